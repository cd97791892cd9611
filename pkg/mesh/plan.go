package mesh

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Plan is the state a node's kernel should hold, and the claims that were refused on the way.
type Plan struct {
	State
	Conflicts []Conflict
}

// NewPlan turns facts into the plan. It never fails: what cannot be served is a Conflict.
func NewPlan(f Facts) Plan {
	local, claimable := claimPrefixes(f.Self.Prefixes), f.Bounds().Claimable()
	local = slices.DeleteFunc(local, func(p netip.Prefix) bool { return !anyCovers(claimable, p) })

	conflict, revoked := revocation(f.Self, f.Revoked)
	if revoked {
		f.Self.PublicKey = wgtypes.Key{} // as while there is none: the tunnel goes, what guards stays
	}
	nodes := slices.DeleteFunc(slices.Clone(f.Nodes), func(n Node) bool { return n.Name == f.Self.Name })
	owners := Owners(append(nodes, f.Self), f.Bounds(), f.Revoked)
	f.LocalPods = remaining(f, owners)
	pods := outside(f.LocalPods, local, claimable)

	p := Plan{Conflicts: owners.Conflicts}
	if revoked {
		p.Conflicts = append(p.Conflicts, conflict)
	}
	p.Routes = localRoutes(f, local, pods, owners.Exempt)
	p.Rules = rules(f.Settings)
	p.SrcValidMark = f.ReachesHosts()
	p.Filter = Filter{
		Interface: f.Interface,
		FwMark:    f.FwMark,
		Cluster:   Merge(f.Bounds().All()),
		Local:     Merge(local),
		Behind:    Merge(inside(f.ExternalCIDRs, local)),
		Pods:      pods,
		Exempt:    owners.Exempt,
		Nodes:     nodeFilter(f),
	}
	if hasKey(f.Self.PublicKey) {
		p.addTunnel(f, nodes, owners)
	}
	p.Filter.Guarded, p.Filter.Withheld = guarded(f, owners)
	slices.SortFunc(p.Conflicts, compareConflicts)
	p.Sort()
	return p
}

// inside are those of the prefixes that one of the bounds covers.
func inside(bounds, prefixes []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool { return !anyCovers(bounds, p) })
}

// addTunnel plans the interface, its peers and the routes into it.
func (p *Plan) addTunnel(f Facts, nodes []Node, owners Ownership) {
	p.Link = Link{
		Name: f.Interface, MTU: f.MTU, Up: true,
		PublicKey: f.Self.PublicKey, ListenPort: f.ListenPort, FwMark: f.FwMark,
	}
	hosts := p.hostPlan(f, owners)
	source := p.sources(f, hosts)
	ours := p.ours(f)
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(n Node) bool { return owners.Refused[n.Name] })
	by := p.planes(f, nodes)
	topology := NewTopology(append(nodes, f.Self), owners.Carrier)
	neighbours := p.addPeers(f, nodes, topology, owners)
	p.Routes = slices.Grow(p.Routes, 2*len(nodes))
	for _, n := range nodes {
		next, ok := neighbours[topology.Next(f.Self.Name, n.Name)]
		if !ok {
			if why := topology.WhyNot(f.Self.Name, n.Name); why != "" {
				p.Conflicts = append(p.Conflicts, Conflict{Node: n.Name, What: "traffic with " + f.Self.Name, Reason: why})
			}
			continue
		}
		peer := &p.Peers[next]
		for _, q := range owners.Prefixes[n.Name] {
			if ours[q] {
				continue
			}
			peer.AllowedIPs = append(peer.AllowedIPs, q)
			p.Routes = append(p.Routes, Route{Prefix: q, Type: ViaLink, Source: source[q.Addr().Is6()], Table: f.Table, Plane: by[peer.Name]})
		}
		p.addHosts(hosts, peer, n.Name, source, by[peer.Name])
	}
	p.addSpare(f, nodes, by)
}

// sources are the addresses that this machine's own packets into the tunnel have,
// by being IPv6: the machine's own if everybody reaches it by that, else the
// tunnel's, else the one by which some do.
func (p *Plan) sources(f Facts, hosts *hostPlan) map[bool]netip.Addr {
	source := map[bool]netip.Addr{}
	if hosts != nil {
		maps.Copy(source, hosts.own)
	}
	self, claimable := f.Self, f.Bounds().Claimable()
	self.Prefixes = slices.DeleteFunc(slices.Clone(self.Prefixes), func(c Claim) bool { return !anyCovers(claimable, c.Prefix) })
	for _, a := range self.TunnelAddresses() { // of a prefix that peers can allow
		p.Addresses = append(p.Addresses, hostPrefix(a))
		source[a.Is6()] = a
	}
	if hosts != nil {
		for v6, a := range hosts.own {
			if anyContains(f.ExternalCIDRs, a) {
				source[v6] = a
			}
		}
	}
	for _, c := range self.Prefixes { // a single address is the machine's own, be it not the first
		if q := c.Prefix.Masked(); q.IsSingleIP() && !slices.Contains(p.Addresses, q) {
			p.Addresses = append(p.Addresses, q)
		}
	}
	return source
}

