package mesh_test

import (
	"fmt"
	"maps"
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

// A chooser drives a crowd: a *rand.Rand, or a fuzzer's bytes.
type chooser interface{ IntN(n int) int }

func (c *cursor) IntN(n int) int { return (int(c.next())<<8 | int(c.next())) % n }

// crowd is a mesh of nodes that are mostly content with what is their own, and now
// and then take what is another's.
type crowd struct {
	chooser
	facts mesh.Facts
	nodes map[string]*mesh.Node // as handed out: never modified, but replaced
	now   int                   // seconds
}

func newCrowd(c chooser, n int) *crowd {
	w := &crowd{chooser: c, facts: mesh.Facts{Settings: settings("10.0.0.0/8", "fd00::/16")}, nodes: map[string]*mesh.Node{}}
	w.facts.Self = w.fresh(250)
	w.facts.Self.Name = "self"
	for i := range n {
		w.join(i)
	}
	return w
}

func (w *crowd) at() time.Time { return epoch.Add(time.Duration(w.now) * time.Second) }

// seldom is true once in n times.
func (w *crowd) seldom(n int) bool { return w.IntN(n) == 0 }

// number is a node's own, or seldom any.
func (w *crowd) number(own int) int {
	if w.seldom(8) {
		return w.IntN(60)
	}
	return own
}

func (w *crowd) claim(format string, own int) mesh.Claim {
	return mesh.Claim{Prefix: netip.MustParsePrefix(fmt.Sprintf(format, w.number(own))), Since: w.at()}
}

// fresh is a node as it joins.
func (w *crowd) fresh(i int) mesh.Node {
	return mesh.Node{
		Name: fmt.Sprintf("n%03d", i), PublicKey: key(1 + w.number(i)), Since: w.at(),
		Endpoint: endpoint(fmt.Sprintf("192.0.2.%d:51820", w.number(i))),
		Prefixes: []mesh.Claim{w.claim("10.244.%d.0/24", i), w.claim("fd00:244:%d::/64", i)},
	}
}

func (w *crowd) join(i int) {
	n := w.fresh(i)
	w.nodes[n.Name] = &n
}

// change changes one node: nearly always in what is its own matter.
func (w *crowd) change() {
	i := w.IntN(60)
	name := fmt.Sprintf("n%03d", i)
	old, there := w.nodes[name]
	if !there {
		w.join(i)
		return
	}
	n := *old
	switch w.IntN(22) {
	case 0:
		delete(w.nodes, name)
		return
	case 1, 2, 3:
		n.Endpoint = endpoint(fmt.Sprintf("192.0.2.%d:%d", w.number(i), 51820+w.IntN(3)))
	case 4:
		n.Endpoint = netip.AddrPort{}
	case 5:
		n.Endpoint = endpoint(fmt.Sprintf("10.244.%d.%d:51820", w.number(i), w.IntN(4))) // inside a prefix: exempt, or refused
	case 6, 7, 8:
		n.Pods = append(slices.Clone(n.Pods), w.claim([]string{"10.245.%d.1/32", "10.245.%d.2/32", "10.99.0.%d/32"}[w.IntN(3)], i))
	case 9:
		n.Pods = nil
	case 10:
		n.Prefixes = append(slices.Clone(n.Prefixes), w.claim([]string{"10.244.%d.0/24", "10.246.%d.0/24", "10.247.%d.0/25", "172.16.%d.0/24", "fd00:245:%d::/64"}[w.IntN(5)], i))
	case 11:
		n.Prefixes = n.Prefixes[:w.IntN(len(n.Prefixes)+1)]
	case 12:
		n.PublicKey = key(w.number(i) + 1 + 100*w.IntN(2))
	case 13:
		n.PresharedKey = psk(w.IntN(4))
	case 14:
		n.Addresses = []netip.Addr{addr(fmt.Sprintf([]string{"192.0.2.%d", "10.244.%d.200", "10.250.0.%d"}[w.IntN(3)], w.number(i)))}
	case 15, 16:
		n.Hosts = []mesh.Claim{w.claim([]string{"192.0.2.%d/32", "172.16.0.%d/32", "2001:db8::%d/128", "10.250.0.%d/32"}[w.IntN(4)], i)}
	case 17:
		n.Hosts = nil
	case 18:
		n.CallsOnly, n.CalledInside = w.seldom(2), w.seldom(3)
	case 19:
		w.place(&n)
	case 20:
		w.enter(&n, i)
	case 21:
		if w.seldom(3) {
			w.facts.Revoked = map[wgtypes.Key]string{key(1 + w.IntN(60)): "gone"}
		}
	}
	w.nodes[name] = &n
}

func (w *crowd) place(n *mesh.Node) {
	n.Location = []string{"", "", "", "east", "west"}[w.IntN(5)]
	n.Segments = [][]string{nil, nil, {"a"}, {"a", "b"}}[w.IntN(4)]
	n.Role = []mesh.Role{mesh.RoleNode, mesh.RoleNode, mesh.RoleNode, mesh.RoleGateway, mesh.RoleSpoke}[w.IntN(5)]
	if n.Role == mesh.RoleGateway && w.seldom(2) {
		n.Silent = []mesh.Silence{{Node: fmt.Sprintf("n%03d", w.IntN(60)), Since: w.at()}}
	}
}

// enter makes a plain machine of a node, or a node of a plain machine.
func (w *crowd) enter(n *mesh.Node, i int) {
	if n.Plain() {
		n.Via, n.Masqueraded = nil, false
		return
	}
	n.Via = [][]string{{"self"}, {"n001", "self"}, {"n001", "n002"}}[w.IntN(3)]
	n.Masqueraded, n.Pods, n.Role = w.seldom(3), nil, mesh.RoleNode
	n.Prefixes = []mesh.Claim{w.claim("10.99.0.%d/32", i)}
	if n.Masqueraded && w.seldom(2) {
		n.Prefixes = []mesh.Claim{w.claim("192.168.%d.0/24", w.IntN(3))}
	}
	if by, there := w.nodes["n001"]; there && w.seldom(2) {
		carrier := *by
		carrier.Pods = append(slices.Clone(carrier.Pods), mesh.Claim{Prefix: n.Prefixes[0].Prefix, Since: w.at()})
		w.nodes["n001"] = &carrier
	}
}

// changePods attaches or detaches a pod, which another node may claim.
func (w *crowd) changePods() {
	f := &w.facts
	pod := addr(fmt.Sprintf([]string{"10.244.250.%d", "10.245.%d.1", "10.200.0.%d", "::ffff:10.245.%d.2"}[w.IntN(4)], w.IntN(60)))
	if i := slices.Index(f.LocalPods, pod); i >= 0 {
		f.LocalPods = slices.Delete(slices.Clone(f.LocalPods), i, i+1)
	} else {
		f.LocalPods = append(slices.Clone(f.LocalPods), pod)
	}
}

// changeSelf changes what concerns all.
func (w *crowd) changeSelf() {
	f := &w.facts
	switch w.IntN(7) {
	case 0:
		f.Self.Pods = [][]mesh.Claim{nil, {w.claim("10.245.%d.1/32", w.IntN(60))}, {w.claim("10.99.0.%d/32", w.IntN(60))}}[w.IntN(3)]
	case 1:
		f.Self.Hosts = [][]mesh.Claim{nil, claims(0, "192.0.2.250/32"), {w.claim("192.0.2.%d/32", 250)}}[w.IntN(3)]
	case 2:
		f.EncryptNodes = w.seldom(2)
	case 3:
		f.ExternalCIDRs = [][]netip.Prefix{nil, nil, prefixes("172.16.0.0/16", "192.0.2.0/27")}[w.IntN(3)]
		f.PeerCIDRs = [][]netip.Prefix{nil, prefixes("10.99.0.0/24")}[w.IntN(2)]
		f.ClusterCIDRs = [][]netip.Prefix{prefixes("10.0.0.0/8", "fd00::/16"), prefixes("10.244.0.0/14", "fd00::/16")}[w.IntN(2)]
	case 4:
		f.Encryption = []mesh.Encryption{mesh.Required, mesh.Required, mesh.Preferred}[w.IntN(3)]
	case 5:
		f.Keepalive, f.MTU = time.Duration(w.IntN(2))*25*time.Second, 1400+20*w.IntN(2)
	case 6:
		w.place(&f.Self)
		f.Self.PublicKey = key([]int{0, 251, 251, 251, 251, 7}[w.IntN(6)])
		f.Self.CallsOnly = w.seldom(4)
		if w.seldom(2) {
			f.Self.Location, f.Self.Segments, f.Self.Role, f.Self.Silent = "", nil, mesh.RoleNode, nil
		}
	}
}

func (w *crowd) step() {
	for range 1 + w.IntN(3)/2 {
		switch {
		case w.seldom(12):
			w.changeSelf()
		case w.seldom(6):
			w.changePods()
		default:
			w.change()
		}
	}
	w.now += w.IntN(3)
	w.facts.Now = w.at()
}

// sorted are the nodes as a Planner takes them.
func (w *crowd) sorted() (out []*mesh.Node) {
	for _, name := range slices.Sorted(maps.Keys(w.nodes)) {
		out = append(out, w.nodes[name])
	}
	return out
}

// checkUpdate: a Planner's plan is the one that NewPlan makes.
func (w *crowd) checkUpdate(t *testing.T, p *mesh.Planner) (patched bool) {
	t.Helper()
	f, nodes := w.facts, w.sorted()
	patched = p.Patches(f, nodes)
	got := p.Update(f, nodes)
	for _, n := range nodes {
		f.Nodes = append(f.Nodes, *n)
	}
	want := mesh.NewPlan(f)
	if !reflect.DeepEqual(want, got) {
		if diff := cmp.Diff(want, got, byEqual); diff != "" {
			t.Fatalf("patched %v (-new plan +update):\n%s", patched, diff)
		}
	}
	return patched
}

// TestPlannerLaw: whatever changes, Update gives what NewPlan gives.
func TestPlannerLaw(t *testing.T) {
	s, patched, steps := seed(t), 0, 0
	for walk := range uint64(16) {
		rng := rand.New(rand.NewPCG(s, walk))
		w, p := newCrowd(rng, 10+int(walk)*7%40), &mesh.Planner{}
		for range 100 {
			w.step()
			steps++
			if w.checkUpdate(t, p) {
				patched++
			}
		}
	}
	t.Logf("%d of %d plans were patched", patched, steps)
	if patched < steps/3 || patched == steps {
		t.Errorf("%d of %d plans were patched: the law was not put to a test", patched, steps)
	}
}

// FuzzPlanner is the law with a fuzzer to choose.
func FuzzPlanner(f *testing.F) {
	rng := rand.New(rand.NewPCG(11, 12))
	for range 20 {
		b := make([]byte, 200)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := cursor(b)
		w, p := newCrowd(&c, int(c.next()%16)), &mesh.Planner{}
		for step := 0; len(c) > 0 && step < 50; step++ {
			w.step()
			w.checkUpdate(t, p)
		}
	})
}
