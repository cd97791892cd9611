package mesh_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// holder is a member that joined at(since) and has claimed its prefixes since then.
func holder(name string, n, since int, own ...string) mesh.Node {
	m := node(name, n, own...)
	m.Since, m.Prefixes = at(since), claims(since, own...)
	return m
}

// podHolder is a member with claims of single pods since at(since), and no prefix.
func podHolder(name string, n, since int, pods ...string) mesh.Node {
	m := node(name, n)
	m.Pods = claims(since, pods...)
	return m
}

// listening is a member since at(since) at the given endpoint, with nothing else.
func listening(name string, n, since int, where string) mesh.Node {
	m := holder(name, n, since)
	m.Endpoint = endpoint(where)
	return m
}

// forgotten are two keys that are revoked in all of ownersTests. The zero key is no key.
var forgotten = map[wgtypes.Key]string{key(9): "x", key(0): "z"}

// revokedText is the conflict of a node with key(9).
func revokedText(name string) string {
	return name + ": public key " + key(9).String() +
		" refused: it was revoked when x was forgotten; to let the machine in again, stop wgcnid there, run `wgcnid leave --purge` and start it"
}

// ownersTest has the nodes and what Owners makes of them: a line "name: prefixes"
// for each that got some, then the conflicts.
type ownersTest struct {
	name  string
	nodes []mesh.Node
	want  []string
}

