package mesh_test

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// cursor reads a fuzzer's bytes; behind their end there are zeros.
type cursor []byte

func (c *cursor) next() byte {
	if len(*c) == 0 {
		return 0
	}
	b := (*c)[0]
	*c = (*c)[1:]
	return b
}

// address is near the clusters' borders, of either family, sometimes IPv4-mapped.
func (c *cursor) address() netip.Addr {
	b, x, y := c.next(), c.next(), c.next()
	switch b & 7 {
	case 0:
		return netip.AddrFrom16([16]byte{10: 0xff, 11: 0xff, 12: 10, 13: x & 3, 14: y, 15: b >> 3})
	case 1, 2:
		return netip.AddrFrom16([16]byte{0: 0xfd, 1: x & 3, 7: y, 15: b >> 3})
	case 3:
		return netip.AddrFrom4([4]byte{x, y, b, x ^ y})
	}
	return netip.AddrFrom4([4]byte{10, x & 3, y & 15, b >> 3})
}

func (c *cursor) prefix() netip.Prefix {
	a := c.address()
	return netip.PrefixFrom(a, int(c.next())%(a.BitLen()+1)) // not masked
}

func (c *cursor) claims() (out []mesh.Claim) {
	for range c.next() & 3 {
		out = append(out, mesh.Claim{Prefix: c.prefix(), Since: at(int(c.next() & 7))})
	}
	return out
}

func (c *cursor) node(name string) mesh.Node {
	n := mesh.Node{Name: name, PublicKey: key(int(c.next() & 31)), PresharedKey: psk(int(c.next() & 3)), Since: at(int(c.next() & 7))}
	n.Prefixes, n.Pods = c.claims(), c.claims()
	if b := c.next(); b&1 != 0 {
		n.Endpoint = netip.AddrPortFrom(c.address(), 51820)
	}
	for range c.next() & 1 {
		n.Addresses = append(n.Addresses, c.address())
	}
	return n
}

func (c *cursor) facts() mesh.Facts {
	f := mesh.Facts{Settings: settings()}
	b := c.next()
	f.Encryption = mesh.Encryption(b & 1)
	f.Keepalive = time.Duration(b>>1&1) * time.Second
	f.ClusterCIDRs = []netip.Prefix{c.prefix().Masked()}
	if b&4 != 0 {
		f.ClusterCIDRs = prefixes("10.0.0.0/14", "fd00::/14")
	}
	f.Self = c.node("self")
	for i := range c.next() & 7 {
		f.Nodes = append(f.Nodes, c.node(string(rune('a'+i))))
	}
	for range c.next() & 3 {
		f.LocalPods = append(f.LocalPods, c.address())
	}
	f.Revoked = map[wgtypes.Key]string{}
	for range c.next() & 3 {
		f.Revoked[key(int(c.next()&31))] = "gone"
	}
	return f
}

func seeds(f *testing.F) {
	rng := rand.New(rand.NewPCG(9, 10))
	for range 60 {
		b := make([]byte, 40+rng.IntN(200))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		f.Add(b)
	}
}

// FuzzPlan: whatever the facts are, a kernel takes their plan, from nothing and
// from any other plan, and then there is nothing left to do.
func FuzzPlan(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := cursor(b)
		first, second := mesh.NewPlan(c.facts()).State, mesh.NewPlan(c.facts()).State
		k := newKernel(mesh.State{})
		for _, want := range []mesh.State{first, second, {}, second, first} {
			converge(t, k, want, false)
		}
	})
}

// FuzzOwners: the result does not depend on the order of the records, and
// nothing has two owners.
func FuzzOwners(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := cursor(b)
		facts := c.facts()
		nodes := append(slices.Clone(facts.Nodes), facts.Self)
		want := mesh.Owners(nodes, facts.Bounds(), facts.Revoked)
		rng := rand.New(rand.NewPCG(uint64(len(b)), 1))
		for range 3 {
			nodes = shuffled(rng, nodes)
			for i := range nodes {
				nodes[i].Prefixes, nodes[i].Pods = shuffled(rng, nodes[i].Prefixes), shuffled(rng, nodes[i].Pods)
			}
			if got := mesh.Owners(nodes, facts.Bounds(), facts.Revoked); !reflect.DeepEqual(want, got) {
				t.Fatalf("another order (-want +got):\n%s", cmp.Diff(want, got, byEqual))
			}
		}
		checkOwners(t, want, nodes, facts.ClusterCIDRs)
		checkRevoked(t, want, nodes, facts)
	})
}

// checkRevoked: of a node that was forgotten nothing counts, as if it had no record.
func checkRevoked(t *testing.T, o mesh.Ownership, nodes []mesh.Node, f mesh.Facts) {
	t.Helper()
	revoked := func(n mesh.Node) bool { return n.PublicKey != key(0) && f.Revoked[n.PublicKey] != "" }
	without := mesh.Owners(slices.DeleteFunc(slices.Clone(nodes), revoked), f.Bounds(), nil)
	for _, n := range nodes {
		if revoked(n) && !o.Refused[n.Name] {
			t.Errorf("%s is not refused", n.Name)
		}
	}
	o.Refused, o.Conflicts, without.Refused, without.Conflicts = nil, nil, nil, nil
	if !reflect.DeepEqual(without, o) {
		t.Errorf("without the forgotten nodes' records (-want +got):\n%s", cmp.Diff(without, o, byEqual))
	}
}

func checkOwners(t *testing.T, o mesh.Ownership, nodes []mesh.Node, clusterCIDRs []netip.Prefix) {
	t.Helper()
	owner := map[netip.Prefix]string{}
	for name, own := range o.Prefixes {
		for _, p := range own {
			if other, twice := owner[p]; twice {
				t.Errorf("%s belongs to %s and to %s", p, name, other)
			}
			owner[p] = name
			if o.Refused[name] || p.Bits() == 0 || len(mesh.Merge(append(clusterCIDRs[:len(clusterCIDRs):len(clusterCIDRs)], p))) > len(mesh.Merge(clusterCIDRs)) {
				t.Errorf("%s must not have %s", name, p)
			}
		}
	}
	for _, n := range nodes { // no tunnel leads into itself
		e, usable := o.Endpoints[n.Name]
		for p, name := range owner {
			if usable && p.Contains(e.Addr()) {
				t.Errorf("endpoint %s of %s is inside %s of %s", e, n.Name, p, name)
			}
		}
	}
}
