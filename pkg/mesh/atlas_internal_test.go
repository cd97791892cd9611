package mesh

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// The atlas against what it stands for, a walk over all nodes, while nodes come, go
// and change.
func TestAtlas(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 10))
	random := func() netip.Prefix {
		a := netip.AddrFrom4([4]byte{10, byte(rng.IntN(2)), byte(rng.IntN(8)), byte(rng.IntN(8))})
		if rng.IntN(3) == 0 {
			a = netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(rng.IntN(4)), 15: byte(rng.IntN(16))})
		}
		bits := a.BitLen() - rng.IntN(6)
		if rng.IntN(40) == 0 {
			bits = rng.IntN(a.BitLen())
		}
		return netip.PrefixFrom(a, bits)
	}
	node := func(i int) *Node {
		n := &Node{Name: fmt.Sprint("node", i), PublicKey: wgtypes.Key{byte(rng.IntN(60))}}
		for range rng.IntN(3) {
			n.Prefixes = append(n.Prefixes, Claim{Prefix: random()})
		}
		if rng.IntN(2) == 0 {
			n.Addresses = []netip.Addr{random().Addr()}
		}
		if rng.IntN(12) == 0 {
			n.Role = RoleGateway
		}
		return n
	}
	bounds := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/15"), netip.MustParsePrefix("fd00::/16")}
	nodes := map[string]*Node{}
	for i := range 20 {
		nodes[fmt.Sprint("node", i)] = node(i)
	}
	a := newAtlas(bounds, slices.Collect(maps.Values(nodes)))
	for range 3000 {
		var out, in []*Node
		for _, i := range rng.Perm(40)[:rng.IntN(4)] {
			now := node(i)
			if was, there := nodes[now.Name]; there {
				other := *was // equal, as a record that is read again
				out = append(out, &other)
				delete(nodes, now.Name)
			}
			if rng.IntN(3) > 0 {
				in, nodes[now.Name] = append(in, now), now
			}
		}
		a.exchange(out, in)

		p := &party{bounds: bounds, names: map[string]bool{}}
		p.add(node(100))
		got, want := map[string]bool{}, map[string]bool{}
		for n := range p.touched(a) {
			got[n.Name] = true
		}
		overlaps := func(in []netip.Prefix) func(netip.Prefix) bool {
			return func(q netip.Prefix) bool { return slices.ContainsFunc(in, q.Overlaps) }
		}
		for _, n := range nodes {
			if isGateway(n) || slices.Contains(p.keys, n.PublicKey) || eachOwn(n, overlaps(p.claims)) ||
				eachClaim(bounds, n, overlaps(slices.Concat(p.claims, p.own))) {
				want[n.Name] = true
			}
		}
		if !maps.Equal(got, want) {
			t.Fatalf("%v and %v touch %v, want %v", p.claims, p.own, slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
		}
	}
	a.exchange(slices.Collect(maps.Values(nodes)), nil)
	if len(a.plots)+len(a.keys)+len(a.gateways) > 0 || a.lengths != [2][129]int{} {
		t.Errorf("without any node it still has %d plots, %d keys, %d gateways, lengths %v", len(a.plots), len(a.keys), len(a.gateways), a.lengths)
	}
}