var ownersTests = []ownersTest{
	{"nothing", nil, nil},
	{
		"two that agree",
		[]mesh.Node{holder("a", 1, 1, "10.244.1.0/24"), holder("b", 2, 2, "10.244.2.0/24", "fd00:2::/64")},
		[]string{"a: 10.244.1.0/24", "b: 10.244.2.0/24 fd00:2::/64"},
	},
	// one key, one node. Neither wins.
	{
		"one key, two nodes",
		[]mesh.Node{holder("a", 1, 1, "10.244.1.0/24"), holder("b", 1, 2, "10.244.2.0/24"), holder("c", 3, 3, "10.244.3.0/24")},
		[]string{
			"c: 10.244.3.0/24",
			"a: public key " + key(1).String() + " refused: b has the same key; delete the private key of the copy and restart it",
			"b: public key " + key(1).String() + " refused: a has the same key; delete the private key of the copy and restart it",
		},
	},
	// A forgotten machine whose helper runs on publishes its record again.
	{"a revoked key, under its old name and under another", []mesh.Node{
		holder("a", 9, 1, "10.244.1.0/24"), podHolder("b", 9, 2, "10.244.200.1/32"), holder("c", 3, 3, "10.244.0.0/20"), podHolder("d", 4, 1, "10.244.200.1/32"),
	}, []string{"c: 10.244.0.0/20", "d: 10.244.200.1/32", revokedText("a"), revokedText("b")}},
	// Else it would go on talking to the pods in plaintext, as any address that it likes.
	{"a revoked key's addresses are not exempt", []mesh.Node{func() mesh.Node {
		m := listening("a", 9, 1, "10.244.77.1:51820")
		m.Addresses = addrs("10.244.77.2")
		return m
	}(), holder("c", 3, 3, "10.244.77.0/24")}, []string{"c: 10.244.77.0/24", revokedText("a")}},
	{
		"no key is no conflict, and no peer",
		[]mesh.Node{holder("a", 0, 1, "10.244.1.0/24"), holder("b", 0, 2, "10.244.1.0/24"), holder("c", 3, 3, "10.244.1.0/24")},
		[]string{"c: 10.244.1.0/24"},
	},
	{
		"default routes",
		[]mesh.Node{holder("a", 1, 1, "0.0.0.0/0", "::/0", "10.244.1.0/24")},
		[]string{"a: 10.244.1.0/24", "a: 0.0.0.0/0 refused: a default route may not be claimed", "a: ::/0 refused: a default route may not be claimed"},
	},
	{
		"outside clusterCIDRs",
		[]mesh.Node{holder("a", 1, 1, "10.245.1.0/24", "10.244.0.0/15", "10.244.1.0/24"), podHolder("b", 2, 1, "192.0.2.9/32")},
		[]string{
			"a: 10.244.1.0/24", "a: 10.244.0.0/15 refused: not inside clusterCIDRs",
			"a: 10.245.1.0/24 refused: not inside clusterCIDRs", "b: 192.0.2.9/32 refused: not inside clusterCIDRs",
		},
	},
	{"unmasked", []mesh.Node{holder("a", 1, 1, "10.244.1.77/24")}, []string{"a: 10.244.1.0/24"}},

	// the mesh under another network learns pod addresses as endpoints and dies (cilium#36491).
	{
		"endpoint in an older prefix",
		[]mesh.Node{holder("a", 1, 1, "10.244.1.0/24"), listening("b", 2, 2, "10.244.1.9:51820")},
		[]string{
			"a: 10.244.1.0/24", "b: address 10.244.1.9 refused: it lies inside 10.244.1.0/24, which a has held longer",
			"b: endpoint 10.244.1.9:51820 refused: it lies inside 10.244.1.0/24, which a has held longer",
		},
	},
	{
		"endpoint in a younger prefix",
		[]mesh.Node{holder("a", 1, 3, "10.244.1.0/24"), listening("b", 2, 2, "10.244.1.9:51820")},
		[]string{"exempt: 10.244.1.9", "a: 10.244.1.0/24 refused: the endpoint 10.244.1.9:51820 of b lies inside it"},
	},
	{
		"endpoint in a prefix of the same age",
		[]mesh.Node{holder("a", 1, 2, "10.244.1.0/24"), listening("b", 2, 2, "10.244.1.9:51820")},
		[]string{"exempt: 10.244.1.9", "a: 10.244.1.0/24 refused: the endpoint 10.244.1.9:51820 of b lies inside it"},
	},
	{
		"IPv4-mapped endpoint in an older prefix",
		[]mesh.Node{holder("a", 1, 1, "10.244.1.0/24"), listening("b", 2, 2, "[::ffff:10.244.1.9]:51820")},
		[]string{
			"a: 10.244.1.0/24", "b: address 10.244.1.9 refused: it lies inside 10.244.1.0/24, which a has held longer",
			"b: endpoint 10.244.1.9:51820 refused: it lies inside 10.244.1.0/24, which a has held longer",
		},
	},
	{"endpoint in the own prefix", []mesh.Node{func() mesh.Node {
		m := holder("a", 1, 1, "10.244.1.0/24")
		m.Endpoint = endpoint("10.244.1.9:51820")
		return m
	}()}, []string{"exempt: 10.244.1.9", "a: 10.244.1.0/24 refused: the endpoint 10.244.1.9:51820 of a lies inside it"}},
	{"a refused prefix costs nobody an endpoint", []mesh.Node{
		listening("a", 1, 1, "10.244.1.1:51820"), holder("b", 2, 2, "10.244.1.0/24"), listening("c", 3, 3, "10.244.1.0:51820"),
	}, []string{"exempt: 10.244.1.0 10.244.1.1", "b: 10.244.1.0/24 refused: the endpoint 10.244.1.1:51820 of a lies inside it"}},
	{"nor does one that loses to a longer held prefix", []mesh.Node{
		holder("a", 1, 1, "10.244.1.0/26"), holder("b", 2, 2, "10.244.1.0/24"), listening("c", 3, 3, "10.244.1.200:51820"),
	}, []string{"a: 10.244.1.0/26", "exempt: 10.244.1.200", "b: 10.244.1.0/24 refused: a has held 10.244.1.0/26 longer"}},

	{
		"equal prefixes",
		[]mesh.Node{holder("a", 1, 2, "10.244.1.0/24"), holder("b", 2, 1, "10.244.1.0/24")},
		[]string{"b: 10.244.1.0/24", "a: 10.244.1.0/24 refused: b has held 10.244.1.0/24 longer"},
	},
	{
		"equal prefixes of one age",
		[]mesh.Node{holder("b", 2, 1, "10.244.1.0/24"), holder("a", 1, 1, "10.244.1.0/24")},
		[]string{"a: 10.244.1.0/24", "b: 10.244.1.0/24 refused: a has held 10.244.1.0/24 longer"},
	},
	{
		"contained in an older one",
		[]mesh.Node{holder("a", 1, 1, "10.244.0.0/20"), holder("b", 2, 2, "10.244.1.0/24")},
		[]string{"a: 10.244.0.0/20", "b: 10.244.1.0/24 refused: a has held 10.244.0.0/20 longer"},
	},
	{
		"containing an older one",
		[]mesh.Node{holder("a", 1, 2, "10.244.0.0/20"), holder("b", 2, 1, "10.244.1.0/24")},
		[]string{"b: 10.244.1.0/24", "a: 10.244.0.0/20 refused: b has held 10.244.1.0/24 longer"},
	},
	{"containing several, one's own among them", []mesh.Node{
		holder("a", 1, 1, "10.244.1.0/24"), holder("b", 2, 2, "10.244.2.0/24"), holder("c", 3, 3, "10.244.3.0/24"),
		func() mesh.Node {
			m := holder("d", 4, 0, "10.244.0.0/24")
			m.Prefixes = append(m.Prefixes, claims(4, "10.244.0.0/20", "10.244.9.0/24")...)
			return m
		}(),
	}, []string{
		"a: 10.244.1.0/24", "b: 10.244.2.0/24", "c: 10.244.3.0/24", "d: 10.244.0.0/24 10.244.9.0/24",
		"d: 10.244.0.0/20 refused: a has held 10.244.1.0/24 longer",
	}},
	{
		"one's own overlap",
		[]mesh.Node{holder("a", 1, 1, "10.244.0.0/20", "10.244.1.0/24", "10.244.1.0/24")},
		[]string{"a: 10.244.0.0/20 10.244.1.0/24"},
	},

	// CNI: ADD x for A, ADD x for B, DEL A late. The newer has it.
	{
		"a pod that moved",
		[]mesh.Node{podHolder("a", 1, 5, "10.244.200.1/32"), podHolder("b", 2, 6, "10.244.200.1/32")},
		[]string{"b: 10.244.200.1/32", "a: 10.244.200.1/32 refused: b has the better claim"},
	},
	{
		"a pod claimed at one time",
		[]mesh.Node{podHolder("b", 2, 5, "10.244.200.1/32"), podHolder("a", 1, 5, "10.244.200.1/32")},
		[]string{"a: 10.244.200.1/32", "b: 10.244.200.1/32 refused: a has the better claim"},
	},
	{
		"a pod that moved out of a merged claim",
		[]mesh.Node{podHolder("a", 1, 5, "10.244.200.0/31"), podHolder("b", 2, 6, "10.244.200.1/32")},
		[]string{"a: 10.244.200.0/31", "b: 10.244.200.1/32"},
	},
	{
		"a pod that moved into a merged claim",
		[]mesh.Node{podHolder("a", 1, 6, "10.244.200.0/31"), podHolder("b", 2, 5, "10.244.200.1/32")},
		[]string{"a: 10.244.200.0/31", "b: 10.244.200.1/32 refused: a has the better claim"},
	},
	{
		"a group within a group within a group",
		[]mesh.Node{podHolder("a", 1, 6, "10.244.200.0/31"), podHolder("b", 2, 5, "10.244.200.0/30"), podHolder("c", 3, 4, "10.244.200.1/32", "10.244.200.2/32", "10.244.200.0/29")},
		[]string{
			"a: 10.244.200.0/31", "b: 10.244.200.0/30", "c: 10.244.200.0/29",
			"c: 10.244.200.1/32 refused: a has the better claim", "c: 10.244.200.2/32 refused: b has the better claim",
		},
	},
	{
		"a pod in another's prefix",
		[]mesh.Node{holder("a", 1, 1, "10.244.1.0/24"), podHolder("b", 2, 2, "10.244.1.7/32")},
		[]string{"a: 10.244.1.0/24", "b: 10.244.1.7/32"},
	},
	{
		"a pod claim equal to a prefix",
		[]mesh.Node{holder("a", 1, 1, "10.244.1.7/32"), podHolder("b", 2, 2, "10.244.1.7/32")},
		[]string{"a: 10.244.1.7/32", "b: 10.244.1.7/32 refused: a has the better claim"},
	},
	{
		"a pod at another's endpoint",
		[]mesh.Node{listening("a", 1, 1, "10.244.9.9:51820"), podHolder("b", 2, 2, "10.244.9.9/32")},
		[]string{"exempt: 10.244.9.9", "b: 10.244.9.9/32 refused: the endpoint 10.244.9.9:51820 of a lies inside it"},
	},
	{"the bridge's address is no exemption", []mesh.Node{func() mesh.Node {
		m := holder("a", 1, 1, "10.244.1.0/24")
		m.Addresses = addrs("10.244.1.1", "10.244.77.1", "192.0.2.1")
		return m
	}()}, []string{"a: 10.244.1.0/24", "exempt: 10.244.77.1"}},
}

