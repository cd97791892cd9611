package kernel_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

const spareLink = link + "x"

func spareEnd(n int) mesh.SpareEnd {
	key := peerKey(n)
	key[2] = 1
	return mesh.SpareEnd{PublicKey: key, Port: 51821}
}

// crossing is a plan with one peer, to which this node sends by the plane.
func crossing(by mesh.Plane) mesh.State {
	n := sharing(1, node(1, "10.244.1.0/24", "fd00:244:1::/64"))
	n.Spare.PresharedKey = fingerprint(2)
	return plan(mesh.Facts{Nodes: []mesh.Node{n}, Crossing: map[string]mesh.Plane{n.Name: by}})
}

// A pair of nodes has a second tunnel, changes to it and back, and then has one again.
func TestSpareComesAndGoes(t *testing.T) {
	k := open(t)
	single := plan(mesh.Facts{Nodes: []mesh.Node{sharing(1, node(1, "10.244.1.0/24", "fd00:244:1::/64"))}})
	apply(t, k, single)
	before := everythingOfOurs(t)
	for _, by := range []mesh.Plane{mesh.Primary, mesh.Spare, mesh.Primary} {
		apply(t, k, crossing(by))
		s, err := k.Observe()
		if err != nil {
			t.Fatal(err)
		}
		if s.Spare.Link.Name != spareLink || s.Spare.Link.ListenPort != 51821 || s.Spare.Link.PublicKey != spareKey.PublicKey() ||
			len(s.Spare.Peers) != 1 || s.Spare.Peers[0].PresharedKey != fingerprint(2) || len(s.Peers) != 1 || s.Peers[0].PresharedKey != fingerprint(1) {
			t.Errorf("%s: %+v", by, s)
		}
		planes := map[mesh.Plane]int{}
		for _, r := range s.Routes {
			if r.Type == mesh.ViaLink {
				planes[r.Plane]++
			}
		}
		if planes[by] != 2 || planes[!by] != 0 {
			t.Errorf("%s: routes %v", by, s.Routes)
		}
		device := map[mesh.Plane]string{mesh.Primary: link, mesh.Spare: spareLink}[by]
		if out := sh(t, "ip route show table 30567; ip -6 route show table 30567"); strings.Count(out, "dev "+device+" ") < 2 {
			t.Errorf("%s: not by %s:\n%s", by, device, out)
		}
	}
	apply(t, k, single)
	if after := everythingOfOurs(t); after != before {
		t.Errorf("before\n%safter\n%s", before, after)
	}
}

// An interface without an IPv4 address has one while there are two, and not longer.
func TestSpareLeavesNoAddress(t *testing.T) {
	k := open(t)
	withoutIPv4 := func(s mesh.State) mesh.State {
		s.Addresses = slices.DeleteFunc(slices.Clone(s.Addresses), func(p netip.Prefix) bool { return p.Addr().Is4() })
		s.Routes = slices.DeleteFunc(slices.Clone(s.Routes), func(r mesh.Route) bool { return r.Prefix.Addr().Is4() })
		return s
	}
	single := withoutIPv4(plan(mesh.Facts{Nodes: []mesh.Node{sharing(1, node(1, "fd00:244:1::/64"))}}))
	apply(t, k, single)
	apply(t, k, withoutIPv4(crossing(mesh.Spare)))
	if out := sh(t, "ip -4 -o address show dev wgcni0; ip -4 -o address show dev wgcni0x"); strings.Count(out, "inet 127.") != 2 {
		t.Errorf("while there are two:\n%s", out)
	}
	apply(t, k, single)
	if out := sh(t, "ip -4 -o address show dev wgcni0"); out != "" {
		t.Errorf("at the end:\n%s", out)
	}
}

func everythingOfOurs(t *testing.T) string {
	return sh(t, "ip -o link | sed 's/^[0-9]*: //'; ip route show table 30567; ip -6 route show table 30567; nft -s list table inet wgcni; wg show wgcni0 allowed-ips")
}

