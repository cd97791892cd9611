package file

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// A clock or an API 60 s off emptied kilo's mesh (Node.Ready), and a share that
// goes away empties a folder. Whatever becomes of the file: the watcher says so,
// Merge keeps every peer, and all is well once the nodes have published again.
func TestNothingRemovesAPeer(t *testing.T) {
	for _, c := range []struct {
		name string
		harm func(path string) error
		want error
		mend func(path string) error
	}{
		{"emptied", func(path string) error { return os.Truncate(path, 0) }, ErrDamaged, nil},
		{"truncated", func(path string) error { return os.Truncate(path, 99) }, ErrDamaged, nil},
		{"deleted", os.Remove, ErrMissing, nil},
		{"replaced by a directory", func(path string) error {
			return errors.Join(os.Remove(path), os.Mkdir(path, 0o755))
		}, ErrDamaged, nil},
		{
			"folder deleted", func(path string) error { return os.RemoveAll(filepath.Dir(path)) }, ErrMissing,
			func(path string) error { return os.Mkdir(filepath.Dir(path), 0o755) },
		},
		{
			"folder moved away", func(path string) error { return os.Rename(filepath.Dir(path), filepath.Dir(path)+".away") }, ErrMissing,
			func(path string) error { return os.Mkdir(filepath.Dir(path), 0o755) },
		},
		{
			"another folder mounted there", func(path string) error {
				return errors.Join(os.Rename(filepath.Dir(path), filepath.Dir(path)+".away"), os.Mkdir(filepath.Dir(path), 0o755))
			}, ErrMissing, nil,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			folder := filepath.Join(t.TempDir(), "share")
			if err := os.Mkdir(folder, 0o755); err != nil {
				t.Fatal(err)
			}
			r := open(filepath.Join(folder, "mesh.json"), WithPollInterval(20*time.Millisecond))
			a, b := registrytest.Record("node-a", 1), registrytest.Record("node-b", 1)
			registrytest.Publish(t, r, a, b)
			ctx, cancel := context.WithCancel(t.Context())
			updates := r.Watch(ctx)
			cached := registrytest.Await(t, updates, "both nodes", registrytest.Has(b)).Snapshot

			if err := c.harm(r.store.path); err != nil {
				t.Fatal(err)
			}
			// A rewrite in place may be seen half done, as another error.
			fresh := registrytest.Await(t, updates, "an error", func(u registry.Update) bool { return errors.Is(u.Err, c.want) })
			if merged, _ := registry.Merge(cached, fresh.Snapshot); !merged.Equal(cached) {
				t.Errorf("merged: %+v", merged)
			}

			if c.mend != nil {
				if err := c.mend(r.store.path); err != nil {
					t.Fatal(err)
				}
			}
			a.Revision++
			registrytest.Publish(t, r, a)
			fresh = registrytest.Await(t, updates, "node-a again", registrytest.Has(a))
			if merged, _ := registry.Merge(cached, fresh.Snapshot); !merged.Equal(registry.NewSnapshot(a, b)) {
				t.Errorf("merged: %+v", merged)
			}
			registrytest.Publish(t, r, b)
			registrytest.Await(t, updates, "node-b again", registrytest.Has(b))
			cancel()
			for range updates { // until it is closed
			}
		})
	}
}

// After another folder was mounted in its place, that one is watched, not the
// one before, which inotify would go on to watch.
func TestWatchFollowsTheFolder(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "share")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	r := open(filepath.Join(folder, "mesh.json"))
	w := &watch{r: r.store, folder: folder}
	defer w.close()
	w.watchFolder()
	if err := errors.Join(os.Rename(folder, folder+".away"), os.Mkdir(folder, 0o755)); err != nil {
		t.Fatal(err)
	}
	w.poll()
	write(t, r.store.path, "")
	timeout := time.After(registrytest.Deadline)
	for {
		select {
		case event := <-w.notify.Events:
			if event.Name == r.store.path {
				return
			}
		case <-timeout:
			t.Fatal("no event of the new folder")
		}
	}
}

