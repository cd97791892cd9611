package file

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/registry"
)

// Watch implements registry.Store. A change on this machine is seen as it
// happens; one on another machine, or in a folder that was away, by the poll.
func (r *Store) Watch(ctx context.Context) <-chan registry.Change {
	out := make(chan registry.Change)
	w := &watch{r: r, folder: filepath.Dir(r.path)}
	go func() {
		defer close(out)
		defer w.close()
		w.run(ctx, out)
	}()
	return out
}

// watch is one running Watch.
type watch struct {
	r      *Store
	folder string

	notify  *fsnotify.Watcher // nil without inotify: then only the poll sees changes
	watched fs.FileInfo       // the folder that notify watches, of several that may be mounted there

	latest registry.Latest

	info    fs.FileInfo // the file when it was last read; nil if there was none
	settled bool        // see poll
	last    reading
}

func (w *watch) run(ctx context.Context, out chan<- registry.Change) {
	ticker := time.NewTicker(w.r.poll)
	defer ticker.Stop()
	w.watchFolder() // before reading, so that no change falls between
	w.read()
	for ctx.Err() == nil {
		present, news := w.latest.News()
		send := out
		if !news {
			send = nil
		}
		var events <-chan fsnotify.Event
		var failures <-chan error
		if w.notify != nil {
			events, failures = w.notify.Events, w.notify.Errors
		}
		select {
		case <-ctx.Done():
		case send <- present:
			w.latest.Sent()
		case event, open := <-events:
			switch {
			case !open: // the poll begins another one
				w.close()
			case event.Name == w.r.path || event.Name == w.folder:
				w.read()
			}
		case <-failures: // such as an overflow, which lost events
			w.read()
		case <-ticker.C:
			w.poll()
		}
	}
}

func (w *watch) close() {
	if w.notify != nil {
		_ = w.notify.Close()
	}
	w.notify, w.watched = nil, nil
}

// watchFolder sees to it that the folder that is there now is watched. The
// folder and not the file, because the file is replaced by a rename. Where
// inotify is not to be had (fs.inotify.max_user_instances) the poll does it
// alone, and each poll tries again.
func (w *watch) watchFolder() {
	info, err := os.Stat(w.folder)
	if err != nil {
		return
	}
	if w.notify == nil {
		if w.notify, err = w.r.inotify(); err != nil {
			w.notify = nil
			return
		}
	}
	if w.watched != nil && os.SameFile(w.watched, info) && slices.Contains(w.notify.WatchList(), w.folder) {
		return
	}
	_ = w.notify.Remove(w.folder) // of a folder that is gone there is nothing to remove
	if err := w.notify.Add(w.folder); err != nil {
		w.watched = nil
		return
	}
	w.watched = info
}

// poll reads the file if it looks different from when it was last read.
//
// Looks can deceive: two documents of equal size, renamed into place in the
// same tick of the file system's clock, one with the inode number that the
// other gave back. So a file counts as unchanged only if it looked the same at
// two polls in a row: by then the tick is over.
func (w *watch) poll() {
	w.watchFolder()
	f, info, err := w.r.open()
	if err == nil {
		_ = f.Close()
	}
	same := durable.Unchanged(w.info, info)
	if same && w.settled {
		return
	}
	w.read()
	w.settled = same && durable.Unchanged(w.info, info)
}

func (w *watch) read() {
	doc, info, err := w.r.loadAgain(&w.last)
	w.info, w.settled = info, false
	if last, _ := w.latest.News(); err == nil && last.Err == nil && last.Entries != nil && len(doc.changed) == 0 {
		return
	}
	w.latest.Put(registry.Change{Entries: doc.nodes, Changed: doc.changed, Err: err})
}
