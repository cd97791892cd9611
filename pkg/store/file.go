package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/durable"
)

// ErrLocked says that another process held the store until the deadline.
var ErrLocked = errors.New("the store is locked by another process")

// Damaged tells where a store that could not be read has been put. The store
// itself is open, and empty.
type Damaged struct {
	Path  string // where it lies now
	Cause error
}

func (d *Damaged) Error() string {
	return fmt.Sprintf("the store was damaged (%v); it lies in %s now, and a new one takes its place", d.Cause, d.Path)
}

// file is a locked, open bbolt file.
type file struct {
	db   *bolt.DB
	lock *os.File
	path string
	// Damaged is set when this opening had to replace the file.
	damaged *Damaged
	broken  bool // bbolt has panicked on it
	trusted bool // see layout
}

// open locks and opens a file, making it and its folder where they are missing.
// The context's deadline bounds the wait for the lock.
func open(ctx context.Context, path string, l layout) (*file, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	lock, err := lockFile(ctx, path+".lock")
	if err != nil {
		return nil, err
	}
	f := &file{lock: lock, path: path, trusted: l.trusted}
	err = f.openDB(ctx, l)
	if isDamage(err) {
		if f.damaged, err = f.moveAside(err); err == nil {
			err = f.openDB(ctx, l)
		}
	}
	if err != nil {
		lock.Close() //nolint:errcheck // this releases the lock
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return f, nil
}

func (f *file) openDB(ctx context.Context, l layout) error {
	f.broken = false
	timeout := time.Second // of somebody who holds the file itself, with bbolt's own tool for instance
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(time.Until(deadline), time.Millisecond)
	}
	return f.guarded(func() error {
		// bbolt refuses a file of less than its two meta pages without saying of
		// which kind its error is. An empty file is a new one.
		if info, err := os.Stat(f.path); err == nil && info.Size() > 0 && info.Size() < int64(2*os.Getpagesize()) {
			return fmt.Errorf("%w: it has %d bytes only", errDamage, info.Size())
		}
		// The list of free pages is stored: without it, bbolt looks for them at
		// each opening in a goroutine of its own (DB.freepages), where a damaged
		// page kills the whole process and guarded is of no help.
		db, err := bolt.Open(f.path, 0o600, &bolt.Options{Timeout: timeout, FreelistType: bolt.FreelistMapType})
		if errors.Is(err, berrors.ErrTimeout) {
			return ErrLocked
		}
		if err != nil {
			return err
		}
		f.db = db
		missing := false
		err = f.view(func(tx *bolt.Tx) error {
			if err := f.checkPages(tx); err != nil {
				return err
			}
			for _, name := range l.buckets {
				switch b := tx.Bucket(name); {
				case b == nil:
					missing = true
				case l.check != nil:
					if err := b.ForEach(l.check); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err == nil && missing {
			err = f.update(func(tx *bolt.Tx) error {
				for _, b := range l.buckets {
					if _, err := tx.CreateBucketIfNotExists(b); err != nil {
						return err
					}
				}
				return nil
			})
			if err == nil { // bbolt syncs the file, and not its name
				err = durable.SyncFolder(filepath.Dir(f.path))
			}
		}
		if err != nil {
			err = errors.Join(err, f.closeDB())
		}
		return err
	})
}

// layout is what a file must hold.
type layout struct {
	buckets [][]byte
	// check looks at every value when the file is opened, so that damage shows at
	// once and not in the middle of a verb. It is nil for a file that was left by us.
	check func(k, v []byte) error
	// trusted is for a file whose pages this process has looked at, and has written
	// since whatever was written: they are not looked at again.
	trusted bool
}

// checkEnds touches a value without reading it: an ADD should not take the longer
// the more pods there are. Every value is a JSON object or literal.
func checkEnds(k, v []byte) error {
	if len(v) == 0 || v[0] < ' ' || v[len(v)-1] < ' ' {
		return notJSON(k)
	}
	return nil
}

// checkJSON reads the whole value.
func checkJSON(k, v []byte) error {
	if !json.Valid(v) {
		return notJSON(k)
	}
	return nil
}

func notJSON(k []byte) error { return fmt.Errorf("%w: the value of %q is not JSON", errDamage, k) }

// close releases file and lock. A file that bbolt does not let go of is moved
// aside: it stays locked for as long as this process lives, and nobody could open
// what is in its place.
func (f *file) close() error {
	err := f.closeDB()
	if errors.Is(err, errHeld) {
		_, aerr := f.moveAside(err)
		err = errors.Join(err, aerr)
	}
	return errors.Join(err, f.lock.Close())
}

// errHeld says that bbolt does not come back.
var errHeld = fmt.Errorf("%w: it cannot be closed", errDamage)

// closePatience is far more than closing takes.
const closePatience = 200 * time.Millisecond

// closeDB does not wait for ever: where a page breaks in the middle of a
// transaction, bbolt panics once more while it rolls back, and keeps the lock that
// its Close waits for.
func (f *file) closeDB() error {
	if !f.broken {
		return f.guarded(f.db.Close)
	}
	closed, db := make(chan error, 1), f.db
	go func() { closed <- (&file{}).guarded(db.Close) }()
	select {
	case err := <-closed:
		return err
	case <-time.After(closePatience):
		return errHeld
	}
}

// errDamage marks what only a broken file brings about.
var errDamage = errors.New("damaged")

func isDamage(err error) bool {
	for _, e := range []error{errDamage, berrors.ErrInvalid, berrors.ErrChecksum, berrors.ErrVersionMismatch} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// guarded runs do on the mapped file. bbolt trusts its pages: a broken one makes
// it panic, or read beyond the end of the file, which is a fault of its own kind.
// After that it may keep its own locks, and is asked for nothing more.
func (f *file) guarded(do func() error) (err error) {
	if f.broken {
		return fmt.Errorf("%w: it broke while it was open", errDamage)
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			f.broken = true
			err = fmt.Errorf("%w: %v", errDamage, p)
		}
	}()
	return do()
}

// view reads, guarded.
func (f *file) view(do func(*bolt.Tx) error) error {
	return f.guarded(func() error { return f.db.View(do) })
}

// update writes, guarded, but for pages that something has broken since the file was
// opened.
func (f *file) update(do func(*bolt.Tx) error) error {
	return f.guarded(func() error {
		return f.db.Update(func(tx *bolt.Tx) error {
			if err := f.checkPages(tx); err != nil {
				return err
			}
			return do(tx)
		})
	})
}

// replace puts an empty store in the place of one whose content makes no sense.
// The lock is kept.
func (f *file) replace(cause error, l layout) error {
	if err := f.closeDB(); err != nil && !errors.Is(err, errHeld) {
		return errors.Join(cause, err)
	}
	damaged, err := f.moveAside(cause)
	if err != nil {
		return err
	}
	f.damaged = damaged
	return f.openDB(context.Background(), l)
}

func (f *file) moveAside(cause error) (*Damaged, error) {
	aside := f.path + ".damaged-" + strconv.FormatInt(time.Now().UnixMilli(), 10)
	if err := os.Rename(f.path, aside); err != nil {
		return nil, fmt.Errorf("%w, and it cannot be moved aside: %w", cause, err)
	}
	return &Damaged{Path: aside, Cause: cause}, nil
}

// lockFile takes an exclusive flock(2). Waiters sleep in the kernel, in line.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	fd := int(f.Fd()) // flock(2) on a blocking descriptor
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err == nil {
		return f, nil
	}
	got := make(chan error)
	abandoned := make(chan struct{})
	go func() {
		err := retryEINTR(func() error { return unix.Flock(fd, unix.LOCK_EX) })
		select {
		case got <- err:
		case <-abandoned:
			f.Close() //nolint:errcheck // this releases the lock that nobody waits for
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			f.Close() //nolint:errcheck // nothing was written
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return f, nil
	case <-ctx.Done():
		close(abandoned)
		return nil, fmt.Errorf("lock %s: %w", path, ErrLocked)
	}
}

func retryEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