// One error a cause, however often the poll meets it.
func TestWatchSaysErrorsOnce(t *testing.T) {
	r := newTest(t)
	registrytest.Publish(t, r, registrytest.Record("node-a", 1))
	w := &watch{r: r.store, folder: filepath.Dir(r.store.path)}
	w.read()
	defer w.close()
	w.latest.Sent()
	os.Remove(r.store.path)
	w.poll()
	if gone, news := w.latest.News(); gone.Err == nil || !news {
		t.Fatalf("after deletion: %+v, news: %v", gone, news)
	}
	w.latest.Sent()
	for range 3 {
		w.poll()
		if again, news := w.latest.News(); news {
			t.Errorf("another error: %v", again.Err)
		}
	}
}

// Watchers that miss MOVED_TO (linkerd 9215ddf): a file renamed over ours, and
// one made from nothing, are changes. The poll is an hour away.
func TestWatchSeesRenames(t *testing.T) {
	noLeaks(t)
	other := newTest(t)
	registrytest.Publish(t, other, registrytest.Record("node-a", 1))
	folder := t.TempDir()
	r := open(filepath.Join(folder, "mesh.json"), WithPollInterval(time.Hour))
	ctx, cancel := context.WithCancel(t.Context())
	updates := r.Watch(ctx)
	registrytest.Await(t, updates, "the empty registry", func(u registry.Update) bool { return u.Err == nil })

	document := readFile(t, other.store.path)
	write(t, filepath.Join(folder, "copy"), document)
	if err := os.Rename(filepath.Join(folder, "copy"), r.store.path); err != nil {
		t.Fatal(err)
	}
	registrytest.Await(t, updates, "the renamed file", registrytest.Has(registrytest.Record("node-a", 1)))
	os.Remove(r.store.path)
	registrytest.Await(t, updates, "the deletion", func(u registry.Update) bool { return errors.Is(u.Err, ErrMissing) })
	write(t, r.store.path, document)
	registrytest.Await(t, updates, "the new file", registrytest.Has(registrytest.Record("node-a", 1)))
	cancel()
	for range updates {
	}
}

// Watchers that die silently at the inotify limit (linkerd e2eeeb1): without
// inotify, or on a network file system, which has no events of other machines,
// the poll sees every change.
func TestWatchWithoutInotify(t *testing.T) {
	for name, inotify := range map[string]func() (*fsnotify.Watcher, error){
		"none": func() (*fsnotify.Watcher, error) { return nil, errors.New("too many open files") },
		"dead": func() (*fsnotify.Watcher, error) {
			w, err := fsnotify.NewWatcher()
			if err == nil {
				err = w.Close()
			}
			return w, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newTest(t)
			writer := open(r.store.path)
			r.store.inotify = inotify
			updates := r.Watch(t.Context())
			for rev := uint64(1); rev < 5; rev++ {
				registrytest.Publish(t, writer, registrytest.Record("node-a", rev))
				registrytest.Await(t, updates, "the change", registrytest.Has(registrytest.Record("node-a", rev)))
			}
		})
	}
}

// A document of the same size, modification time and inode as the one before
// is still noticed, at the second poll: see watch.poll.
func TestPollIsNotDeceived(t *testing.T) {
	r := newTest(t)
	registrytest.Publish(t, r, registrytest.Record("node-a", 1))
	first := readFile(t, r.store.path)
	registrytest.Publish(t, r, registrytest.Record("node-a", 2))
	changed := readFile(t, r.store.path)
	write(t, r.store.path, first)
	w := &watch{r: r.store, folder: filepath.Dir(r.store.path)}
	defer w.close()
	w.read()
	looks := w.info
	write(t, r.store.path, changed)
	if err := os.Chtimes(r.store.path, time.Time{}, looks.ModTime()); err != nil {
		t.Fatal(err)
	}
	if _, now, err := r.store.load(); err != nil || !durable.Unchanged(looks, now) {
		t.Fatalf("the test itself: the file looks different, error %v", err)
	}
	w.poll()
	present, _ := w.latest.News()
	record, err := registry.Decode("node-a", present.Entries["node-a"])
	if err != nil || record.Revision != 2 {
		t.Errorf("after a poll: %+v, error %v", record, err)
	}
	w.poll()
	if !w.settled {
		t.Error("an unchanged file is read at every poll")
	}
}
