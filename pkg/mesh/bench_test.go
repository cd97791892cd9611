package mesh_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// manyNodes are n members with an IPv4 and an IPv6 prefix each.
func manyNodes(n int) mesh.Facts {
	f := mesh.Facts{Settings: settings("10.0.0.0/8", "fd00::/16"), Self: node("self", 1, "10.255.0.0/24", "fd00:ffff::/64")}
	f.Self.PublicKey = key(65000)
	for i := range n {
		hi, lo := byte(i>>8), byte(i)
		f.Nodes = append(f.Nodes, mesh.Node{
			Name: fmt.Sprintf("node%05d", i), PublicKey: key(i + 1), Since: at(i),
			Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, hi, lo}), 51820),
			Prefixes: []mesh.Claim{
				{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, hi, lo, 0}), 24), Since: at(i)},
				{Prefix: netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 5: hi, 6: lo}), 64), Since: at(i)},
			},
		})
	}
	return f
}

var sizes = []int{10, 1000, 5000}

func BenchmarkNewPlan(b *testing.B) {
	for _, n := range sizes {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			f := manyNodes(n)
			b.ReportAllocs()
			for b.Loop() {
				mesh.NewPlan(f)
			}
		})
	}
}

func BenchmarkDiffOneChange(b *testing.B) {
	for _, n := range sizes {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			f := manyNodes(n)
			before := mesh.NewPlan(f).State
			f.Nodes[n/2].Endpoint = endpoint("198.51.100.1:51820")
			after := mesh.NewPlan(f).State
			b.ReportAllocs()
			for b.Loop() {
				if ops := mesh.Diff(before, after, mesh.Context{Now: epoch}); len(ops) != 1 {
					b.Fatal(mesh.Text(ops))
				}
			}
		})
	}
}

func BenchmarkPlannerOneChange(b *testing.B) {
	for _, n := range sizes {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			f := manyNodes(n)
			nodes := make([]*mesh.Node, 0, n)
			for i := range f.Nodes {
				nodes = append(nodes, &f.Nodes[i])
			}
			var p mesh.Planner
			p.Update(f, nodes)
			was, other := nodes[n/2], f.Nodes[n/2]
			other.Endpoint = endpoint("198.51.100.1:51820")
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				nodes = slices.Clone(nodes)
				if nodes[n/2] = was; i%2 == 0 {
					nodes[n/2] = &other
				}
				if !p.Patches(f, nodes) {
					b.Fatal("it takes a whole plan")
				}
				p.Update(f, nodes)
			}
		})
	}
}
