package file

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

func TestConformance(t *testing.T) {
	registrytest.Run(t, func(t *testing.T) func() registry.Store {
		path := filepath.Join(t.TempDir(), "mesh.json")
		return func() registry.Store { return New(path) }
	})
}

// handle is a store with the registry in it, which trusts everybody.
type handle struct {
	*registry.Registry
	store *Store
}

func open(path string, options ...Option) handle {
	s := New(path, options...)
	return handle{registry.New(s, registry.Trust{}), s}
}

func newTest(t *testing.T) handle {
	t.Helper()
	return open(filepath.Join(t.TempDir(), "mesh.json"), WithPollInterval(20*time.Millisecond))
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestDocumentForPeople(t *testing.T) {
	r := newTest(t)
	b := registrytest.Record("node-b", 7)
	b.Endpoints, b.Pods, b.Addresses = b.Endpoints[1:2], nil, nil
	registrytest.Publish(t, r, b, registry.Record{Name: "node-a", Revision: 2, Left: true})
	want := `{
  "version": 1,
  "nodes": {
    "node-a": {
      "name": "node-a",
      "revision": 2,
      "left": true
    },
    "node-b": {
      "name": "node-b",
      "publicKey": "bm9kZS1iAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
      "endpoints": [
        "192.0.2.7:51820"
      ],
      "prefixes": [
        {
          "prefix": "10.244.1.0/24",
          "since": "2026-03-01T12:00:00.25Z"
        }
      ],
      "since": "2026-03-01T12:00:00.25Z",
      "revision": 7
    }
  }
}
`
	if diff := cmp.Diff(want, readFile(t, r.store.path)); diff != "" {
		t.Error(diff)
	}
	info, err := os.Stat(r.store.path)
	if err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("mode %v, error %v; want 0644", info.Mode(), err)
	}
}

// What a writer does not understand, it must carry on: fields of newer versions
// and records with mistakes.
func TestForeignContentIsKept(t *testing.T) {
	r := newTest(t)
	newer := `{"name": "newer", "publicKey": "bm9kZS1iAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
		"since": "2026-03-01T12:00:00Z", "revision": 9, "labels": {"big": 12345678901234567890, "html": "<&>"}}`
	broken := `{"name": "Broken!", "revision": "three"}`
	write(t, r.store.path, `{"version": 1, "nodes": {"newer": `+newer+`, "broken": `+broken+`, "odd": [[1]]}}`)

	registrytest.Publish(t, r, registrytest.Record("node-a", 1))

	text := readFile(t, r.store.path)
	for _, want := range []string{newer, broken, "[[1]]"} {
		if !strings.Contains(text, want) {
			t.Errorf("lost %s in\n%s", want, text)
		}
	}
	s, err := r.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Nodes) != 2 || s.Nodes["newer"].Revision != 9 || len(s.Invalid) != 2 || s.Invalid["broken"] == nil || s.Invalid["odd"] == nil {
		t.Errorf("snapshot: %+v", s)
	}
	// Its own broken record a node may mend: nobody acts on it.
	registrytest.Publish(t, r, registrytest.Record("broken", 1))
	if s, err = r.Snapshot(t.Context()); err != nil || !s.Nodes["broken"].Equal(registrytest.Record("broken", 1)) {
		t.Errorf("after mending: %+v, error %v", s, err)
	}
}

func TestSameAgainDoesNotWrite(t *testing.T) {
	r := newTest(t)
	registrytest.Publish(t, r, registrytest.Record("node-a", 1))
	before, _ := os.Stat(r.store.path)
	lock, err := r.store.lock(t.Context()) // nor wait for other writers
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	registrytest.Publish(t, r, registrytest.Record("node-a", 1))
	if after, _ := os.Stat(r.store.path); !os.SameFile(before, after) {
		t.Error("the file was written again")
	}
}

