package reconcile

import (
	"context"
	"errors"
	"os"
)

// holdsLock reports whether a lock of HoldHelperLock is still the one of its folder:
// somebody may have removed the file, or the whole folder.
func holdsLock(runDir string, lock *os.File) bool {
	there, err := os.Stat(helperLock(runDir))
	if err != nil {
		return !errors.Is(err, os.ErrNotExist) // nothing is known
	}
	ours, err := lock.Stat()
	return err == nil && os.SameFile(there, ours) // while it is open no other file can have its inode
}

// watch begins to watch the store, anew where it was watched before.
func (l *Loop) watch(ctx context.Context) <-chan struct{} {
	if l.unwatch != nil {
		l.unwatch()
	}
	ctx, l.unwatch = context.WithCancel(ctx) //nolint:gosec // it is called by the next watch, or ends with ctx
	return watchStore(ctx, l.config.RunDir, l.Log)
}

// evicted reports whether the run folder was taken from under this helper. It is
// the helper of the folder that is there now then: the plugin's verbs tell by the
// lock whether there is one, the store is filled again, and ADDs are told what has
// been announced. The error Is ErrRunning if another helper was quicker.
func (l *Loop) evicted() (bool, error) {
	if l.Lock == nil || holdsLock(l.config.RunDir, l.Lock) {
		return false, nil
	}
	lock, err := HoldHelperLock(l.config.RunDir)
	if errors.Is(err, ErrRunning) {
		return true, err
	}
	if err != nil {
		l.Log.Warn("the run folder was removed, and cannot be made again", "path", l.config.RunDir, "error", err)
		return false, nil
	}
	l.Log.Warn("the run folder was removed; it is filled again", "path", l.config.RunDir)
	_ = l.Lock.Close() // of a file that nobody can find any more
	l.Lock, l.told, l.observed = lock, nil, nil
	return true, nil
}
