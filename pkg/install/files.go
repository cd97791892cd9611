package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/durable"
)

// errRaced says that somebody changed a file while it was being edited: look again.
var errRaced = errors.New("it was changed by somebody else at the same time")

// displaced is the file that an edit has taken the place of. Somebody who had
// opened it before goes on writing into it.
type displaced struct {
	file *os.File
	path string // its name now
	was  []byte
}

// taken is in the name of a file that an edit puts into another's place, and after
// that of the one that it has displaced. The first bytes of the SHA-256 of what the
// edit writes and of what it was made of follow, and a number: whoever finds such a
// file after a crash knows which of the two it is, and whether somebody has written
// into it, see [recoverTaken].
const taken = ".wgcni-taken-"

var takenName = regexp.MustCompile(`^\.(.+)\.wgcni-taken-([0-9a-f]{16})-([0-9a-f]{16})-[0-9]+$`)

func brief(data []byte) string { return hashOf(data)[:16] }

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
	a, err := durable.WriteAside(path, data, info.Mode().Perm(), info)
	if err != nil {
		return d, err
	}
	defer a.Close()
	number := a.Path[strings.LastIndexByte(a.Path, '-')+1:]
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+taken+brief(data)+"-"+brief(old)+"-"+number)
	if err := os.Rename(a.Path, temp); err != nil {
		return d, err
	}
	// After the exchange, temp is what stood there in that very moment.
	err = exchange(temp, path)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return d, errors.Join(editByRename(path, temp, old), durable.Remove(temp)) // NFS and others cannot exchange
	}
	if err != nil {
		return d, errors.Join(fmt.Errorf("replace %s: %w", path, err), durable.Remove(temp))
	}
	f, err := os.Open(temp)
	if err != nil {
		return d, err
	}
	d = displaced{file: f, path: temp, was: old}
	if now, err := d.read(); err != nil || !bytes.Equal(now, old) {
		// Their file goes back, so that what they are still writing is seen.
		_ = f.Close()
		if back := exchange(temp, path); back != nil {
			return displaced{}, errors.Join(errRaced, err, back)
		}
		return displaced{}, errors.Join(errRaced, err, durable.Remove(temp))
	}
	return d, durable.SyncFolder(filepath.Dir(path))
}

func exchange(a, b string) error {
	return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
}

func editByRename(path, temp string, old []byte) error {
	now, err := readFile(path)
	if err != nil {
		return err
	}
	if !bytes.Equal(now, old) {
		return errRaced
	}
	return os.Rename(temp, path)
}

func (d displaced) read() ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(d.file, 0, maxFileBytes))
}

// close gives up what somebody may still write into the file.
func (d displaced) close() {
	if d.file != nil {
		_ = d.file.Close()
		_ = os.Remove(d.path)
	}
}

// removeLeftovers clears up after a process that was killed. It is called with the
// lock held, under which no other process edits there.
func removeLeftovers(dirs ...string) {
	durable.Sweep(dirs...)
	for _, dir := range dirs {
		for _, d := range recoverTaken(dir) {
			d.close()
		}
	}
}

// recoverTaken looks for what an edit that was killed has left in a folder. The file
// that it was about to put in is deleted. One that it had displaced, and that
// somebody had written to, goes back to its place, unless that was written to again
// since. One that is as it was is returned: its author may still have it open.
func recoverTaken(dir string) (out []displaced) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		name := takenName.FindStringSubmatch(e.Name())
		if name == nil || !e.Type().IsRegular() {
			continue
		}
		temp, path := filepath.Join(dir, e.Name()), filepath.Join(dir, name[1])
		data, err := readFile(temp)
		if err != nil {
			continue
		}
		switch brief(data) {
		case name[2]:
		case name[3]:
			if f, err := os.Open(temp); err == nil {
				out = append(out, displaced{file: f, path: temp, was: data})
			}
			continue
		default:
			if now, err := readFile(path); err == nil && brief(now) == name[2] && exchange(temp, path) != nil {
				continue // it stays for the next
			}
		}
		_ = durable.Remove(temp)
	}
	return out
}
