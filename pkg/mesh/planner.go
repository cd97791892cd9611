package mesh

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Planner makes one plan after another, each at a cost that goes with what has
// changed since the one before. The zero value is ready for use.
//
// Of a mesh of thousands a change concerns few: the node that has changed, those
// whose addresses overlap with its own or that have its key, and whoever these touch
// in turn. All others get the same plan with it and without it, see Owners. So two
// small plans are made by NewPlan, of those few as they were and as they are now,
// and what one has and the other lacks is exchanged in the large one:
//
//	                   few, before        few, now
//	                        |                 |
//	                     NewPlan           NewPlan
//	                        |                 |
//	the last plan ------ without ----------- with ------> the plan
//
// Where more than lists of peers, routes, pods and machines differs between the two
// (an exempt address, for one), where the settings change, a gateway or a key's
// rotation is concerned, or the few are not few, the whole plan is made anew.
type Planner struct {
	facts Facts   // of the last plan; its Nodes are not used
	nodes []*Node // sorted by name
	plan  Plan
	made  bool
	atlas *atlas // of nodes; nil until one is needed
}

// few is the most nodes for which two small plans take less time than a large one.
const few = 100

// Update returns NewPlan of these facts, with these nodes in the place of f.Nodes.
// They are sorted by name, which must differ, and none of them may be modified any
// more: one that is the same pointer as at the last Update has not changed. Nor may
// the plan be modified: parts of it go on into the next one.
func (p *Planner) Update(f Facts, nodes []*Node) Plan {
	f.Nodes = nil
	plan, ok := p.patch(f, nodes)
	switch {
	case !ok:
		plan, p.atlas = NewPlan(f.with(nodes)), nil
	case p.atlas != nil:
		p.atlas.exchange(p.changed(f, nodes))
	}
	p.facts, p.nodes, p.plan, p.made = f, nodes, plan, true
	return plan
}

func (f Facts) with(nodes []*Node) Facts {
	f.Nodes = make([]Node, 0, len(nodes))
	for _, n := range nodes {
		f.Nodes = append(f.Nodes, *n)
	}
	return f
}

// patch makes the plan from the last one, if that can be done.
func (p *Planner) patch(f Facts, nodes []*Node) (plan Plan, ok bool) {
	if !p.made || !sameButPods(p.facts, f) {
		return plan, false
	}
	before, now := p.changed(f, nodes)
	pods := slices.Concat(difference(p.facts.LocalPods, f.LocalPods), difference(f.LocalPods, p.facts.LocalPods))
	if len(before)+len(now)+len(pods) == 0 {
		return p.plan, true
	}
	if len(before) > few || len(now) > few || slices.ContainsFunc(slices.Concat(before, now), isGateway) {
		return plan, false
	}
	// Neither its own addresses are a matter between few, nor is the way to what
	// lies behind a gateway.
	concerned := newParty(f.Bounds(), &f.Self)
	concerned.add(before...)
	concerned.add(now...)
	concerned.claims = append(concerned.claims, hostPrefixes(unmapped(pods))...)
	if p.atlas == nil {
		p.atlas = newAtlas(f.Bounds().All(), p.nodes)
	}
	rest, ok := concerned.gather(p.atlas)
	if !ok {
		return plan, false
	}
	was, is := NewPlan(p.facts.with(slices.Concat(before, rest))), NewPlan(f.with(slices.Concat(now, rest)))
	return p.plan.exchange(was, is)
}

// sameButPods reports whether what concerns all nodes is as it was.
func sameButPods(a, b Facts) bool {
	if len(a.Crossing)+len(b.Crossing) > 0 || !a.Self.same(&b.Self) || !maps.Equal(a.Revoked, b.Revoked) || !reflect.DeepEqual(a.Settings, b.Settings) {
		return false
	}
	if !b.ReachesHosts() {
		return true
	}
	young := func(c Claim) bool { return !a.settled(c) || !b.settled(c) }
	return !slices.ContainsFunc(b.Self.Hosts, young)
}

