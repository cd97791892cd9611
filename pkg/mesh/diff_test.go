package mesh_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// diffText is Diff's text, with "kn" for key(n).
func diffText(observed, planned mesh.State, c mesh.Context) string {
	s := mesh.Text(mesh.Diff(observed, planned, c))
	for n := range 10 {
		s = strings.ReplaceAll(s, key(n).String(), keyName(key(n)))
	}
	return s
}

// a peer's roamed endpoint with a fresh handshake is left alone.
func TestDiffEndpoint(t *testing.T) {
	facts := mesh.Facts{Settings: settings("10.244.0.0/16"), Self: node("a", 1), Nodes: []mesh.Node{node("b", 2)}}
	planned := mesh.NewPlan(facts).State
	roamed := endpoint("198.51.100.7:1234")
	const set = "wg set wgcni0 peer k2 (b) endpoint 192.0.2.2:51820\n"
	for _, tt := range []struct {
		name      string
		observed  netip.AddrPort
		handshake time.Duration // ago; 0: never
		moved     bool
		want      string
	}{
		{"as recorded", planned.Peers[0].Endpoint, 0, true, ""},
		{"roamed, fresh", roamed, time.Second, false, ""},
		{"roamed, just fresh", roamed, mesh.HandshakeFresh - 1, false, ""},
		{"roamed, stale", roamed, mesh.HandshakeFresh, false, set},
		{"never shook hands", roamed, 0, false, set},
		{"roamed, fresh, but its record moved", roamed, time.Second, true, set},
		// a clock that is off must not decide for ever.
		{"the clock went back a little", roamed, -time.Minute, false, ""},
		{"the clock went back a day", roamed, -24 * time.Hour, false, set},
		{"none observed", netip.AddrPort{}, 0, false, set},
	} {
		t.Run(tt.name, func(t *testing.T) {
			observed := planned
			observed.Peers = slices.Clone(planned.Peers)
			observed.Peers[0].Endpoint = tt.observed
			if tt.handshake != 0 {
				observed.Peers[0].LastHandshake = at(0).Add(-tt.handshake)
			}
			c := mesh.Context{Now: at(0), Moved: map[wgtypes.Key]bool{key(2): tt.moved}}
			if diff := cmp.Diff(tt.want, diffText(observed, planned, c)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// The text of a first apply is what a person would type, in an order that works,
// and removing it all is the same backwards.
func TestDiffText(t *testing.T) {
	facts := mesh.Facts{
		Settings: settings("10.244.0.0/16"), Self: node("a", 1, "10.244.1.0/24"),
		Nodes: []mesh.Node{node("b", 2, "10.244.2.0/24")}, LocalPods: addrs("10.244.9.1"),
	}
	facts.Nodes[0].PresharedKey = psk(1)
	facts.Keepalive = 25 * time.Second
	p := mesh.NewPlan(facts).State
	const up = `nft replace table: cluster [10.244.0.0/16] guarded [10.244.0.0/16] local [10.244.1.0/24] exempt []
ip link add wgcni0 mtu 1420 type wireguard
wg set wgcni0 private-key (hidden) listen-port 51820 fwmark 0x1000000
ip link set wgcni0 mtu 1420 up
ip address add 10.244.1.0/32 dev wgcni0
ip route replace unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route replace throw 10.244.1.0/24 table 5182
ip route replace throw 10.244.9.1/32 table 5182
wg set wgcni0 peer k2 (b) preshared-key (hidden) endpoint 192.0.2.2:51820 persistent-keepalive 25s allowed-ips +10.244.2.0/24
ip route replace 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip rule add ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
`
	if diff := cmp.Diff(up, diffText(mesh.State{}, p, mesh.Context{})); diff != "" {
		t.Errorf("up (-want +got):\n%s", diff)
	}
	const down = `ip rule delete ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
ip route delete throw 10.244.1.0/24 table 5182
ip route delete 10.244.2.0/24 src 10.244.1.0 table 5182
ip route delete throw 10.244.9.1/32 table 5182
ip route delete unreachable 10.244.0.0/16 metric 1048576 table 5182
ip link delete wgcni0
nft delete table
`
	if diff := cmp.Diff(down, diffText(p, mesh.State{}, mesh.Context{})); diff != "" {
		t.Errorf("down (-want +got):\n%s", diff)
	}
}

// Each row is a change, and the ops that it must come to.
func TestDiffOneChange(t *testing.T) {
	base := func() mesh.Facts {
		f := mesh.Facts{
			Settings: settings("10.244.0.0/16"), Self: node("a", 1, "10.244.1.0/24"),
			Nodes: []mesh.Node{node("b", 2, "10.244.2.0/24"), node("c", 3, "10.244.3.0/24")}, LocalPods: addrs("10.244.1.5"),
		}
		f.Nodes[1].PresharedKey = psk(3)
		return f
	}
	for _, tt := range []struct {
		name   string
		change func(*mesh.Facts)
		want   string
	}{
		{"nothing", func(*mesh.Facts) {}, ""},
		{"a pod inside the prefix", func(f *mesh.Facts) { f.LocalPods = addrs("10.244.1.6") }, ""},
		// a key change filtered out as "no change" (cilium#25492). The prefix moves, it is never removed.
		{
			"key", func(f *mesh.Facts) { f.Nodes[0].PublicKey = key(4) },
			"wg set wgcni0 peer k4 (b) endpoint 192.0.2.2:51820 allowed-ips +10.244.2.0/24\nwg set wgcni0 peer k2 remove\n",
		},
		// Nothing but the key: not the peer, its endpoint nor its allowed IPs.
		{
			"the first preshared key, and another", func(f *mesh.Facts) { f.Nodes[0].PresharedKey, f.Nodes[1].PresharedKey = psk(1), psk(2) },
			"wg set wgcni0 peer k2 (b) preshared-key (hidden)\nwg set wgcni0 peer k3 (c) preshared-key (hidden)\n",
		},
		{
			"no preshared key any more", func(f *mesh.Facts) { f.Nodes[1].PresharedKey = psk(0) },
			"wg set wgcni0 peer k3 (c) preshared-key (none)\n",
		},
		{
			"key and preshared key", func(f *mesh.Facts) { f.Nodes[0].PublicKey, f.Nodes[0].PresharedKey = key(4), psk(1) },
			"wg set wgcni0 peer k4 (b) preshared-key (hidden) endpoint 192.0.2.2:51820 allowed-ips +10.244.2.0/24\nwg set wgcni0 peer k2 remove\n",
		},
		{
			"swap", func(f *mesh.Facts) {
				f.Nodes[0].Prefixes, f.Nodes[1].Prefixes = f.Nodes[1].Prefixes, f.Nodes[0].Prefixes
			},
			"wg set wgcni0 peer k2 (b) allowed-ips +10.244.3.0/24\nwg set wgcni0 peer k3 (c) allowed-ips +10.244.2.0/24\n",
		},
		// The routes get the new source before the old address goes, which would take them along.
		// The pod is now outside of the prefix, and is let through before Local shrinks.
		{"own prefix", func(f *mesh.Facts) { f.Self.Prefixes = claims(1, "10.244.8.0/24") }, `nft set pods: +10.244.1.5
nft set: cluster [10.244.0.0/16] guarded [10.244.0.0/16] local [10.244.8.0/24] exempt []
ip address add 10.244.8.0/32 dev wgcni0
ip route replace throw 10.244.1.5/32 table 5182
ip route replace throw 10.244.8.0/24 table 5182
ip route replace 10.244.2.0/24 dev wgcni0 src 10.244.8.0 table 5182
ip route replace 10.244.3.0/24 dev wgcni0 src 10.244.8.0 table 5182
ip address delete 10.244.1.0/32 dev wgcni0
ip route delete throw 10.244.1.0/24 table 5182
`},
		// Two interfaces cannot listen on one port: the old one goes first, behind the filter.
		{"interface", func(f *mesh.Facts) { f.Interface = "wg9"; f.Nodes = f.Nodes[:1] }, `nft replace table: cluster [10.244.0.0/16] guarded [10.244.0.0/16] local [10.244.1.0/24] exempt []
ip link delete wgcni0
ip link add wg9 mtu 1420 type wireguard
wg set wg9 private-key (hidden) listen-port 51820 fwmark 0x1000000
ip link set wg9 mtu 1420 up
ip address add 10.244.1.0/32 dev wg9
wg set wg9 peer k2 (b) endpoint 192.0.2.2:51820 allowed-ips +10.244.2.0/24
ip route replace 10.244.2.0/24 dev wg9 src 10.244.1.0 table 5182
greet 1 peers of wg9
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			after := base()
			tt.change(&after)
			got := diffText(mesh.NewPlan(base()).State, mesh.NewPlan(after).State, mesh.Context{Now: at(9)})
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// ADD and DEL work without the other nodes, under the store's lock: what one
// pod changes is Local, all of it.
func TestLocalOps(t *testing.T) {
	for _, enc := range []mesh.Encryption{mesh.Required, mesh.Preferred} {
		facts := mesh.Facts{Settings: settings("10.244.0.0/16", "fd00:244::/32"), Self: node("a", 1, "10.244.1.0/24"), LocalPods: addrs("10.244.9.1", "fd00:244::9")}
		facts.Encryption = enc
		before := mesh.NewPlan(facts).State
		facts.LocalPods = append(facts.LocalPods, addrs("10.244.9.2", "fd00:244::a")...)
		after := mesh.NewPlan(facts).State
		for _, ops := range [][]mesh.Op{mesh.Diff(before, after, mesh.Context{}), mesh.Diff(after, before, mesh.Context{})} {
			local, others := mesh.Split(ops)
			if len(local) != 3 || len(others) != 0 {
				t.Errorf("%s: %d local ops, want 3 (the set, two routes); others:\n%s", enc, len(local), mesh.Text(others))
			}
			if slices.ContainsFunc(ops, mesh.NeedsLink) {
				t.Errorf("%s: an op needs the link:\n%s", enc, mesh.Text(ops))
			}
		}
	}
}

// NeedsLink is what a kernel without the link refuses, and nothing else.
func TestNeedsLinkAndSplit(t *testing.T) {
	p := mesh.NewPlan(mesh.Facts{
		Settings: settings("10.244.0.0/16"), Self: node("a", 1, "10.244.1.0/24"),
		Nodes: []mesh.Node{node("b", 2, "10.244.2.0/24")}, LocalPods: addrs("10.244.9.1"),
	}).State
	ops := append(mesh.Diff(mesh.State{}, p, mesh.Context{}), mesh.Diff(p, mesh.State{}, mesh.Context{})...)
	for _, o := range ops {
		var k kerneltest.Kernel
		err := k.Apply([]mesh.Op{o})
		_, makesIt := o.(mesh.AddLink)
		if refused := err != nil; refused != (mesh.NeedsLink(o) && !makesIt) {
			t.Errorf("%s: NeedsLink is %v; without the link: %v", o, mesh.NeedsLink(o), err)
		}
	}
	local, others := mesh.Split(ops)
	if len(local)+len(others) != len(ops) || slices.ContainsFunc(others, mesh.Local) || !slices.ContainsFunc(local, mesh.Local) {
		t.Errorf("local:\n%s\nothers:\n%s", mesh.Text(local), mesh.Text(others))
	}
}

// A key never appears in a text. The public one may. Not even a preshared key's
// fingerprint does: whether there is one is all that a reader can use.
func TestTextHidesKeys(t *testing.T) {
	private := wgtypes.Key{9: 9, 31: 77}
	self := node("a", 1, "10.244.1.0/24")
	self.PublicKey = private.PublicKey()
	preshared := wgtypes.Key{7: 7, 31: 78}
	b := node("b", 2, "10.244.2.0/24")
	b.PresharedKey = mesh.FingerprintOf(preshared)
	p := mesh.NewPlan(mesh.Facts{Settings: settings("10.244.0.0/16"), Self: self, Nodes: []mesh.Node{b}})
	text := mesh.Text(append(mesh.Diff(mesh.State{}, p.State, mesh.Context{}), mesh.Diff(p.State, mesh.State{}, mesh.Context{})...))
	for _, secret := range []string{private.String(), preshared.String(), b.PresharedKey.String()} {
		if strings.Contains(text, secret) {
			t.Errorf("%s is in\n%s", secret, text)
		}
	}
	if !strings.Contains(text, "private-key (hidden)") || !strings.Contains(text, "preshared-key (hidden)") {
		t.Error(text)
	}
}
