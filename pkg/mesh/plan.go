package mesh

import (
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Plan is the state a node's kernel should hold, and the claims that were refused on the way.
type Plan struct {
	State
	Conflicts []Conflict
}

// NewPlan turns facts into the plan. It never fails: what cannot be served is a Conflict.
func NewPlan(f Facts) Plan {
	local := claimPrefixes(f.Self.Prefixes)
	local = slices.DeleteFunc(local, func(p netip.Prefix) bool { return !anyCovers(f.ClusterCIDRs, p) })

	conflict, revoked := revocation(f.Self, f.Revoked)
	if revoked {
		f.Self.PublicKey = wgtypes.Key{} // as while there is none: the tunnel goes, what guards stays
	}
	nodes := slices.DeleteFunc(slices.Clone(f.Nodes), func(n Node) bool { return n.Name == f.Self.Name })
	owners := Owners(append(nodes, f.Self), f.ClusterCIDRs, f.Revoked)
	f.LocalPods = remaining(f, owners)
	pods := outside(f.LocalPods, local, f.ClusterCIDRs)

	p := Plan{Conflicts: owners.Conflicts}
	if revoked {
		p.Conflicts = append(p.Conflicts, conflict)
	}
	p.Routes = localRoutes(f, local, pods, owners.Exempt)
	p.Rules = rules(f.Settings)
	p.SrcValidMark = f.EncryptNodes
	p.Filter = Filter{
		Interface: f.Interface,
		Cluster:   Merge(f.ClusterCIDRs),
		Local:     Merge(local),
		Pods:      pods,
		Exempt:    owners.Exempt,
		Nodes:     nodeFilter(f),
	}
	if hasKey(f.Self.PublicKey) {
		p.addTunnel(f, nodes, owners)
	}
	p.Filter.Guarded = guarded(f, p.Peers, owners)
	slices.SortFunc(p.Conflicts, compareConflicts)
	p.Sort()
	return p
}

// addTunnel plans the interface, its peers and the routes into it.
func (p *Plan) addTunnel(f Facts, nodes []Node, owners Ownership) {
	p.Link = Link{
		Name: f.Interface, MTU: f.MTU, Up: true,
		PublicKey: f.Self.PublicKey, ListenPort: f.ListenPort, FwMark: f.FwMark,
	}
	source := map[bool]netip.Addr{}
	self := f.Self
	self.Prefixes = slices.DeleteFunc(slices.Clone(self.Prefixes), func(c Claim) bool { return !anyCovers(f.ClusterCIDRs, c.Prefix) })
	for _, a := range self.TunnelAddresses() { // of a prefix that peers can allow
		p.Addresses = append(p.Addresses, hostPrefix(a))
		source[a.Is6()] = a
	}
	ours := map[netip.Prefix]bool{} // whatever others claim, a node knows best where its own pods are
	for _, a := range f.LocalPods {
		ours[hostPrefix(a.Unmap())] = true
	}
	for _, r := range p.Routes {
		if r.Metric == 0 {
			ours[r.Prefix] = true
		}
	}
	p.Peers, p.Routes = make([]Peer, 0, len(nodes)), slices.Grow(p.Routes, 2*len(nodes))
	hosts := p.hostPlan(f, owners)
	for _, n := range nodes {
		if owners.Refused[n.Name] {
			continue
		}
		prefixes := slices.DeleteFunc(slices.Clone(owners.Prefixes[n.Name]), func(q netip.Prefix) bool { return ours[q] })
		p.Peers = append(p.Peers, Peer{
			Name: n.Name, PublicKey: n.PublicKey, PresharedKey: n.PresharedKey,
			Endpoint: owners.Endpoints[n.Name], AllowedIPs: prefixes, Keepalive: f.Keepalive,
		})
		for _, q := range prefixes {
			p.Routes = append(p.Routes, Route{Prefix: q, Type: ViaLink, Source: source[q.Addr().Is6()], Table: f.Table})
		}
		p.addHosts(hosts, n.Name)
	}
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

// localRoutes are those that do not need the tunnel.
func localRoutes(f Facts, local []netip.Prefix, pods, exempt []netip.Addr) []Route {
	var out []Route
	throw := slices.Concat(local, hostPrefixes(pods), hostPrefixes(exempt))
	for _, p := range SortPrefixes(throw) {
		out = append(out, Route{Prefix: p, Type: Throw, Table: f.Table})
	}
	if f.Encryption == Required {
		for _, p := range Merge(f.ClusterCIDRs) {
			out = append(out, Route{Prefix: p, Type: Unreachable, Table: f.Table, Metric: guardMetric})
		}
	}
	return out
}

// rules has one rule for each family of the cluster.
func rules(s Settings) []Rule {
	var out []Rule
	for _, v6 := range []bool{false, true} {
		if slices.ContainsFunc(s.ClusterCIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() == v6 }) {
			out = append(out, Rule{IPv6: v6, Priority: s.RulePriority, FwMark: s.FwMark, Table: s.Table})
		}
	}
	return out
}

// guarded is what may only be reached through the tunnel.
func guarded(f Facts, peers []Peer, owners Ownership) []netip.Prefix {
	if f.Encryption == Required {
		return Merge(f.ClusterCIDRs)
	}
	var joined []netip.Prefix
	for _, p := range peers {
		joined = append(joined, p.AllowedIPs[:len(p.AllowedIPs)-owners.hostsIn(p)]...)
	}
	return Merge(joined)
}
