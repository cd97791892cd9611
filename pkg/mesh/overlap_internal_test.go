package mesh

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

// The index against what it stands for: a walk over all that is held.
func TestOverlapIndex(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	random := func() holding {
		a := netip.AddrFrom4([4]byte{10, byte(rng.IntN(2)), byte(rng.IntN(4)), byte(rng.IntN(4))})
		if rng.IntN(3) == 0 {
			a = netip.AddrFrom16([16]byte{0xfd, 15: byte(rng.IntN(16))})
		}
		p, err := a.Prefix(rng.IntN(a.BitLen() + 1))
		if rng.IntN(2) == 0 {
			p, err = a.Prefix(a.BitLen() - rng.IntN(5))
		}
		if err != nil {
			t.Fatal(err)
		}
		return holding{node: string(rune('a' + rng.IntN(4))), prefix: p}
	}
	for range 2000 {
		var index overlapIndex
		var held []holding
		for range 25 {
			claim := random()
			want := false
			for _, h := range held {
				want = want || h.node != claim.node && h.prefix.Overlaps(claim.prefix)
			}
			other, got := index.overlapping(claim)
			if got != want {
				t.Fatalf("%v among %v: %v, want %v", claim, held, got, want)
			}
			if got && (other.node == claim.node || !other.prefix.Overlaps(claim.prefix)) {
				t.Fatalf("%v among %v: named %v", claim, held, other)
			}
			if !got {
				index.add(claim)
				held = append(held, claim)
			}
		}
	}
}
