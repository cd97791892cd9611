package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/durable"
)

// The record's file and its lock, in the state folder.
const (
	RecordFile = "install.json"
	lockFile   = "install.lock"
)

// lockWait bounds how long a command waits for another change to end.
const lockWait = 30 * time.Second

// Mode says where the entry is.
type Mode string

// The modes of an installation.
const (
	Copy    Mode = "copy"
	InPlace Mode = "in-place"
	// ByHand is an entry that stood in the source before: only the binary is ours.
	ByHand Mode = "by-hand"
)

// Stage says how far an installation has come. What was stopped half way is
// completed by the next run, in the direction that it had.
type Stage string

// The stages of an installation.
const (
	Installing Stage = "installing"
	Installed  Stage = "installed"
	Removing   Stage = "removing"
)

// Record is what install did to a node, for uninstall and the keeper.
type Record struct {
	Stage  Stage  `json:"stage"`
	Mode   Mode   `json:"mode"`
	CNIDir string `json:"cniDir"`
	// Source is the name of the primary's file in CNIDir.
	Source string `json:"source"`
	// Pinned says that Source was named by the operator. Otherwise it is the first.
	Pinned bool `json:"pinned,omitempty"`
	// Target is the name of the file with the entry: the source, or its copy.
	Target string `json:"target"`
	// Made is the SHA-256 of the copy as it was made, in hexadecimal.
	Made   string `json:"made,omitempty"`
	Entry  string `json:"entry"`
	Plugin Placed `json:"plugin"`
	// Secret is nil where the cluster secret was not copied.
	Secret *Placed `json:"secret,omitempty"`
	// Left says that the node has left the mesh, in a removal that goes on.
	Left bool `json:"left,omitempty"`
	// Folders are those that were made, outermost first.
	Folders []string `json:"folders,omitempty"`
}

// Placed is a file that was copied to where it belongs.
type Placed struct {
	Path string `json:"path"`
	From string `json:"from"`
	// SHA256 is that of the content, in hexadecimal; of a secret it is not kept.
	SHA256 string `json:"sha256,omitempty"`
	// Found says that the very same file was there before: it is not ours to delete.
	Found bool `json:"found,omitempty"`
}

// target is the path of the file with the entry.
func (r Record) target() string { return filepath.Join(r.CNIDir, r.Target) }

// Load reads the record in a state folder. The error Is fs.ErrNotExist where
// install has not been run.
func Load(stateDir string) (Record, error) {
	path := filepath.Join(stateDir, RecordFile)
	data, err := readFile(path)
	if err != nil {
		return Record{}, err
	}
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return Record{}, fmt.Errorf("%s: %w: delete it and run `wgcnid install --entry FILE` again", path, err)
	}
	if r.CNIDir == "" || r.Plugin.Path == "" || r.Entry == "" {
		return Record{}, fmt.Errorf("%s is no record of an installation: delete it and run `wgcnid install --entry FILE` again", path)
	}
	return r, nil
}

// loadIfAny is Load, with nil for no record.
func loadIfAny(stateDir string) (*Record, error) {
	r, err := Load(stateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &r, nil
}

func (r Record) save(stateDir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return durable.Replace(filepath.Join(stateDir, RecordFile), append(data, '\n'), 0o600)
}

// lock lets one process at a time change an installation. It waits for others as
// long as ctx lets it; its end, or Close, lets the next one in.
func lock(ctx context.Context, stateDir string) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for {
		f, err := tryLock(stateDir)
		if err != nil || f != nil {
			return f, err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, fmt.Errorf("another wgcnid is changing this installation (%s is locked): wait for it to end", filepath.Join(stateDir, lockFile))
		}
	}
}

// tryLock is lock without the waiting: nil if another has it.
func tryLock(stateDir string) (*os.File, error) {
	path := filepath.Join(stateDir, lockFile)
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case errors.Is(err, unix.EWOULDBLOCK):
			return nil, f.Close()
		case errors.Is(err, unix.EINTR):
			_ = f.Close()
			continue
		case err != nil:
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// Uninstall deletes the file while it holds it: who has waited for that one
		// holds a lock that nobody else will ever ask for.
		mine, err := f.Stat()
		if err == nil {
			if there, err := os.Stat(path); err == nil && os.SameFile(mine, there) {
				return f, nil
			}
		}
		_ = f.Close()
	}
}
