package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Encryption says what becomes of cluster traffic that cannot be encrypted.
type Encryption int

const (
	// Required drops it, in both directions.
	Required Encryption = iota
	// Preferred lets it pass in the clear while its node has not joined the
	// mesh. It is meant for roll-outs.
	Preferred
)

// String returns the word that the configuration uses.
func (e Encryption) String() string {
	if e == Preferred {
		return "preferred"
	}
	return "required"
}

// UnmarshalText parses "required" or "preferred".
func (e *Encryption) UnmarshalText(text []byte) error {
	switch string(text) {
	case "required":
		*e = Required
	case "preferred":
		*e = Preferred
	default:
		return fmt.Errorf(`%q is neither "required" nor "preferred"`, text)
	}
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (e Encryption) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// Settings are the parts of a node's configuration that shape its data plane.
type Settings struct {
	// ClusterCIDRs bound everything: no address outside them is ever routed,
	// allowed or announced. Masked, at least one, both families welcome.
	ClusterCIDRs []netip.Prefix
	// ExternalCIDRs bound the addresses of machines that are no nodes, and of what is
	// behind them: claims inside them are accepted as those inside ClusterCIDRs are.
	// Pods reach them by the tunnel only. Masked, disjoint from ClusterCIDRs.
	ExternalCIDRs []netip.Prefix
	// PeerCIDRs are where machines that run nothing but WireGuard have their
	// addresses; see Node.Via. Masked, disjoint from the two above.
	PeerCIDRs  []netip.Prefix
	Encryption Encryption

	Interface  string // name of the WireGuard interface
	ListenPort int    // UDP, 1 to 65535
	SparePort  int    // the same, of the second interface; see Plane. 0: never one
	MTU        int    // of the interface and of the pods' links, in bytes

	FwMark       uint32 // exactly one bit; value and mask at once
	Table        int    // routing table that is ours
	RulePriority int    // of the rule that leads there

	Keepalive time.Duration // of every peer; 0 is off

	// EncryptNodes has the machines' own traffic encrypted too: between nodes
	// that both want it, and between their pods and them.
	EncryptNodes bool
	// DirectPorts are the TCP ports that stay outside of the tunnel all the same,
	// so that a machine whose tunnel is broken can be reached. Sorted.
	DirectPorts []uint16
}

// Bounds are the ranges that claims must lie in.
type Bounds struct{ Cluster, External, Peer []netip.Prefix }

// Bounds are those of the settings.
func (s Settings) Bounds() Bounds { return Bounds{s.ClusterCIDRs, s.ExternalCIDRs, s.PeerCIDRs} }

// Claimable are the ranges of what nodes have behind them.
func (b Bounds) Claimable() []netip.Prefix { return slices.Concat(b.Cluster, b.External) }

// All are those that the tunnel is for.
func (b Bounds) All() []netip.Prefix { return slices.Concat(b.Cluster, b.External, b.Peer) }

// A Claim is a prefix that a node says is behind it.
type Claim struct {
	Prefix netip.Prefix `json:"prefix"`
	// Since is when the node began to hold the prefix. Between two nodes that
	// claim the same one it decides, see Owners.
	Since time.Time `json:"since"`
}

// ClaimTime is a time as claims have it: in UTC, and in whole milliseconds.
func ClaimTime(t time.Time) time.Time { return t.UTC().Truncate(time.Millisecond) }

// Node is one machine of the mesh, as its record describes it.
type Node struct {
	Name      string
	PublicKey wgtypes.Key
	// PresharedKey is of the key that this node and that one share; the zero
	// value when they share none.
	PresharedKey Fingerprint
	// Spare is its other end; see Plane.
	Spare SpareEnd
	// Endpoint is where its WireGuard listens; the zero value when it is not
	// known or could not be resolved.
	Endpoint netip.AddrPort
	// CallsOnly says that it has none at all: it stands behind NAT, and can only call others.
	CallsOnly bool
	// CalledInside says that only machines of its own location can call it there.
	CalledInside bool
	// Prefixes are the node's own pod ranges. Of two nodes that claim the same
	// addresses the one that has held them longer keeps them.
	Prefixes []Claim
	// Pods cover single pods outside of Prefixes. Of two nodes that claim the
	// same one the newer claim wins, since pods move.
	Pods []Claim
	// Hosts are the machine's own addresses that are reached through the tunnel
	// by nodes that have some themselves; see Settings.EncryptNodes. Single ones.
	Hosts []Claim
	// Addresses are the machine's own: never pods.
	Addresses []netip.Addr
	// Since is when the node joined the mesh.
	Since time.Time

	// Location is where the machine stands, Role what it does there, and Segments
	// are the parts of the mesh that it belongs to, sorted; see Topology.
	Location string
	Role     Role
	Segments []string
	// Silent are the other gateways of its location that this one, being a gateway,
	// does not hear.
	Silent []Silence

	// Via are the nodes by which a machine enters that runs nothing but WireGuard,
	// the preferred one first. It publishes nothing: its addresses, single ones inside
	// PeerCIDRs, are its Prefixes, and whichever of Via carries it claims them as its Pods.
	Via []string
	// Masqueraded has the node that carries it rewrite its addresses to that node's
	// own, so that no other needs to know them.
	Masqueraded bool
}

// Plain reports whether the machine runs nothing but WireGuard.
func (n Node) Plain() bool { return len(n.Via) > 0 }

// Role is what a machine does for others.
type Role string

// The roles. The zero value is a node.
const (
	RoleNode    Role = ""        // talks to all nodes of its location
	RoleGateway Role = "gateway" // carries what enters and leaves its location
	RoleSpoke   Role = "spoke"   // talks to its location's gateway only
)

// A Silence is a gateway that is not heard, and since when.
type Silence struct {
	Node  string    `json:"node"`
	Since time.Time `json:"since"`
}

// TunnelAddresses are the node's addresses inside the tunnel, at most one a
// family: the network address of its first prefix, which no IPAM hands out
// and every peer already allows.
func (n Node) TunnelAddresses() []netip.Addr {
	var v4, v6 netip.Addr
	for _, c := range n.Prefixes {
		a := c.Prefix.Masked().Addr()
		switch {
		case a.Is4() && !v4.IsValid():
			v4 = a
		case a.Is6() && !v6.IsValid():
			v6 = a
		}
	}
	var out []netip.Addr
	for _, a := range []netip.Addr{v4, v6} {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

// Facts are everything a plan depends on.
type Facts struct {
	Settings

	// Self is this node. While its PublicKey is zero the node has no key yet:
	// the plan then holds all that keeps plaintext from leaving, and no tunnel.
	// So it does where the key is among Revoked.
	Self Node
	// Nodes are all known machines; Self may be among them, by name.
	Nodes []Node
	// Revoked are the public keys that nobody may use any more, each with the
	// name of the forgotten node that it belonged to.
	Revoked map[wgtypes.Key]string
	// LocalPods are the addresses of the pods attached to this node, in any order.
	LocalPods []netip.Addr
	// Crossing are the nodes with which this one has tunnels on both planes, each
	// with the plane by which this one sends.
	Crossing map[string]Plane
	// Now decides which of the Hosts have been known for HostsSettle. While it is
	// zero all have.
	Now time.Time
}

// hasKey reports whether k is set.
func hasKey(k wgtypes.Key) bool { return k != wgtypes.Key{} }

// Room is the largest packet, in bytes, that fits into one underlay packet once
// WireGuard has wrapped it: the underlay's MTU less 60 when every endpoint is
// IPv4, less 80 otherwise (outer header 20 or 40, UDP 8, WireGuard 32; see
// "Protocol" on wireguard.com).
func Room(underlay int, endpoints []netip.AddrPort) int {
	overhead := 60
	for _, e := range endpoints {
		if e.Addr().IsValid() && !e.Addr().Unmap().Is4() {
			overhead = 80
		}
	}
	return underlay - overhead
}

// LeastMTU is the least MTU, in bytes, that the interface and the pods' links may
// have: 1280 for IPv6 (RFC 8200, section 5), which Linux takes off a link with
// less, and 576 for IPv4, which every host accepts (RFC 791).
func LeastMTU(clusterCIDRs []netip.Prefix) int {
	if slices.ContainsFunc(clusterCIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		return 1280
	}
	return 576
}
