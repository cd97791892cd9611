package verify

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestJudge(t *testing.T) {
	good := Result{Peer: "b", Sent: 5, Answered: 5, InTunnel: 10, WireGuardOut: 5, WireGuardIn: 5}
	for _, tt := range []struct {
		name   string
		change func(*Result)
		missed int
		want   string
		reason string
	}{
		{"encrypted", func(*Result) {}, 0, Encrypted, ""},
		{"some answers lost", func(r *Result) { r.Answered = 1 }, 0, Encrypted, ""},
		{"in the clear", func(r *Result) { r.InClear, r.ClearOn = 3, map[string]int{"eth0": 1, "eth1": 2} }, 0, Plaintext, "on eth1, eth0"},
		{"in the clear, whatever else", func(r *Result) { *r = Result{InClear: 1, ClearOn: map[string]int{"eth0": 1}} }, 9, Plaintext, "on eth0"},
		{"too busy", func(*Result) {}, 1, NotShown, "1 packets passed by"},
		{"not sent", func(r *Result) { r.InTunnel, r.Reason = 0, "no route to host" }, 0, NotShown, "no route to host"},
		{"dropped", func(r *Result) { r.InTunnel = 0 }, 0, NotShown, "it was dropped"},
		{"no handshake", func(r *Result) { r.WireGuardOut = 0 }, 0, NotShown, "no handshake"},
		{"no answer", func(r *Result) { r.Answered = 0 }, 0, NotShown, "no answer came"},
	} {
		r := good
		tt.change(&r)
		if verdict, reason := Judge(r, tt.missed); verdict != tt.want || !strings.Contains(reason, tt.reason) {
			t.Errorf("%s: %s: %s; want %s: %s", tt.name, verdict, reason, tt.want, tt.reason)
		}
	}
}

// newTestWatcher looks for one marker: index 7 is the tunnel, 8 is watched, all
// others lead to pods.
func newTestWatcher() *watcher {
	w := &watcher{tunnels: map[int]bool{7: true}, watched: map[int]string{8: "eth0"}, results: make([]Result, 1), markers: make([][]byte, 1)}
	w.add(0, []byte("0123456789abcdef"), Target{Endpoint: netip.MustParseAddrPort("192.0.2.2:51820")})
	return w
}

// wire is a packet of WireGuard's data from 192.0.2.1:51820 to 192.0.2.2:51820.
func wire() []byte {
	p := make([]byte, 200)
	p[0], p[9] = 0x45, unix.IPPROTO_UDP
	copy(p[12:], []byte{192, 0, 2, 1, 192, 0, 2, 2})
	copy(p[20:], []byte{0xca, 0x6c, 0xca, 0x6c})
	p[28] = 4
	return p
}

func TestTake(t *testing.T) {
	w := newTestWatcher()
	marked := append(wire(), "xx0123456789abcdef"...)
	for _, ifindex := range []int{7, 7, 8, 9} {
		w.take(ifindex, true, marked)
	}
	w.take(8, true, wire())
	handshake := wire()
	handshake[28] = 1
	w.take(8, true, handshake)
	w.take(8, false, wire()) // not from the endpoint
	answer := wire()
	copy(answer[12:], []byte{192, 0, 2, 2, 192, 0, 2, 1})
	w.take(8, false, answer)
	w.take(7, false, answer)
	r := w.results[0]
	if r.InTunnel != 2 || r.InClear != 1 || r.ClearOn["eth0"] != 1 || r.WireGuardOut != 1 || r.WireGuardIn != 1 {
		t.Errorf("%+v", r)
	}
}

// Whatever passes by, it is looked at.
func FuzzTake(f *testing.F) {
	f.Add(wire())
	f.Add([]byte{0x4f, 1, 2})
	f.Add([]byte{0x60, 0, 0, 0, 0, 0, 17})
	f.Fuzz(func(_ *testing.T, packet []byte) {
		w := newTestWatcher()
		w.take(8, true, packet)
		w.take(7, false, packet)
	})
}