// What others have in the spare's place keeps nothing of the primary from being
// applied, and is not touched.
func TestSpareCannotBeMade(t *testing.T) {
	want := crossing(mesh.Spare)
	for _, tt := range []struct{ name, make, unmake, says string }{
		{"a bridge", "ip link add wgcni0x type bridge", "ip link del wgcni0x", "was not made by wgcni"},
		{"another's tun", "ip tuntap add wgcni0x mode tun", "ip link del wgcni0x", "no WireGuard answers"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := open(t)
			sh(t, tt.make)
			unmake := func() { sh(t, tt.unmake) }
			defer func() { unmake() }()
			before := sh(t, "ip -d -o link show wgcni0x")
			refused(t, k, want, tt.says, spareLink)
			if after := sh(t, "ip -d -o link show wgcni0x"); after != before {
				t.Errorf("before\n%safter\n%s", before, after)
			}
			unmake()
			unmake = func() {}
			apply(t, k, want)
		})
	}
	t.Run("its port", func(t *testing.T) {
		taken, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 51821})
		for give := time.Now().Add(10 * time.Second); err != nil && time.Now().Before(give); { // the test before has it yet
			time.Sleep(10 * time.Millisecond)
			taken, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 51821})
		}
		if err != nil {
			t.Fatal(err)
		}
		k := open(t)
		refused(t, k, want, "UDP port 51821 is taken", "wgcni0x needs it", "rotationPort")
		if err := taken.Close(); err != nil {
			t.Fatal(err)
		}
		apply(t, k, want)
	})
}

// refused applies a plan of which all but the spare and the routes into it must be there then.
func refused(t *testing.T, k *kernel.Kernel, want mesh.State, says ...string) {
	t.Helper()
	for range 2 { // what is there already the first time must not hinder the second
		observed, err := k.Observe()
		if err != nil {
			t.Fatal(err)
		}
		err = k.Apply(mesh.Diff(observed, want, mesh.Context{}))
		for _, s := range says {
			if err == nil || !strings.Contains(err.Error(), s) {
				t.Errorf("error %v, want one that says %q", err, s)
			}
		}
		if err != nil && strings.Contains(err.Error(), "peer") {
			t.Errorf("more than the cause: %v", err)
		}
	}
	observed, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	rest := want
	rest.Spare = mesh.SpareLink{}
	rest.Routes = slices.DeleteFunc(slices.Clone(want.Routes), func(r mesh.Route) bool { return r.Plane == mesh.Spare })
	observed.Spare = mesh.SpareLink{}
	if ops := mesh.Diff(observed, rest, mesh.Context{}); len(ops) > 0 {
		t.Errorf("left undone:\n%s", mesh.Text(ops))
	}
}

// Pings go on while both ends change planes, one after the other, and each end
// sends by one and hears by the other meanwhile: strict reverse path filters and all.
func TestPlanesChangeUnderTraffic(t *testing.T) {
	near, far := twoEnds(t, 1, 1)
	for _, e := range []*end{near, far} {
		e.in(t, func() { sh(t, "sysctl -qw net.ipv4.conf.all.rp_filter=1") })
		e.cross(t, mesh.Primary)
	}
	t.Cleanup(func() { sh(t, "sysctl -qw net.ipv4.conf.all.rp_filter=0") })
	if err := near.ping(0); err != nil {
		t.Fatal(err)
	}
	until(t, "both have shaken hands on the spare plane", func() bool { return near.heard(t, mesh.Spare) && far.heard(t, mesh.Spare) })
	x := near.exchange()
	x.some(t)
	for range 3 {
		for _, by := range []mesh.Plane{mesh.Spare, mesh.Primary} {
			for _, e := range []*end{near, far} {
				e.cross(t, by)
				x.some(t)
			}
		}
	}
	for _, e := range []*end{near, far} {
		e.share(t, 1)
		x.some(t)
	}
	x.stop(t)
}

// cross makes the end hold both tunnels to the other, and send by one of them.
func (e *end) cross(t *testing.T, by mesh.Plane) {
	t.Helper()
	e.facts.Crossing = map[string]mesh.Plane{e.other.facts.Self.Name: by}
	defer func() { e.facts.Crossing = nil }()
	e.apply(t, sharing(1, e.other.facts.Self))
}

