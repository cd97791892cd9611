package mesh_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// world makes up facts, one change after another: nodes that join, leave, get
// new keys, swap prefixes, are forgotten; pods that move; settings that change.
type world struct {
	rng   *rand.Rand
	now   int // minutes; every change has a time of its own
	facts mesh.Facts
	nodes map[string]*mesh.Node
}

func newWorld(rng *rand.Rand) *world {
	w := &world{rng: rng, facts: mesh.Facts{Settings: settings("10.244.0.0/16", "fd00:244::/32")}, nodes: map[string]*mesh.Node{}}
	w.facts.Self = mesh.Node{
		Name: "self", PublicKey: key(100), Endpoint: endpoint("192.0.2.100:51820"), Prefixes: w.someClaims(),
		Spare: mesh.SpareEnd{PublicKey: key(250), Port: 51821},
	}
	w.facts.SparePort = 51830
	return w
}

// cross has a pair of nodes change planes: the second tunnel comes, the routes move,
// and it goes.
func (w *world) cross(n *mesh.Node) {
	f := &w.facts
	f.Crossing = maps.Clone(f.Crossing)
	if f.Crossing == nil {
		f.Crossing = map[string]mesh.Plane{}
	}
	switch _, crossing := f.Crossing[n.Name]; {
	case !crossing:
		f.Crossing[n.Name] = mesh.Primary
	case w.rng.IntN(3) == 0:
		delete(f.Crossing, n.Name)
	default:
		f.Crossing[n.Name] = !f.Crossing[n.Name]
	}
}

func (w *world) at() time.Time { return at(w.now) }

// somePrefix is one of few, so that nodes collide.
func (w *world) somePrefix() netip.Prefix {
	n := w.rng.IntN(10)
	if w.rng.IntN(3) == 0 {
		return netip.MustParsePrefix(fmt.Sprintf("fd00:244:%d::/64", n))
	}
	if w.rng.IntN(4) == 0 {
		return netip.MustParsePrefix(fmt.Sprintf("172.16.%d.0/24", n)) // external
	}
	return netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n))
}

// somePod is one of few addresses: most outside of what somePrefix gives.
func (w *world) somePod() netip.Addr {
	n := w.rng.IntN(6)
	switch w.rng.IntN(4) {
	case 0:
		return addr(fmt.Sprintf("fd00:244:ffff::%x", n))
	case 1:
		return addr(fmt.Sprintf("10.244.%d.%d", w.rng.IntN(3), n+1))
	}
	return addr(fmt.Sprintf("10.244.200.%d", n))
}

// somePSK is one of few, none among them.
func (w *world) somePSK() mesh.Fingerprint { return psk(w.rng.IntN(4)) }

func (w *world) someClaims() (out []mesh.Claim) {
	for range w.rng.IntN(3) {
		out = append(out, mesh.Claim{Prefix: w.somePrefix(), Since: w.at()})
	}
	return out
}

func (w *world) someEndpoint() netip.AddrPort {
	n := w.rng.IntN(8)
	switch w.rng.IntN(8) {
	case 0:
		return netip.AddrPort{}
	case 1:
		return endpoint(fmt.Sprintf("[2001:db8::%x]:51820", n+1))
	case 2:
		return endpoint(fmt.Sprintf("10.244.%d.200:51820", n)) // may lie in a prefix, may be exempt
	}
	return endpoint(fmt.Sprintf("192.0.2.%d:51820", n+1))
}

// someHosts are addresses of which each may be another's too, in the cluster's
// ranges or not, or of no use.
func (w *world) someHosts() (out []mesh.Claim) {
	for range w.rng.IntN(3) {
		a := addr(fmt.Sprintf("192.0.2.%d", 1+w.rng.IntN(8)))
		switch w.rng.IntN(6) {
		case 0:
			a = addr(fmt.Sprintf("2001:db8::%x", 1+w.rng.IntN(8)))
		case 1:
			a = addr(fmt.Sprintf("10.244.%d.200", w.rng.IntN(8)))
		case 2:
			a = addrs("127.0.0.1", "192.0.2.100", "fe80::1", "10.244.200.1")[w.rng.IntN(4)]
		}
		out = append(out, mesh.Claim{Prefix: netip.PrefixFrom(a, a.BitLen()), Since: w.at()})
	}
	return out
}

// someNode is one of the members, or nil.
func (w *world) someNode() *mesh.Node {
	names := slices.Sorted(maps.Keys(w.nodes))
	if len(names) == 0 {
		return nil
	}
	return w.nodes[names[w.rng.IntN(len(names))]]
}

// step changes one thing, or a few at once.
func (w *world) step() {
	for range 1 + w.rng.IntN(3) {
		w.now++
		switch n := w.rng.IntN(10); {
		case n < 6:
			w.changeNodes()
		case n < 8:
			w.changePods()
		default:
			w.changeSelf()
		}
	}
}

