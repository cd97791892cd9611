package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// The other nodes hear of it whatever the registry has of this one.
func TestAnnounceLeave(t *testing.T) {
	at := ahead() // the clock with which the node published last was ahead
	a := registrytest.Record("a", at)
	later := registrytest.Record("a", at+7)
	b := registrytest.Record("b", 1)
	forged := registrytest.Record("a", registry.MaxRevision)
	for _, tt := range []struct {
		name string
		prep func(m *testMesh)
		told bool
		want registry.Record // zero: nothing that counts
		says string          // in the log
	}{
		{"before anybody has joined", func(*testMesh) {}, false, registry.Record{}, ""},
		{"never joined", func(m *testMesh) { m.publish(b) }, false, registry.Record{}, ""},
		{"a member", func(m *testMesh) { m.publish(a, b) }, true, tombstone("a", at+1), ""},
		{"left already", func(m *testMesh) { m.publish(a, tombstone("a", at+3)) }, true, tombstone("a", at+3), ""},
		{"the registry was emptied", func(m *testMesh) {
			m.publish(b)
			m.cache(a, b)
		}, true, tombstone("a", at+1), ""},
		{"the registry was deleted", func(m *testMesh) {
			m.publish(a)
			m.cache(a)
			m.must(os.Remove(m.path))
		}, true, tombstone("a", at+1), ""},
		{"the registry is damaged", func(m *testMesh) {
			m.publish(a)
			m.cache(a)
			m.must(os.WriteFile(m.path, []byte(`{"version": 1, "no`), 0o600))
		}, true, tombstone("a", at+1), ""},
		{"the registry was rolled back", func(m *testMesh) {
			m.publish(a)
			m.cache(later)
		}, true, tombstone("a", at+8), ""},
		{"forged in the registry", func(m *testMesh) {
			m.cache(a)
			m.forge(forged)
		}, true, tombstone("a", at+1), ""},
		{"no record at all in its place", func(m *testMesh) {
			m.cache(a)
			m.raw("a", `{"name": 7}`)
		}, true, tombstone("a", at+1), ""},
		{"forgotten", func(m *testMesh) { m.publish(a, forgotten(a, at+1)) }, false, forgotten(a, at+1), ""},
		{"another node with this name", func(m *testMesh) {
			if _, err := identity.LoadOrCreate(m.config.StateDir); err != nil {
				m.t.Fatal(err)
			}
			m.publish(a)
		}, false, a, "another node uses this node's name"},
		{"another node took the name over", func(m *testMesh) {
			m.cache(a)
			other := later
			other.PublicKey[0]++
			m.publish(other)
		}, false, func() registry.Record { r := later; r.PublicKey[0]++; return r }(), "nodeName"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t, 1)
			tt.prep(m)
			others := m.others()
			for _, round := range []string{"once", "twice"} {
				var log bytes.Buffer
				told, err := announceLeave(t.Context(), m.config, slog.New(slog.NewTextHandler(&log, nil)))
				if err != nil || told != tt.told {
					t.Fatalf("%s: told %v, %v; want %v", round, told, err, tt.told)
				}
				if (log.Len() > 0) != (tt.says != "") || !strings.Contains(log.String(), tt.says) {
					t.Errorf("%s: it says %q, want %q", round, &log, tt.says)
				}
				equalTo(t, tt.want, m.stored("a"))
			}
			if diff := cmp.Diff(others, m.others()); diff != "" {
				t.Errorf("others' records (-before +after):\n%s", diff)
			}
		})
	}
}

// Its forger's revision does not count, and its own is not known any more.
func TestAnnounceLeaveByTheClock(t *testing.T) {
	m := newMesh(t, 1)
	m.forge(registrytest.Record("a", registry.MaxRevision))
	before := registry.NextRevision(0, time.Now())
	if told, err := announceLeave(t.Context(), m.config, slog.New(slog.DiscardHandler)); err != nil || !told {
		t.Fatalf("told %v, %v", told, err)
	}
	if got := m.stored("a"); !got.Left || got.Revision < before || got.Revision > ahead() {
		t.Errorf("%+v", got)
	}
}

// others are the records of all nodes but a, where the registry can be read.
func (m *testMesh) others() map[string]*registry.Record {
	s, _ := m.registry.Snapshot(m.t.Context())
	delete(s.Nodes, "a")
	if len(s.Nodes) == 0 {
		return nil
	}
	return s.Nodes
}

