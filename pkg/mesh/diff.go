package mesh

import (
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// HandshakeFresh is how long after a handshake a session may still carry
// packets (REJECT_AFTER_TIME, WireGuard paper, section 6.1). Within it, the
// peer itself tells where it is, and better than its record does.
const HandshakeFresh = 180 * time.Second

// Context is what Diff needs besides the two states.
type Context struct {
	Now time.Time
	// Moved are the peers whose recorded endpoint has just changed: it is set
	// even where a handshake is fresh.
	Moved map[wgtypes.Key]bool
}

// Diff returns the operations that turn the observed state into the planned one.
//
// The order carries the promises. What keeps plaintext from leaving comes
// first and goes last. On the way in: peer, allowed IPs, route, rule; on the
// way out: rule, route, allowed IPs, peer. An allowed IP that moves to another
// peer is only added there, and the kernel moves it; so at no moment is it
// nobody's. After any number of the ops Diff may be asked again, and converges.
func Diff(observed, planned State, c Context) []Op {
	d := differ{observed: observed, planned: planned, Context: c}
	d.addFilter()
	d.setSrcValidMark(true)
	d.renameLink()
	d.index()
	d.addLink(d.primary)
	d.addAddresses()
	d.addLink(d.spare)
	d.addRoutes(func(r Route) bool { return r.Type != ViaLink })
	d.setPeers(d.primary, false)
	d.setPeers(d.spare, false)
	d.addRoutes(func(r Route) bool { return r.Type == ViaLink })
	d.addRules()
	d.greet()

	d.removeAddresses()
	d.removeRules()
	d.removeRoutes()
	for _, l := range []linkDiff{d.spare, d.primary} {
		d.setPeers(l, true)
		d.removePeers(l)
		d.removeLink(l)
	}
	d.setFilterNodes(d.planned.Filter.Nodes)
	d.setSrcValidMark(false)
	d.removeFilter()
	return d.ops
}

type differ struct {
	observed, planned State
	Context
	primary, spare linkDiff
	// haveRoutes and wantRoutes are those in which the states may differ.
	haveRoutes, wantRoutes []Route
	filterNodes            NodeFilter // what the ops so far have left in the table
	ops                    []Op
}

// linkDiff is one of the two interfaces, as it is and as it should be.
type linkDiff struct {
	have, want Link
	// havePeers and wantPeers are those in which the states may differ.
	havePeers, wantPeers []Peer
	byKey                map[wgtypes.Key]*Peer // of havePeers
	allWanted            []Peer
}

func diffLink(have, want Link, havePeers, wantPeers []Peer) linkDiff {
	l := linkDiff{have, want, havePeers, wantPeers, nil, wantPeers}
	if l.stays() {
		l.havePeers, l.wantPeers = trimFunc(havePeers, wantPeers, (*Peer).same)
	}
	l.byKey = make(map[wgtypes.Key]*Peer, len(l.havePeers))
	for i := range l.havePeers {
		l.byKey[l.havePeers[i].PublicKey] = &l.havePeers[i]
	}
	return l
}

// stays reports whether the observed interface is the planned one.
func (l linkDiff) stays() bool { return l.have.Name == l.want.Name }

func (d *differ) index() {
	o, p := d.observed, d.planned
	d.primary = diffLink(o.Link, p.Link, o.Peers, p.Peers)
	d.spare = diffLink(o.Spare.Link, p.Spare.Link, o.Spare.Peers, p.Spare.Peers)
	d.haveRoutes, d.wantRoutes = o.Routes, p.Routes
	if d.primary.stays() && d.spare.stays() { // else even equal ones are to be made anew
		d.haveRoutes, d.wantRoutes = trim(d.haveRoutes, d.wantRoutes)
	}
}

// link is the interface of a plane.
func (d *differ) link(p Plane) linkDiff {
	if p == Spare {
		return d.spare
	}
	return d.primary
}

func (d *differ) add(o Op) { d.ops = append(d.ops, o) }

func (d *differ) addFilter() {
	have, want := d.observed.Filter, d.planned.Filter
	switch {
	case !want.present():
		d.releaseNodes()
		return
	case have.Broken || have.Interface != want.Interface || have.FwMark != want.FwMark || have.Nodes.Mark != want.Nodes.Mark:
		want.Nodes = want.Nodes.between(have.Nodes)
		d.filterNodes = want.Nodes
		d.add(ReplaceFilter{want})
		return
	}
	d.filterNodes = have.Nodes
	d.setFilterNodes(want.Nodes.between(have.Nodes))
	add, remove := difference(want.Pods, have.Pods), difference(have.Pods, want.Pods)
	if !have.sameSets(want) {
		if len(add) > 0 { // before Local gives them up, or their packets are dropped between the two
			d.add(SetFilterPods{Add: add})
			add = nil
		}
		d.add(SetFilter{want})
	}
	if len(add)+len(remove) > 0 {
		d.add(SetFilterPods{Add: add, Remove: remove})
	}
}

func (d *differ) removeFilter() {
	if d.observed.Filter.present() && !d.planned.Filter.present() {
		d.add(RemoveFilter{})
	}
}

// renameLink removes interfaces of another name before the planned ones are
// made: two cannot listen on one port. Until the new ones work, the filter and
// the unreachable routes hold what would be encrypted.
func (d *differ) renameLink() {
	renamed := func(have, want Link) bool { return have.Name != want.Name && have.Name != "" && want.Name != "" }
	link, spare := d.observed.Link, d.observed.Spare.Link
	both := renamed(link, d.planned.Link)
	if spare.Name != "" && (both || renamed(spare, d.planned.Spare.Link)) {
		d.removeNow(spare.Name, func(r Route) bool { return r.Plane == Spare })
		d.observed.Spare = SpareLink{}
	}
	if both {
		d.removeNow(link.Name, func(r Route) bool { return r.Plane == Primary })
		d.observed.Link, d.observed.Addresses, d.observed.Peers = Link{}, nil, nil
	}
}

// removeNow removes an interface, and with it its routes.
func (d *differ) removeNow(link string, its func(Route) bool) {
	d.add(RemoveLink{link})
	d.observed.Routes = slices.DeleteFunc(slices.Clone(d.observed.Routes), func(r Route) bool { return r.Type == ViaLink && its(r) })
}

func (d *differ) addLink(l linkDiff) {
	have, want := l.have, l.want
	if want.Name == "" {
		return
	}
	if !l.stays() {
		d.add(AddLink{Name: want.Name, MTU: want.MTU})
		have = Link{Name: want.Name, MTU: want.MTU}
	}
	if have.PublicKey != want.PublicKey || have.ListenPort != want.ListenPort || have.FwMark != want.FwMark {
		d.add(ConfigureLink{want})
	}
	if have.MTU != want.MTU || !have.Up {
		d.add(SetLink{Name: want.Name, MTU: want.MTU})
	}
}

func (d *differ) addAddresses() {
	if d.planned.Link.Name == "" {
		return
	}
	for _, p := range difference(d.planned.Addresses, d.observed.Addresses) {
		d.add(AddAddress{Link: d.planned.Link.Name, Prefix: p})
	}
}

// greet tells the peers of an interface that is new, or has a new key. A keepalive
// does so by itself, and so do all peers of the spare interface.
func (d *differ) greet() {
	have, want := d.primary.have, d.primary.want
	if want.Name == "" || d.primary.stays() && have.PublicKey == want.PublicKey {
		return
	}
	g := Greet{Link: want.Name}
	for _, p := range d.planned.Peers {
		if p.Endpoint.IsValid() && p.Keepalive == 0 && len(p.AllowedIPs) > 0 { // none: a plain machine that another node carries
			g.Peers = append(g.Peers, p.PublicKey)
		}
	}
	if len(g.Peers) > 0 {
		d.add(g)
	}
}

// removeAddresses comes after the routes have their new source address: with
// the old one Linux takes what refers to it, the whole IPv4 route
// (fib_sync_down_addr; since 6.2 in the main table alone) or an IPv6 route's
// source (rt6_remove_prefsrc).
func (d *differ) removeAddresses() {
	if d.planned.Link.Name == "" {
		return // they go with the interface
	}
	for _, p := range difference(d.observed.Addresses, d.planned.Addresses) {
		d.add(RemoveAddress{Link: d.planned.Link.Name, Prefix: p})
	}
}

func (d *differ) removeLink(l linkDiff) {
	if l.have.Name != "" && !l.stays() {
		d.add(RemoveLink{l.have.Name})
	}
}

type routeKey struct {
	prefix        netip.Prefix
	table, metric int
}

func (r Route) key() routeKey { return routeKey{r.Prefix, r.Table, r.Metric} }

func routesByKey(routes []Route) map[routeKey]Route {
	m := make(map[routeKey]Route, len(routes))
	for _, r := range routes {
		m[r.key()] = r
	}
	return m
}

func (d *differ) addRoutes(wanted func(Route) bool) {
	have := routesByKey(d.haveRoutes)
	for _, r := range d.wantRoutes {
		if !wanted(r) {
			continue
		}
		h, ok := have[r.key()]
		l := d.link(r.Plane)
		if !ok || h != r || r.Type == ViaLink && !l.stays() {
			d.add(SetRoute{Link: l.want.Name, Route: r})
		}
	}
}

func (d *differ) removeRoutes() {
	want := routesByKey(d.wantRoutes)
	for _, last := range []bool{false, true} { // the guard routes go last
		for _, r := range d.haveRoutes {
			if _, ok := want[r.key()]; !ok && (r.Type == Unreachable) == last {
				d.add(RemoveRoute{r})
			}
		}
	}
}

func (d *differ) addRules() {
	for _, r := range difference(d.planned.Rules, d.observed.Rules) {
		d.add(AddRule{r})
	}
}

func (d *differ) removeRules() {
	for _, r := range difference(d.observed.Rules, d.planned.Rules) {
		d.add(RemoveRule{r})
	}
}

// setPeers adds (or, in the later half, removes) allowed IPs, with all else that a peer needs.
// A new peer gets its preshared key in the op that makes it: a moment without
// one would be enough for a session without one.
func (d *differ) setPeers(l linkDiff, removing bool) {
	var taken map[netip.Prefix]bool // made when something is removed, which is rare
	for _, want := range l.wantPeers {
		h, known := l.byKey[want.PublicKey]
		if !known {
			h = &Peer{}
		}
		o := SetPeer{Link: l.want.Name, PublicKey: want.PublicKey, Name: want.Name}
		if removing {
			gone := difference(h.AllowedIPs, want.AllowedIPs)
			if len(gone) > 0 && taken == nil {
				taken = allAllowed(l.allWanted)
			}
			for _, ip := range gone {
				if !taken[ip] {
					o.Remove = append(o.Remove, ip)
				}
			}
			if len(o.Remove) > 0 {
				d.add(o)
			}
			continue
		}
		o.Add = difference(want.AllowedIPs, h.AllowedIPs)
		if d.endpointDiffers(*h, want) {
			o.Endpoint = want.Endpoint
		}
		if h.PresharedKey != want.PresharedKey {
			presharedKey := want.PresharedKey // a copy, as below
			o.PresharedKey = &presharedKey
		}
		if h.Keepalive != want.Keepalive {
			keepalive := want.Keepalive // a copy, or each loop's want lives on the heap
			o.Keepalive = &keepalive
		}
		if !known || o.PresharedKey != nil || o.Endpoint.IsValid() || o.Keepalive != nil || len(o.Add) > 0 {
			d.add(o)
		}
	}
}

// same reports whether nothing need be done to turn a peer into the other.
func (p *Peer) same(o *Peer) bool {
	return p.PublicKey == o.PublicKey && p.PresharedKey == o.PresharedKey && p.Endpoint == o.Endpoint &&
		p.Keepalive == o.Keepalive && (shared(p.AllowedIPs, o.AllowedIPs) || slices.Equal(p.AllowedIPs, o.AllowedIPs))
}

func allAllowed(peers []Peer) map[netip.Prefix]bool {
	m := make(map[netip.Prefix]bool, len(peers))
	for _, p := range peers {
		for _, ip := range p.AllowedIPs {
			m[ip] = true
		}
	}
	return m
}

// endpointDiffers leaves a peer alone that has roamed and talks to us.
func (d *differ) endpointDiffers(have, want Peer) bool {
	if !want.Endpoint.IsValid() || have.Endpoint == want.Endpoint {
		return false
	}
	// A clock that was set back leaves handshakes in the future; one far ahead says nothing.
	fresh := !have.LastHandshake.IsZero() && d.Now.Sub(have.LastHandshake).Abs() < HandshakeFresh
	return !fresh || d.Moved[want.PublicKey]
}

func (d *differ) removePeers(l linkDiff) {
	if !l.stays() || l.want.Name == "" {
		return // they go with the interface
	}
	want := make(map[wgtypes.Key]bool, len(l.wantPeers))
	for _, p := range l.wantPeers {
		want[p.PublicKey] = true
	}
	for _, p := range l.havePeers {
		if !want[p.PublicKey] {
			d.add(RemovePeer{Link: l.want.Name, PublicKey: p.PublicKey})
		}
	}
}
