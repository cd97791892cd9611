package crash

import (
	"io/fs"

	"golang.org/x/sys/unix"
)

// readOld is read for the calls that younger architectures do not have.
func (t *tracer) readOld(tid int, nr uint64, a [6]uint64) (c Call, ok bool) {
	cwd := uint64(uint32(unix.AT_FDCWD & 0xffffffff))
	switch nr {
	case unix.SYS_OPEN:
		return t.read(tid, unix.SYS_OPENAT, [6]uint64{cwd, a[0], a[1], a[2]})
	case unix.SYS_CREAT:
		return t.read(tid, unix.SYS_OPENAT, [6]uint64{cwd, a[0], unix.O_CREAT | unix.O_TRUNC | unix.O_WRONLY, a[1]})
	case unix.SYS_RENAME:
		return t.read(tid, unix.SYS_RENAMEAT, [6]uint64{cwd, a[0], cwd, a[1]})
	case unix.SYS_LINK:
		return t.read(tid, unix.SYS_LINKAT, [6]uint64{cwd, a[0], cwd, a[1]})
	case unix.SYS_SYMLINK:
		return t.read(tid, unix.SYS_SYMLINKAT, [6]uint64{a[0], cwd, a[1]})
	case unix.SYS_UNLINK:
		return t.read(tid, unix.SYS_UNLINKAT, [6]uint64{cwd, a[0]})
	case unix.SYS_RMDIR:
		return t.read(tid, unix.SYS_UNLINKAT, [6]uint64{cwd, a[0], unix.AT_REMOVEDIR})
	case unix.SYS_MKDIR:
		return t.read(tid, unix.SYS_MKDIRAT, [6]uint64{cwd, a[0], a[1]})
	case unix.SYS_CHMOD:
		c = Call{Name: "chmod", Path: t.path(tid, unix.AT_FDCWD, a[0]), Mode: fs.FileMode(a[1]).Perm()}
		return c, c.ofFile()
	}
	return c, false
}
