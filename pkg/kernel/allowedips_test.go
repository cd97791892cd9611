package kernel

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
)

func TestIntervalsRoundTrip(t *testing.T) {
	for _, want := range [][]netip.Prefix{
		nil,
		{netip.MustParsePrefix("10.0.0.0/8")},
		{netip.MustParsePrefix("10.0.0.0/25"), netip.MustParsePrefix("10.0.0.128/26")}, // one ends where the next begins
		{netip.MustParsePrefix("0.0.0.0/1"), netip.MustParsePrefix("255.255.255.0/24")},
		{netip.MustParsePrefix("fd00::/8"), netip.MustParsePrefix("ff00::/8")}, // up to the last address there is
	} {
		var elements []nftables.SetElement
		for _, p := range want {
			elements = append(elements, interval(p)...)
		}
		slices.Reverse(elements) // the kernel lists them in no order of ours
		if got := decodeIntervals(elements); !slices.Equal(got, want) {
			t.Errorf("%v came back as %v", want, got)
		}
	}
}
