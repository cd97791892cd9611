package cluster

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func serve(t *testing.T, at Endpointer, port uint16) *Server {
	t.Helper()
	s, err := StartServer(at, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestTrafficBetweenNodes(t *testing.T) {
	c := newCluster(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	s := serve(t, b, 7000)
	for _, tt := range []struct{ from, to netip.Addr }{{a.IPv4, b.IPv4}, {a.IPv6, b.IPv6}} {
		if _, err := Ping(t.Context(), a, tt.to, []byte("hello")); err != nil {
			t.Error(err)
		}
		to := addrPort(tt.to, s.Port)
		large := bytes.Repeat([]byte("large"), 1<<20)
		for _, payload := range [][]byte{nil, []byte("hello"), large} {
			if seen, err := TCP(t.Context(), a, to, payload); err != nil || seen.Addr() != tt.from {
				t.Errorf("TCP, %d bytes: seen %v, %v", len(payload), seen, err)
			}
		}
		if seen, err := UDP(t.Context(), a, to, []byte("hello")); err != nil || seen.Addr() != tt.from {
			t.Errorf("UDP: seen %v, %v", seen, err)
		}
		if got := s.Sources()[tt.from]; got != 4 {
			t.Errorf("the server has counted %d from %s, want 4", got, tt.from)
		}
		if _, err := UDP(t.Context(), a, addrPort(tt.to, 9), nil); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("UDP to a closed port: %v", err)
		}
		if _, err := PingWhole(t.Context(), a, tt.to, make([]byte, 1400)); err != nil {
			t.Error(err)
		}
		if _, err := PingWhole(t.Context(), a, tt.to, make([]byte, 1473)); !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("ping beyond the MTU: %v", err)
		}
	}
}

// TestServerAnswersFromTheAskedAddress: connected UDP sockets refuse others.
func TestServerAnswersFromTheAskedAddress(t *testing.T) {
	c := newCluster(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	mustRun(t, b.Machine, "ip", "addr", "add", "192.0.2.200/24", "dev", Uplink)
	mustRun(t, b.Machine, "ip", "addr", "add", "2001:db8:1::200/64", "dev", Uplink, "nodad")
	s := serve(t, b, 7000)
	for _, to := range []string{"192.0.2.200", "2001:db8:1::200"} {
		if _, err := UDP(t.Context(), a, addrPort(netip.MustParseAddr(to), s.Port), []byte("x")); err != nil {
			t.Error(err)
		}
	}
}

func TestLossAndStream(t *testing.T) {
	c := newCluster(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	s := serve(t, b, 7000)
	stream := func(between func()) StreamReport {
		st, err := StartStream(a, addrPort(b.IPv4, s.Port), StreamOptions{Rate: 500})
		if err != nil {
			t.Fatal(err)
		}
		received := func(n int) {
			if err := Poll(t.Context(), "datagrams to come back", func() error {
				if r := st.Report(); r.Received < n {
					return errors.New(r.String())
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		received(100)
		between()
		received(st.Report().Received + 100)
		return st.Stop()
	}
	if r := stream(func() {}); r.Lost != 0 || r.Received != r.Sent || r.Duplicates != 0 {
		t.Errorf("on a whole link: %s", r)
	}
	const cut = 300 * time.Millisecond
	r := stream(func() {
		start := time.Now()
		if err := b.SetLoss(t.Context(), 1000); err != nil {
			t.Fatal(err)
		}
		time.Sleep(cut - min(cut, time.Since(start))) // the length of the outage, not a wait
		if err := b.SetLoss(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	})
	if r.Lost < 50 || r.LongestGap < cut/2 || r.Lost+r.Received != r.Sent {
		t.Errorf("over a link that was cut for %v: %s", cut, r)
	}
}

// TestStreamKnowsWhatItLost: what was before does not count, what is missing has a
// number and a time, and what our own socket had no room for is told apart.
func TestStreamKnowsWhatItLost(t *testing.T) {
	c := newCluster(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	s := serve(t, b, 7000)
	st, err := StartStream(a, addrPort(b.IPv4, s.Port), StreamOptions{Rate: 500})
	if err != nil {
		t.Fatal(err)
	}
	await := func(what string, enough func(StreamReport) bool) StreamReport {
		t.Helper()
		var r StreamReport
		if err := Poll(t.Context(), what, func() error {
			if r = st.Report(); !enough(r) {
				return errors.New(r.String())
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return r
	}
	cut := func(perMille int) {
		t.Helper()
		if err := b.SetLoss(t.Context(), perMille); err != nil {
			t.Fatal(err)
		}
	}
	cut(1000)
	await("a loss", func(r StreamReport) bool { return r.Lost > 100 })
	cut(0)
	await("an answer", func(r StreamReport) bool { return r.Received > 100 })
	st.Reset()
	await("answers after the reset", func(r StreamReport) bool { return r.Received > 100 })
	before := time.Now()
	cut(1000)
	// What is older than a second cannot be under way any more.
	r := await("a loss that is no delay", func(r StreamReport) bool { return r.Lost-r.UnderWay > 50 })
	after := time.Now()
	cut(0)
	if r.UnderWay == 0 || r.UnderWay == r.Lost {
		t.Errorf("%d of %d may be under way", r.UnderWay, r.Lost)
	}
	want := r.Received + 100
	await("answers again", func(r StreamReport) bool { return r.Received > want })
	if n, err := st.Overflowed(); err != nil || n != 0 {
		t.Errorf("the stream's socket dropped %d, %v", n, err)
	}
	r = st.Stop()
	rows := st.Losses(100)
	sum := 0
	for _, l := range rows {
		sum += l.Count
		if l.Sent.Before(before.Add(-time.Second)) || l.Sent.After(after.Add(time.Second)) {
			t.Errorf("%s; want it between %s and %s", l, before, after)
		}
	}
	if sum != r.Lost || r.Lost < 50 || r.Lost+r.Received != r.Sent {
		t.Errorf("%d in %v, and the report says %s", sum, rows, r)
	}
	if got := st.Losses(1); len(rows) > 0 && (len(got) != 1 || got[0] != rows[0]) {
		t.Errorf("one of %v is %v", rows, got)
	}
}

// TestOverflowIsSeen: a socket that nobody reads drops, and says how much.
func TestOverflowIsSeen(t *testing.T) {
	m, err := StartMachine(t.Context(), "alone")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	var lazy, sender net.PacketConn
	err = m.Do(func() (err error) {
		if lazy, err = net.ListenPacket("udp4", "127.0.0.1:7000"); err == nil {
			sender, err = net.ListenPacket("udp4", "127.0.0.1:0")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = lazy.Close(), sender.Close() })
	const n = 2000
	for range n {
		if _, err := sender.WriteTo(make([]byte, 1000), lazy.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	drops, err := udpDrops(m, 7000)
	if err != nil || drops < 100 || drops >= n {
		t.Errorf("%d of %d dropped, %v", drops, n, err)
	}
	if _, err := dropsOfPort("head\n 1: 0100007F:1B58 0 many\n", 7000); err == nil {
		t.Error("a table without a number is read")
	}
}

// TestBarePod: it is reached by its node's routes, sends when told to, and its
// address may pass to another.
func TestBarePod(t *testing.T) {
	c := newCluster(t, 1)
	n := c.Nodes[0]
	var pods []*BarePod
	for _, name := range []string{"one", "two"} {
		p, err := n.AddBarePod(t.Context(), name, NetworkOptions{})
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	four, six := netip.MustParseAddr("10.244.99.1"), netip.MustParseAddr("fd00:244:99::1")
	other := netip.MustParseAddr("10.244.99.2")
	reach := func(at *BarePod, to netip.Addr) {
		t.Helper()
		s := serve(t, at, 7000)
		seen, err := UDP(t.Context(), n, addrPort(to, s.Port), []byte("x"))
		if err != nil {
			t.Error(err)
		} else if len(s.Sources()) != 1 {
			t.Errorf("%s was reached from %s, and has seen %v", at, seen, s.Sources())
		}
		_ = s.Close()
	}
	if err := pods[0].SetAddresses(four, six); err != nil {
		t.Fatal(err)
	}
	reach(pods[0], four)
	reach(pods[0], six)
	if err := errors.Join(pods[1].SetAddresses(four), pods[0].SetAddresses(other, six)); err != nil {
		t.Fatal(err)
	}
	reach(pods[1], four)
	reach(pods[0], other)
	s := serve(t, pods[1], 7000)
	spray, err := StartSpray(pods[0], SprayOptions{To: []netip.AddrPort{addrPort(four, s.Port)}, Rate: 200, Payload: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	err = Poll(t.Context(), "datagrams between pods", func() error {
		if got := s.Sources()[other]; got < 10 || spray.Sent() < got {
			return fmt.Errorf("%v, of %d sent, %d refused", s.Sources(), spray.Sent(), spray.Refused())
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := spray.Stop(); err != nil {
		t.Error(err)
	}
	if _, err := StartSpray(pods[0], SprayOptions{}); err == nil {
		t.Error("a spray to nobody has started")
	}
}

func TestShapedThroughput(t *testing.T) {
	c := newCluster(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	if err := a.Shape(t.Context(), "200mbit"); err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.Addr{b.IPv4, b.IPv6} {
		r, err := Throughput(t.Context(), a, b, to, ThroughputOptions{Duration: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		// Only the shaper's upper bound is sure: this machine may be busy.
		if mbit := r.BytesPerSecond * 8 / 1e6; mbit < 1 || mbit > 260 || r.MSS == 0 {
			t.Errorf("to %s: %.0f Mbit/s, MSS %d", to, mbit, r.MSS)
		}
	}
}

func TestCapture(t *testing.T) {
	c := newCluster(t, 3)
	a, b, other := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	s := serve(t, b, 7000)
	serve(t, b, 51820)
	marker := []byte("a-secret-that-must-not-be-seen")
	start := func(o CaptureOptions) *Capture {
		cp, err := StartCapture(c.Underlay, Bridge, o)
		if err != nil {
			t.Fatal(err)
		}
		return cp
	}
	stop := func(cp *Capture) CaptureReport {
		r, err := cp.Stop(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	marked := start(CaptureOptions{Markers: [][]byte{marker}})
	prefixes := []netip.Prefix{netip.PrefixFrom(other.IPv4, 32), netip.PrefixFrom(other.IPv6, 128)}
	quiet := start(CaptureOptions{Markers: [][]byte{[]byte("never sent at all")}, Prefixes: prefixes})
	const n = 200
	for range n {
		for _, to := range []netip.Addr{b.IPv4, b.IPv6} {
			if _, err := UDP(t.Context(), a, addrPort(to, s.Port), marker); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := marked.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r, err := marked.Report(); err != nil || r.WithMarker != 4*n || len(r.Findings) != maxFindings {
		t.Errorf("%d findings, %v: %s", len(r.Findings), err, r)
	}
	if _, err := UDP(t.Context(), a, addrPort(b.IPv4, 51820), []byte{4, 0, 0, 0, 1, 2}); err != nil {
		t.Fatal(err)
	}
	if r := stop(marked); r.WithMarker != 4*n || r.WireGuard != 1 || r.Clean() == nil {
		t.Errorf("with markers: %s", r)
	}
	r := stop(quiet)
	if err := r.Clean(); err != nil || r.Packets < 4*n {
		t.Errorf("%d packets, %v", r.Packets, err)
	}

	plain := start(CaptureOptions{Prefixes: prefixes})
	for _, to := range []netip.Addr{other.IPv4, other.IPv6} {
		if _, err := Ping(t.Context(), a, to, nil); err != nil {
			t.Fatal(err)
		}
	}
	if r := stop(plain); r.Plain != 4 || !strings.Contains(r.Clean().Error(), other.IPv6.String()) {
		t.Errorf("plain packets: %s", r)
	}
}

// TestSyncComesLast: what was sent without waiting for anything is counted.
func TestSyncComesLast(t *testing.T) {
	c := newCluster(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	serve(t, b, 7000)
	if _, err := UDP(t.Context(), a, addrPort(b.IPv4, 7000), nil); err != nil { // neighbours are known
		t.Fatal(err)
	}
	conn, err := Dial(t.Context(), a, "udp", addrPort(b.IPv4, 7000))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	marker := []byte("marker-in-the-request")
	for round := range 50 {
		cp, err := StartCapture(c.Underlay, Bridge, CaptureOptions{Markers: [][]byte{marker}})
		if err != nil {
			t.Fatal(err)
		}
		for seq := range uint64(20) {
			if _, err := conn.Write(binary.BigEndian.AppendUint64(marker, seq)); err != nil {
				t.Fatal(err)
			}
		}
		r, err := cp.Stop(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if r.WithMarker < 20 || r.Dropped > 0 { // the server's answers come on top
			t.Fatalf("round %d: %s", round, r)
		}
	}
}

func TestParseFrame(t *testing.T) {
	c := sentinel([16]byte{1, 2, 3})
	if nonce, ok := isSentinel(c); !ok || nonce != [16]byte{1, 2, 3} {
		t.Errorf("sentinel: %v, %v", nonce, ok)
	}
	udp := func(fragment byte, first ...byte) []byte {
		f := append(make([]byte, 12), 0x08, 0x00)
		ip := make([]byte, 20)
		ip[0], ip[7], ip[9] = 0x45, fragment, protoUDP
		copy(ip[12:], []byte{10, 244, 1, 2, 10, 244, 2, 3})
		return append(append(append(f, ip...), 0xca, 0x6c, 0x12, 0x34, 0, 0, 0, 0), first...)
	}
	for _, tt := range []struct {
		name  string
		frame []byte
		want  bool
	}{
		{"handshake initiation", udp(0, 1, 0, 0, 0), true},
		{"transport data", udp(0, 4, 0, 0, 0, 9), true},
		{"no such type", udp(0, 5, 0, 0, 0), false},
		{"reserved bytes set", udp(0, 4, 0, 1, 0), false},
		{"short", udp(0, 4, 0, 0), false},
		{"later fragment", udp(1, 4, 0, 0, 0), false},
	} {
		p := parseFrame(tt.frame, 51820)
		if p.wireGuard != tt.want || p.src != netip.MustParseAddr("10.244.1.2") {
			t.Errorf("%s: got %+v", tt.name, p)
		}
		if parseFrame(tt.frame, 51821).wireGuard {
			t.Errorf("%s: is WireGuard on another port", tt.name)
		}
		for n := range tt.frame { // truncated frames must not panic
			parseFrame(tt.frame[:n], 51820)
		}
	}
}