func TestDamagedIsMovedAside(t *testing.T) {
	good := newTest(t)
	registrytest.Publish(t, good, registrytest.Record("node-b", 4))
	document := readFile(t, good.store.path)
	for name, text := range map[string]string{
		"empty":      "",
		"zeroes":     strings.Repeat("\x00", 4096), // what a crash can leave of an unsynced file
		"truncated":  document[:len(document)/2],
		"not JSON":   "mesh:\n  nodes: []\n",
		"other JSON": `{"kind": "List"}`,
		"appended":   document + "}",
	} {
		t.Run(name, func(t *testing.T) {
			r := newTest(t)
			r.store.now = func() time.Time { return time.UnixMilli(1000) }
			write(t, r.store.path+".damaged-1000", "an earlier one")
			write(t, r.store.path, text)
			if _, err := r.Snapshot(t.Context()); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), r.store.path) {
				t.Errorf("Snapshot: error %v, want ErrDamaged that names the file", err)
			}
			if err := r.store.moveAside(); err != nil {
				t.Fatal(err)
			}
			if got := readFile(t, r.store.path); got != text {
				t.Errorf("between two writes the file is %q", got)
			}
			os.Remove(r.store.path + ".damaged-1001")
			registrytest.Publish(t, r, registrytest.Record("node-a", 1))
			registrytest.Expect(t, r, registrytest.Record("node-a", 1))
			if diff := cmp.Diff(text, readFile(t, r.store.path+".damaged-1001")); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff("an earlier one", readFile(t, r.store.path+".damaged-1000")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTooLarge(t *testing.T) {
	r := newTest(t)
	write(t, r.store.path, "")
	if err := os.Truncate(r.store.path, maxFileBytes+1); err != nil { // sparse
		t.Fatal(err)
	}
	if _, err := r.Snapshot(t.Context()); !errors.Is(err, ErrDamaged) {
		t.Errorf("error %v, want ErrDamaged", err)
	}
}

func TestFutureVersionIsLeftAlone(t *testing.T) {
	for _, text := range []string{`{"version": 2, "nodes": {}}`, `{"nodes": ["other", "form"], "version": 3}`} {
		r := newTest(t)
		write(t, r.store.path, text)
		_, err := r.Snapshot(t.Context())
		for _, err := range []error{err, r.Publish(t.Context(), registrytest.Record("node-a", 1), 0)} {
			if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "upgrade") {
				t.Errorf("error %v, want ErrVersion and how to mend it", err)
			}
		}
		if got := readFile(t, r.store.path); got != text {
			t.Errorf("the file was changed to %s", got)
		}
	}
}

func TestAbsence(t *testing.T) {
	r := newTest(t)
	gone := open(filepath.Join(filepath.Dir(r.store.path), "share", "mesh.json"))
	_, err := gone.Snapshot(t.Context())
	for _, err := range []error{err, gone.Publish(t.Context(), registrytest.Record("node-a", 1), 0)} {
		if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), filepath.Dir(gone.store.path)+" is missing: create it or mount it") {
			t.Errorf("folder missing: error %v", err)
		}
	}
	registrytest.Expect(t, r) // never written: that is how a mesh begins
	registrytest.Publish(t, r, registrytest.Record("node-a", 1))
	os.Remove(r.store.path)
	for _, r := range []handle{r, open(r.store.path)} { // also a process that has not seen it
		if _, err := r.Snapshot(t.Context()); !errors.Is(err, ErrMissing) {
			t.Errorf("deleted: error %v, want ErrMissing", err)
		}
	}
	registrytest.Publish(t, r, registrytest.Record("node-a", 1))
	registrytest.Expect(t, r, registrytest.Record("node-a", 1))
}

// A container runtime makes a folder for a bind mount whose file is missing; a
// FIFO must not block a reader for ever.
func TestReplacedByOtherThings(t *testing.T) {
	for name, replace := range map[string]func(path string) error{
		"directory": func(path string) error { return os.MkdirAll(filepath.Join(path, "full"), 0o755) },
		"FIFO":      func(path string) error { return unix.Mkfifo(path, 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newTest(t)
			if err := replace(r.store.path); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Snapshot(t.Context()); !errors.Is(err, ErrDamaged) {
				t.Errorf("error %v, want ErrDamaged", err)
			}
			registrytest.Publish(t, r, registrytest.Record("node-a", 1))
			registrytest.Expect(t, r, registrytest.Record("node-a", 1))
		})
	}
}

func TestLockWait(t *testing.T) {
	r := open(filepath.Join(t.TempDir(), "mesh.json"), WithLockWait(20*time.Millisecond))
	lock, err := r.store.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = r.Publish(t.Context(), registrytest.Record("node-a", 1), 0)
	if err == nil || !strings.Contains(err.Error(), r.store.path+".lock: another writer has held it for 20ms") {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := open(r.store.path).Publish(ctx, registrytest.Record("node-a", 1), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want the ctx's", err)
	}
	lock.Close()
	registrytest.Publish(t, r, registrytest.Record("node-a", 1))
}

// A lock on a lock file that was deleted keeps nobody out: the next one counts.
func TestLockFileDeleted(t *testing.T) {
	r := newTest(t)
	old, err := os.Create(r.store.lockPath())
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	os.Remove(r.store.lockPath())
	lock, err := r.store.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if current(old, r.store.lockPath()) || !current(lock, r.store.lockPath()) {
		t.Error("the deleted lock file counts as the present one")
	}
}

// noLeaks fails the test if goroutines that began during it do not end.
func noLeaks(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		deadline := time.Now().Add(registrytest.Deadline)
		for runtime.NumGoroutine() > before {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<16)
				t.Fatalf("goroutines leaked:\n%s", buf[:runtime.Stack(buf, true)])
			}
			time.Sleep(time.Millisecond)
		}
	})
}
