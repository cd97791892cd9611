package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
)

func TestPublishTombstone(t *testing.T) {
	r := openRegistry(config.Registry{Type: "file", Path: filepath.Join(t.TempDir(), "mesh.json")})
	if err := publishTombstone(t.Context(), r, "a"); err != nil {
		t.Errorf("before anybody has joined: %v", err)
	}
	ahead := time.Now().Add(time.Hour) // the node's clock, when it published last
	a := registry.Record{Name: "a", PublicKey: keyA, Since: now, Revision: registry.NextRevision(0, ahead)}
	b := registry.Record{Name: "b", PublicKey: keyB, Since: now, Revision: 1}
	for _, rec := range []registry.Record{a, b} {
		if err := r.Publish(t.Context(), rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := publishTombstone(t.Context(), r, "nobody"); err != nil {
		t.Errorf("an unknown node: %v", err)
	}
	if err := publishTombstone(t.Context(), r, "a"); err != nil {
		t.Fatal(err)
	}
	first, err := r.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := (registry.Record{Name: "a", Left: true, Revision: a.Revision + 1}); !first.Nodes["a"].Equal(want) {
		t.Errorf("tombstone %+v, want %+v", first.Nodes["a"], want)
	}
	if !first.Nodes["b"].Equal(b) || len(first.Nodes) != 2 {
		t.Errorf("the others: %+v", first.Nodes)
	}
	if err := publishTombstone(t.Context(), r, "a"); err != nil {
		t.Errorf("twice: %v", err)
	}
	if again, err := r.Snapshot(t.Context()); err != nil || !again.Equal(first) {
		t.Errorf("twice: %+v, %v", again.Nodes, err)
	}
}

// restless has a later record each time that somebody wants to put one.
type restless struct {
	registry.Registry
	times int
}

func (r *restless) Publish(ctx context.Context, rec registry.Record) error {
	if r.times--; r.times < 0 {
		return r.Registry.Publish(ctx, rec)
	}
	other := registry.Record{Name: rec.Name, PublicKey: keyA, Since: now, Revision: rec.Revision + 1}
	if err := r.Registry.Publish(ctx, other); err != nil {
		return err
	}
	return r.Registry.Publish(ctx, rec)
}

// The helper still publishes while its node is told to leave.
func TestPublishTombstoneGoesForward(t *testing.T) {
	r := &restless{openRegistry(config.Registry{Type: "file", Path: filepath.Join(t.TempDir(), "mesh.json")}), 3}
	if err := r.Registry.Publish(t.Context(), registry.Record{Name: "a", PublicKey: keyA, Since: now, Revision: 1}); err != nil {
		t.Fatal(err)
	}
	if err := publishTombstone(t.Context(), r, "a"); err != nil {
		t.Fatal(err)
	}
	s, err := r.Snapshot(t.Context())
	if err != nil || !s.Nodes["a"].Left {
		t.Errorf("%+v, %v", s.Nodes, err)
	}
}

func TestPublishTombstoneFails(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "not-mounted")
	err := publishTombstone(t.Context(), openRegistry(config.Registry{Path: filepath.Join(folder, "mesh.json")}), "a")
	if err == nil || !strings.Contains(err.Error(), folder) {
		t.Errorf("error %v, want one that names %s", err, folder)
	}
}

func TestAwaitHelperEnd(t *testing.T) {
	dir := t.TempDir()
	helper, err := reconcile.HoldHelperLock(dir)
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := awaitHelperEnd(ended, dir); err == nil || !strings.Contains(err.Error(), "systemctl stop wgcnid") {
		t.Errorf("while it runs: %v, want how to stop it", err)
	}
	done := make(chan error, 1)
	go func() {
		lock, err := awaitHelperEnd(t.Context(), dir)
		if err == nil {
			err = lock.Close()
		}
		done <- err
	}()
	if err := helper.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("it waits for a helper that has ended")
	}
	if _, err := awaitHelperEnd(t.Context(), filepath.Join(dir, "wgcnid.lock")); err == nil || errors.Is(err, reconcile.ErrRunning) {
		t.Errorf("a run folder that is a file: %v", err)
	}
}

func TestRemoveFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := removeFolder(dir); err != nil {
		t.Errorf("a folder that is not there: %v", err)
	}
	elsewhere := filepath.Join(t.TempDir(), "kept")
	for _, path := range []string{filepath.Join(dir, "a", "b", "file"), filepath.Join(dir, "private.key"), elsewhere} {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(elsewhere, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := removeFolder(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
	if _, err := os.Stat(elsewhere); err != nil {
		t.Errorf("what a link led to is gone: %v", err)
	}
	if err := removeFolder(elsewhere); err == nil {
		t.Error("no error for a file")
	}
}
