package endpoint

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"
)

// udpEcho answers every datagram with itself.
func udpEcho(t *testing.T) netip.AddrPort {
	t.Helper()
	return udpSpeaker(t, "127.0.0.1:0", "")
}

// udpSpeaker answers every datagram with itself and its own name.
func udpSpeaker(t *testing.T, at, name string) netip.AddrPort {
	t.Helper()
	c, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, datagram)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(append(buf[:n:n], name...), from)
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return unmapped(c.LocalAddr().(*net.UDPAddr).AddrPort())
}

func dialUDP(t *testing.T, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	// Connected, so that an answer from any other address does not arrive.
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

func ask(t *testing.T, c *net.UDPConn, text string) string {
	t.Helper()
	say(t, c, text)
	buf := make([]byte, datagram)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func talkUDP(t *testing.T, c *net.UDPConn) {
	t.Helper()
	if got := ask(t, c, "hello"); got != "hello" {
		t.Fatalf("got %q", got)
	}
}

func udpForward(target string) []Forward { return []Forward{{Protocol: UDP, Target: target}} }

func TestUDP(t *testing.T) {
	s := start(t, Config{
		Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.7"), loopback6},
		Forwards:  udpForward(udpEcho(t).String()),
	})
	for family := range 2 {
		a, b := dialUDP(t, s.Addr(0, family)), dialUDP(t, s.Addr(0, family))
		talkUDP(t, a)
		talkUDP(t, b)
		if got := ask(t, a, ""); got != "" {
			t.Errorf("an empty datagram came back as %q", got)
		}
		large := string(make([]byte, 40000))
		if got := ask(t, a, large); got != large {
			t.Errorf("%d bytes came back of %d", len(got), len(large))
		}
	}
	s.awaitValue(t, 4, "udp_sessions")
	s.awaitValue(t, 8, "datagrams_total", "direction=out")
}

func TestUDPTargetMoves(t *testing.T) {
	first := udpSpeaker(t, "127.0.0.2:0", "first")
	udpSpeaker(t, fmt.Sprintf("127.0.0.3:%d", first.Port()), "second")
	n := &names{}
	n.set("dns.example", "127.0.0.2")
	s := start(t, Config{Lookup: n.lookup, Resolve: 20 * time.Millisecond, Forwards: udpForward(fmt.Sprintf("dns.example:%d", first.Port()))})
	c := dialUDP(t, s.Addr(0, 0))
	if got := ask(t, c, ""); got != "first" {
		t.Fatalf("%s answers", got)
	}
	n.set("dns.example", "127.0.0.2", "127.0.0.3") // more of them: nobody is disturbed
	n.awaitAsked(t, 2)
	if got := ask(t, c, ""); got != "first" {
		t.Fatalf("%s answers", got)
	}
	n.set("dns.example", "127.0.0.3")
	buf := make([]byte, 100)
	await(t, "the second to answer the same caller", func() error {
		_ = c.SetDeadline(time.Now().Add(100 * time.Millisecond)) // what is under way as sessions change is lost
		_, err := c.Write(nil)
		n, rerr := c.Read(buf)
		if got := string(buf[:n]); got != "second" {
			return fmt.Errorf("%q answers, %w", got, errors.Join(err, rerr))
		}
		return nil
	})
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	n.fail(fmt.Errorf("server misbehaving"))
	s.awaitMore(t, "lookup_failures_total")
	if got := ask(t, c, ""); got != "second" {
		t.Fatalf("%s answers while the name server is away", got)
	}
}

// awaitAsked waits for more questions: of two the first may have been under way.
func (n *names) awaitAsked(t *testing.T, more int) {
	t.Helper()
	n.mu.Lock()
	before := n.asked
	n.mu.Unlock()
	await(t, "the target to be looked up", func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.asked < before+more {
			return fmt.Errorf("%d times, %d before", n.asked, before)
		}
		return nil
	})
}

func (r *running) awaitMore(t *testing.T, name string) {
	t.Helper()
	before := r.value(t, name)
	await(t, name+" to grow", func() error {
		if now := r.value(t, name); now < before+2 {
			return fmt.Errorf("%v, %v before", now, before)
		}
		return nil
	})
}

// The session that was silent longest makes room.
func TestUDPSessionsAreBounded(t *testing.T) {
	s := start(t, Config{MaxSessions: 2, Forwards: udpForward(udpEcho(t).String())})
	a, b, c := dialUDP(t, s.Addr(0, 0)), dialUDP(t, s.Addr(0, 0)), dialUDP(t, s.Addr(0, 0))
	talkUDP(t, a)
	talkUDP(t, b)
	talkUDP(t, a)
	talkUDP(t, c) // b goes
	s.awaitValue(t, 2, "udp_sessions")
	s.mu.Lock()
	l := s.udp[0]
	s.mu.Unlock()
	s.sessions.mu.Lock()
	for name, x := range map[string]*net.UDPConn{"a": a, "b": b, "c": c} {
		_, in := s.sessions.table[sessionKey{l, unmapped(x.LocalAddr().(*net.UDPAddr).AddrPort())}]
		if in != (name != "b") {
			t.Errorf("session of %s: %v", name, in)
		}
	}
	s.sessions.mu.Unlock()
	s.awaitValue(t, 1, "udp_sessions_evicted_total")
	for range 50 { // many callers, all of them served, and never more than two sessions
		talkUDP(t, dialUDP(t, s.Addr(0, 0)))
	}
	s.awaitValue(t, 2, "udp_sessions")
}

func TestUDPIdleTimeoutAndDrain(t *testing.T) {
	s := start(t, Config{UDPIdleTimeout: 200 * time.Millisecond, Drain: time.Minute, Forwards: udpForward(udpEcho(t).String())})
	c := dialUDP(t, s.Addr(0, 0))
	for begin := time.Now(); time.Since(begin) < 500*time.Millisecond; time.Sleep(40 * time.Millisecond) {
		talkUDP(t, c)
	}
	if _, sessions := s.Open(); sessions != 1 {
		t.Errorf("%d sessions while it is in use", sessions)
	}
	s.awaitValue(t, 0, "udp_sessions")
	talkUDP(t, c)
	s.stop()
	select {
	case <-s.done: // once it was silent, not after a minute
	case <-time.After(15 * time.Second):
		t.Error("the server does not end")
	}
}

func TestUDPRefused(t *testing.T) {
	f := udpForward(udpEcho(t).String())
	f[0].Allow = Allow{Prefixes: []netip.Prefix{netip.MustParsePrefix("127.0.0.44/32")}}
	s := start(t, Config{Forwards: f})
	say(t, dialUDP(t, s.Addr(0, 0)), "hello")
	s.awaitValue(t, 1, "refused_total", "reason=source")
	s.awaitValue(t, 0, "udp_sessions")
}
