package mesh

import (
	"crypto/sha256"
	"encoding/hex"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Fingerprint names a preshared key without telling it; the zero value is none.
// Plans and ops carry it in the key's place, so that nothing that is printed,
// compared or kept along the way can hold the secret.
type Fingerprint [8]byte

// fingerprintLabel keeps a fingerprint apart from any other hash of the same key.
const fingerprintLabel = "wgcni preshared key fingerprint\x00"

// FingerprintOf returns the fingerprint of a preshared key: the first 8 bytes of
// SHA-256 over a label and the key. The zero key, which is how WireGuard writes
// "none", has the zero fingerprint. A preshared key has 256 random bits, or is
// derived from as many, so its hash gives nothing away that could be guessed.
func FingerprintOf(psk wgtypes.Key) Fingerprint {
	if !hasKey(psk) {
		return Fingerprint{}
	}
	sum := sha256.Sum256(append([]byte(fingerprintLabel), psk[:]...))
	return Fingerprint(sum[:len(Fingerprint{})])
}

// String returns the fingerprint in hexadecimal, 16 digits.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }
