package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// nextKeyFile holds the key that takes the place of the one in use at the next
// rotation. It is made in advance: all nodes know its public half by then.
const nextKeyFile = "next.key"

// Keys are the node's two keys, the public halves only, and how far the rotation
// from one to the other has come; see mesh.Stage.
type Keys struct {
	Current, Next wgtypes.Key // Next is zero while Stage is mesh.Back: there is none
	Since         time.Time   // when Current came into use
	Stage         mesh.Stage
	Answered      time.Time // the latest order of a rotation that was begun
}

// Spare is the key of the spare interface: Next, but Current while Stage is mesh.Back.
func (k Keys) Spare() wgtypes.Key {
	if k.Stage == mesh.Back {
		return k.Current
	}
	return k.Next
}

// NextPath is the file in which the next key of a state folder lies.
func NextPath(stateDir string) string { return filepath.Join(stateDir, nextKeyFile) }

// LoadKeys reads the node's keys and changes nothing. The error Is ErrNoKey if
// there are none yet. Next is zero too where its file is missing or damaged and
// nothing depends on it, which is at rest: LoadOrCreateKeys makes a new one.
// It may be called while the helper rotates them: what is read alike twice in a row was
// so in between.
func LoadKeys(stateDir string) (Keys, error) {
	k, _, err := loadKeys(stateDir)
	for range keyReads {
		before, berr := k, err
		k, _, err = loadKeys(stateDir)
		if k == before && fmt.Sprint(err) == fmt.Sprint(berr) {
			break
		}
	}
	return k, err
}

// keyReads bounds LoadKeys: a whole rotation, of seconds, changes the files five times.
const keyReads = 10

// loadKeys also reports whether the state file is to be written: it is missing, or
// a Switch has come no further than the key.
func loadKeys(stateDir string) (k Keys, unwritten bool, err error) {
	current, err := Load(stateDir)
	if err != nil {
		return Keys{}, false, err
	}
	s, err := readRotation(stateDir)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return Keys{}, false, err
	}
	k = Keys{Current: current.Public(), Since: s.Since, Stage: s.Stage, Answered: s.Answered}
	if missing { // the key of a version that did not rotate
		if info, err := os.Stat(Path(stateDir)); err == nil {
			k.Since = mesh.ClaimTime(info.ModTime())
		}
	}
	if k.Stage == mesh.Out && k.Current.String() == s.Next {
		k.Stage = mesh.Back
		return k, true, nil
	}
	if k.Stage == mesh.Back {
		return k, missing, nil
	}
	next, err := LoadPrivateKey(NextPath(stateDir))
	if err == nil {
		k.Next = next.Public()
	}
	if k.Stage == mesh.Out && (err != nil || k.Next.String() != s.Next) {
		if err == nil {
			err = fmt.Errorf("%s is not the key %s that this node is changing to", NextPath(stateDir), s.Next)
		}
		return Keys{}, false, fmt.Errorf("the next key is lost in the middle of a rotation: %w: restore it, or delete %s to give the rotation up", err, rotationPath(stateDir))
	}
	return k, missing, nil
}

// LoadOrCreateKeys reads the node's keys, makes those that are missing, and ends
// what a kill has left half done. Only the helper calls it, of which one at most
// runs on a node.
func LoadOrCreateKeys(stateDir string, now time.Time) (Keys, error) {
	now = mesh.ClaimTime(now)
	k, unwritten, err := loadKeys(stateDir)
	if errors.Is(err, ErrNoKey) {
		// First, so that no rotation of a key that was lost goes on with the new one.
		if err := writeRotation(stateDir, Keys{Since: now}); err != nil {
			return Keys{}, err
		}
		if _, err := LoadOrCreate(stateDir); err != nil {
			return Keys{}, err
		}
		k, unwritten, err = loadKeys(stateDir)
	}
	if err != nil {
		return Keys{}, err
	}
	if unwritten {
		if k.Stage == mesh.Back || k.Since.After(now) {
			k.Since = now
		}
		if err := writeRotation(stateDir, k); err != nil {
			return Keys{}, err
		}
	}
	if k.Stage == mesh.Resting && k.Next == (wgtypes.Key{}) {
		return k.renew(stateDir)
	}
	return k, nil
}

