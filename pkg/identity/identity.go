// Package identity keeps what a node must not tell: its WireGuard private key,
// the cluster secrets, and the keys that are derived from them.
package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/durable"
)

// keyFile holds the key as `wg genkey` prints it. It is durable: a key made
// anew at each start would cut the node off from all its peers at each reboot.
const keyFile = "private.key"

// maxKeyFile leaves a key of 44 characters room for white space.
const maxKeyFile = 1 << 10

// ErrNoKey says that the node has no key yet.
var ErrNoKey = errors.New("this node has no key yet: start `wgcnid run` once")

// PrivateKey is a node's private key. It prints itself as "(hidden)", in every way.
type PrivateKey struct{ concealed[wgtypes.Key] }

// NewPrivateKey makes a key.
func NewPrivateKey() (PrivateKey, error) {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return PrivateKey{}, fmt.Errorf("make a private key: %w", err)
	}
	return PrivateKey{conceal(key)}, nil
}

// Public is the key that others may know.
func (k PrivateKey) Public() wgtypes.Key { return k.Reveal().PublicKey() }

// Reveal hands out the key itself, for the kernel alone.
func (k PrivateKey) Reveal() wgtypes.Key { return k.value() }

// Path is the file in which the key of a state folder lies.
func Path(stateDir string) string { return filepath.Join(stateDir, keyFile) }

// Load reads the node's key. The error Is ErrNoKey if there is none yet.
func Load(stateDir string) (PrivateKey, error) {
	key, err := LoadPrivateKey(Path(stateDir))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return key, ErrNoKey
	case errors.Is(err, errNotKey):
		err = fmt.Errorf("%w: restore it, or delete it to get a new one", err)
	}
	return key, err
}

// LoadPrivateKey reads a file as `wg genkey` writes it. For the file's mode see
// ReadSecretFile.
func LoadPrivateKey(path string) (PrivateKey, error) {
	text, err := ReadSecretFile(path, maxKeyFile)
	if err != nil {
		return PrivateKey{}, err
	}
	key, err := ParsePrivateKey(string(text))
	if err != nil {
		return key, fmt.Errorf("%s %w", path, err)
	}
	return key, nil
}

// errNotKey does not say what stands there instead.
var errNotKey = errors.New("does not hold a key as `wg genkey` writes it")

// ParsePrivateKey reads a key's text. The error does not quote it, as wgtypes' may.
func ParsePrivateKey(text string) (PrivateKey, error) {
	key, err := wgtypes.ParseKey(strings.TrimSpace(text))
	if err != nil {
		return PrivateKey{}, errNotKey
	}
	return PrivateKey{conceal(key)}, nil
}

// LoadOrCreate reads the node's key and makes one where there is none. Only the
// helper calls it, of which one at most runs on a node.
func LoadOrCreate(stateDir string) (PrivateKey, error) {
	k, err := Load(stateDir)
	if err == nil {
		// Whoever made it may have been killed before its name was synced.
		return k, durable.SyncFolder(stateDir)
	}
	if !errors.Is(err, ErrNoKey) {
		return k, err
	}
	if err := createKey(stateDir, Path(stateDir)); err != nil {
		return PrivateKey{}, err
	}
	return Load(stateDir)
}
