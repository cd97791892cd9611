package mesh

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Conflict is a part of a record that was refused. The rest of the record counts.
type Conflict struct {
	Node   string `json:"node"`   // whose record
	What   string `json:"what"`   // the refused value, as the record has it
	Reason string `json:"reason"` // one clause, without a full stop
}

func (c Conflict) String() string { return c.Node + ": " + c.What + " refused: " + c.Reason }

// Ownership is who may send and receive for which addresses.
type Ownership struct {
	// Prefixes of each node, by name, sorted. No prefix is in two lists. Those of a
	// plain machine are the addresses that its carrier claims for it.
	Prefixes map[string][]netip.Prefix
	// Carrier is the node that carries each plain machine, by name; see Node.Via.
	Carrier map[string]string
	// Hosts of each node, by name: the claims that stand, none of them among Prefixes.
	Hosts map[string][]Claim
	// Endpoints that may be used, by node name.
	Endpoints map[string]netip.AddrPort
	// Exempt are the machines' own addresses that lie inside the bounds, as they do
	// where pods share the nodes' network. They are not pods: they are reached
	// without the tunnel. One inside externalCIDRs that is claimed as a host is not
	// among them. Sorted.
	Exempt []netip.Addr
	// Refused names the nodes that get no peer at all.
	Refused   map[string]bool
	Conflicts []Conflict
}

// Owners decides between the claims of all nodes. The result depends only on
// the set of nodes, the bounds and the revoked keys, so every node that holds
// the same snapshot decides alike, in whatever order the records arrived:
//
//   - a node with a revoked public key is refused, and nothing of its record
//     counts: not even an address may be exempt, by which a forgotten machine
//     would go on sending plaintext to the pods;
//   - two nodes with one public key are both refused;
//   - a claim must lie inside clusterCIDRs or externalCIDRs and may not be a
//     default route;
//   - a plain machine's addresses are single ones inside peerCIDRs; of two machines
//     with one address the older has it. A node may claim it if the machine enters
//     by that node, and the newest such claim says who carries the machine;
//   - an endpoint inside a claimed prefix would send the tunnel into itself:
//     whichever of the two is older stands;
//   - of two overlapping node prefixes the older claim stands, ties go to the
//     lesser name;
//   - of two nodes that claim the same pod the newer claim has it. An older one
//     inside a newer one is refused; around a newer one it stands, for the rest
//     of its addresses: the longest prefix decides where packets go. So does a
//     pod claim inside another node's prefix;
//   - a machine's own address inside a prefix that another node has held
//     longer is not exempt: it would be an order to the whole mesh to send
//     what goes to that pod in the clear;
//   - a host claim is a single address, wherever it lies, but not in what
//     another node holds. Of two equal ones the newer stands: machines are
//     replaced, and their addresses used again.
//
// The names of the nodes must differ, as the registry's keys do. What revoked
// means is told at Facts.Revoked.
func Owners(nodes []Node, b Bounds, revoked map[wgtypes.Key]string) Ownership {
	nodes = slices.SortedFunc(slices.Values(nodes), func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	o := Ownership{
		Prefixes:  map[string][]netip.Prefix{},
		Carrier:   map[string]string{},
		Hosts:     map[string][]Claim{},
		Endpoints: map[string]netip.AddrPort{},
		Refused:   map[string]bool{},
	}
	nodes = o.refuseRevoked(nodes, revoked)
	o.refuseSharedKeys(nodes)
	byAddr := o.endpointsByAddress(nodes)
	for _, l := range byAddr {
		o.Endpoints[l.node] = l.endpoint
	}
	nodes, plain := o.settlePlain(nodes, b.Peer)
	held := o.settlePrefixes(nodes, b, byAddr)
	owner := o.settlePods(nodes, b, plain, byAddr, held)
	o.settleExempt(nodes, b, owner)
	o.settleHosts(nodes, owner)
	for name := range o.Prefixes {
		o.Prefixes[name] = SortPrefixes(o.Prefixes[name])
	}
	slices.SortFunc(o.Conflicts, compareConflicts)
	o.Conflicts = slices.Compact(o.Conflicts)
	return o
}

func compareConflicts(a, b Conflict) int {
	return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.What, b.What), cmp.Compare(a.Reason, b.Reason))
}