// heard reports whether the end has a session with the other on a plane.
func (e *end) heard(t *testing.T, p mesh.Plane) (fresh bool) {
	t.Helper()
	e.in(t, func() {
		hands, err := e.k.HandshakesOn(p)
		if err != nil || len(hands) != 1 {
			t.Fatalf("%v, %v; want one peer", hands, err)
		}
		for _, h := range hands {
			fresh = !h.At.IsZero()
		}
	})
	return fresh
}

// A wave goes by the route, is counted at the other end, and goes no further.
func TestWave(t *testing.T) {
	near, far := twoEnds(t, 0, 0)
	near.cross(t, mesh.Primary)
	far.cross(t, mesh.Primary)
	to := far.facts.Self.TunnelAddresses()[0]
	received := func(p mesh.Plane) (n int64) {
		far.in(t, func() {
			hands, err := far.k.HandshakesOn(p)
			if err != nil {
				t.Fatal(err)
			}
			for _, h := range hands {
				n += h.Received
			}
		})
		return n
	}
	own, pod := near.facts.Self.TunnelAddresses()[0], netip.MustParseAddr("10.244.1.77")
	for _, by := range []mesh.Plane{mesh.Spare, mesh.Primary} {
		near.cross(t, by)
		for _, from := range []netip.Addr{own, pod} {
			before := received(by)
			until(t, fmt.Sprintf("a wave from %s by %s is heard", from, by), func() bool {
				near.in(t, func() {
					if err := near.k.Wave(from, to); err != nil {
						t.Fatal(err)
					}
				})
				return received(by) >= before+400
			})
		}
	}
	near.in(t, func() {
		if err := near.k.Wave(own, netip.MustParseAddr("fd00::1")); err == nil {
			t.Error("sent IPv4 to an IPv6 address")
		}
		if err := near.k.Wave(own, netip.MustParseAddr("10.244.77.1")); err == nil { // unreachable
			t.Error("sent to nobody without an error")
		}
		for i := range 100 { // pods come and go
			if err := near.k.Wave(netip.AddrFrom4([4]byte{10, 244, 1, byte(100 + i)}), to); err != nil {
				t.Fatal(err)
			}
		}
		near.k.Wave(netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::1")) //nolint:errcheck // there is no IPv6 here
	})
}

// WireGuard clears send_redirects when an interface goes up: it is put back when
// neither of ours is there any more, in whichever order they go.
func TestSpareAndSendRedirects(t *testing.T) {
	if !kernel.HasWireGuard() {
		return // a tun device clears nothing
	}
	const sysctl = "net.ipv4.conf.all.send_redirects"
	get := func() string { return strings.TrimSpace(sh(t, "sysctl -n "+sysctl)) }
	was := get()
	defer sh(t, "sysctl -qw "+sysctl+"="+was)
	for _, order := range [][]string{{spareLink, link}, {link, spareLink}} {
		sh(t, "sysctl -qw "+sysctl+"=1")
		k := open(t)
		apply(t, k, crossing(mesh.Primary))
		if got := get(); got != "0" {
			t.Fatalf("%s while the tunnel is up", got)
		}
		for i, name := range order {
			if err := k.Apply([]mesh.Op{mesh.RemoveLink{Name: name}}); err != nil {
				t.Fatal(err)
			}
			if got, want := get(), fmt.Sprint(i); got != want {
				t.Errorf("%s is %s when %v are gone, want %s", sysctl, got, order[:i+1], want)
			}
		}
		apply(t, k, mesh.State{})
	}
}

func TestWatchSpare(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	k := open(t)
	apply(t, k, crossing(mesh.Spare))
	events, err := k.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	sh(t, "ip link set wgcni0x down")
	for timeout := time.After(10 * time.Second); ; {
		select {
		case e := <-events:
			if e.Underlay {
				t.Errorf("%+v: the spare is not the underlay", e)
			}
			if e.Ours {
				return
			}
		case <-timeout:
			t.Fatal("no event")
		}
	}
}
