package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// aside is in the names of files that are being written. Their extensions are
// none that a runtime takes.
const aside = ".wgcni-aside-"

// errRaced says that somebody changed a file while it was being edited: look again.
var errRaced = errors.New("it was changed by somebody else at the same time")

// replaceFile makes data the content of a file. Readers, and whoever comes after
// a power cut, see the old file or the new one.
func replaceFile(path string, data []byte, mode fs.FileMode) error {
	temp, err := writeAside(path, data, mode, nil)
	if err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// writeAside writes a file beside path and returns its name. A rename makes it the
// file: writing into a binary that is being executed fails ("text file busy"), and
// a reader of a conflist would see half of it. Owner is the file whose owner the
// new one gets; nil: the caller's own.
func writeAside(path string, data []byte, mode fs.FileMode, owner fs.FileInfo) (name string, err error) {
	// A child that is forked while the file is open for writing holds it open until
	// it executes, and until then nobody can execute the file (golang/go#22315).
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+aside+"*")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(data); err != nil {
		return "", err
	}
	if owner != nil {
		if st, ok := owner.Sys().(*syscall.Stat_t); ok {
			if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil {
				return "", err
			}
		}
	}
	if err := f.Chmod(mode); err != nil { // after chown(2), which takes bits away
		return "", err
	}
	if err := f.Sync(); err != nil {
		return "", fmt.Errorf("write %s: %w", f.Name(), err)
	}
	return f.Name(), f.Close()
}

// syncFolder makes what happened to names durable (fsync(2)). Some file systems
// have no such call.
func syncFolder(path string) error {
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

// removeFile deletes a file, durably. One that is not there is no error.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// removeLeftovers deletes what a process that was killed had written aside. It is
// called with the lock held, under which no other process writes there.
func removeLeftovers(dirs ...string) {
	for _, dir := range dirs {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if _, random, ok := strings.Cut(e.Name(), aside); ok && e.Name()[0] == '.' && strings.Trim(random, "0123456789") == "" && e.Type().IsRegular() {
				_ = os.Remove(filepath.Join(dir, e.Name()))
			}
		}
	}
}

// displaced is the file that an edit has taken the place of. Somebody who had
// opened it before goes on writing into it.
type displaced struct {
	file *os.File
	was  []byte
}

// edit replaces a file that is another program's, and that it may write at any
// moment: if the content is not old any more when the new one is to take its
// place, nothing is changed and the error Is errRaced. Mode and owner stay. The
// file that was there is returned, to be looked at for a while and closed.
func edit(path string, old, data []byte) (d displaced, err error) {
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return d, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return d, err
	}
	temp, err := writeAside(path, data, info.Mode().Perm(), info)
	if err != nil {
		return d, err
	}
	defer func() { _ = os.Remove(temp) }()
	// After the exchange, temp is what stood there in that very moment.
	err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return d, editByRename(path, temp, old) // NFS and others cannot exchange
	}
	if err != nil {
		return d, fmt.Errorf("replace %s: %w", path, err)
	}
	f, err := os.Open(temp)
	if err != nil {
		return d, err
	}
	d = displaced{file: f, was: old}
	if now, err := d.read(); err != nil || !bytes.Equal(now, old) {
		// Their file goes back, so that what they are still writing is seen.
		_ = f.Close()
		return displaced{}, errors.Join(errRaced, err, unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE))
	}
	return d, syncFolder(filepath.Dir(path))
}

func editByRename(path, temp string, old []byte) error {
	now, err := readFile(path)
	if err != nil {
		return err
	}
	if !bytes.Equal(now, old) {
		return errRaced
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func (d displaced) read() ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(d.file, 0, maxFileBytes))
}

func (d displaced) close() {
	if d.file != nil {
		_ = d.file.Close()
	}
}