// changed are the nodes that have come, gone or changed, as they were before and as
// they are now. Time changes a node whose host claim has just settled.
func (p *Planner) changed(f Facts, nodes []*Node) (before, now []*Node) {
	differs := func(n *Node) bool {
		return f.ReachesHosts() && slices.ContainsFunc(n.Hosts, func(c Claim) bool { return f.settled(c) != p.facts.settled(c) })
	}
	old := p.nodes
	for len(old)+len(nodes) > 0 {
		switch {
		case len(old) > 0 && len(nodes) > 0 && old[0] == nodes[0] && !differs(nodes[0]): // nearly all: not even the names are read
			old, nodes = old[1:], nodes[1:]
		case len(nodes) == 0 || len(old) > 0 && old[0].Name < nodes[0].Name:
			before, old = append(before, old[0]), old[1:]
		case len(old) == 0 || nodes[0].Name < old[0].Name:
			now, nodes = append(now, nodes[0]), nodes[1:]
		default:
			if old[0] != nodes[0] && !old[0].same(nodes[0]) || differs(nodes[0]) {
				before, now = append(before, old[0]), append(now, nodes[0])
			}
			old, nodes = old[1:], nodes[1:]
		}
	}
	return before, now
}

func isGateway(n *Node) bool { return n.Role == RoleGateway }

// same reports whether both nodes are equal, times included.
func (n *Node) same(o *Node) bool { return reflect.DeepEqual(n, o) }

func unmapped(addrs []netip.Addr) []netip.Addr {
	out := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, a.Unmap())
	}
	return out
}

// party is a set of nodes that grows by all whom they touch.
type party struct {
	bounds []netip.Prefix
	names  map[string]bool
	keys   []wgtypes.Key
	claims []netip.Prefix // of others no claim and no address may be inside
	own    []netip.Prefix // the machines' addresses, which several may share
}

func newParty(b Bounds, self *Node) *party {
	p := &party{bounds: b.All(), names: map[string]bool{}}
	p.add(self)
	return p
}

func (p *party) add(nodes ...*Node) {
	for _, n := range nodes {
		p.names[n.Name] = true
		if hasKey(n.PublicKey) {
			p.keys = append(p.keys, n.PublicKey)
		}
		eachClaim(p.bounds, n, func(q netip.Prefix) bool { p.claims = append(p.claims, q); return false })
		eachOwn(n, func(q netip.Prefix) bool { p.own = append(p.own, q); return false })
	}
}

// eachClaim gives all claims of a node to do; it stops, and returns true, where do
// does. What lies outside of the bounds is refused for that alone, whoever else claims
// it, but for what a plain machine's entry keeps to itself.
func eachClaim(bounds []netip.Prefix, n *Node, do func(netip.Prefix) bool) bool {
	for i, claims := range [...][]Claim{n.Hosts, n.Prefixes, n.Pods} {
		for _, c := range claims {
			if q := c.Prefix.Masked(); (i == 0 || n.Plain() || q.Bits() > 0 && anyCovers(bounds, q)) && do(q) {
				return true
			}
		}
	}
	return false
}

func eachOwn(n *Node, do func(netip.Prefix) bool) bool {
	if n.Endpoint.IsValid() && do(hostPrefix(n.Endpoint.Addr().Unmap())) {
		return true
	}
	return slices.ContainsFunc(n.Addresses, func(a netip.Addr) bool { return do(hostPrefix(a.Unmap())) })
}

// gather returns all others that belong to the party, and all gateways: ways lead
// by them. It gives up where they are not few.
func (p *party) gather(a *atlas) (rest []*Node, ok bool) {
	for more := true; more; {
		more = false
		for n := range p.touched(a) {
			if p.names[n.Name] {
				continue
			}
			p.add(n)
			rest, more = append(rest, n), true
			if len(rest) > few {
				return nil, false
			}
		}
	}
	return rest, true
}

// touched are the nodes that belong to the party as it is now, those that are in it
// among them, and some more than once. No claim may overlap with another's address,
// but addresses may be shared.
func (p *party) touched(a *atlas) iter.Seq[*Node] {
	claims, own, keys := Merge(p.claims), Merge(p.own), slices.Clone(p.keys)
	return func(yield func(*Node) bool) {
		for _, n := range a.gateways {
			if !yield(n) {
				return
			}
		}
		for _, k := range keys {
			for _, n := range a.keys[k] {
				if !yield(n) {
					return
				}
			}
		}
		for i, ground := range [...][]netip.Prefix{claims, own} {
			for _, q := range ground {
				for at := range a.touching(q) {
					if (i == 0 || !at.own) && !yield(at.node) {
						return
					}
				}
			}
		}
	}
}

