package mesh

import (
	"net/netip"
	"slices"
	"strconv"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// State is what a kernel holds of ours. NewPlan makes the wish, kernel.Observe
// the observation; both are sorted.
type State struct {
	Link      Link
	Addresses []netip.Prefix // of Link
	Peers     []Peer         // of Link
	Spare     SpareLink      // there while keys are rotated
	Routes    []Route
	Rules     []Rule
	Filter    Filter
	// SrcValidMark has the reverse path filter heed packets' marks: without, a
	// strict one drops WireGuard's own packets from nodes that are routed into the
	// tunnel (rp_filter in Documentation/networking/ip-sysctl.rst).
	SrcValidMark bool
}

// Link is the WireGuard interface. The zero value is its absence.
type Link struct {
	Name       string
	MTU        int
	Up         bool
	PublicKey  wgtypes.Key
	ListenPort int
	FwMark     uint32
}

// Peer is one WireGuard peer.
type Peer struct {
	Name         string // of its node; only plans know it
	PublicKey    wgtypes.Key
	PresharedKey Fingerprint
	Endpoint     netip.AddrPort
	AllowedIPs   []netip.Prefix
	Keepalive    time.Duration

	// What only an observation knows.
	LastHandshake time.Time
	ReceiveBytes  int64
	TransmitBytes int64
}

// RouteType is what a route does with a packet.
type RouteType int

const (
	// ViaLink sends it into the tunnel.
	ViaLink RouteType = iota
	// Throw goes on with the next rule: the main table knows better.
	Throw
	// Unreachable refuses it.
	Unreachable
)

// guardMetric lets the unreachable route of a cluster CIDR stand beside, and
// behind, another route for the very same prefix.
const guardMetric = 1 << 20

// Route is one route of ours. Its key is (Prefix, Table, Metric).
type Route struct {
	Prefix netip.Prefix
	Type   RouteType
	Source netip.Addr // preferred source address, or none
	Table  int
	Metric int // 0 is the family's default
	// Plane is the interface that a route of type ViaLink leads into.
	Plane Plane
}

// Rule sends all packets that do not carry the mark to the table.
type Rule struct {
	IPv6     bool
	Priority int
	FwMark   uint32 // value and mask
	Table    int
}

// Filter is the content of the nftables table. The zero value is its absence.
//
// What it does: a packet from Cluster to Guarded that leaves by an interface
// other than Interface is dropped and counted, and so is one from Guarded to
// Cluster that came in by another. For what this machine itself sends and gets
// Withheld takes the place of Guarded: a part of it, so that no machine is cut off
// from its gateway. Local, Pods and Exempt addresses at the far end are excepted.
// A packet from Local or Pods that leaves by Interface keeps its source address,
// whatever masquerades later.
type Filter struct {
	Interface string
	FwMark    uint32 // one bit: what carries it asks the tables of others only
	Cluster   []netip.Prefix
	Guarded   []netip.Prefix // disjoint
	Withheld  []netip.Prefix // disjoint
	Local     []netip.Prefix // disjoint: this node's own ranges
	Pods      []netip.Addr   // this node's pods outside of Local
	// Behind are those of Local that may lie behind a router of this machine's own: the
	// networks of a machine that is no node. All else of Local is on its links.
	Behind []netip.Prefix
	Exempt []netip.Addr // node addresses inside Cluster
	// Masqueraded are the ranges of machines that only this node knows: what comes
	// from them leaves by Interface with this node's address.
	Masqueraded []netip.Prefix
	Nodes       NodeFilter
	// Broken is set by an observation: the table is there, but its chains or
	// rules are not as we make them.
	Broken bool
}

// present reports whether there is such a table.
func (f Filter) present() bool { return f.Interface != "" || f.Broken }

// sameSets reports whether all but Pods is equal.
func (f Filter) sameSets(g Filter) bool {
	return f.Interface == g.Interface && slices.Equal(f.Cluster, g.Cluster) && slices.Equal(f.Guarded, g.Guarded) &&
		slices.Equal(f.Withheld, g.Withheld) && slices.Equal(f.Local, g.Local) && slices.Equal(f.Exempt, g.Exempt) &&
		slices.Equal(f.Masqueraded, g.Masqueraded) && slices.Equal(f.Behind, g.Behind)
}

func compareRoutes(a, b Route) int {
	if c := ComparePrefixes(a.Prefix, b.Prefix); c != 0 {
		return c
	}
	if a.Table != b.Table {
		return a.Table - b.Table
	}
	return a.Metric - b.Metric
}

func compareRules(a, b Rule) int {
	switch {
	case a.IPv6 != b.IPv6:
		if b.IPv6 {
			return -1
		}
		return 1
	case a.Priority != b.Priority:
		return a.Priority - b.Priority
	case a.Table != b.Table:
		return a.Table - b.Table
	}
	return int(a.FwMark) - int(b.FwMark)
}

func comparePeers(a, b Peer) int { return slices.Compare(a.PublicKey[:], b.PublicKey[:]) }

// Sort puts every list into its one order. NewPlan's states are sorted; an
// adapter calls it on what it observed.
func (s *State) Sort() {
	slices.SortFunc(s.Addresses, ComparePrefixes)
	for _, peers := range [][]Peer{s.Peers, s.Spare.Peers} {
		slices.SortFunc(peers, comparePeers)
		for i := range peers {
			slices.SortFunc(peers[i].AllowedIPs, ComparePrefixes)
		}
	}
	slices.SortFunc(s.Routes, compareRoutes)
	slices.SortFunc(s.Rules, compareRules)
	for _, set := range []*[]netip.Prefix{&s.Filter.Cluster, &s.Filter.Guarded, &s.Filter.Withheld, &s.Filter.Local, &s.Filter.Behind, &s.Filter.Masqueraded} {
		slices.SortFunc(*set, ComparePrefixes)
	}
	slices.SortFunc(s.Filter.Pods, netip.Addr.Compare)
	slices.SortFunc(s.Filter.Exempt, netip.Addr.Compare)
	s.Filter.Nodes.sort()
}

// String prints the route as ip(8) would take it, without the device.
func (r Route) String() string {
	s := r.Prefix.String()
	switch r.Type {
	case Throw:
		s = "throw " + s
	case Unreachable:
		s = "unreachable " + s
	}
	if r.Source.IsValid() {
		s += " src " + r.Source.String()
	}
	if r.Metric != 0 {
		s += " metric " + strconv.Itoa(r.Metric)
	}
	return s + " table " + strconv.Itoa(r.Table)
}

// String prints the rule as ip(8) would take it.
func (r Rule) String() string {
	family := "ipv4"
	if r.IPv6 {
		family = "ipv6"
	}
	mark := "0x" + strconv.FormatUint(uint64(r.FwMark), 16)
	return family + " priority " + strconv.Itoa(r.Priority) + " not fwmark " + mark + "/" + mark + " lookup " + strconv.Itoa(r.Table)
}