// A command that fails says how to mend it, and has changed nothing.
func TestLeaveFails(t *testing.T) {
	const forced, running = true, true
	for _, tt := range []struct {
		name    string
		prep    func(m *testMesh)
		force   bool
		running bool
		want    []string
	}{
		{"no folder", func(m *testMesh) { m.must(os.RemoveAll(filepath.Dir(m.path))) }, false, false, []string{"the other nodes cannot be told", "/shared", "--force"}},
		{"no secret", func(m *testMesh) { m.must(os.Remove(m.secretFile())) }, false, false, []string{"/secret", "copy it from another node", "--force"}},
		{"a secret for everybody", func(m *testMesh) { m.must(os.Chmod(m.secretFile(), 0o644)) }, false, false, []string{"/secret", "chmod 600", "--force"}},
		// The helper cannot hear of it: nobody waits for it to end.
		{"no folder, forced, helper", func(m *testMesh) { m.must(os.RemoveAll(filepath.Dir(m.path))) }, forced, running, []string{"systemctl stop wgcnid"}},
		{"no secret, forced, helper", func(m *testMesh) { m.must(os.Remove(m.secretFile())) }, forced, running, []string{"systemctl stop wgcnid"}},
		{"forgotten, helper", func(m *testMesh) { m.publish(forgotten(registrytest.Record("a", 1), 2)) }, false, running, []string{"systemctl stop wgcnid"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t, 1)
			m.cache(registrytest.Record("a", 1))
			tt.prep(m)
			if tt.running {
				lock, err := reconcile.HoldHelperLock(m.config.RunDir)
				m.must(err)
				defer lock.Close()
			}
			begun := time.Now()
			err := leave(t.Context(), m.config, tt.force, slog.New(slog.DiscardHandler))
			if err == nil {
				t.Fatal("it has left")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v: want %s in it", err, want)
				}
			}
			if waited := time.Since(begun); waited > leaveTimeout/2 {
				t.Errorf("it took %v", waited)
			}
			if _, err := os.Stat(filepath.Join(m.config.StateDir, "peers.db")); err != nil {
				t.Errorf("what was known of the mesh is gone: %v", err)
			}
		})
	}
}

// The whole command, in a network namespace of its own.
func TestLeave(t *testing.T) {
	for _, tt := range []struct {
		name   string
		args   string
		prep   func(m *testMesh)
		left   bool   // the registry has the tombstone
		stderr string // in it
		gone   bool   // the state folder
	}{
		{"leave", "leave", func(*testMesh) {}, true, "", false},
		{"purge", "leave --purge", func(*testMesh) {}, true, "", true},
		{"no secret", "leave --force", func(m *testMesh) { m.must(os.Remove(m.secretFile())) }, false, "wgcnid forget a", false},
		{"forgotten", "leave --purge", func(m *testMesh) { m.publish(forgotten(registrytest.Record("a", 1), 2)) }, true, "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t, 1)
			m.cache(registrytest.Record("a", 1))
			m.publish(registrytest.Record("a", 1))
			tt.prep(m)
			stdout, stderr := m.apart(append(strings.Fields(tt.args), "--config", m.conf)...)
			if !strings.HasPrefix(stdout, "a has left the mesh") || !strings.Contains(stderr, tt.stderr) || (stderr == "") != (tt.stderr == "") {
				t.Errorf("%s%s", stdout, stderr)
			}
			if m.stored("a").Left != tt.left {
				t.Errorf("the registry has %+v", m.stored("a"))
			}
			for path, gone := range map[string]bool{m.config.RunDir: true, filepath.Join(m.config.StateDir, "peers.db"): true, m.config.StateDir: tt.gone} {
				if _, err := os.Stat(path); os.IsNotExist(err) != gone {
					t.Errorf("%s: %v, want it gone: %v", path, err, gone)
				}
			}
		})
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
	for ctx, told := range map[context.Context]bool{ended: true, t.Context(): false} {
		if _, err := awaitHelperEnd(ctx, dir, told); err == nil || !strings.Contains(err.Error(), "systemctl stop wgcnid") {
			t.Errorf("while it runs: %v, want how to stop it", err)
		}
	}
	done := make(chan error, 1)
	go func() {
		lock, err := awaitHelperEnd(t.Context(), dir, true)
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
	if _, err := awaitHelperEnd(t.Context(), filepath.Join(dir, "wgcnid.lock"), true); err == nil || errors.Is(err, reconcile.ErrRunning) {
		t.Errorf("a run folder that is a file: %v", err)
	}
}

func TestRemoveFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := removeFolder(dir, ""); err != nil {
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
	if err := removeFolder(dir, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
	if _, err := os.Stat(elsewhere); err != nil {
		t.Errorf("what a link led to is gone: %v", err)
	}
	if err := removeFolder(elsewhere, ""); err == nil {
		t.Error("no error for a file")
	}
}