func (w *world) changeNodes() {
	a, b := w.someNode(), w.someNode()
	if a == nil || w.rng.IntN(5) == 0 {
		name := fmt.Sprintf("n%d", w.rng.IntN(9))
		w.nodes[name] = &mesh.Node{
			Name: name, PublicKey: key(1 + w.rng.IntN(200)), PresharedKey: w.somePSK(),
			Endpoint: w.someEndpoint(), Prefixes: w.someClaims(), Since: w.at(), Hosts: w.someHosts(),
			Spare: mesh.SpareEnd{PublicKey: key(201 + w.rng.IntN(40)), PresharedKey: w.somePSK(), Port: 51821},
		}
		return
	}
	switch w.rng.IntN(18) {
	case 14, 15, 16:
		w.cross(a)
	case 17:
		a.Spare = mesh.SpareEnd{PublicKey: key(201 + w.rng.IntN(40)), PresharedKey: w.somePSK(), Port: uint16(51821 + w.rng.IntN(2))}
	case 12:
		a.Hosts = w.someHosts()
	case 13:
		a.Hosts, b.Hosts = b.Hosts, a.Hosts
	case 0:
		delete(w.nodes, a.Name)
	case 1:
		a.PublicKey = key(w.rng.IntN(200)) // may be none, or another's
	case 2:
		a.PublicKey, b.PublicKey = b.PublicKey, a.PublicKey
	case 3:
		a.Prefixes, b.Prefixes = b.Prefixes, a.Prefixes
	case 4:
		a.Prefixes = append(slices.Clone(a.Prefixes), mesh.Claim{Prefix: w.somePrefix(), Since: w.at()})
	case 5:
		a.Endpoint = w.someEndpoint()
	case 6:
		a.Addresses = []netip.Addr{addr("192.0.2.50"), w.somePod()}
	case 7:
		a.PresharedKey = w.somePSK()
	case 8:
		for _, n := range w.nodes { // another cluster secret
			n.PresharedKey = w.somePSK()
		}
	case 9:
		w.forget(a)
	default: // A -> B -> A is skipped by a stale cache (felix#2535)
		pod := w.somePod()
		a.Pods = append(slices.Clone(a.Pods), mesh.Claim{Prefix: netip.PrefixFrom(pod, pod.BitLen()), Since: w.at()})
		if b != a && w.rng.IntN(2) == 0 {
			b.Pods = nil
		}
	}
}

// forget revokes a node's key, and lets one in again. The node may not know yet.
func (w *world) forget(n *mesh.Node) {
	w.facts.Revoked = map[wgtypes.Key]string{n.PublicKey: n.Name}
	if w.rng.IntN(2) == 0 {
		delete(w.nodes, n.Name)
	}
}

func (w *world) changePods() {
	pod := w.somePod()
	if i := slices.Index(w.facts.LocalPods, pod); i >= 0 {
		w.facts.LocalPods = slices.Delete(slices.Clone(w.facts.LocalPods), i, i+1)
		return
	}
	w.facts.LocalPods = append(slices.Clone(w.facts.LocalPods), pod)
}

func (w *world) changeSelf() {
	f := &w.facts
	switch w.rng.IntN(14) {
	case 13:
		f.ExternalCIDRs = [][]netip.Prefix{
			nil, prefixes("192.0.2.0/24", "172.16.0.0/12"), prefixes("192.0.2.0/29", "2001:db8::/64"), prefixes("172.16.4.0/22"),
		}[w.rng.IntN(4)]
	case 10:
		f.EncryptNodes, f.DirectPorts = !f.EncryptNodes, []uint16{22, uint16(2379 + w.rng.IntN(2))}
	case 11:
		f.EncryptNodes = true
	case 12:
		f.Self.Hosts = [][]mesh.Claim{nil, claims(w.now, "192.0.2.100/32"), claims(w.now, "192.0.2.100/32", "2001:db8::100/128")}[w.rng.IntN(3)]
	case 0:
		f.Self.PublicKey = key(w.rng.IntN(200)) // may be none, or another's
	case 1:
		f.Self.PublicKey = key(100)
	case 2:
		f.Self.Prefixes = w.someClaims()
	case 3:
		f.Encryption = mesh.Preferred
	case 4:
		f.Encryption = mesh.Required
	case 5:
		f.ClusterCIDRs = [][]netip.Prefix{
			prefixes("10.244.0.0/16"), prefixes("fd00:244::/32"), prefixes("fd00:244::/32", "10.244.0.0/16"), prefixes("10.244.0.0/17", "10.244.128.0/17"),
		}[w.rng.IntN(4)]
	case 6:
		f.Keepalive, f.MTU = time.Duration(w.rng.IntN(2))*25*time.Second, 1400+20*w.rng.IntN(3)
	case 7:
		f.ListenPort, f.FwMark = 51820+w.rng.IntN(2), 1<<(24+w.rng.IntN(2))
	case 8:
		if w.rng.IntN(3) == 0 {
			f.Interface = []string{"wgcni0", "wg1"}[w.rng.IntN(2)]
		}
	case 9:
		w.forget(&f.Self)
	}
}

// snapshot is the world's facts in a random order.
func (w *world) snapshot() mesh.Facts {
	f := w.facts
	f.Nodes = nil
	for _, n := range w.nodes {
		m := *n
		m.Prefixes, m.Pods, m.Addresses = shuffled(w.rng, m.Prefixes), shuffled(w.rng, m.Pods), shuffled(w.rng, m.Addresses)
		f.Nodes = append(f.Nodes, m)
	}
	if w.rng.IntN(2) == 0 {
		f.Nodes = append(f.Nodes, f.Self) // may be among them
	}
	f.Nodes, f.LocalPods, f.ClusterCIDRs = shuffled(w.rng, f.Nodes), shuffled(w.rng, f.LocalPods), shuffled(w.rng, f.ClusterCIDRs)
	return f
}

func shuffled[T any](rng *rand.Rand, in []T) []T {
	out := slices.Clone(in)
	rng.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}
