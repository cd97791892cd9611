// Package file keeps a registry in one shared file: a JSON document that a
// person can read, on a disk or a share that every node mounts.
//
// Writers take turns by a lock file beside it, write aside in the same folder,
// fsync and rename, so that a reader sees the old document or the new one and a
// writer that is killed leaves the old. Readers take no lock. They watch the
// folder and also poll, since a network file system tells nobody of a change
// that another machine made.
//
// Share the folder, not the file: a file that is bind mounted by itself can't
// be renamed over.
package file

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/renameio/v2"

	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/registry"
)

var _ registry.Store = (*Store)(nil)

// Errors of a document that cannot be read. The text around them names the file
// and how to mend it.
var (
	// ErrMissing means that the folder is not there, or that the document was
	// there once and is gone.
	ErrMissing = errors.New("missing")
	// ErrDamaged means that the file is no registry document: empty, truncated,
	// too large, not JSON, or no file at all. The next writer moves it aside and
	// begins a new one.
	ErrDamaged = errors.New("damaged")
	// ErrVersion means that a newer wgcni wrote the document. It is left alone.
	ErrVersion = errors.New("unsupported version")
)

// maxFileBytes bounds what is read into memory: 1,000 bytes for each of 67,000 nodes.
const maxFileBytes = 64 << 20

// Store is a handle onto a shared file. It holds nothing open between calls.
type Store struct {
	path     string
	poll     time.Duration
	lockWait time.Duration
	now      func() time.Time
	inotify  func() (*fsnotify.Watcher, error)

	// seen is set once the document has been read: from then on its absence
	// is an error.
	seen atomic.Bool
	// safe is the document that is known to be durable, name and all; nil for none.
	safe atomic.Pointer[fs.FileInfo]
}

// Option changes how a Store works.
type Option func(*Store)

// WithPollInterval sets how often a Watch looks at the file by itself, 2 s by
// default.
func WithPollInterval(d time.Duration) Option { return func(r *Store) { r.poll = d } }

// WithLockWait sets how long an Update waits for other writers at most, 30 s by
// default.
func WithLockWait(d time.Duration) Option { return func(r *Store) { r.lockWait = d } }

// New returns the registry in the file at path, whose folder must exist by the
// time it is used. It touches nothing yet.
func New(path string, options ...Option) *Store {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs // as the folder's events name it
	}
	r := &Store{
		path: path, poll: 2 * time.Second, lockWait: 30 * time.Second,
		now: time.Now, inotify: fsnotify.NewWatcher,
	}
	for _, o := range options {
		o(r)
	}
	return r
}

// String returns "file:" and the path.
func (r *Store) String() string { return "file:" + r.path }

// Entries reads the document. Before anything was ever stored it is empty.
func (r *Store) Entries(ctx context.Context) (registry.Entries, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("read registry %s: %w", r.path, err)
	}
	doc, _, err := r.load()
	if err != nil {
		return nil, err
	}
	return doc.nodes, nil
}

// Update implements registry.Store. What is stored is the same JSON, indented.
func (r *Store) Update(ctx context.Context, name string, change func([]byte) ([]byte, error)) error {
	// Most changes turn out to be none. They shall not queue for the lock.
	if doc, info, err := r.load(); err == nil && ctx.Err() == nil {
		if record, err := change(doc.nodes[name]); err == nil && record == nil {
			return r.settle(info)
		}
	}
	lock, err := r.lock(ctx)
	if err != nil {
		return fmt.Errorf("publish %s: %w", name, err)
	}
	defer lock.Close()
	return r.put(ctx, lock, name, change)
}

// put does the work of Update while lock is held.
func (r *Store) put(ctx context.Context, lock *os.File, name string, change func([]byte) ([]byte, error)) error {
	r.removeLeftovers()
	doc, info, err := r.load()
	switch {
	case errors.Is(err, ErrDamaged):
		if err := r.moveAside(); err != nil {
			return err
		}
	case errors.Is(err, ErrMissing): // the file only: the lock is in the same folder
	case err != nil:
		return err
	}
	record, err := change(doc.nodes[name])
	if err != nil {
		return err
	}
	if record == nil {
		return r.settle(info)
	}
	data, err := doc.with(name, record)
	if err != nil {
		return err
	}
	if len(data) > maxFileBytes {
		return fmt.Errorf("publish %s: registry file %s would grow to %d bytes, at most %d are read; forget old nodes or use etcd",
			name, r.path, len(data), maxFileBytes)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("publish %s: %w", name, err)
	}
	if err := r.replace(data); err != nil {
		return err
	}
	r.mark(lock)
	return nil
}

// load reads and parses the document, and returns the FileInfo that it had.
func (r *Store) load() (document, fs.FileInfo, error) { return r.loadAgain(&reading{}) }

// reading is what a reader keeps from one look at the document to the next.
type reading struct {
	buffer  []byte
	entries registry.Entries
}

// loadAgain is load for one who has read it before.
func (r *Store) loadAgain(last *reading) (document, fs.FileInfo, error) {
	// The mark comes after the first document. So whoever sees the mark first and
	// then no document knows that it was taken away.
	begun := r.seen.Load() || r.marked()
	data, info, err := r.read(last.buffer)
	last.buffer = data
	if errors.Is(err, fs.ErrNotExist) {
		if err := r.absent(begun); err != nil {
			return document{}, nil, err
		}
		doc := document{changed: slices.Collect(maps.Keys(last.entries))}
		last.entries = nil
		return doc, nil, nil
	}
	if err != nil {
		return document{}, info, err
	}
	doc, err := parseAgain(data, last.entries)
	switch {
	case errors.Is(err, ErrVersion):
		return document{}, info, fmt.Errorf("registry file %s: %w; upgrade wgcni on this node", r.path, err)
	case err != nil:
		return document{}, info, r.damaged(err.Error())
	}
	r.seen.Store(true)
	last.entries = doc.nodes
	return doc, info, nil
}

