package crash

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Call is a system call that changes a file, or makes a change durable.
type Call struct {
	Name   string // as in section 2 of the manual; pwrite64 is "pwrite"
	Path   string // absolute, as the program sees it
	To     string // of rename, link and symlink: the second path
	Flags  int    // of openat, renameat2 and unlinkat
	Mode   fs.FileMode
	Data   []byte // of a write
	Offset int64  // of a write; the length of an ftruncate
	Result int64  // negated errno for a failure
}

// String is the call in one line, without data.
func (c Call) String() string {
	out := c.Name + " " + c.Path
	if c.To != "" {
		out += " -> " + c.To
	}
	switch c.Name {
	case "write", "pwrite":
		out += fmt.Sprintf(" [%d bytes at %d]", len(c.Data), c.Offset)
	case "ftruncate":
		out += fmt.Sprintf(" [%d]", c.Offset)
	}
	if c.Result < 0 {
		out += fmt.Sprintf(" = %v", unix.Errno(-c.Result))
	}
	return out
}

// alien are the paths of what is no file of a disk.
var alien = []string{"/proc/", "/sys/", "/dev/", "pipe:", "socket:", "anon_inode:", "/memfd:"}

// read returns the call that a thread enters, if it is one that changes a file.
func (t *tracer) read(tid int, nr uint64, a [6]uint64) (c Call, ok bool) {
	switch nr {
	case unix.SYS_OPENAT:
		c = Call{Name: "openat", Path: t.at(tid, a[0], a[1]), Flags: int(int32(a[2])), Mode: fs.FileMode(a[3]).Perm()}
		if c.Flags&(unix.O_CREAT|unix.O_TRUNC) == 0 {
			return c, false
		}
	case unix.SYS_WRITE:
		c = Call{Name: "write", Path: t.fd(tid, a[0])}
		if c.Offset = t.position(tid, a[0]); c.ofFile() {
			c.Data = t.memory(tid, a[1], a[2])
		}
	case unix.SYS_PWRITE64:
		c = Call{Name: "pwrite", Path: t.fd(tid, a[0]), Data: t.memory(tid, a[1], a[2]), Offset: int64(a[3])}
	case unix.SYS_WRITEV, unix.SYS_PWRITEV, unix.SYS_PWRITEV2, unix.SYS_COPY_FILE_RANGE, unix.SYS_SENDFILE, unix.SYS_FALLOCATE, unix.SYS_SPLICE:
		target := a[0]
		if nr == unix.SYS_COPY_FILE_RANGE || nr == unix.SYS_SPLICE {
			target = a[2]
		}
		c = Call{Name: otherWrite, Path: t.fd(tid, target)}
	case unix.SYS_FTRUNCATE:
		c = Call{Name: "ftruncate", Path: t.fd(tid, a[0]), Offset: int64(a[1])}
	case unix.SYS_TRUNCATE:
		c = Call{Name: "ftruncate", Path: t.path(tid, unix.AT_FDCWD, a[0]), Offset: int64(a[1])}
	case unix.SYS_FSYNC, unix.SYS_FDATASYNC:
		c = Call{Name: "fsync", Path: t.fd(tid, a[0])}
	case unix.SYS_FCHMOD:
		c = Call{Name: "chmod", Path: t.fd(tid, a[0]), Mode: fs.FileMode(a[1]).Perm()}
	case unix.SYS_FCHMODAT:
		c = Call{Name: "chmod", Path: t.at(tid, a[0], a[1]), Mode: fs.FileMode(a[2]).Perm()}
	case unix.SYS_FCHOWN:
		c = Call{Name: "chown", Path: t.fd(tid, a[0])}
	case unix.SYS_FCHOWNAT:
		c = Call{Name: "chown", Path: t.at(tid, a[0], a[1])}
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		c = Call{Name: "rename", Path: t.at(tid, a[0], a[1]), To: t.at(tid, a[2], a[3])}
		if nr == unix.SYS_RENAMEAT2 {
			c.Flags = int(a[4])
		}
	case unix.SYS_LINKAT:
		c = Call{Name: "link", Path: t.at(tid, a[0], a[1]), To: t.at(tid, a[2], a[3])}
	case unix.SYS_SYMLINKAT:
		c = Call{Name: "symlink", Path: t.at(tid, a[1], a[2]), To: t.text(tid, a[0])}
	case unix.SYS_UNLINKAT:
		c = Call{Name: "unlink", Path: t.at(tid, a[0], a[1]), Flags: int(a[2])}
	case unix.SYS_SENDTO, unix.SYS_SENDMSG:
		return Call{Name: "send", Path: t.fd(tid, a[0])}, t.kernel
	case unix.SYS_MKDIRAT:
		c = Call{Name: "mkdir", Path: t.at(tid, a[0], a[1]), Mode: fs.FileMode(a[2]).Perm()}
	default:
		return t.readOld(tid, nr, a)
	}
	return c, c.ofFile()
}

// otherWrite are the calls whose data nobody reads here: a test fails on them, so
// that whoever brings them in teaches this package what they do.
const otherWrite = "other"

func (c Call) ofFile() bool {
	for _, prefix := range alien {
		if strings.HasPrefix(c.Path, prefix) {
			return false
		}
	}
	return c.Path != "" && !strings.HasSuffix(c.Path, " (deleted)")
}

// at is the path that a directory's descriptor and a name lead to.
func (t *tracer) at(tid int, dirfd, name uint64) string { return t.path(tid, int(int32(dirfd)), name) }

func (t *tracer) path(tid, dirfd int, name uint64) string {
	text := t.text(tid, name)
	if path.IsAbs(text) || text == "" {
		return path.Clean(text)
	}
	dir := "cwd"
	if dirfd != unix.AT_FDCWD {
		dir = "fd/" + strconv.Itoa(dirfd)
	}
	return path.Join(t.link(tid, dir), text)
}

func (t *tracer) fd(tid int, fd uint64) string { return t.link(tid, "fd/"+strconv.Itoa(int(fd))) }

func (t *tracer) link(tid int, name string) string {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(t.proc.Fd()), strconv.Itoa(tid)+"/"+name, buf)
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

func (t *tracer) open(tid int, name string) (*os.File, error) {
	fd, err := unix.Openat(int(t.proc.Fd()), strconv.Itoa(tid)+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// memory is what the program's memory has at an address; less of it where it ends.
func (t *tracer) memory(tid int, addr, n uint64) []byte {
	f, err := t.open(tid, "mem")
	if err != nil {
		return nil
	}
	defer f.Close()
	out := make([]byte, n)
	got, _ := f.ReadAt(out, int64(addr))
	return out[:got]
}

func (t *tracer) text(tid int, addr uint64) string {
	b := t.memory(tid, addr, unix.PathMax)
	if end := bytes.IndexByte(b, 0); end >= 0 {
		b = b[:end]
	}
	return string(b)
}

// position is where write(2) goes; -1 for the end of the file.
func (t *tracer) position(tid int, fd uint64) (pos int64) {
	f, err := t.open(tid, "fdinfo/"+strconv.Itoa(int(fd)))
	if err != nil {
		return 0
	}
	defer f.Close()
	text := make([]byte, 256)
	n, _ := f.Read(text)
	for line := range strings.Lines(string(text[:n])) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "pos":
			pos, _ = strconv.ParseInt(value, 10, 64)
		case "flags":
			if flags, _ := strconv.ParseInt(value, 8, 64); flags&unix.O_APPEND != 0 {
				return -1
			}
		}
	}
	return pos
}
