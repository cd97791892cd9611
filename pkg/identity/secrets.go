package identity

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// Bounds of a file of secrets. One is the rule, and two while it is changed.
const (
	maxSecrets    = 16
	maxSecretFile = 64 << 10
)

// What Check finds.
var (
	ErrUnsealed      = errors.New("not sealed with a cluster secret: set clusterSecretFile on its node too")
	ErrUnknownSecret = errors.New("sealed with an unknown cluster secret")
	ErrForged        = errors.New("its seal does not fit its content: it was altered or forged, by somebody who can write to the registry")
)

// Secrets are those that a node knows. The first seals what it publishes, and
// all of them are accepted of others, so that a secret is changed node by node.
type Secrets []Secret

// LoadSecrets reads a file with one secret a line. Empty lines, and those that
// begin with #, are left out. The error names the path and the line, and not
// what is there; a missing file is fs.ErrNotExist. For the file's mode see
// ReadSecretFile.
func LoadSecrets(path string) (Secrets, error) {
	data, err := ReadSecretFile(path, maxSecretFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cluster secret: %w: copy it from another node, or make the first one with `wgcnid secret new`", err)
	}
	if err != nil {
		return nil, fmt.Errorf("cluster secret: %w", err)
	}
	s, err := parseSecrets(string(data))
	if err != nil {
		return nil, fmt.Errorf("cluster secret: %s: %w", path, err)
	}
	return s, nil
}

func parseSecrets(text string) (Secrets, error) {
	var out Secrets
	lines := map[SecretID]int{}
	n := 0
	for line := range strings.SplitSeq(text, "\n") {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		s, err := ParseSecret(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if first, ok := lines[s.ID()]; ok {
			return nil, fmt.Errorf("line %d: the secret of line %d again: delete one of them", n, first)
		}
		if len(out) == maxSecrets {
			return nil, fmt.Errorf("line %d: more than %d secrets: delete those that no node uses any more", n, maxSecrets)
		}
		lines[s.ID()] = n
		out = append(out, s)
	}
	if len(out) == 0 {
		return nil, errors.New("no secret in it: make one with `wgcnid secret new`")
	}
	return out, nil
}

// Current names the first secret. It is empty if there is none.
func (s Secrets) Current() SecretID {
	if len(s) == 0 {
		return ""
	}
	return s[0].ID()
}

// Knows reports whether a secret of that name is among these.
func (s Secrets) Knows(id SecretID) bool {
	_, ok := s.find(id)
	return ok
}

func (s Secrets) find(id SecretID) (Secret, bool) {
	i := slices.IndexFunc(s, func(s Secret) bool { return s.ID() == id })
	if id == "" || i < 0 {
		return Secret{}, false
	}
	return s[i], true
}

// Seal vouches for the message with the first secret. It is the zero value if
// there is none.
func (s Secrets) Seal(message []byte) Seal {
	current, ok := s.find(s.Current())
	if !ok {
		return Seal{}
	}
	return current.vouch(message)
}

// Check returns nil if one of the secrets has sealed this message, else an error
// that is ErrUnsealed, ErrUnknownSecret or ErrForged.
func (s Secrets) Check(message []byte, seal Seal) error {
	if seal.Secret == "" {
		return ErrUnsealed
	}
	by, ok := s.find(seal.Secret)
	if !ok {
		return fmt.Errorf("%w: %s, while this node has %s: add it to the secret file of this node, or one of these to that of the other", ErrUnknownSecret, seal.Secret, s.ids())
	}
	if want := by.vouch(message); !hmac.Equal(want.MAC[:], seal.MAC[:]) {
		return ErrForged
	}
	return nil
}

func (s Secrets) ids() string {
	if len(s) == 0 {
		return "none"
	}
	var out []string
	for _, s := range s {
		out = append(out, string(s.ID()))
	}
	return strings.Join(out, ", ")
}

func (s Secret) vouch(message []byte) Seal {
	key := s.value().seal
	mac := hmac.New(sha256.New, key[:])
	mac.Write(message)
	return Seal{Secret: s.ID(), MAC: [sha256.Size]byte(mac.Sum(nil))}
}

// ForPair returns the secret that keys the tunnel between two nodes whose records
// are sealed by a and b, in whatever order: the older of the two, by ID if they
// are of one second, so that a pair changes over when both nodes have and not
// before. It is false if either is empty or not known.
func (s Secrets) ForPair(a, b SecretID) (Secret, bool) {
	older, okA := s.find(a)
	other, okB := s.find(b)
	if !okA || !okB {
		return Secret{}, false
	}
	if c := other.Made().Compare(older.Made()); c < 0 || c == 0 && other.ID() < older.ID() {
		older = other
	}
	return older, true
}

// Seal vouches for a message, and names the secret that it was made with. It is
// no secret. The zero value is no seal.
type Seal struct {
	Secret SecretID
	MAC    [sha256.Size]byte // HMAC-SHA256 with a key derived from the secret
}

// IsZero reports whether there is no seal.
func (s Seal) IsZero() bool { return s == Seal{} }

// String returns the text form: the secret's ID, a colon and the MAC in base64.
// It is empty for the zero value.
func (s Seal) String() string {
	if s.IsZero() {
		return ""
	}
	return string(s.Secret) + ":" + macBase64.EncodeToString(s.MAC[:])
}

// MarshalText returns the text form.
func (s Seal) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is the inverse of MarshalText, and takes nothing else.
func (s *Seal) UnmarshalText(text []byte) error {
	id, encoded, _ := strings.Cut(string(text), ":")
	mac, err := macBase64.DecodeString(encoded)
	seal := Seal{Secret: SecretID(id)}
	copy(seal.MAC[:], mac)
	if len(text) > 0 && (err != nil || len(id) != 8 || strings.Trim(id, "0123456789abcdef") != "") || seal.String() != string(text) {
		return errors.New("a seal in an unknown form: a newer version of wgcni may have made it, then update this node")
	}
	*s = seal
	return nil
}