// exchange takes out what the one small plan has and the other lacks, and puts in
// what the other has. It fails where that is not all there is to it.
func (p Plan) exchange(was, is Plan) (out Plan, ok bool) {
	if !reflect.DeepEqual(was.frame(), is.frame()) {
		return out, false
	}
	out, ok = p, true
	done := func(fits bool) { ok = ok && fits }
	out.Conflicts = exchange(p.Conflicts, was.Conflicts, is.Conflicts, compareConflicts, done)
	out.Routes = exchange(p.Routes, was.Routes, is.Routes, compareRoutes, done)
	out.Filter.Pods = exchange(p.Filter.Pods, was.Filter.Pods, is.Filter.Pods, netip.Addr.Compare, done)
	out.Filter.Nodes.Peers = exchange(p.Filter.Nodes.Peers, was.Filter.Nodes.Peers, is.Filter.Nodes.Peers, netip.Addr.Compare, done)
	out.Filter.Nodes.Held = exchange(p.Filter.Nodes.Held, was.Filter.Nodes.Held, is.Filter.Nodes.Held, netip.Addr.Compare, done)
	out.Peers = exchangePeers(p.Peers, was.Peers, is.Peers, done)
	return out, ok
}

// frame is the part of a plan in which no single node's part can be told from another's.
func (p Plan) frame() State {
	s := p.State
	s.Peers, s.Routes, s.Filter.Pods, s.Filter.Nodes.Peers, s.Filter.Nodes.Held = nil, nil, nil, nil, nil
	return s
}

// exchange returns a sorted list without what only was has, and with what only is
// has; the list itself if that is nothing. All are in the order of compare, by which
// no two that are in a list together may be equal.
func exchange[T comparable](list, was, is []T, compare func(a, b T) int, done func(fits bool)) []T {
	out, in := difference(was, is), difference(is, was)
	return splice(list, out, in, compare, func(a, b *T) bool { return *a == *b }, done)
}

// splice is the work of exchange.
func splice[T any](list, out, in []T, compare func(a, b T) int, equal func(a, b *T) bool, done func(fits bool)) []T {
	if len(out)+len(in) == 0 {
		return list
	}
	s := make([]T, 0, max(len(list)+len(in)-len(out), 0))
	for len(out)+len(in) > 0 {
		removing := len(in) == 0 || len(out) > 0 && compare(out[0], in[0]) <= 0
		next := &in
		if removing {
			next = &out
		}
		x := (*next)[0]
		*next = (*next)[1:]
		i, found := slices.BinarySearchFunc(list, x, compare)
		s, list = append(s, list[:i]...), list[i:]
		if found != removing || removing && !equal(&list[0], &x) {
			done(false)
			return nil
		}
		if removing {
			list = list[1:]
		} else {
			s = append(s, x)
		}
	}
	if s = append(s, list...); len(s) == 0 {
		return nil
	}
	return s
}

// exchangePeers changes a peer that was there before, and goes on to be, as far as
// it has changed: of a gateway's allowed IPs only some are a matter of the few.
func exchangePeers(list, was, is []Peer, done func(fits bool)) []Peer {
	var out, in []Peer
	for len(was)+len(is) > 0 {
		switch c := comparePeersOf(was, is); {
		case c < 0:
			out, was = append(out, was[0]), was[1:]
		case c > 0:
			in, is = append(in, is[0]), is[1:]
		default:
			if !was[0].equal(&is[0]) || !slices.Equal(was[0].AllowedIPs, is[0].AllowedIPs) {
				i, found := slices.BinarySearchFunc(list, was[0], comparePeers)
				if !found || !list[i].equal(&was[0]) {
					done(false)
					return nil
				}
				now := is[0]
				now.AllowedIPs = exchange(list[i].AllowedIPs, was[0].AllowedIPs, now.AllowedIPs, ComparePrefixes, done)
				out, in = append(out, was[0]), append(in, now)
			}
			was, is = was[1:], is[1:]
		}
	}
	return splice(list, out, in, comparePeers, (*Peer).equal, done)
}

// comparePeersOf compares the first of two lists; the end comes after all.
func comparePeersOf(a, b []Peer) int {
	if len(a) == 0 || len(b) == 0 {
		return cmp.Compare(len(b), len(a))
	}
	return comparePeers(a[0], b[0])
}

// equal reports whether all but the allowed IPs, and what only an observation
// knows, is equal.
func (p *Peer) equal(o *Peer) bool {
	return p.Name == o.Name && p.PublicKey == o.PublicKey && p.PresharedKey == o.PresharedKey &&
		p.Endpoint == o.Endpoint && p.Keepalive == o.Keepalive
}
