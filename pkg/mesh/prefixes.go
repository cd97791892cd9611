package mesh

import (
	"cmp"
	"net/netip"
	"slices"
)

// ComparePrefixes orders by family, address, then length; shorter first.
func ComparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// SortPrefixes returns the prefixes masked, sorted and each once.
func SortPrefixes(in []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(in))
	for _, p := range in {
		out = append(out, p.Masked())
	}
	slices.SortFunc(out, ComparePrefixes)
	return slices.Compact(out)
}

// SortAddrs returns the addresses sorted, each once.
func SortAddrs(in []netip.Addr) []netip.Addr {
	out := slices.Clone(in)
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// Merge returns the fewest prefixes that cover exactly the same addresses:
// covered ones are dropped, neighbours joined. The result is sorted.
func Merge(in []netip.Prefix) []netip.Prefix {
	var stack []netip.Prefix
	for _, p := range SortPrefixes(in) {
		if n := len(stack); n > 0 && covers(stack[n-1], p) {
			continue
		}
		stack = append(stack, p)
		for n := len(stack); n > 1; n = len(stack) {
			parent, ok := siblingsParent(stack[n-2], stack[n-1])
			if !ok {
				break
			}
			stack = append(stack[:n-2], parent)
		}
	}
	return stack
}

// siblingsParent returns the prefix one bit shorter that a and b fill together.
func siblingsParent(a, b netip.Prefix) (netip.Prefix, bool) {
	if a.Bits() != b.Bits() || a.Bits() == 0 || a.Addr().BitLen() != b.Addr().BitLen() {
		return netip.Prefix{}, false
	}
	parent := netip.PrefixFrom(a.Addr(), a.Bits()-1).Masked()
	return parent, parent == netip.PrefixFrom(b.Addr(), b.Bits()-1).Masked() && a != b
}

// covers reports whether every address of b is in a.
func covers(a, b netip.Prefix) bool { return a.Bits() <= b.Bits() && a.Contains(b.Addr()) }

func anyCovers(set []netip.Prefix, p netip.Prefix) bool {
	return slices.ContainsFunc(set, func(s netip.Prefix) bool { return covers(s, p) })
}

func anyContains(set []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(set, func(s netip.Prefix) bool { return s.Contains(a) })
}

// hostPrefix is the /32 or /128 of an address.
func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func hostPrefixes(addrs []netip.Addr) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, hostPrefix(a))
	}
	return out
}

func claimPrefixes(claims []Claim) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(claims))
	for _, c := range claims {
		out = append(out, c.Prefix)
	}
	return out
}
