package mesh

import (
	"net/netip"
	"slices"
)

// uncontested says of each claim whether no other node's can overlap it. In a
// healthy mesh that is all of them, and they need no place in an overlapIndex.
func uncontested(claims []holding) []bool {
	order := make([]int, len(claims))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(i, j int) int { return ComparePrefixes(claims[i].prefix, claims[j].prefix) })
	out := make([]bool, len(claims))
	for len(order) > 0 {
		// Prefixes either nest or are apart, so what follows the first and is
		// covered by it is all that it overlaps.
		first, n, alone := claims[order[0]], 0, true
		for n < len(order) && covers(first.prefix, claims[order[n]].prefix) {
			alone = alone && claims[order[n]].node == first.node
			n++
		}
		for _, i := range order[:n] {
			out[i] = alone
		}
		order = order[n:]
	}
	return out
}

// overlapIndex finds a prefix that another node holds and that overlaps a given
// one, in time that grows with the length of an address, not with the mesh.
type overlapIndex struct {
	exact map[netip.Prefix]holding
	// above has, for every shorter prefix that contains a held one, the held
	// ones of up to two different nodes: enough to name one that is not mine.
	above map[netip.Prefix][]holding
}

func (x *overlapIndex) add(h holding) {
	if x.exact == nil {
		x.exact, x.above = map[netip.Prefix]holding{}, map[netip.Prefix][]holding{}
	}
	x.exact[h.prefix] = h
	for bits := h.prefix.Bits() - 1; bits >= 0; bits-- {
		p := netip.PrefixFrom(h.prefix.Addr(), bits).Masked()
		known := x.above[p]
		if len(known) == 2 || len(known) == 1 && known[0].node == h.node {
			break // then all shorter ones know as much
		}
		x.above[p] = append(known, h)
	}
}

// overlapping returns a held prefix of a node other than the claimant that overlaps its claim.
func (x *overlapIndex) overlapping(claim holding) (holding, bool) {
	for _, h := range x.above[claim.prefix] {
		if h.node != claim.node {
			return h, true
		}
	}
	for bits := claim.prefix.Bits(); bits >= 0; bits-- {
		h, ok := x.exact[netip.PrefixFrom(claim.prefix.Addr(), bits).Masked()]
		if ok && h.node != claim.node {
			return h, true
		}
	}
	return holding{}, false
}
