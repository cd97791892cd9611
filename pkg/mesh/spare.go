package mesh

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// How a key is replaced without losing a packet. WireGuard takes an address from
// one peer of an interface only, so that two keys of one node need two interfaces
// at both ends: each node has a second one, the spare, while keys are rotated.
// A pair of nodes then has two tunnels, planes, with the same allowed IPs. Each node
// sends by either, as its routes say, and takes what comes by both.
//
//	        A rotates                        B
//	        wgcni0  key A0  ═══ Primary ═══  wgcni0  key B0
//	        wgcni0x key A1  ═══ Spare   ═══  wgcni0x key B1
//
//	out     all of A's pairs move to Spare; then wgcni0 gets key A1
//	back    they move back to Primary; then wgcni0x goes, and A makes a key A2
//
// B may or may not rotate meanwhile: B1 is the key that it would change to.

// A Plane is one of the two tunnels that a pair of nodes may have.
type Plane bool

// The planes.
const (
	Primary Plane = false
	Spare   Plane = true
)

// String returns the plane's name.
func (p Plane) String() string {
	if p == Spare {
		return "spare"
	}
	return "primary"
}

// A Stage is how far a node has come with the rotation of its key.
type Stage string

// The stages.
const (
	Resting Stage = ""     // none is going on
	Out     Stage = "out"  // its pairs move to the spare plane
	Back    Stage = "back" // its primary interface has the new key; they move back
)

// A SpareEnd is how a node is reached on the spare plane. The zero value is a node
// that has none.
type SpareEnd struct {
	PublicKey    wgtypes.Key
	PresharedKey Fingerprint // as Node.PresharedKey
	Port         uint16      // UDP, at the address of the node's endpoint
}

// SpareLink is the second interface, with its peers. The zero value is its absence.
type SpareLink struct {
	Link  Link
	Peers []Peer
}

// crossKeepalive is that of a pair's peers while it changes planes: it starts a
// handshake at once, and again while none succeeds.
const crossKeepalive = 5 * time.Second

// SpareInterface is the name of the second interface: Linux has room for 15 characters.
func SpareInterface(primary string) string {
	const most = 15
	return primary[:min(len(primary), most-1)] + "x"
}

// planes are those by which this node sends to its neighbours, where it is not the
// primary. It takes the spare end from nodes that share a key with others.
func (p *Plan) planes(f Facts, nodes []Node) map[string]Plane {
	if len(f.Crossing) == 0 || f.SparePort == 0 {
		return nil
	}
	p.Conflicts = append(p.Conflicts, refuseSpareKeys(f.Self, nodes)...)
	by := map[string]Plane{}
	for _, n := range nodes {
		if plane, crossing := f.Crossing[n.Name]; crossing && n.Crosses(f.Self) {
			by[n.Name] = plane
		}
	}
	return by
}

// addSpare plans the second tunnels to the neighbours that have them, once the
// first are complete.
func (p *Plan) addSpare(f Facts, nodes []Node, by map[string]Plane) {
	if len(by) == 0 {
		return
	}
	ends := make(map[string]SpareEnd, len(by))
	for _, n := range nodes {
		if _, crosses := by[n.Name]; crosses {
			ends[n.Name] = n.Spare
		}
	}
	for i := range p.Peers {
		peer := &p.Peers[i]
		end, ok := ends[peer.Name]
		if !ok {
			continue
		}
		peer.Keepalive = crossKeepalive
		spare := *peer
		spare.PublicKey, spare.PresharedKey, spare.AllowedIPs = end.PublicKey, end.PresharedKey, slices.Clone(peer.AllowedIPs)
		if spare.Endpoint.IsValid() {
			spare.Endpoint = netip.AddrPortFrom(spare.Endpoint.Addr(), end.Port)
		}
		p.Spare.Peers = append(p.Spare.Peers, spare)
	}
	if len(p.Spare.Peers) == 0 {
		return
	}
	p.Spare.Link = p.Link
	p.Spare.Link.Name, p.Spare.Link.PublicKey, p.Spare.Link.ListenPort = SpareInterface(f.Interface), f.Self.Spare.PublicKey, f.SparePort
}

// Crosses reports whether two nodes can have a tunnel on the spare plane.
func (n Node) Crosses(other Node) bool {
	return n.Spare.Port != 0 && other.Spare.Port != 0 && hasKey(n.Spare.PublicKey) && hasKey(other.Spare.PublicKey) &&
		n.Spare.PublicKey != other.Spare.PublicKey && !n.Plain() && !other.Plain()
}

// refuseSpareKeys takes the spare end from nodes that share its key with another:
// their tunnels stay on the primary plane.
func refuseSpareKeys(self Node, nodes []Node) (conflicts []Conflict) {
	users := make(map[wgtypes.Key][]string, 2*len(nodes))
	for _, n := range append(slices.Clip(nodes), self) {
		users[n.PublicKey] = append(users[n.PublicKey], n.Name)
		if n.Spare.PublicKey != n.PublicKey { // they are equal while the node is Back
			users[n.Spare.PublicKey] = append(users[n.Spare.PublicKey], n.Name)
		}
	}
	for i := range nodes {
		n := &nodes[i]
		if names := users[n.Spare.PublicKey]; hasKey(n.Spare.PublicKey) && len(names) > 1 {
			others := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == n.Name })
			slices.Sort(others)
			conflicts = append(conflicts, Conflict{
				Node: n.Name, What: "next public key " + n.Spare.PublicKey.String(), Reason: strings.Join(others, ", ") + " has the same",
			})
			n.Spare = SpareEnd{}
		}
	}
	return conflicts
}
