package identity

import (
	"sync"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

func TestPairs(t *testing.T) {
	s := all(t)
	here, there := NewPairs(keyA, s), NewPairs(keyB, s)
	names := append(ids(s), "", "ffffffff")
	for _, own := range names {
		for _, theirs := range names {
			want, wanted := s.ForPair(own, theirs)
			for range 2 { // derived, and remembered
				got, ok := here.PresharedKey(own, theirs, keyB)
				if ok != wanted || got != want.PresharedKey(keyA, keyB) {
					t.Errorf("%q and %q: %v, want that of %q", own, theirs, ok, want.ID())
				}
				if other, otherOK := there.PresharedKey(theirs, own, keyA); other != got || otherOK != ok {
					t.Errorf("%q and %q: the two ends differ", own, theirs)
				}
			}
		}
	}
	if len(here.known) != len(s) {
		t.Errorf("%d keys are remembered of one peer and %d secrets", len(here.known), len(s))
	}
}

func TestByFingerprint(t *testing.T) {
	s := all(t)
	p := NewPairs(keyA, s[:3])
	stranger := wgtypes.Key{5}
	for i, secret := range s {
		want := secret.PresharedKey(keyA, keyB)
		got, ok := p.ByFingerprint(keyB, mesh.FingerprintOf(want))
		switch {
		case i < 3 && (!ok || got != want):
			t.Errorf("%s: %v, and another key", secret.ID(), ok)
		case i == 3 && (ok || got != wgtypes.Key{}):
			t.Errorf("%s is not known: %v", secret.ID(), ok)
		}
		if got, ok := p.ByFingerprint(stranger, mesh.FingerprintOf(want)); ok || got != (wgtypes.Key{}) {
			t.Errorf("%s: that of another peer is found", secret.ID())
		}
	}
}

func TestNoPairs(t *testing.T) {
	s := all(t)
	for name, p := range map[string]*Pairs{"nil": nil, "no secrets": NewPairs(keyA, nil), "an empty secret": NewPairs(keyA, Secrets{{}})} {
		for _, id := range []SecretID{"", s[0].ID()} {
			if psk, ok := p.PresharedKey(id, id, keyB); ok || psk != (wgtypes.Key{}) {
				t.Errorf("%s: %q has a preshared key", name, id)
			}
		}
		for _, f := range []mesh.Fingerprint{{}, mesh.FingerprintOf(s[0].PresharedKey(keyA, keyB))} {
			if psk, ok := p.ByFingerprint(keyB, f); ok || psk != (wgtypes.Key{}) {
				t.Errorf("%s: %s is found", name, f)
			}
		}
	}
}

func TestPairsAtOnce(t *testing.T) {
	s := all(t)
	p := NewPairs(keyA, s)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 100 {
				secret, peer := s[(n+i)%len(s)], wgtypes.Key{byte(n % 7)}
				want := secret.PresharedKey(keyA, peer)
				if got, ok := p.PresharedKey(secret.ID(), secret.ID(), peer); !ok || got != want {
					t.Errorf("%s: %v, and another key", secret.ID(), ok)
				}
				if got, ok := p.ByFingerprint(peer, mesh.FingerprintOf(want)); !ok || got != want {
					t.Errorf("%s: %v, by fingerprint another key", secret.ID(), ok)
				}
			}
		})
	}
	wg.Wait()
}
