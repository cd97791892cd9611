package mesh_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/wgcni/wgcni/pkg/mesh"
)

var byEqual = cmp.Options{
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmpopts.EquateEmpty(),
}

// bases are where random prefixes of at most 5 host bits lie: small enough for
// a naive set, at both ends of both families.
var bases = addrs("10.1.2.224", "0.0.0.0", "255.255.255.224", "fd00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffe0")

func randomPrefix(rng *rand.Rand, base netip.Addr) netip.Prefix {
	a := base
	for range rng.IntN(32) {
		a = a.Next()
	}
	return netip.PrefixFrom(a, a.BitLen()-rng.IntN(6))
}

// cover is the naive model: all addresses, one by one.
func cover(in []netip.Prefix) map[netip.Addr]bool {
	out := map[netip.Addr]bool{}
	for _, p := range in {
		for a := p.Masked().Addr(); p.Contains(a); a = a.Next() {
			out[a] = true
		}
	}
	return out
}

// fewest counts the prefixes that the set needs: the largest blocks that are
// wholly in it, counted from the top.
func fewest(set map[netip.Addr]bool, block netip.Prefix) int {
	full, empty := true, true
	for a := block.Addr(); block.Contains(a); a = a.Next() {
		full, empty = full && set[a], empty && !set[a]
	}
	switch {
	case empty:
		return 0
	case full:
		return 1
	}
	lower := netip.PrefixFrom(block.Addr(), block.Bits()+1)
	upper := block.Addr()
	for lower.Contains(upper) {
		upper = upper.Next()
	}
	return fewest(set, lower) + fewest(set, netip.PrefixFrom(upper, block.Bits()+1))
}

func TestMerge(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 1000 {
		base := bases[rng.IntN(len(bases))]
		var in []netip.Prefix
		for range rng.IntN(12) {
			in = append(in, randomPrefix(rng, base))
		}
		got := mesh.Merge(in)
		set := cover(in)
		if diff := cmp.Diff(set, cover(got), byEqual); diff != "" {
			t.Fatalf("Merge(%v) = %v covers (-want +got):\n%s", in, got, diff)
		}
		if want := fewest(set, netip.PrefixFrom(base, base.BitLen()-5)); len(got) != want {
			t.Fatalf("Merge(%v) = %v, %d prefixes would do", in, got, want)
		}
		if !slices.IsSortedFunc(got, mesh.ComparePrefixes) {
			t.Fatalf("Merge(%v) = %v is not sorted", in, got)
		}
	}
	both := mesh.Merge(prefixes("0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1", "10.0.0.0/8"))
	if diff := cmp.Diff(prefixes("0.0.0.0/0", "::/0"), both, byEqual); diff != "" {
		t.Errorf("both families whole (-want +got):\n%s", diff)
	}
}

func TestSortPrefixes(t *testing.T) {
	got := mesh.SortPrefixes(prefixes("fd00::1/64", "10.0.1.9/24", "10.0.0.0/16", "10.0.1.0/24", "10.0.0.0/24", "fd00::/48"))
	want := prefixes("10.0.0.0/16", "10.0.0.0/24", "10.0.1.0/24", "fd00::/48", "fd00::/64")
	if diff := cmp.Diff(want, got, byEqual); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// an IPv6 underlay needs 20 bytes more (cilium#23917).
func TestRoom(t *testing.T) {
	four, six, mapped := endpoint("192.0.2.1:1"), endpoint("[2001:db8::1]:1"), endpoint("[::ffff:192.0.2.1]:1")
	for _, tt := range []struct {
		underlay  int
		endpoints []netip.AddrPort
		want      int
	}{
		{1500, nil, 1440},
		{1500, []netip.AddrPort{four, {}, mapped}, 1440},
		{1500, []netip.AddrPort{six}, 1420},
		{1500, []netip.AddrPort{four, six, four}, 1420},
		{9001, []netip.AddrPort{four}, 8941},
		{1280, []netip.AddrPort{six}, 1200},
	} {
		if got := mesh.Room(tt.underlay, tt.endpoints); got != tt.want {
			t.Errorf("Room(%d, %v) = %d, want %d", tt.underlay, tt.endpoints, got, tt.want)
		}
	}
}

func TestLeastMTU(t *testing.T) {
	four, six := netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")
	if got := mesh.LeastMTU([]netip.Prefix{four}); got != 576 {
		t.Errorf("IPv4: %d", got)
	}
	if got := mesh.LeastMTU([]netip.Prefix{four, six}); got != 1280 {
		t.Errorf("both: %d", got)
	}
}
