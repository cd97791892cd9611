// Package durable writes files whole: a reader, whoever comes after a process that
// was killed, and whoever comes after a power cut see the old file or the new one.
//
// What is written is written aside, synced and renamed, and the folder is synced
// (fsync(2): a name is not safe before that). A process that is killed leaves at
// most a file beside, which the next write of the same file removes, see Sweep.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// infix is in the names of files that are being written. They begin with a dot and
// end with digits: no runtime takes one for a network configuration.
const infix = ".wgcni-aside-"

// Replace makes data the content of a file, with this mode whatever the umask. The
// folder must exist. What the error does not report as written is not seen by
// anybody; but where only the last sync has failed, the new content may be.
func Replace(path string, data []byte, mode fs.FileMode) error {
	a, err := WriteAside(path, data, mode, nil)
	if err != nil {
		return err
	}
	defer a.Close()
	if err := os.Rename(a.Path, path); err != nil {
		return err
	}
	return SyncFolder(filepath.Dir(path))
}

// Create is Replace for a file that must not exist: the error then Is fs.ErrExist,
// and what is there stays.
func Create(path string, data []byte, mode fs.FileMode) error {
	if _, err := os.Lstat(path); err == nil {
		return &fs.PathError{Op: "create", Path: path, Err: unix.EEXIST}
	}
	a, err := WriteAside(path, data, mode, nil)
	if err != nil {
		return err
	}
	defer a.Close()
	err = unix.Renameat2(unix.AT_FDCWD, a.Path, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // NFS and others
		err = unix.Link(a.Path, path)
	}
	if err != nil {
		return &fs.PathError{Op: "create", Path: path, Err: err}
	}
	if err := SyncFolder(filepath.Dir(path)); err != nil {
		return errors.Join(err, os.Remove(path)) // else the next would find it there
	}
	return nil
}

// Aside is a file that has been written beside another one, and synced.
type Aside struct {
	Path string
	lock *os.File
}

// Close removes the file, unless it has been renamed.
func (a Aside) Close() {
	if there, err := os.Lstat(a.Path); err == nil {
		if mine, err := a.lock.Stat(); err == nil && os.SameFile(mine, there) {
			_ = os.Remove(a.Path)
		}
	}
	_ = a.lock.Close()
}

// WriteAside writes a file beside path, for the caller to rename. Owner is the file
// whose owner it gets; nil: the caller's own.
func WriteAside(path string, data []byte, mode fs.FileMode, owner fs.FileInfo) (Aside, error) {
	sweep(filepath.Dir(path), filepath.Base(path))
	// A child that is forked while the file is open for writing holds it open until
	// it executes, and until then nobody can execute the file (golang/go#22315).
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	for {
		f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+infix+"*")
		if err != nil {
			return Aside{}, err
		}
		lock, err := lockNew(f)
		if err == nil && lock == nil {
			_ = f.Close()
			continue // swept before it was locked
		}
		a := Aside{Path: f.Name(), lock: lock}
		if err == nil {
			err = fill(f, data, mode, owner)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			_ = os.Remove(a.Path)
			_ = lock.Close()
			return Aside{}, err
		}
		return a, nil
	}
}

// lockNew keeps Sweep from a file while this process lives. It locks a descriptor
// that cannot write: one that can would make the file busy until it is closed. It
// returns nil if the file was swept before.
func lockNew(f *os.File) (*os.File, error) {
	lock, err := os.Open(f.Name())
	if errors.Is(err, fs.ErrPermission) { // the umask has taken the owner's right to read it
		_ = f.Chmod(0o600)
		lock, err = os.Open(f.Name())
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	// A file system without locks: Sweep cannot lock it either, and leaves it.
	mine, err := lock.Stat()
	if err != nil {
		return lock, err
	}
	if there, err := os.Lstat(f.Name()); err != nil || !os.SameFile(mine, there) {
		_ = lock.Close()
		return nil, nil
	}
	return lock, nil
}

func fill(f *os.File, data []byte, mode fs.FileMode, owner fs.FileInfo) error {
	if _, err := f.Write(data); err != nil {
		return err
	}
	if owner != nil {
		if st, ok := owner.Sys().(*syscall.Stat_t); ok {
			if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil {
				return err
			}
		}
	}
	if err := f.Chmod(mode); err != nil { // after chown(2), which takes bits away
		return err
	}
	return f.Sync()
}

// Sweep removes what processes that were killed have left beside the files of some
// folders. What a living one is writing stays: it holds a lock on it.
func Sweep(folders ...string) {
	for _, folder := range folders {
		sweep(folder, "")
	}
}

// sweep is Sweep for one file's folder, or for all files with the name "".
func sweep(folder, name string) {
	entries, _ := os.ReadDir(folder)
	for _, e := range entries {
		base, random, ok := strings.Cut(e.Name(), infix)
		if !ok || base == "" || base[0] != '.' || name != "" && base[1:] != name || random == "" || strings.Trim(random, "0123456789") != "" || !e.Type().IsRegular() {
			continue
		}
		path := filepath.Join(folder, e.Name())
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.Remove(path)
		}
		_ = f.Close()
	}
}

// MkdirAll makes a folder and those above it, durably. Those that were there before
// are synced too: whoever made them may have been killed before it came to that.
func MkdirAll(path string, mode fs.FileMode) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(path, mode); err != nil {
		return err
	}
	for path != "/" {
		path = filepath.Dir(path)
		// One that may not be read is none that was just made.
		if err := SyncFolder(path); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return nil
}

// Unchanged reports whether a file looks as it did: the same inode, size and time. It
// is false where one of them is nil, for a file that was not there.
func Unchanged(before, now fs.FileInfo) bool {
	return before != nil && now != nil && os.SameFile(before, now) && before.Size() == now.Size() && before.ModTime().Equal(now.ModTime())
}

// Remove deletes a file. One that is not there is no error.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return SyncFolder(filepath.Dir(path))
}

// SyncFolder makes what happened to the names in a folder durable. Some file systems
// have no such call, and need none.
func SyncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return nil
}
