package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/durable"
)

// unreadyWait is how long a removal waits for a network configuration that is
// being written.
const unreadyWait = 10 * time.Second

// Removal takes an installation away again. It holds the installation's lock until
// Close; the keeper does nothing from TakeOut on.
type Removal struct {
	Record Record

	stateDir string
	held     *os.File
}

// BeginRemoval takes the lock and reads the record; it changes nothing yet. The
// error Is fs.ErrNotExist where install was not run, or was undone.
func BeginRemoval(ctx context.Context, stateDir string) (*Removal, error) {
	if _, err := Load(stateDir); err != nil {
		return nil, err // and no lock is made in a folder that has nothing else of ours
	}
	held, err := lock(ctx, stateDir)
	if err != nil {
		return nil, err
	}
	r, err := Load(stateDir)
	if err != nil {
		_ = held.Close()
		return nil, err
	}
	return &Removal{Record: r, stateDir: stateDir, held: held}, nil
}

// Close lets others change the installation. A removal that has not come to its
// end is taken up by the next one.
func (m *Removal) Close() error { return m.held.Close() }

// Config is what the node was configured with: as the network configuration has
// it, else as the helper read it last, else as it was installed.
func (m *Removal) Config() (config.Config, error) {
	for _, path := range []string{m.Record.target(), filepath.Join(m.stateDir, config.LastFile)} {
		if data, err := readFile(path); err == nil && Chains(data) {
			if c, err := config.ParseFile(data); err == nil {
				return c, nil
			}
		}
	}
	return config.Parse([]byte(m.Record.Entry))
}

// Plan is what TakeOut and Finish would do to files.
func (m *Removal) Plan(purge bool) (Plan, error) {
	p := Plan{Record: m.Record}
	changes, err := m.entry()
	if err != nil {
		return p, err
	}
	p.Changes = slices.Concat(changes, m.files(&p, purge))
	return p, nil
}

// entry decides how the entry leaves the network configurations. It is an error if
// one would keep it: without the binary no pod of that network would start.
func (m *Removal) entry() ([]Change, error) {
	f, err := readFolder(m.Record.CNIDir, &m.Record)
	if err != nil {
		return nil, err
	}
	out := f.deleteCopies("", "the primary plugin's own file counts again")
	for _, n := range f.networks {
		path := filepath.Join(f.path, n.file)
		switch {
		case f.copied(n):
		case n.file == m.Record.Target && n.fault != nil && !errors.Is(n.fault, ErrNoPrimary):
			return nil, fmt.Errorf("%s: %w", path, n.fault)
		case !Chains(n.list):
		case m.Record.Mode == InPlace && n.file == m.Record.Target:
			rest, err := Remove(n.data)
			if err != nil {
				return nil, fmt.Errorf("%s: %w: delete that file, or write a primary plugin into it", path, err)
			}
			out = append(out, Change{Path: path, Old: n.data, New: rest, Foreign: true, Text: "loses the entry"})
		default:
			return nil, fmt.Errorf("%s has an entry of wgcni that `wgcnid install` did not write: take it out, and run `wgcnid uninstall` again", path)
		}
	}
	return out, nil
}

// files decides which of the placed files go. What was there before, and what
// somebody has replaced since, stays.
func (m *Removal) files(p *Plan, purge bool) (out []Change) {
	plugin := m.Record.Plugin
	data, err := os.ReadFile(plugin.Path)
	switch {
	case err != nil:
	case plugin.Found:
		p.Notes = append(p.Notes, plugin.Path+" stays: it was there before")
	case hashOf(data) != plugin.SHA256:
		p.Notes = append(p.Notes, plugin.Path+" stays: it is not the one that was placed")
	default:
		out = append(out, Change{Path: plugin.Path, Old: data, Quiet: true, Text: "is deleted"})
	}
	if s := m.Record.Secret; s != nil && purge && !s.Found {
		if data, err := os.ReadFile(s.Path); err == nil {
			out = append(out, Change{Path: s.Path, Old: data, Quiet: true, Text: "is deleted"})
		}
	}
	return out
}

// TakeOut marks the record, so that no keeper puts back what goes now, and takes
// the entry out of the network configurations. Called again it has nothing to do.
func (m *Removal) TakeOut(ctx context.Context) ([]Change, error) {
	removeLeftovers(m.Record.CNIDir, m.stateDir, filepath.Dir(m.Record.Plugin.Path))
	changes, err := m.entry()
	if err != nil && !errors.Is(err, ErrUnready) {
		return nil, err
	}
	if m.Record.Stage != Removing {
		m.Record.Stage = Removing
		if err := m.Record.save(m.stateDir); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, unreadyWait)
	defer cancel()
	for {
		if err == nil {
			err = applyAll(changes)
		}
		if !errors.Is(err, ErrUnready) && !errors.Is(err, errRaced) {
			return changes, err
		}
		select {
		case <-time.After(20 * time.Millisecond): // its author is at work
		case <-ctx.Done():
			return nil, err
		}
		changes, err = m.entry()
	}
}

func applyAll(changes []Change) error {
	for _, c := range changes {
		if err := c.apply(); err != nil {
			return err
		}
	}
	return nil
}

// SaveLeft notes that the node has left the mesh: what Finish deletes is not needed
// for that any more.
func (m *Removal) SaveLeft() error {
	m.Record.Left = true
	return m.Record.save(m.stateDir)
}

// Finish deletes the binary, with purge also the node's key with all else in the
// state folder and the copied secret, and the record at last. It fails, and deletes
// nothing, if a network configuration has the entry (again).
func (m *Removal) Finish(purge bool) (Plan, error) {
	p := Plan{Record: m.Record}
	left, err := m.entry()
	if err != nil {
		return p, err
	}
	if len(left) > 0 {
		return p, fmt.Errorf("%s has the entry again: somebody else has put it back; take it out, and run `wgcnid uninstall` again", left[0].Path)
	}
	p.Changes = m.files(&p, purge)
	if err := applyAll(p.Changes); err != nil {
		return p, err
	}
	for _, dir := range slices.Backward(m.Record.Folders) {
		_ = os.Remove(dir) // it stays if there is something else in it
	}
	if purge {
		if err := m.purge(); err != nil {
			return p, err
		}
	}
	if err := durable.Remove(filepath.Join(m.stateDir, RecordFile)); err != nil {
		return p, err
	}
	return p, m.forget(purge)
}

// forget deletes what is left when the record is gone.
func (m *Removal) forget(purge bool) error {
	if err := durable.Remove(filepath.Join(m.stateDir, lockFile)); err != nil {
		return err
	}
	if purge {
		_ = os.Remove(m.stateDir) // one that is a mount stays, empty
	}
	return config.ForgetStateDir(m.Record.CNIDir, m.stateDir)
}

// FinishRemoval is for a state folder without a record: it does what a removal that
// was killed after that has not come to.
func FinishRemoval(stateDir, cniDir string, purge bool) error {
	m := Removal{Record: Record{CNIDir: cniDir}, stateDir: stateDir}
	if _, err := os.Lstat(filepath.Join(stateDir, lockFile)); err == nil {
		if m.held, err = tryLock(stateDir); err != nil || m.held == nil {
			return err // somebody installs just now
		}
		defer m.Close()
	}
	if _, err := os.Lstat(filepath.Join(stateDir, RecordFile)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return m.forget(purge)
}

// purge deletes all of the state folder but the record and the lock, which go last.
func (m *Removal) purge() error {
	entries, err := os.ReadDir(m.stateDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if e.Name() == RecordFile || e.Name() == lockFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(m.stateDir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