// ours are the local pods and ranges: whatever others claim, a node knows best
// where its own pods are.
func (p *Plan) ours(f Facts) map[netip.Prefix]bool {
	ours := map[netip.Prefix]bool{}
	for _, a := range f.LocalPods {
		ours[hostPrefix(a.Unmap())] = true
	}
	for _, r := range p.Routes {
		if r.Metric == 0 {
			ours[r.Prefix] = true
		}
	}
	return ours
}

const (
	// GatewayKeepalive lets the gateways of a location hear each other, so that one
	// that is silent is noticed.
	GatewayKeepalive = 3 * time.Second
	// natKeepalive keeps the mapping of a NAT alive: those of UDP live for 30 s or
	// more (RFC 4787 asks for 2 minutes, and few do that). It keeps a session warm
	// as well.
	natKeepalive = 25 * time.Second
)

// addPeers plans the peers, with no allowed IPs yet, and returns which is whose.
func (p *Plan) addPeers(f Facts, nodes []Node, topology Topology, owners Ownership) map[string]int {
	neighbours := make(map[string]int, len(nodes))
	var masqueraded []Node
	at := map[string]int{}
	p.Peers = make([]Peer, 0, len(nodes))
	for _, n := range nodes {
		if slices.Contains(n.Via, f.Self.Name) && !n.Masqueraded && !MayCarry(f.Self.Segments, n.Segments) {
			p.Conflicts = append(p.Conflicts, Conflict{
				Node: n.Name, What: "entry by " + f.Self.Name, Reason: "this node is in a segment that the machine is not in, and would let others of that segment in to it",
			})
			continue
		}
		warm := topology.warm(f.Self.Name, n.Name)
		if !warm && topology.Next(f.Self.Name, n.Name) != n.Name && !slices.Contains(n.Via, f.Self.Name) {
			continue
		}
		keepalive := f.Keepalive
		switch {
		case n.Plain(): // it calls the node that is to carry it, and is called by none
			keepalive = 0
		case f.Self.Role == RoleGateway && n.Role == RoleGateway && f.Self.Location == n.Location:
			keepalive = GatewayKeepalive
		case !n.canCall(f.Self), warm && f.Self.warms(n):
			keepalive = cmp.Or(keepalive, natKeepalive)
		}
		peer := Peer{Name: n.Name, PublicKey: n.PublicKey, PresharedKey: n.PresharedKey, Keepalive: keepalive}
		if f.Self.canCall(n) {
			peer.Endpoint = owners.Endpoints[n.Name]
		}
		if n.Masqueraded {
			masqueraded = append(masqueraded, n)
			at[n.Name] = len(p.Peers)
		} else {
			neighbours[n.Name] = len(p.Peers)
		}
		p.Peers = append(p.Peers, peer)
	}
	slices.SortFunc(masqueraded, func(a, b Node) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Name, b.Name)) })
	for _, n := range masqueraded {
		p.addMasqueraded(f, &p.Peers[at[n.Name]], n, owners)
	}
	return neighbours
}

// canCall reports whether the other can be called from here, at its endpoint.
func (n Node) canCall(other Node) bool {
	return callable(other.CallsOnly, other.CalledInside, n.Location == other.Location)
}

// warms reports whether it is for this machine, not for the other, to keep the
// session between the two warm.
func (n Node) warms(other Node) bool {
	if n.Role != other.Role {
		return other.Role == RoleGateway
	}
	return n.Name < other.Name
}

// addMasqueraded lets a machine in that only this node knows: the others see its
// packets come from here. Of two with the same addresses the older has them.
func (p *Plan) addMasqueraded(f Facts, peer *Peer, n Node, owners Ownership) {
	for _, c := range n.Prefixes {
		q := c.Prefix.Masked()
		if why := p.whyNotMasqueraded(f, q, owners); why != "" {
			p.Conflicts = append(p.Conflicts, Conflict{Node: n.Name, What: q.String(), Reason: why})
			continue
		}
		peer.AllowedIPs = append(peer.AllowedIPs, q)
		p.Routes = append(p.Routes, Route{Prefix: q, Type: ViaLink, Table: f.Table})
		p.Filter.Masqueraded = append(p.Filter.Masqueraded, q)
	}
}

