package install

import (
	"io/fs"
	"os"
	"slices"

	"github.com/fsnotify/fsnotify"
)

// watch tells of changes in a folder as far as inotify does. It may miss some, or
// all where inotify is not to be had (fs.inotify.max_user_instances), has died, or
// the folder is another one by now: see to it with look at every poll, and do not
// rely on it.
type watch struct {
	folder string
	open   func() (*fsnotify.Watcher, error)

	notify  *fsnotify.Watcher
	watched fs.FileInfo // the folder that notify watches
}

// look begins to watch the folder that is there now, if that is not watched yet.
func (w *watch) look() {
	info, err := os.Stat(w.folder)
	if err != nil {
		return
	}
	if w.notify == nil {
		if w.notify, err = w.open(); err != nil {
			w.notify = nil
			return
		}
	}
	if w.watched != nil && os.SameFile(w.watched, info) && slices.Contains(w.notify.WatchList(), w.folder) {
		return
	}
	_ = w.notify.Remove(w.folder) // of a folder that is gone there is nothing to remove
	w.watched = nil
	if w.notify.Add(w.folder) == nil {
		w.watched = info
	}
}

// events are nil, which blocks for ever, where there is no inotify. Renames into
// the folder are among them (IN_MOVED_TO, which fsnotify calls Create).
func (w *watch) events() (<-chan fsnotify.Event, <-chan error) {
	if w.notify == nil {
		return nil, nil
	}
	return w.notify.Events, w.notify.Errors
}

func (w *watch) close() {
	if w.notify != nil {
		_ = w.notify.Close()
	}
	w.notify, w.watched = nil, nil
}
