package mesh_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/wgcni/wgcni/pkg/mesh"
)

var bounds = mesh.Bounds{
	Cluster: prefixes("10.244.0.0/16"), External: prefixes("198.51.100.0/28", "172.17.0.0/16"), Peer: prefixes("10.250.0.0/24"),
}

// laptop is a plain machine that was added at(since), and may enter by the named nodes.
func laptop(name string, n, since int, addr string, via ...string) mesh.Node {
	m := mesh.Node{Name: name, PublicKey: key(n), Since: at(since), Via: via}
	m.Prefixes = claims(since, addr)
	return m
}

// carrying is a node that claims a plain machine's address since at(since).
func carrying(m mesh.Node, since int, addr string) mesh.Node {
	m.Pods = claims(since, addr)
	return m
}

func TestOwnersOfMachinesThatAreNoNodes(t *testing.T) {
	a, b, c := holder("a", 1, 1, "10.244.1.0/24"), holder("b", 2, 2, "10.244.2.0/24"), holder("c", 3, 3, "10.244.3.0/24")
	vm := holder("d", 4, 4)
	vm.Addresses, vm.Hosts = addrs("198.51.100.4", "198.51.100.5"), claims(4, "198.51.100.4/32")
	masqueraded := laptop("d", 4, 4, "192.168.7.0/24", "a")
	masqueraded.Masqueraded = true
	rng := rand.New(rand.NewPCG(3, 4))
	for _, tt := range []ownersTest{
		{"what is behind a machine", []mesh.Node{holder("a", 1, 1, "172.17.0.0/16")}, []string{"a: 172.17.0.0/16"}},
		{
			"outside of both lists",
			[]mesh.Node{holder("a", 1, 1, "172.16.0.0/12", "0.0.0.0/0")},
			[]string{"a: 0.0.0.0/0 refused: a default route may not be claimed", "a: 172.16.0.0/12 refused: inside neither clusterCIDRs nor externalCIDRs"},
		},
		{
			// Plaintext to it would be allowed until its claim has settled.
			"a machine's own address that is a host is not exempt, its other one is",
			[]mesh.Node{vm},
			[]string{"exempt: 198.51.100.5"},
		},
		{"a plain machine that nobody carries", []mesh.Node{a, laptop("d", 4, 4, "10.250.0.7/32", "a")}, []string{"a: 10.244.1.0/24"}},
		{
			"carried by one of its nodes",
			[]mesh.Node{carrying(a, 4, "10.250.0.7/32"), b, laptop("d", 4, 4, "10.250.0.7/32", "a", "b")},
			[]string{"a: 10.244.1.0/24", "b: 10.244.2.0/24", "d: 10.250.0.7/32 by a"},
		},
		{
			"it has gone to another",
			[]mesh.Node{carrying(a, 4, "10.250.0.7/32"), carrying(b, 5, "10.250.0.7/32"), laptop("d", 4, 4, "10.250.0.7/32", "a", "b")},
			[]string{"a: 10.244.1.0/24", "b: 10.244.2.0/24", "d: 10.250.0.7/32 by b"},
		},
		{
			"a node that it does not enter by",
			[]mesh.Node{carrying(a, 4, "10.250.0.7/32"), carrying(c, 9, "10.250.0.7/32"), laptop("d", 4, 4, "10.250.0.7/32", "a", "b")},
			[]string{"a: 10.244.1.0/24", "c: 10.244.3.0/24", "d: 10.250.0.7/32 by a", "c: 10.250.0.7/32 refused: no machine that enters by this node has it"},
		},
		{
			"an address that no machine has",
			[]mesh.Node{carrying(a, 4, "10.250.0.8/32")},
			[]string{"a: 10.244.1.0/24", "a: 10.250.0.8/32 refused: no machine that enters by this node has it"},
		},
		{
			"two machines with one address",
			[]mesh.Node{carrying(a, 6, "10.250.0.7/32"), laptop("c", 3, 5, "10.250.0.7/32", "a"), laptop("d", 4, 4, "10.250.0.7/32", "a")},
			[]string{"a: 10.244.1.0/24", "d: 10.250.0.7/32 by a", "c: 10.250.0.7/32 refused: d has had it longer"},
		},
		{
			"a plain machine that claims what is no address for it",
			[]mesh.Node{laptop("d", 4, 4, "10.244.1.7/32", "a"), laptop("c", 3, 3, "10.250.0.0/24", "a")},
			[]string{"c: 10.250.0.0/24 refused: not a single address inside peerCIDRs", "d: 10.244.1.7/32 refused: not a single address inside peerCIDRs"},
		},
		{"a masqueraded one is nobody else's business", []mesh.Node{a, masqueraded}, []string{"a: 10.244.1.0/24"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range 8 {
				rng.Shuffle(len(tt.nodes), func(i, j int) { tt.nodes[i], tt.nodes[j] = tt.nodes[j], tt.nodes[i] })
				if diff := cmp.Diff(tt.want, ownersText(tt.nodes, mesh.Owners(tt.nodes, bounds, nil)), cmpopts.EquateEmpty()); diff != "" {
					t.Fatalf("Owners (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// An entry node lets every machine that may enter by it shake hands; only what it
// carries may send.
func TestPlanOfAnEntryNode(t *testing.T) {
	entry, other := node("a", 1, "10.244.1.0/24"), node("b", 2, "10.244.2.0/24")
	entry = carrying(entry, 4, "10.250.0.7/32")
	carried, waiting := laptop("laptop", 4, 4, "10.250.0.7/32", "a", "b"), laptop("phone", 5, 5, "10.250.0.8/32", "b", "a")
	site := laptop("site", 6, 6, "192.168.7.0/24", "a")
	site.Masqueraded = true
	other = carrying(other, 5, "10.250.0.8/32")
	f := mesh.Facts{Settings: settings("10.244.0.0/16"), Nodes: []mesh.Node{entry, other, carried, waiting, site}}
	f.PeerCIDRs = bounds.Peer
	for _, tt := range []struct {
		self mesh.Node
		want map[string]string // allowed IPs by peer
		masq []netip.Prefix
	}{
		{entry, map[string]string{"b": "[10.244.2.0/24 10.250.0.8/32]", "laptop": "[10.250.0.7/32]", "phone": "[]", "site": "[192.168.7.0/24]"}, prefixes("192.168.7.0/24")},
		{other, map[string]string{"a": "[10.244.1.0/24 10.250.0.7/32]", "laptop": "[]", "phone": "[10.250.0.8/32]"}, nil},
		{node("c", 3, "10.244.3.0/24"), map[string]string{"a": "[10.244.1.0/24 10.250.0.7/32]", "b": "[10.244.2.0/24 10.250.0.8/32]"}, nil},
	} {
		f.Self = tt.self
		p := mesh.NewPlan(f)
		got := map[string]string{}
		for _, peer := range p.Peers {
			got[peer.Name] = textOf(peer.AllowedIPs)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("peers of %s (-want +got):\n%s", tt.self.Name, diff)
		}
		if diff := cmp.Diff(textOf(tt.masq), textOf(p.Filter.Masqueraded)); diff != "" {
			t.Errorf("masqueraded on %s (-want +got):\n%s", tt.self.Name, diff)
		}
		if got := textOf(p.Filter.Guarded); got != "[10.244.0.0/16 10.250.0.0/24]" {
			t.Errorf("guarded on %s: %s", tt.self.Name, got)
		}
		if len(p.Conflicts) > 0 {
			t.Errorf("conflicts on %s: %v", tt.self.Name, p.Conflicts)
		}
	}
}

// What cannot be masqueraded is a conflict, the same one every time.
func TestMasqueradedConflicts(t *testing.T) {
	entry, other := node("a", 1, "10.244.1.0/24"), node("b", 2, "10.244.2.0/24")
	entry.Addresses = []netip.Addr{netip.MustParseAddr("172.16.3.1")}
	other.Endpoint = netip.MustParseAddrPort("198.51.100.2:51820")
	site := func(name string, since int, prefixes ...string) mesh.Node {
		n := laptop(name, 10+since, since, prefixes[0], "a")
		n.Masqueraded, n.Prefixes = true, claims(since, prefixes...)
		return n
	}
	carried := carrying(entry, 4, "10.250.0.7/32")
	f := mesh.Facts{Settings: settings("10.244.0.0/16"), Self: carried, Nodes: []mesh.Node{
		other, laptop("laptop", 4, 4, "10.250.0.7/32", "a"),
		site("younger", 7, "10.250.0.9/32", "192.168.0.0/16"), site("older", 6, "10.250.0.8/32", "192.168.7.0/24"),
		site("odd", 8, "10.250.0.7/32", "10.250.0.0/25", "10.244.9.0/24", "0.0.0.0/0", "198.51.100.0/24", "172.16.0.0/12"),
	}}
	f.PeerCIDRs = bounds.Peer
	p := mesh.NewPlan(f)
	if got := textOf(p.Filter.Masqueraded); got != "[10.250.0.8/32 10.250.0.9/32 192.168.7.0/24]" {
		t.Errorf("masqueraded %s", got)
	}
	outside := "what is masqueraded lies outside of clusterCIDRs and externalCIDRs"
	want := []mesh.Conflict{
		{Node: "odd", What: "0.0.0.0/0", Reason: outside},
		{Node: "odd", What: "10.244.9.0/24", Reason: outside},
		{Node: "odd", What: "10.250.0.0/25", Reason: outside},
		{Node: "odd", What: "10.250.0.7/32", Reason: "laptop has it"},
		{Node: "odd", What: "172.16.0.0/12", Reason: "an address of this node lies inside it"},
		{Node: "odd", What: "198.51.100.0/24", Reason: "the endpoint 198.51.100.2:51820 of b lies inside it"},
		{Node: "younger", What: "192.168.0.0/16", Reason: "another machine that enters by this node has 192.168.7.0/24"},
	}
	if diff := cmp.Diff(want, p.Conflicts); diff != "" {
		t.Errorf("conflicts (-want +got):\n%s", diff)
	}
}

func textOf(ps []netip.Prefix) string { return fmt.Sprint(ps) }

// Of two gateways that do not hear each other the one that spoke last was alive then.
func TestSilencedGateways(t *testing.T) {
	gateway := func(name string, silent ...mesh.Silence) mesh.Node {
		return mesh.Node{Name: name, Location: "x", Role: mesh.RoleGateway, Silent: silent}
	}
	of := func(name string, seconds int) mesh.Silence {
		return mesh.Silence{Node: name, Since: at(0).Add(time.Duration(seconds) * time.Second)}
	}
	elsewhere := mesh.Node{Name: "z", Location: "y", Role: mesh.RoleGateway, Silent: []mesh.Silence{of("a", 99)}}
	member := mesh.Node{Name: "m", Location: "x", Silent: []mesh.Silence{of("a", 99)}}
	for _, tt := range []struct {
		name  string
		nodes []mesh.Node
		want  string
	}{
		{"the first by name", []mesh.Node{gateway("b"), gateway("a"), member}, "a"},
		{"it is silent", []mesh.Node{gateway("a"), gateway("b", of("a", 1))}, "b"},
		{"each accuses the other", []mesh.Node{gateway("a", of("b", 2)), gateway("b", of("a", 1))}, "a"},
		{"and the second spoke last", []mesh.Node{gateway("a", of("b", 1)), gateway("b", of("a", 2))}, "b"},
		{"a silenced one accuses the third", []mesh.Node{gateway("a", of("b", 1)), gateway("b", of("a", 2)), gateway("c")}, "b"},
		{"only gateways of the same location count", []mesh.Node{gateway("a"), gateway("b"), elsewhere, member}, "a"},
		{"itself and strangers", []mesh.Node{gateway("a", of("a", 1), of("nobody", 1)), gateway("b")}, "a"},
	} {
		if got := mesh.NewTopology(tt.nodes, nil).Gateway("x"); got != tt.want {
			t.Errorf("%s: gateway %q, want %q", tt.name, got, tt.want)
		}
	}
}

// A single address among a machine's ranges is its own, be it not the first: a
// service endpoint listens there. The others' routes know of it as of any range.
func TestSingleAddressesAreTheMachinesOwn(t *testing.T) {
	self, other := holder("a", 1, 1, "10.244.1.0/24", "172.17.0.0/16", "198.51.100.7/32", "10.9.9.9/32"), holder("b", 2, 2, "10.244.2.0/24")
	settings := mesh.Settings{ClusterCIDRs: bounds.Cluster, ExternalCIDRs: bounds.External, PeerCIDRs: bounds.Peer, Interface: "wgcni0", MTU: 1420, Table: 7}
	p := mesh.NewPlan(mesh.Facts{Settings: settings, Self: self, Nodes: []mesh.Node{other}})
	if got := textOf(p.Addresses); got != "[10.244.1.0/32 198.51.100.7/32]" {
		t.Errorf("addresses %s", got)
	}
	for _, r := range p.Routes {
		if r.Type == mesh.ViaLink && r.Source.String() != "10.244.1.0" {
			t.Errorf("%s; want the tunnel address as the source", r)
		}
	}
	p = mesh.NewPlan(mesh.Facts{Settings: settings, Self: holder("a", 1, 1, "198.51.100.7/32"), Nodes: []mesh.Node{other}})
	if got := textOf(p.Addresses); got != "[198.51.100.7/32]" {
		t.Errorf("addresses %s, want the only one once", got)
	}
	p = mesh.NewPlan(mesh.Facts{Settings: settings, Self: other, Nodes: []mesh.Node{self}})
	if got := textOf(p.Peers[0].AllowedIPs); got != "[10.244.1.0/24 172.17.0.0/16 198.51.100.7/32]" {
		t.Errorf("the other allows %s", got)
	}
}