func (o *Ownership) refuse(node string, what any, reason string, args ...any) {
	o.Conflicts = append(o.Conflicts, Conflict{Node: node, What: fmt.Sprint(what), Reason: fmt.Sprintf(reason, args...)})
}

// refuseRevoked returns the nodes that are left.
func (o *Ownership) refuseRevoked(nodes []Node, revoked map[wgtypes.Key]string) []Node {
	return slices.DeleteFunc(nodes, func(n Node) bool {
		c, gone := revocation(n, revoked)
		if gone {
			o.Refused[n.Name] = true
			o.Conflicts = append(o.Conflicts, c)
		}
		return gone
	})
}

// revocation says whether a node's key has been revoked, and what to tell then.
func revocation(n Node, revoked map[wgtypes.Key]string) (Conflict, bool) {
	forgotten, gone := revoked[n.PublicKey]
	if !gone || !hasKey(n.PublicKey) {
		return Conflict{}, false
	}
	return Conflict{
		Node: n.Name, What: "public key " + n.PublicKey.String(),
		Reason: fmt.Sprintf("it was revoked when %s was forgotten; to let the machine in again, stop wgcnid there, run `wgcnid leave --purge` and start it", forgotten),
	}, true
}

func (o *Ownership) refuseSharedKeys(nodes []Node) {
	byKey := map[wgtypes.Key][]string{}
	for _, n := range nodes {
		if hasKey(n.PublicKey) {
			byKey[n.PublicKey] = append(byKey[n.PublicKey], n.Name)
		}
	}
	for _, n := range nodes {
		switch names := byKey[n.PublicKey]; {
		case !hasKey(n.PublicKey):
			o.Refused[n.Name] = true
		case len(names) > 1:
			o.Refused[n.Name] = true
			others := slices.DeleteFunc(slices.Clone(names), func(s string) bool { return s == n.Name })
			o.refuse(n.Name, "public key "+n.PublicKey.String(), "%s has the same key; delete the private key of the copy and restart it",
				enumerate(others))
		}
	}
}