func (r *Store) damaged(what string) error {
	return fmt.Errorf("registry file %s is %w: %s; restore it, or let any node publish: that moves it aside and begins a new one",
		r.path, ErrDamaged, what)
}

// absent explains why there is no file, or returns nil if there never was one.
func (r *Store) absent(begun bool) error {
	folder := filepath.Dir(r.path)
	if _, err := os.Stat(folder); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("registry folder %s is %w: create it or mount it", folder, ErrMissing)
		}
		return fmt.Errorf("registry folder: %w", err)
	}
	if begun {
		return fmt.Errorf("registry file %s is %w: it was there before; restore or mount it, or let any node publish: that begins a new one",
			r.path, ErrMissing)
	}
	return nil
}

// open opens the file whatever it is; without O_NONBLOCK a FIFO would block.
// The poll uses it too: open makes an NFS client ask the server, where stat may
// answer from a cache for up to a minute (nfs(5), close-to-open consistency).
func (r *Store) open() (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(r.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("registry file: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, nil, fmt.Errorf("registry file: %w", err)
	}
	return f, info, nil
}

// read uses the buffer if it is large enough.
func (r *Store) read(buffer []byte) ([]byte, fs.FileInfo, error) {
	f, info, err := r.open()
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if !info.Mode().IsRegular() {
		return nil, info, r.damaged("not a file (" + info.Mode().Type().String() + ")")
	}
	if info.Size() > maxFileBytes {
		return nil, info, r.damaged(fmt.Sprintf("%d bytes, at most %d are read", info.Size(), maxFileBytes))
	}
	// Should it grow meanwhile, the rest is cut off, and the next read sees all of it.
	data := bytes.NewBuffer(slices.Grow(buffer[:0], int(info.Size())+bytes.MinRead))
	if _, err := data.ReadFrom(io.LimitReader(f, maxFileBytes)); err != nil {
		return nil, info, fmt.Errorf("registry file: %w", err)
	}
	return data.Bytes(), info, nil
}

// replace makes data the document, durably.
func (r *Store) replace(data []byte) error {
	folder := filepath.Dir(r.path)
	f, err := renameio.NewPendingFile(r.path, renameio.WithTempDir(folder), renameio.WithStaticPermissions(0o644))
	if err != nil {
		return fmt.Errorf("write registry file %s: %w", r.path, err)
	}
	defer func() { _ = f.Cleanup() }()
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("write registry file %s: %w", r.path, err)
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		if errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("write registry file %s: %w; mount its folder, not the file by itself", r.path, err)
		}
		return fmt.Errorf("write registry file %s: %w", r.path, err)
	}
	r.seen.Store(true)
	return syncFolder(folder)
}

// settle makes sure that a document which was read is durable: the writer who has
// put it there may have been killed before it came to that, and whoever is told that
// its record is there relies on it. Info is nil where there is no document.
func (r *Store) settle(info fs.FileInfo) error {
	if info == nil {
		return nil
	}
	if safe := r.safe.Load(); safe != nil && durable.Unchanged(*safe, info) {
		return nil
	}
	if err := syncFolder(filepath.Dir(r.path)); err != nil {
		return err
	}
	r.safe.Store(&info)
	return nil
}

func syncFolder(folder string) error {
	if err := durable.SyncFolder(folder); err != nil {
		return fmt.Errorf("registry folder: %w", err)
	}
	return nil
}

// moveAside keeps a damaged file as path.damaged-<milliseconds since 1970>. A
// second hard link leaves no moment without a file; a directory, or a file
// system without hard links, needs the rename.
func (r *Store) moveAside() error {
	for ms := r.now().UnixMilli(); ; ms++ {
		aside := fmt.Sprintf("%s.damaged-%d", r.path, ms)
		if _, err := os.Lstat(aside); err == nil {
			continue
		}
		if r.linked() {
			return nil // by a writer who was killed after it
		}
		err := os.Link(r.path, aside)
		if err == nil {
			return nil
		}
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) { // nor would there be room for a new one
			return fmt.Errorf("move the damaged registry file aside: %w", err)
		}
		if err := os.Rename(r.path, aside); err != nil {
			return fmt.Errorf("move the damaged registry file aside: %w", err)
		}
		return nil
	}
}

// linked reports whether the damaged file has a second name beside it already.
func (r *Store) linked() bool {
	info, err := os.Lstat(r.path)
	if err != nil {
		return false
	}
	folder, base := filepath.Dir(r.path), filepath.Base(r.path)
	entries, _ := os.ReadDir(folder)
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		there, err := os.Lstat(filepath.Join(folder, e.Name()))
		return strings.HasPrefix(e.Name(), base+".damaged-") && err == nil && os.SameFile(info, there)
	})
}

// removeLeftovers deletes what writers that were killed left behind. Under the
// lock there is no other writer, so every such file is a dead one's. Failing to
// delete it is no reason not to publish.
func (r *Store) removeLeftovers() {
	folder, base := filepath.Dir(r.path), filepath.Base(r.path)
	entries, _ := os.ReadDir(folder)
	for _, e := range entries {
		// renameio's names: a dot, the base name, a random number.
		digits, ours := strings.CutPrefix(e.Name(), "."+base)
		if ours && digits != "" && strings.Trim(digits, "0123456789") == "" && e.Type().IsRegular() {
			_ = os.Remove(filepath.Join(folder, e.Name()))
		}
	}
}