func (p *Plan) whyNotMasqueraded(f Facts, q netip.Prefix, owners Ownership) string {
	inside := anyCovers(f.PeerCIDRs, q) && q.IsSingleIP()
	if !inside && slices.ContainsFunc(f.Bounds().All(), q.Overlaps) || q.Bits() == 0 {
		return "what is masqueraded lies outside of clusterCIDRs and externalCIDRs"
	}
	for _, name := range slices.Sorted(maps.Keys(owners.Prefixes)) {
		if inside && slices.Contains(owners.Prefixes[name], q) {
			return name + " has it"
		}
	}
	for _, name := range slices.Sorted(maps.Keys(owners.Endpoints)) {
		if e := owners.Endpoints[name]; q.Contains(e.Addr()) {
			return "the endpoint " + e.String() + " of " + name + " lies inside it"
		}
	}
	if slices.ContainsFunc(f.Self.Addresses, func(a netip.Addr) bool { return q.Contains(a.Unmap()) }) {
		return "an address of this node lies inside it"
	}
	if i := slices.IndexFunc(p.Filter.Masqueraded, q.Overlaps); i >= 0 {
		return "another machine that enters by this node has " + p.Filter.Masqueraded[i].String()
	}
	return ""
}

// remaining are the local pods without those that have moved: a pod whose late
// DEL has not come yet (CNI: ADD x for A, ADD x for B, DEL x for A), while
// another node has it by a newer claim than ours. A pod that we have not claimed
// yet has only just come.
func remaining(f Facts, owners Ownership) []netip.Addr {
	if owners.Refused[f.Self.Name] {
		return f.LocalPods // none of our claims was looked at
	}
	stands := map[netip.Prefix]bool{}
	for _, p := range owners.Prefixes[f.Self.Name] {
		stands[p] = true
	}
	lost := map[netip.Addr]bool{}
	for _, c := range f.Self.Pods {
		if p := c.Prefix.Masked(); p.IsSingleIP() && !stands[p] {
			lost[p.Addr()] = true
		}
	}
	if len(lost) == 0 {
		return f.LocalPods
	}
	moved := map[netip.Addr]bool{}
	for _, n := range f.Nodes {
		if n.Name == f.Self.Name {
			continue
		}
		ranges := claimPrefixes(n.Prefixes)
		for _, p := range owners.Prefixes[n.Name] {
			if slices.Contains(ranges, p) {
				continue
			}
			for a := range lost {
				moved[a] = moved[a] || p.Contains(a)
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(f.LocalPods), func(a netip.Addr) bool { return moved[a.Unmap()] })
}

// localRoutes are those that do not need the tunnel. What is inside externalCIDRs
// and not announced is left to the main table: it may be this machine's gateway.
// Pods do not get there, see Filter.
func localRoutes(f Facts, local []netip.Prefix, pods, exempt []netip.Addr) []Route {
	var out []Route
	throw := slices.Concat(local, hostPrefixes(pods), hostPrefixes(exempt))
	for _, p := range SortPrefixes(throw) {
		out = append(out, Route{Prefix: p, Type: Throw, Table: f.Table})
	}
	if f.Encryption == Required {
		for _, p := range Merge(slices.Concat(f.ClusterCIDRs, f.PeerCIDRs)) {
			out = append(out, Route{Prefix: p, Type: Unreachable, Table: f.Table, Metric: guardMetric})
		}
	}
	return out
}

// rules has one rule for each family that the tunnel is for.
func rules(s Settings) []Rule {
	var out []Rule
	all := s.Bounds().All()
	for _, v6 := range []bool{false, true} {
		if slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Addr().Is6() == v6 }) {
			out = append(out, Rule{IPv6: v6, Priority: s.RulePriority, FwMark: s.FwMark, Table: s.Table})
		}
	}
	return out
}

// guarded is what pods may only reach through the tunnel, and withheld what this
// machine itself may. What has joined is guarded on machines as well that may not
// talk to it. Hosts are held one by one, see NodeFilter.
func guarded(f Facts, owners Ownership) (guarded, withheld []netip.Prefix) {
	var joined []netip.Prefix
	for name, prefixes := range owners.Prefixes {
		if name != f.Self.Name && hasKey(f.Self.PublicKey) {
			joined = append(joined, prefixes...)
		}
	}
	if f.Encryption != Required {
		joined = Merge(joined)
		return joined, joined
	}
	external := slices.DeleteFunc(joined, func(p netip.Prefix) bool { return !anyCovers(f.ExternalCIDRs, p) })
	return Merge(f.Bounds().All()), Merge(slices.Concat(f.ClusterCIDRs, f.PeerCIDRs, external))
}
