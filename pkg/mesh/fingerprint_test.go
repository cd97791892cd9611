package mesh_test

import (
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

func TestFingerprintOf(t *testing.T) {
	if f := mesh.FingerprintOf(wgtypes.Key{}); f != (mesh.Fingerprint{}) || f.String() != "0000000000000000" {
		t.Errorf("of no key: %s", f)
	}
	seen := map[mesh.Fingerprint]wgtypes.Key{}
	for i := range 256 {
		for _, k := range []wgtypes.Key{{0: byte(i)}, {31: byte(i)}} {
			f := mesh.FingerprintOf(k)
			if other, twice := seen[f]; twice && other != k {
				t.Errorf("%v and %v are both %s", other, k, f)
			}
			if (f == mesh.Fingerprint{}) != (k == wgtypes.Key{}) {
				t.Errorf("%v is %s, which is none", k, f)
			}
			seen[f] = k
		}
	}
	// Two versions of this program on one node must agree, or each would set the key anew.
	const want = "cc9965b8ea0dbcc2" // printf 'wgcni preshared key fingerprint\0\1\2\3\0…' | sha256sum
	if got := mesh.FingerprintOf(wgtypes.Key{1, 2, 3}).String(); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