// renew makes the next key.
func (k Keys) renew(stateDir string) (Keys, error) {
	if err := createKey(stateDir, NextPath(stateDir)); err != nil {
		return k, err
	}
	next, err := LoadPrivateKey(NextPath(stateDir))
	if err != nil {
		return k, err
	}
	k.Next = next.Public()
	return k, nil
}

func createKey(stateDir, path string) error {
	fresh, err := NewPrivateKey()
	if err != nil {
		return err
	}
	return writeFile(stateDir, path, fresh.Reveal().String()+"\n")
}

// Begin starts a rotation: the node's pairs are to move to the spare plane. order
// is when it was asked for. An error leaves all as it was, or as it is to be.
func (k Keys) Begin(stateDir string, order time.Time) (Keys, error) {
	if k.Stage != mesh.Resting || k.Next == (wgtypes.Key{}) {
		return k, fmt.Errorf("begin a rotation: there is one already, or no next key (stage %q)", k.Stage)
	}
	out := k
	out.Stage, out.Answered = mesh.Out, mesh.ClaimTime(order)
	if err := writeRotation(stateDir, out); err != nil {
		return k, err
	}
	return out, nil
}

// Switch puts the next key into the place of the one in use, which is gone from
// the disk by then: no pair needs it. After an error it can be called again.
func (k Keys) Switch(stateDir string, now time.Time) (Keys, error) {
	if k.Stage != mesh.Out {
		return k, fmt.Errorf("switch keys: no rotation is going on (stage %q)", k.Stage)
	}
	disk, _, err := loadKeys(stateDir)
	switch {
	case err != nil:
		return k, err
	case disk.Spare() != k.Next:
		return k, fmt.Errorf("switch keys: another process has changed those in %s: restart `wgcnid run`", stateDir)
	case disk.Stage == mesh.Out:
		if err := rename(NextPath(stateDir), Path(stateDir)); err != nil {
			return k, err
		}
	}
	// The key in use is to be durable before the state that says so.
	if err := syncFolder(stateDir); err != nil {
		return k, err
	}
	out := Keys{Current: k.Next, Since: mesh.ClaimTime(now), Stage: mesh.Back, Answered: k.Answered}
	if err := writeRotation(stateDir, out); err != nil {
		return k, err
	}
	return out, nil
}

// End closes a rotation and makes a new next key. After an error it can be called
// again; a start in between makes the key.
func (k Keys) End(stateDir string, _ time.Time) (Keys, error) {
	if k.Stage != mesh.Back {
		return k, fmt.Errorf("end the rotation: its key is not in use yet (stage %q)", k.Stage)
	}
	out := k
	out.Stage = mesh.Resting
	// In this order: beside a next key, a Switch that was cut short would look as if
	// it had not begun.
	if err := writeRotation(stateDir, out); err != nil {
		return k, err
	}
	out, err := out.renew(stateDir)
	if err != nil {
		return k, err
	}
	return out, nil
}

// Revealer hands the node's private keys to the kernel package, which asks for the
// one of a public key when it configures an interface, and only then.
func Revealer(stateDir string) func(public wgtypes.Key) (wgtypes.Key, error) {
	return func(public wgtypes.Key) (wgtypes.Key, error) {
		var errs []error
		// Current first, last and once more: a Switch in between moves the next key there.
		for _, path := range []string{Path(stateDir), NextPath(stateDir), Path(stateDir)} {
			key, err := LoadPrivateKey(path)
			if err == nil && key.Public() == public {
				return key.Reveal(), nil
			}
			errs = append(errs, err)
		}
		if errors.Is(errs[0], fs.ErrNotExist) {
			return wgtypes.Key{}, ErrNoKey
		}
		if errors.Is(errs[1], fs.ErrNotExist) {
			errs[1] = nil
		}
		if err := errors.Join(errs[:2]...); err != nil {
			return wgtypes.Key{}, fmt.Errorf("the private key of %s: %w", public, err)
		}
		return wgtypes.Key{}, fmt.Errorf("%s has no private key of %s: it has been rotated meanwhile", stateDir, public)
	}
}
