package identity

import (
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/durable"
)

// A secret's text form is wgcni1_20261121T050000Z_KEY: its version, when it was
// made, and 32 random bytes. Whoever reads the registry can try guesses against
// its seals at leisure, so there is no form for anything that a person thought up.
const (
	secretVersion = "wgcni1"
	secretTime    = "20060102T150405Z"
)

// The labels of what is derived from a secret (info of RFC 5869, section 3.2).
// A change here, or of what stands beside them, cuts a mesh in two.
const (
	labelID           = "wgcni secret id"
	labelSeal         = "wgcni seal"
	labelPresharedKey = "wgcni preshared key"
)

// Unlike the standard encodings, these two take one text for one value.
var (
	secretKeyBase64 = base64.RawURLEncoding.Strict()
	macBase64       = base64.StdEncoding.Strict()
)

// errNotSecret does not say what stands there instead: it may be a secret with a
// letter missing, or a password.
var errNotSecret = errors.New("not a cluster secret (wgcni1_TIME_KEY): make one with `wgcnid secret new`")

// SecretID names a secret without telling it: 8 hexadecimal digits in lower case,
// derived from it. Empty is none.
type SecretID string

// Secret is what the nodes of a cluster share, and nobody else has. It prints
// itself as "(hidden)", in every way. The zero value is none.
type Secret struct{ concealed[secret] }

// secret is a Secret with what is asked of it often, derived once.
type secret struct {
	made time.Time
	key  [32]byte
	id   SecretID
	seal [32]byte
}

// NewSecret makes a secret. It fails only if now cannot be written in four
// digits of a year.
func NewSecret(now time.Time) (Secret, error) {
	s := secret{made: now}
	rand.Read(s.key[:])
	made, err := ParseSecret(s.text())
	if err != nil {
		return Secret{}, fmt.Errorf("make a cluster secret: the clock shows the year %d: set it", now.UTC().Year())
	}
	return made, nil
}

// ParseSecret reads a secret's text form, and nothing else. The error does not
// quote it.
func ParseSecret(text string) (Secret, error) {
	_, rest, _ := strings.Cut(text, "_")
	made, key, _ := strings.Cut(rest, "_")
	at, err := time.Parse(secretTime, made)
	if err != nil {
		return Secret{}, errNotSecret
	}
	raw, err := secretKeyBase64.DecodeString(key)
	s := secret{made: at}
	if err != nil || len(raw) != len(s.key) {
		return Secret{}, errNotSecret
	}
	copy(s.key[:], raw)
	// time.Parse takes fractions of a second, and base64 line ends between the letters.
	if s.text() != text {
		return Secret{}, errNotSecret
	}
	s.id = SecretID(hex.EncodeToString(s.derive(labelID, 4)))
	copy(s.seal[:], s.derive(labelSeal, len(s.seal)))
	return Secret{conceal(s)}, nil
}

func (s secret) header() string { return secretVersion + "_" + s.made.UTC().Format(secretTime) }

func (s secret) text() string { return s.header() + "_" + secretKeyBase64.EncodeToString(s.key[:]) }

// derive returns length bytes that only this secret and this info give. The salt
// binds the time as well: nodes that agree on a secret's ID agree on when it was
// made, and so on which of two is the older.
func (s secret) derive(info string, length int) []byte {
	out, err := hkdf.Key(sha256.New, s.key[:], []byte(s.header()), info, length)
	if err != nil {
		// Only of a key below 14 bytes, or more than 8160 bytes asked for. Going on
		// with less than was asked for would key tunnels with zeros.
		panic(err)
	}
	return out
}

// ID names the secret.
func (s Secret) ID() SecretID { return s.value().id }

// Made is when the secret was made, in UTC and to the second.
func (s Secret) Made() time.Time { return s.value().made }

// Reveal returns the secret's text form, for `wgcnid secret new` alone. It is
// empty for the zero value.
func (s Secret) Reveal() string {
	if s.ID() == "" {
		return ""
	}
	return s.value().text()
}

// PresharedKey is WireGuard's preshared key of the pair of nodes with these
// public keys, in whatever order. The zero value gives the zero key, which is
// how WireGuard writes "none".
func (s Secret) PresharedKey(a, b wgtypes.Key) wgtypes.Key {
	if s.ID() == "" {
		return wgtypes.Key{}
	}
	if bytes.Compare(a[:], b[:]) > 0 {
		a, b = b, a
	}
	return wgtypes.Key(s.value().derive(labelPresharedKey+string(a[:])+string(b[:]), wgtypes.KeyLen))
}

// WriteSecret writes the secret into a new file of mode 0600. It never writes
// over what is there: the error is then fs.ErrExist.
func WriteSecret(path string, s Secret) error {
	if s.ID() == "" {
		return fmt.Errorf("write %s: there is no secret to write", path)
	}
	err := durable.Create(path, []byte(s.Reveal()+"\n"), 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: leave it as it is, or add a new secret to it as the last line (see `wgcnid secret new`), on every node before it becomes the first on any", err)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
