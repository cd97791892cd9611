package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/wgcni/wgcni/pkg/durable"
)

// LastFile is where the helper leaves the file that it read its stanza from, in
// its state folder: a node leaves the mesh after the entry was taken out.
const LastFile = "last.conflist"

// stateFile, in a folder of network configurations, names the state folder of its
// node where that is not DefaultStateDir: once the entry is lost, nothing else does.
// No runtime takes a file of that name for a network configuration.
const stateFile = ".wgcni-state"

// LoadLast is Load without a path; where no configuration chains wgcni any more, or
// only another network's, it reads the last one that did.
func LoadLast(dir string) (Config, error) {
	c, err := Load("", dir)
	if err == nil && c.PassedOver == "" || err != nil && !errors.Is(err, ErrNotChained) {
		return c, err
	}
	last, lastErr := Load(filepath.Join(StateDir(dir), LastFile), dir)
	if lastErr != nil || err == nil && c.InPlaceOf(last) == nil {
		return c, err
	}
	return last, nil
}

// InPlaceOf is an error where c was found only because the conflist that last was read
// from is damaged: this node's pods would be lost to the others for as long.
func (c Config) InPlaceOf(last Config) error {
	if c.PassedOver == "" || c.Name == last.Name {
		return nil
	}
	return fmt.Errorf("%s is not valid JSON, and the next conflist is of another network, %s", c.PassedOver, c.Name)
}

// StateDir is the state folder that goes with a folder of network configurations,
// as far as that is known when none of them chains wgcni.
func StateDir(dir string) string {
	text, err := os.ReadFile(filepath.Join(dir, stateFile))
	if stateDir := strings.TrimSuffix(string(text), "\n"); err == nil && filepath.IsAbs(stateDir) {
		return filepath.Clean(stateDir)
	}
	return DefaultStateDir
}

// KeepStateDir notes where the state of a node is, for StateDir.
func KeepStateDir(dir, stateDir string) error {
	switch {
	case StateDir(dir) == stateDir:
		return nil
	case stateDir == DefaultStateDir:
		return durable.Remove(filepath.Join(dir, stateFile))
	}
	return durable.Replace(filepath.Join(dir, stateFile), []byte(stateDir+"\n"), 0o644)
}

// ForgetStateDir takes back what KeepStateDir has noted, if it was this state folder.
func ForgetStateDir(dir, stateDir string) error {
	if path := filepath.Join(dir, stateFile); StateDir(dir) == stateDir {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return durable.Remove(path)
	}
	return nil
}
