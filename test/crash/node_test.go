package crash

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/pkg/store"
)

// records reads the shared file as any node does. It must never be half a document.
func (w *world) records() (registry.Snapshot, error) {
	s, err := registry.New(file.New(w.path("shared/mesh.json")), registry.Trust{}).Snapshot(context.Background())
	for name, err := range s.Invalid {
		return s, fmt.Errorf("the record of %s: %w", name, err)
	}
	return s, err
}

// keyAnnounced compares the key that the mesh knows this node by with the one it has.
func (w *world) keyAnnounced(must bool) error {
	s, err := w.records()
	if err != nil {
		return err
	}
	key, keyErr := identity.Load(w.state)
	if keyErr != nil && (must || !errors.Is(keyErr, identity.ErrNoKey)) {
		return keyErr
	}
	r, ok := s.Nodes["node-a"]
	switch {
	case !ok && must:
		return errors.New("this node has no record")
	case ok && !r.Left && (keyErr != nil || r.PublicKey != key.Public()):
		return fmt.Errorf("the mesh knows this node by %v, and it has %v, %w", r.PublicKey, key.Public(), keyErr)
	}
	return nil
}

// storesSound opens the node's stores as the product does.
func (w *world) storesSound() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, err := os.Stat(filepath.Join(w.state, "peers.db")); err == nil {
		data, err := os.ReadFile(filepath.Join(w.state, "peers.db"))
		if err != nil {
			return err
		}
		dir := w.t.TempDir() // a reader of its own: the store's lock is held by the program
		if err := os.WriteFile(store.KnownPath(dir), data, 0o600); err != nil {
			return err
		}
		if _, _, err := store.LoadKnown(ctx, dir); err != nil {
			return fmt.Errorf("peers.db: %w", err)
		}
	}
	return nil
}

// jsonSound reads the files as `wgcnid status` does.
func (w *world) jsonSound(names ...string) error {
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(w.run, name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if !json.Valid(text) {
			return fmt.Errorf("%s is half a document: %.40q", name, text)
		}
	}
	return nil
}

func (w *world) meshSound() error {
	return errors.Join(w.keyAnnounced(false), w.storesSound(), w.jsonSound("helper.json", "announced.json", "tunnel.json"))
}

// otherNode is a writer on another machine, which must not be kept waiting by one
// that has died.
func (w *world) otherNode() error {
	key, err := identity.NewPrivateKey()
	if err != nil {
		return err
	}
	return w.publish(registry.Record{Name: "node-b", PublicKey: key.Public(), Revision: uint64(time.Now().UnixMilli()), Since: time.Now()})
}

func (w *world) publish(r registry.Record) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := registry.New(file.New(w.path("shared/mesh.json")), registry.Trust{}).Publish(ctx, r, r.Revision-1); err != nil {
		return fmt.Errorf("another node: %w", err)
	}
	s, err := w.records()
	if err == nil && s.Nodes[r.Name] == nil {
		err = fmt.Errorf("the record of %s is lost", r.Name)
	}
	return err
}

// A node that joins: its key, the stores, its record.
func TestSync(t *testing.T) {
	sync := func(w *world) *exec.Cmd { return w.wgcnid("sync") }
	campaign(t, subject{
		name:  t.Name(),
		old:   func(w *world) { w.chained() },
		cmd:   sync,
		sound: (*world).meshSound,
		done: func(w *world) error {
			_, err := os.Stat(store.KnownPath(w.state)) // else it would come up knowing nobody
			return errors.Join(err, w.keyAnnounced(true), w.meshSound())
		},
		again: func(w *world) error {
			if err := w.otherNode(); err != nil {
				return err
			}
			if e := w.trace(sync(w), patience, goOn); e.Code != 0 {
				return errors.New(e.err)
			}
			s, err := w.records()
			if err == nil && s.Nodes["node-b"] == nil {
				err = errors.New("the record of another node is lost")
			}
			return err
		},
	})
}

func goOn(Call) Fate { return Fate{} }

// The registry's file is damaged: it is moved aside, and another takes its place.
func TestDamagedRegistry(t *testing.T) {
	const damaged = `{"half a document`
	campaign(t, subject{
		name: t.Name(),
		old: func(w *world) {
			w.chained()
			w.do(w.wgcnid("sync"))
			w.write("shared/mesh.json", []byte(damaged), 0o644)
		},
		cmd: func(w *world) *exec.Cmd { return w.wgcnid("sync") },
		sound: func(w *world) error {
			if _, err := w.records(); errors.Is(err, file.ErrDamaged) {
				return w.kept(damaged, true)
			}
			return errors.Join(w.meshSound(), w.kept(damaged, false))
		},
		done: func(w *world) error { return errors.Join(w.keyAnnounced(true), w.kept(damaged, false)) },
		left: func(name string) bool { return strings.Contains(name, "mesh.json.damaged-") },
	})
}

// kept looks for the damaged document: in its place, or beside, once.
func (w *world) kept(damaged string, inPlace bool) error {
	asides, err := filepath.Glob(w.path("shared/mesh.json.damaged-*"))
	if err != nil {
		return err
	}
	if len(asides) > 1 || len(asides) == 0 && !inPlace {
		return fmt.Errorf("the damaged document is kept %d times", len(asides))
	}
	for _, path := range asides {
		if text, err := os.ReadFile(path); err != nil || string(text) != damaged {
			return fmt.Errorf("%s: %q, %w", path, text, err)
		}
	}
	return nil
}

// The helper's start, up to its first report, and its end.
func TestRun(t *testing.T) {
	campaign(t, subject{
		name:  t.Name(),
		old:   func(w *world) { w.chained() },
		cmd:   func(w *world) *exec.Cmd { return w.wgcnid("run", "--http", "off") },
		ready: func(w *world) bool { return w.keyAnnounced(true) == nil },
		sound: (*world).meshSound,
		done: func(w *world) error {
			c, err := config.LoadLast(w.path("net.d"))
			if err == nil && c.StateDir != w.state {
				err = fmt.Errorf("the state folder is %s", c.StateDir)
			}
			return errors.Join(err, w.keyAnnounced(true), w.meshSound())
		},
		lesser: func(string) bool { return true }, // it goes on, and tries again
	})
}

// keyKept is what holds while a node leaves: as long as the mesh knows it, it has
// its key.
func (w *world) keyKept() error {
	s, err := w.sealedRecords()
	if err != nil {
		return err
	}
	if r := s.Nodes["node-a"]; r != nil && !r.Left {
		_, err = identity.Load(w.state)
	}
	return err
}

// sealedRecords is records for a mesh that may have a secret.
func (w *world) sealedRecords() (registry.Snapshot, error) {
	secrets, err := identity.LoadSecrets(w.path("usr/secret"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return registry.Snapshot{}, err
	}
	return registry.New(file.New(w.path("shared/mesh.json")), registry.Trust{Secrets: secrets}).Snapshot(context.Background())
}

// helperReport is what the helper writes with each pass that changes it.
func (w *world) helperReport() string { return filepath.Join(w.run, "helper.json") }

// run1 runs the helper until it is in the mesh.
func (w *world) run1() {
	w.t.Helper()
	e := w.trace(w.wgcnid("run", "--http", "off"), patience, func(c Call) Fate {
		return Fate{Term: c.Name == "rename" && c.To == w.helperReport() && w.keyAnnounced(true) == nil}
	})
	w.must(w.keyAnnounced(true))
	if e.Code != 0 {
		w.t.Fatal(e.err)
	}
}