func TestOwners(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, tt := range ownersTests {
		t.Run(tt.name, func(t *testing.T) {
			for range 8 { // every node decides alike, in whatever order the records arrive
				rng.Shuffle(len(tt.nodes), func(i, j int) { tt.nodes[i], tt.nodes[j] = tt.nodes[j], tt.nodes[i] })
				got := ownersText(tt.nodes, mesh.Owners(tt.nodes, mesh.Bounds{Cluster: prefixes("10.244.0.0/16", "fd00::/16")}, forgotten))
				if diff := cmp.Diff(tt.want, got, cmpopts.EquateEmpty()); diff != "" {
					t.Fatalf("Owners (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func ownersText(nodes []mesh.Node, o mesh.Ownership) []string {
	byName := map[string]string{}
	for _, n := range nodes {
		if own := o.Prefixes[n.Name]; len(own) > 0 {
			byName[n.Name] = n.Name + ": " + strings.Trim(fmt.Sprint(own), "[]")
			if carrier := o.Carrier[n.Name]; carrier != "" {
				byName[n.Name] += " by " + carrier
			}
		}
	}
	var out []string
	for _, name := range []string{"a", "b", "c", "d"} {
		if s, ok := byName[name]; ok {
			out = append(out, s)
		}
	}
	if len(o.Exempt) > 0 {
		out = append(out, "exempt: "+strings.Trim(fmt.Sprint(o.Exempt), "[]"))
	}
	for _, c := range o.Conflicts {
		out = append(out, c.String())
	}
	return out
}

func TestOwnersEndpoints(t *testing.T) {
	keep, lose, twin := listening("keep", 1, 1, "192.0.2.1:1"), listening("lose", 2, 5, "10.244.1.1:1"), listening("twin", 3, 1, "192.0.2.3:1")
	other := twin
	other.Name = "other"
	o := mesh.Owners([]mesh.Node{keep, lose, twin, other, holder("old", 4, 2, "10.244.1.0/24"), listening("no", 5, 1, "192.0.2.5:1")}, mesh.Bounds{Cluster: prefixes("10.244.0.0/16")}, nil)
	want := map[string]netip.AddrPort{"keep": keep.Endpoint, "old": endpoint("192.0.2.4:51820"), "no": endpoint("192.0.2.5:1")}
	if diff := cmp.Diff(want, o.Endpoints, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("endpoints (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]bool{"twin": true, "other": true}, o.Refused); diff != "" {
		t.Errorf("refused (-want +got):\n%s", diff)
	}
}

// Machines cloned from one image share its key. What is said of it must not
// grow with the square of their number.
func TestOwnersOfManyClones(t *testing.T) {
	var nodes []mesh.Node
	for i := range 1000 {
		nodes = append(nodes, mesh.Node{Name: fmt.Sprintf("clone%04d", i), PublicKey: key(1)})
	}
	o := mesh.Owners(nodes, mesh.Bounds{Cluster: prefixes("10.0.0.0/8")}, nil)
	if len(o.Conflicts) != len(nodes) || len(o.Refused) != len(nodes) {
		t.Fatalf("%d conflicts, %d refused; want %d each", len(o.Conflicts), len(o.Refused), len(nodes))
	}
	want := "clone0000, clone0001, clone0002 and 996 more has the same key; delete the private key of the copy and restart it"
	if got := o.Conflicts[999].Reason; got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}
