package mesh

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// HostsSettle is how long a host claim is known before anybody routes by it.
// Both ends begin to allow at once and to route at about the same time, so that
// nothing is sent into a tunnel whose far end has not heard of it yet.
const HostsSettle = 3 * time.Second

// hostKeepalive is that of the peers whose machines are reached through the
// tunnel, where the settings have none: it renews the session every two minutes
// (REKEY_AFTER_TIME), so that one whose last handshake is not fresh is out of reach.
const hostKeepalive = 25 * time.Second

// NodeFilter is the part of the nftables table that concerns the machines' own
// traffic. With Mark 0 there is none.
//
// Without encryptNodes they are those inside externalCIDRs. What it does: packets that carry Mark are routed past the tunnel, as
// WireGuard's own are. So are the answers to what a peer has begun to send in the
// clear, until the peer goes on by the tunnel: a machine that has no tunnel yet,
// or none any more, reaches the others. So is TCP from and to DirectPorts.
// Without the mark, packets to Held that leave by an interface other than the
// tunnel are dropped and counted, and so are those from Held to pods that came
// in by another.
type NodeFilter struct {
	Mark        uint32       // of packets and of connections
	Own         []netip.Addr // this node's addresses that others reach through the tunnel
	Peers       []netip.Addr // those of others
	Held        []netip.Addr // of Peers
	DirectPorts []uint16
}

// ReachesHosts reports whether there may be machines that this one reaches through
// the tunnel by their own addresses.
func (s Settings) ReachesHosts() bool { return s.EncryptNodes || len(s.ExternalCIDRs) > 0 }

func nodeFilter(f Facts) NodeFilter {
	if !f.ReachesHosts() {
		return NodeFilter{}
	}
	return NodeFilter{Mark: f.FwMark, DirectPorts: slices.Clone(f.DirectPorts)}
}

// Equal reports whether both are the same.
func (n NodeFilter) Equal(o NodeFilter) bool {
	return n.Mark == o.Mark && slices.Equal(n.Own, o.Own) && slices.Equal(n.Peers, o.Peers) &&
		slices.Equal(n.Held, o.Held) && slices.Equal(n.DirectPorts, o.DirectPorts)
}

func (n *NodeFilter) sort() {
	for _, set := range []*[]netip.Addr{&n.Own, &n.Peers, &n.Held} {
		slices.SortFunc(*set, netip.Addr.Compare)
	}
	slices.Sort(n.DirectPorts)
}

func (n NodeFilter) sets() string {
	return fmt.Sprintf("nodes %v held %v own %v direct %v", n.Peers, n.Held, n.Own, n.DirectPorts)
}

// between is what the table holds while the routes change from those of have to
// those of n: every machine that is routed is among Peers, and none is Held that
// is not routed yet.
func (n NodeFilter) between(have NodeFilter) NodeFilter {
	if n.Mark == 0 {
		return n
	}
	n.Own = SortAddrs(slices.Concat(n.Own, have.Own))
	n.Peers = SortAddrs(slices.Concat(n.Peers, have.Peers))
	var held []netip.Addr
	for _, a := range n.Held {
		if slices.Contains(have.Held, a) {
			held = append(held, a)
		}
	}
	n.Held = held
	return n
}

func (d *differ) setFilterNodes(want NodeFilter) {
	if want.Mark != 0 && !d.filterNodes.Equal(want) {
		d.add(SetFilterNodes{want})
		d.filterNodes = want
	}
}

// releaseNodes lets the machines' own packets pass before their routes go: where
// all is taken away there is nothing to hold them for.
func (d *differ) releaseNodes() {
	have := d.observed.Filter
	if d.filterNodes = have.Nodes; !have.Broken && len(have.Nodes.Held) > 0 {
		free := have.Nodes
		free.Held = nil
		d.setFilterNodes(free)
	}
}

// setSrcValidMark comes when the table is there, which remembers what was before.
func (d *differ) setSrcValidMark(on bool) {
	if d.planned.SrcValidMark == on && d.observed.SrcValidMark != on {
		d.add(SetSrcValidMark{On: on})
	}
}

// settleHosts hands out the machines' own addresses, the newest claim first.
func (o *Ownership) settleHosts(nodes []Node, owner map[netip.Prefix]holding) {
	claims := holdings(nodes, o.Refused, func(n Node) []Claim { return n.Hosts })
	slices.SortStableFunc(claims, func(a, b holding) int {
		return cmp.Or(b.since.Compare(a.since), cmp.Compare(a.node, b.node), ComparePrefixes(a.prefix, b.prefix))
	})
	taken := map[netip.Prefix]string{}
	for _, h := range claims {
		by, twice := taken[h.prefix]
		switch {
		case !usableHost(h.prefix):
			o.refuse(h.node, "host "+h.prefix.String(), "not the address of one machine")
		case o.heldByOther(h, owner):
		case twice && by != h.node:
			o.refuse(h.node, "host "+h.prefix.String(), "%s has the newer claim", by)
		case twice || slices.Contains(o.Prefixes[h.node], h.prefix): // reached by that already
		default:
			taken[h.prefix] = h.node
			o.Hosts[h.node] = append(o.Hosts[h.node], Claim{Prefix: h.prefix, Since: h.since})
		}
	}
}

// heldByOther reports whether a host claim lies in what another node holds for its pods.
func (o *Ownership) heldByOther(h holding, owner map[netip.Prefix]holding) bool {
	for bits := h.prefix.Bits(); bits > 0; bits-- {
		p, _ := h.prefix.Addr().Prefix(bits)
		if other, found := owner[p]; found && other.node != h.node {
			o.refuse(h.node, "host "+h.prefix.String(), "it lies inside %s of %s", other.prefix, other.node)
			return true
		}
	}
	return false
}

