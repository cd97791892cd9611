package mesh

import (
	"iter"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// atlas tells which nodes touch given addresses, or have a given key, without a look
// at each of thousands. It has all nodes of a Planner's last plan.
type atlas struct {
	bounds   []netip.Prefix
	plots    []plot      // sorted by prefix
	lengths  [2][129]int // how many plots have a prefix of that many bits: IPv4, IPv6
	keys     map[wgtypes.Key][]*Node
	gateways []*Node
}

// plot is an address or a range that a node has.
type plot struct {
	prefix netip.Prefix
	own    bool // the machine's own address, which several may share; else a claim
	node   *Node
}

func newAtlas(bounds []netip.Prefix, nodes []*Node) *atlas {
	a := &atlas{bounds: bounds, keys: map[wgtypes.Key][]*Node{}}
	for _, n := range nodes {
		a.plots = append(a.plots, a.plotsOf(n)...)
		a.list(n)
	}
	slices.SortStableFunc(a.plots, func(x, y plot) int { return ComparePrefixes(x.prefix, y.prefix) })
	for _, p := range a.plots {
		*a.length(p.prefix)++
	}
	return a
}

func (a *atlas) plotsOf(n *Node) (out []plot) {
	eachClaim(a.bounds, n, func(q netip.Prefix) bool { out = append(out, plot{q, false, n}); return false })
	eachOwn(n, func(q netip.Prefix) bool { out = append(out, plot{q, true, n}); return false })
	return out
}

func (a *atlas) length(p netip.Prefix) *int {
	if p.Addr().Is4() {
		return &a.lengths[0][p.Bits()]
	}
	return &a.lengths[1][p.Bits()]
}

func (a *atlas) list(n *Node) {
	a.keys[n.PublicKey] = append(a.keys[n.PublicKey], n)
	if isGateway(n) {
		a.gateways = append(a.gateways, n)
	}
}

// exchange takes out nodes that are in it, or others like them, and puts others in.
func (a *atlas) exchange(out, in []*Node) {
	for _, n := range out {
		same := func(m *Node) bool { return m.Name == n.Name }
		for _, p := range a.plotsOf(n) {
			for i := a.find(p.prefix); i < len(a.plots) && a.plots[i].prefix == p.prefix; i++ {
				if a.plots[i].own == p.own && same(a.plots[i].node) {
					a.plots = slices.Delete(a.plots, i, i+1)
					*a.length(p.prefix)--
					break
				}
			}
		}
		if a.keys[n.PublicKey] = slices.DeleteFunc(a.keys[n.PublicKey], same); len(a.keys[n.PublicKey]) == 0 {
			delete(a.keys, n.PublicKey)
		}
		a.gateways = slices.DeleteFunc(a.gateways, same)
	}
	for _, n := range in {
		for _, p := range a.plotsOf(n) {
			a.plots = slices.Insert(a.plots, a.find(p.prefix), p)
			*a.length(p.prefix)++
		}
		a.list(n)
	}
}

// find is where the plots of that prefix begin, or would.
func (a *atlas) find(p netip.Prefix) int {
	i, _ := slices.BinarySearchFunc(a.plots, p, func(q plot, p netip.Prefix) int { return ComparePrefixes(q.prefix, p) })
	return i
}

// touching are the plots that overlap with a masked prefix.
func (a *atlas) touching(q netip.Prefix) iter.Seq[plot] {
	return func(yield func(plot) bool) {
		for bits := range q.Bits() { // those around it
			around := netip.PrefixFrom(q.Addr(), bits).Masked()
			if *a.length(around) == 0 {
				continue
			}
			for _, p := range a.plots[a.find(around):] {
				if p.prefix != around {
					break
				}
				if !yield(p) {
					return
				}
			}
		}
		for _, p := range a.plots[a.find(q):] { // and those inside lie in a row
			if !covers(q, p.prefix) || !yield(p) {
				return
			}
		}
	}
}
