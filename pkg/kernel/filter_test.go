package kernel_test

import (
	"net/netip"
	"testing"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// The table of an older version, whose rules know one interface, is made anew at
// once, and with it the sources are verified where this kernel can.
func TestTableOfAnOlderVersion(t *testing.T) {
	k := open(t)
	want := plan(mesh.Facts{Nodes: []mesh.Node{node(1, "10.244.1.0/24")}})
	apply(t, k, want)
	sh(t, `nft flush chain inet wgcni forward
nft add rule inet wgcni forward 'oifname "wgcni0" return comment "ipv4 oifname wgcni0 return"'
nft flush chain inet wgcni plain-in
nft 'delete chain inet wgcni into-tunnel; delete chain inet wgcni from-here'`)
	s, err := k.Observe()
	if err != nil || !s.Filter.Broken {
		t.Fatalf("%+v, %v; want it to be broken", s.Filter, err)
	}
	if verifies, err := k.FilterVerifiesSources(); verifies || err != nil {
		t.Errorf("the old table: %v, %v", verifies, err)
	}
	ops := apply(t, k, want)
	if _, replaced := ops[0].(mesh.ReplaceFilter); !replaced || len(ops) != 1 {
		t.Errorf("it takes\n%s", mesh.Text(ops))
	}
	if verifies, err := k.FilterVerifiesSources(); !verifies || err != nil {
		t.Errorf("verifies sources: %v, %v", verifies, err)
	}
}

// No table is an error, and not an answer.
func TestNoTableVerifiesNothing(t *testing.T) {
	k := open(t)
	if _, err := k.FilterVerifiesSources(); err == nil {
		t.Error("no error without a table")
	}
}

// A table for as much as a large cluster has fits into one transaction, of which
// the kernel answers each message before the first answer is read.
func TestLargeTable(t *testing.T) {
	f := mesh.Filter{Interface: link, Nodes: mesh.NodeFilter{Mark: 4}}
	for i := range 5_000 {
		a := netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)})
		f.Nodes.Peers = append(f.Nodes.Peers, a)
		f.Pods = append(f.Pods, netip.AddrFrom4([4]byte{10, 200, byte(i >> 8), byte(i)}))
		f.Cluster = append(f.Cluster, netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 7), byte(i << 1), 0}), 24))
	}
	k := open(t)
	if err := k.Apply([]mesh.Op{mesh.ReplaceFilter{Filter: f}}); err != nil {
		t.Fatalf("… %s", err.Error()[max(len(err.Error())-200, 0):])
	}
	s, err := k.Observe()
	if err != nil || s.Filter.Broken || len(s.Filter.Nodes.Peers) != len(f.Nodes.Peers) || len(s.Filter.Pods) != len(f.Pods) {
		t.Errorf("%d nodes, %d pods, broken %v, %v", len(s.Filter.Nodes.Peers), len(s.Filter.Pods), s.Filter.Broken, err)
	}
}