// enumerate joins names, but not thousands of them: machines cloned from one
// image all share its key, and each one's conflict would name all others.
func enumerate(names []string) string {
	const most = 3
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// A holding is one claim with its claimant.
type holding struct {
	node   string
	prefix netip.Prefix
	since  time.Time
}

func holdings(nodes []Node, refused map[string]bool, claims func(Node) []Claim) []holding {
	var out []holding
	for _, n := range nodes {
		if refused[n.Name] {
			continue
		}
		for _, c := range claims(n) {
			out = append(out, holding{n.Name, c.Prefix.Masked(), c.Since})
		}
	}
	return out
}

// permitted says whether a claim is acceptable by itself.
func (o *Ownership) permitted(h holding, b Bounds) bool {
	switch {
	case h.prefix.Bits() == 0:
		o.refuse(h.node, h.prefix, "a default route may not be claimed")
	case anyCovers(b.Cluster, h.prefix) || anyCovers(b.External, h.prefix):
		return true
	case anyCovers(b.Peer, h.prefix):
		o.refuse(h.node, h.prefix, "no machine that enters by this node has it")
	case len(b.External) > 0:
		o.refuse(h.node, h.prefix, "inside neither clusterCIDRs nor externalCIDRs")
	default:
		o.refuse(h.node, h.prefix, "not inside clusterCIDRs")
	}
	return false
}

// settlePrefixes hands out the node prefixes, the oldest claim first.
func (o *Ownership) settlePrefixes(nodes []Node, b Bounds, byAddr []located) []holding {
	claims := holdings(nodes, o.Refused, func(n Node) []Claim { return n.Prefixes })
	slices.SortStableFunc(claims, func(a, b holding) int {
		return cmp.Or(a.since.Compare(b.since), cmp.Compare(a.node, b.node), ComparePrefixes(a.prefix, b.prefix))
	})
	alone := uncontested(claims)
	var held overlapIndex
	out := make([]holding, 0, len(claims))
	for i, h := range claims {
		if !o.permitted(h, b) {
			continue
		}
		if !alone[i] {
			if other, found := held.overlapping(h); found {
				o.refuse(h.node, h.prefix, "%s has held %s longer", other.node, other.prefix)
				continue
			}
		}
		if !o.clearOfEndpoints(h, byAddr) { // last: a refused claim must not cost anyone an endpoint
			continue
		}
		if !alone[i] {
			held.add(h)
		}
		out = append(out, h)
		o.Prefixes[h.node] = append(o.Prefixes[h.node], h.prefix)
	}
	return out
}

// clearOfEndpoints settles a claim against the endpoints inside it.
func (o *Ownership) clearOfEndpoints(h holding, byAddr []located) bool {
	first, _ := slices.BinarySearchFunc(byAddr, h.prefix.Addr(), func(l located, a netip.Addr) int { return l.endpoint.Addr().Compare(a) })
	var younger []located
	for _, l := range byAddr[first:] {
		switch {
		case !h.prefix.Contains(l.endpoint.Addr()):
			o.refuseEndpoints(younger, h)
			return true
		case !o.Endpoints[l.node].IsValid(): // refused before
		case l.node != h.node && h.since.Before(l.since):
			younger = append(younger, l)
		default:
			o.refuse(h.node, h.prefix, "the endpoint %s of %s lies inside it", l.endpoint, l.node)
			return false
		}
	}
	o.refuseEndpoints(younger, h)
	return true
}

func (o *Ownership) refuseEndpoints(ls []located, h holding) {
	for _, l := range ls {
		o.refuse(l.node, "endpoint "+l.endpoint.String(), "it lies inside %s, which %s has held longer", h.prefix, h.node)
		delete(o.Endpoints, l.node)
	}
}

// located is a node's endpoint, and how long the node has been a member.
type located struct {
	node     string
	endpoint netip.AddrPort
	since    time.Time
}

func (o *Ownership) endpointsByAddress(nodes []Node) []located {
	var out []located
	for _, n := range nodes {
		if n.Endpoint.IsValid() && !o.Refused[n.Name] {
			// Kernels report ::ffff:192.0.2.1 as 192.0.2.1, so only that compares equal.
			out = append(out, located{n.Name, netip.AddrPortFrom(n.Endpoint.Addr().Unmap(), n.Endpoint.Port()), n.Since})
		}
	}
	slices.SortStableFunc(out, func(a, b located) int { return a.endpoint.Compare(b.endpoint) })
	return out
}

// settlePods hands out single pods, the newest claim first, and returns all that
// is held. Plain machines are handed out to their carriers in the same way.
func (o *Ownership) settlePods(nodes []Node, b Bounds, plain plainMachines, byAddr []located, held []holding) map[netip.Prefix]holding {
	owner := make(map[netip.Prefix]holding, len(held))
	for _, h := range held {
		if _, twice := owner[h.prefix]; !twice { // the older of a node's two
			owner[h.prefix] = h
		}
	}
	claims := holdings(nodes, o.Refused, func(n Node) []Claim { return n.Pods })
	slices.SortStableFunc(claims, func(a, b holding) int {
		return cmp.Or(b.since.Compare(a.since), cmp.Compare(a.node, b.node), ComparePrefixes(a.prefix, b.prefix))
	})
	pods := podClaims{holders: map[netip.Prefix]string{}}
	for _, h := range claims {
		if machine, ok := plain.entering(h); ok {
			if o.Carrier[machine] == "" {
				o.Carrier[machine] = h.node
			}
			if o.Carrier[machine] == h.node && !slices.Contains(o.Prefixes[machine], h.prefix) {
				owner[h.prefix] = h
				o.Prefixes[machine] = append(o.Prefixes[machine], h.prefix)
			}
			continue
		}
		if !o.permitted(h, b) {
			continue
		}
		if other, taken := owner[h.prefix]; taken {
			if other.node != h.node {
				o.refuse(h.node, h.prefix, "%s has the better claim", other.node)
			}
			continue
		}
		if other := pods.around(h); other != "" && other != h.node {
			o.refuse(h.node, h.prefix, "%s has the better claim", other)
			continue
		}
		if !o.clearOfEndpoints(h, byAddr) {
			continue
		}
		owner[h.prefix] = h
		pods.add(h)
		o.Prefixes[h.node] = append(o.Prefixes[h.node], h.prefix)
	}
	return owner
}

// podClaims are the newer ones while older ones are settled.
type podClaims struct {
	holders map[netip.Prefix]string
	lengths [2][129]bool // that occur, by family: nearly all are single pods
}

func family(p netip.Prefix) int {
	if p.Addr().Is6() {
		return 1
	}
	return 0
}

func (c *podClaims) add(h holding) {
	c.holders[h.prefix] = h.node
	c.lengths[family(h.prefix)][h.prefix.Bits()] = true
}

// around returns who has the longest claim around h, or "".
func (c *podClaims) around(h holding) string {
	for bits := h.prefix.Bits() - 1; bits > 0; bits-- {
		if !c.lengths[family(h.prefix)][bits] {
			continue
		}
		p, _ := h.prefix.Addr().Prefix(bits)
		if node, found := c.holders[p]; found {
			return node
		}
	}
	return ""
}

// settleExempt lets the machines keep their own addresses inside clusterCIDRs.
// One inside the node's own prefix, such as its bridge's, is not exempt either:
// it is reached as the pods beside it are.
func (o *Ownership) settleExempt(nodes []Node, b Bounds, owner map[netip.Prefix]holding) {
	all := b.All()
	for _, n := range nodes {
		for _, a := range append(slices.Clone(n.Addresses), n.Endpoint.Addr()) {
			if a = a.Unmap(); anyContains(all, a) && !n.externalHost(a, b) && o.maySkipTunnel(n, a, owner) && !o.ofRefused(nodes, n, a, b) {
				o.Exempt = append(o.Exempt, a)
			}
		}
	}
	o.Exempt = SortAddrs(o.Exempt)
}

// ofRefused reports whether an address lies inside what a node claims that another
// has the key of. Nobody sends it anything by the tunnel then, and all the less in the
// clear: whoever can copy a public key could have that.
func (o *Ownership) ofRefused(nodes []Node, n Node, a netip.Addr, b Bounds) bool {
	for _, r := range nodes {
		if r.Name == n.Name || !o.Refused[r.Name] {
			continue
		}
		for _, c := range slices.Concat(r.Prefixes, r.Pods) {
			if p := c.Prefix.Masked(); p.Contains(a) && anyCovers(b.Claimable(), p) && c.Since.Before(n.Since) {
				o.refuse(n.Name, "address "+a.String(), "it lies inside %s, which %s has held longer", p, r.Name)
				return true
			}
		}
	}
	return false
}

func (o *Ownership) maySkipTunnel(n Node, a netip.Addr, owner map[netip.Prefix]holding) bool {
	for bits := a.BitLen(); bits > 0; bits-- {
		p, _ := a.Prefix(bits)
		switch h, found := owner[p]; {
		case !found:
		case h.node == n.Name:
			return false
		case o.Refused[n.Name] || h.since.Before(n.Since):
			o.refuse(n.Name, "address "+a.String(), "it lies inside %s, which %s has held longer", h.prefix, h.node)
			return false
		}
	}
	return true
}