// usableHost reports whether packets to an address go to a machine, and to one only.
func usableHost(p netip.Prefix) bool {
	a := p.Addr()
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return p.IsSingleIP() && a.IsGlobalUnicast() && a != broadcast && !a.Is4In6()
}

// hostPlan is what the plan for each peer's machine depends on.
type hostPlan struct {
	facts  Facts
	owners Ownership
	here   map[netip.Prefix]bool // this node's own addresses and pods
	own    map[bool]netip.Addr   // this node's addresses that have settled, by being IPv6
	young  map[bool]bool         // it has some that have not
	exempt map[netip.Addr]bool
}

// hostPlan is nil where no machine is reached by its own address.
func (p *Plan) hostPlan(f Facts, owners Ownership) *hostPlan {
	if !f.ReachesHosts() {
		return nil
	}
	h := &hostPlan{
		facts: f, owners: owners,
		here: map[netip.Prefix]bool{}, own: map[bool]netip.Addr{}, young: map[bool]bool{}, exempt: map[netip.Addr]bool{},
	}
	for _, a := range slices.Concat(f.Self.Addresses, f.LocalPods) {
		h.here[hostPrefix(a.Unmap())] = true
	}
	for _, c := range f.Self.Hosts {
		h.here[c.Prefix] = true
	}
	for _, c := range owners.Hosts[f.Self.Name] {
		a := c.Prefix.Addr()
		switch {
		case !f.settled(c):
			h.young[a.Is6()] = true
		case !h.own[a.Is6()].IsValid():
			h.own[a.Is6()] = a
			p.Filter.Nodes.Own = append(p.Filter.Nodes.Own, a)
		}
	}
	for _, a := range owners.Exempt {
		h.exempt[a] = true
	}
	return h
}

// settled reports whether a claim is known for long enough. A clock that is far
// off says nothing about that.
func (f Facts) settled(c Claim) bool {
	return f.Now.IsZero() || f.Now.Sub(c.Since).Abs() >= HostsSettle
}

// addHosts lets the named machine use the tunnel by that peer, and routes it there.
// One outside of externalCIDRs is not meant for machines without encryptNodes, nor
// is it carried by others: its packets come and go in the clear.
func (p *Plan) addHosts(h *hostPlan, peer *Peer, name string, source map[bool]netip.Addr, by Plane) {
	if h == nil {
		return
	}
	for _, c := range h.owners.Hosts[name] {
		external := anyCovers(h.facts.ExternalCIDRs, c.Prefix)
		if !external && (!h.facts.EncryptNodes || peer.Name != name) {
			continue
		}
		if h.here[c.Prefix] {
			p.Conflicts = append(p.Conflicts, Conflict{Node: name, What: "host " + c.Prefix.String(), Reason: "the address is in use on this node"})
			continue
		}
		peer.AllowedIPs = append(slices.Clip(peer.AllowedIPs), c.Prefix)
		routed := h.routes(c, external)
		if routed {
			v6 := c.Prefix.Addr().Is6()
			own, ok := h.own[v6]
			if !ok {
				own = source[v6]
			}
			p.routeHost(h, c.Prefix, own, by)
		}
		// One of the two shakes hands ahead: both at the same moment, when both
		// begin to route, would collide and lose what is sent for REKEY_TIMEOUT, 5 s.
		if routed || h.facts.Self.Name < name {
			peer.Keepalive = cmp.Or(peer.Keepalive, hostKeepalive)
		}
	}
}

// routes reports whether a machine is reached by the tunnel now. Where this one
// has an address of its own the other answers to that, and has to know it first.
func (h *hostPlan) routes(c Claim, external bool) bool {
	v6 := c.Prefix.Addr().Is6()
	return h.facts.settled(c) && (h.own[v6].IsValid() || external && !h.young[v6])
}

// routeHost leads to a machine by the tunnel, with a source address that it can
// answer to, if there is one. A machine inside the cluster's ranges would be unreachable when the interface goes, for what the filter lets pass as
// well: the route that it has without encryptNodes stays behind the other.
func (p *Plan) routeHost(h *hostPlan, host netip.Prefix, own netip.Addr, by Plane) {
	a, f := host.Addr(), h.facts
	if h.exempt[a] {
		i := slices.IndexFunc(p.Routes, func(r Route) bool { return r.Prefix == host && r.Type == Throw })
		p.Routes[i].Metric = guardMetric
	}
	p.Routes = append(p.Routes, Route{Prefix: host, Type: ViaLink, Source: own, Table: f.Table, Plane: by})
	rule := Rule{IPv6: a.Is6(), Priority: f.RulePriority, FwMark: f.FwMark, Table: f.Table}
	if !slices.Contains(p.Rules, rule) { // pods may be of the other family only
		p.Rules = append(p.Rules, rule)
	}
	nodes := &p.Filter.Nodes
	nodes.Peers = append(nodes.Peers, a)
	if f.Encryption == Required {
		nodes.Held = append(nodes.Held, a)
	}
}

// AnnounceHosts returns the claims to a machine's own addresses that a node
// publishes. Those that it held before keep their time; new ones begin at now.
func AnnounceHosts(addresses []netip.Addr, before []Claim, now time.Time) (out []Claim) {
	for _, a := range addresses {
		if p := hostPrefix(a.Unmap()); usableHost(p) {
			out = append(out, keepTime(before, p, now))
		}
	}
	return out
}
