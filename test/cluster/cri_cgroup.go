package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupScript runs a command in the machine's own control groups: those below
// the harness's own that have the machine's name, and nothing else, is what
// /sys/fs/cgroup shows then. All controllers are cgroup v2's, or none where the
// host's are all v1's, so that a runtime does the same everywhere. Three things
// are done in an order:
//   - the file system is mounted by somebody who is in a cgroup namespace of his
//     own, since a mount in the host's sets its options for all
//     (kernel/cgroup/cgroup.c, apply_cgroup_root_flags);
//   - the machine's namespace is made by a process that is in the machine's
//     group, which is the root from then on, and is kept for later commands;
//   - who gave a group its children leaves it: a group with processes cannot
//     hand controllers on.
const cgroupScript = `
name=$0 held=/run/cgroup.ns
if [ ! -e $held ]; then
	: >$held
	unshare --cgroup sh -e -c '
		mount -t cgroup2 cgroup2 /sys/fs/cgroup
		mkdir /sys/fs/cgroup/$0 /sys/fs/cgroup/$0/runtime
		echo $$ >/sys/fs/cgroup/$0/cgroup.procs
		unshare --cgroup sh -e -c "
			mount --bind /proc/self/ns/cgroup $1
			umount /sys/fs/cgroup
			mount -t cgroup2 cgroup2 /sys/fs/cgroup
		"' "$name" $held
fi
exec nsenter --cgroup=$held sh -e -c 'echo $$ >/sys/fs/cgroup/runtime/cgroup.procs && exec "$@"' sh "$@"
`

// startGrouped is [Machine.Start] for what makes control groups.
func (m *Machine) startGrouped(name string, args ...string) (*Process, error) {
	m.grouped.Store(true)
	return m.Start("sh", append([]string{"-e", "-c", cgroupScript, cgroupName(m.dir), name}, args...)...)
}

// cgroupName is that of the machine's control group, below the harness's own.
func cgroupName(dir string) string {
	return filepath.Base(filepath.Dir(dir)) + "-" + filepath.Base(dir)
}

// removeCgroup removes a machine's control groups, if there are any. What runs in
// them must be ending.
func removeCgroup(name string) error {
	err := withCgroups(func(root string) (err error) {
		for range 100 { // what was killed may still be ending
			if err = removeTree(filepath.Join(root, name)); !errors.Is(err, unix.EBUSY) {
				return err
			}
			time.Sleep(20 * time.Millisecond)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("remove control group %s: %w", name, err)
	}
	return nil
}

// withCgroups calls f with a path to the control groups below the harness's own,
// through a mount that is nowhere in the host's tree, in a namespace that ends
// with the thread; see cgroupScript and doIn.
func withCgroups(f func(root string) error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		fd, err := mountCgroups()
		if err == nil {
			err = errors.Join(f(filepath.Join("/proc/self/fd", strconv.Itoa(fd))), unix.Close(fd))
		}
		done <- err
	}()
	return <-done
}

// mountCgroups gives the calling thread a cgroup namespace of its own.
func mountCgroups() (fd int, err error) {
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return -1, fmt.Errorf("make a cgroup namespace: %w", err)
	}
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open cgroup2: %w", err)
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("open cgroup2: %w", err)
	}
	fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("mount cgroup2: %w", err)
	}
	return fd, nil
}

// removeTree removes a group with its children. The files in it are the kernel's,
// and go with it.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeTree(filepath.Join(dir, e.Name())))
		}
	}
	if err == nil {
		err = unix.Rmdir(dir)
	}
	return err
}
