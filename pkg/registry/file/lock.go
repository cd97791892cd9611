package file

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockText marks a lock file whose registry has been written at least once.
const lockText = "wgcni: writers of the registry beside this file lock it (flock). Leave it here.\n"

func (r *Store) lockPath() string { return r.path + ".lock" }

// lock takes the writers' lock, which closing the file, or dying, gives back.
//
// flock(2) has no timeout, and a blocked call can't be called back from another
// goroutine. So it is tried again and again, at most 25 ms apart.
func (r *Store) lock(ctx context.Context) (*os.File, error) {
	bounded, cancel := context.WithTimeoutCause(ctx, r.lockWait,
		fmt.Errorf("another writer has held it for %v; see who does with `fuser -v %s`", r.lockWait, r.lockPath()))
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 25*time.Millisecond) {
		if bounded.Err() != nil {
			return nil, fmt.Errorf("lock %s: %w", r.lockPath(), context.Cause(bounded))
		}
		f, err := r.tryLock()
		if err == nil {
			return f, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			if err := r.absent(false); err != nil {
				return nil, err
			}
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("lock %s: %w", r.lockPath(), err)
		}
		select {
		case <-bounded.Done():
		case <-time.After(pause):
		}
	}
}

// tryLock opens the lock file anew each time, for it may have been deleted, and
// a lock on a deleted file keeps nobody out.
func (r *Store) tryLock() (*os.File, error) {
	f, err := os.OpenFile(r.lockPath(), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, err
	}
	if !current(f, r.lockPath()) {
		_ = f.Close()
		return nil, unix.EWOULDBLOCK
	}
	return f, nil
}

// current reports whether path still leads to f.
func current(f *os.File, path string) bool {
	held, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(path)
	return err == nil && os.SameFile(held, now)
}

// mark notes in the lock file that the registry has begun. Without it, a
// document that was deleted would look like one that was never written. A mark
// that fails costs no more than that.
func (r *Store) mark(lock *os.File) {
	if info, err := lock.Stat(); err == nil && info.Size() == 0 {
		_, _ = lock.WriteString(lockText)
	}
}

func (r *Store) marked() bool {
	info, err := os.Stat(r.lockPath())
	return err == nil && info.Size() > 0
}
