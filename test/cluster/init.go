package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// initArg0 is argv[0] of a machine's init, which also makes it easy to spot in ps.
const initArg0 = "wgcni-machine"

const readyLine = "ready"

// initSpec is the first line that an init reads from its stdin.
type initSpec struct {
	Name    string
	Scratch string // an empty directory of the host, to mount working space on
	Binds   []bind // durable directories
	Remove  string // removed when the harness died; else the harness does it
	Cgroup  string // likewise: a control group below the harness's own, which may not be there
}

// bind shows a directory of the host at another path inside the machine.
type bind struct{ Source, Target string }

// Init turns the process into the init of a machine, or into a container, if it was
// started as one, and then never returns. Call it first in main or TestMain.
func Init() {
	beContainer()
	if len(os.Args) == 0 || os.Args[0] != initArg0 {
		return
	}
	stdin := bufio.NewReader(os.Stdin)
	spec, err := setUpMachine(stdin)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go reap()
	fmt.Println(readyLine)
	// The harness writes nothing more, and kills us when it wants us to end: an
	// end of the pipe means that it has died.
	if _, err := io.Copy(io.Discard, stdin); err != nil {
		fmt.Fprintln(os.Stderr, "read from harness:", err)
	}
	_ = unix.Kill(-1, unix.SIGKILL) // all of this PID namespace, without PID 1
	_ = removeCgroup(spec.Cgroup)
	removeAfterDeath(spec.Remove)
	os.Exit(0) // and the kernel kills whatever was started since
}

// setUpMachine makes the namespaces, in which the process already is, look like a machine.
func setUpMachine(stdin *bufio.Reader) (initSpec, error) {
	var spec initSpec
	line, err := stdin.ReadBytes('\n')
	if err != nil {
		return spec, fmt.Errorf("read the machine's description: %w", err)
	}
	if err := json.Unmarshal(line, &spec); err != nil {
		return spec, fmt.Errorf("parse the machine's description: %w", err)
	}
	if os.Getpid() != 1 {
		return spec, fmt.Errorf("set up machine %s: process is not PID 1 of its namespace", spec.Name)
	}
	if err := os.Chdir("/"); err != nil {
		return spec, fmt.Errorf("set up machine %s: %w", spec.Name, err)
	}
	if err := mountAll(spec); err != nil {
		return spec, fmt.Errorf("set up machine %s: %w", spec.Name, err)
	}
	if err := unix.Sethostname([]byte(spec.Name)); err != nil {
		return spec, fmt.Errorf("set host name %s: %w", spec.Name, err)
	}
	if err := loopbackUp(); err != nil {
		return spec, fmt.Errorf("set up machine %s: %w", spec.Name, err)
	}
	return spec, nil
}

func mountAll(spec initSpec) error {
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	// A sysfs shows the interfaces of the namespace that it was mounted in.
	if err := mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return err
	}
	if err := overlay(spec.Scratch, "/etc", "/var/lib"); err != nil {
		return err
	}
	// A mount of the host's that lay hidden under ours would still be found in
	// mountinfo, and taken for what is there.
	if err := unix.Unmount("/run/netns", unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount /run/netns: %w", err)
	}
	if err := mount("run", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	for _, dir := range []string{"/run/netns", "/run/wireguard", "/run/lock"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if to, err := filepath.EvalSymlinks("/var/run"); err != nil || to != "/run" {
		if err := mount("/run", "/var/run", "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	for _, b := range spec.Binds {
		if err := os.MkdirAll(b.Target, 0o755); err != nil {
			return err
		}
		if err := mount(b.Source, b.Target, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// overlay makes directories of the host writable for the machine alone. The
// writes go to a tmpfs, which the overlays keep alive once it is unmounted.
func overlay(scratch string, dirs ...string) error {
	if err := mount("scratch", scratch, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for i, dir := range dirs {
		upper := filepath.Join(scratch, fmt.Sprintf("upper%d", i))
		work := filepath.Join(scratch, fmt.Sprintf("work%d", i))
		if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
			return err
		}
		opts := "lowerdir=" + dir + ",upperdir=" + upper + ",workdir=" + work
		if err := mount("overlay", dir, "overlay", 0, opts); err != nil {
			return err
		}
	}
	if err := unix.Unmount(scratch, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", scratch, err)
	}
	return nil
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s %s on %s: %w", fstype, source, target, err)
	}
	return nil
}

// loopbackUp acts in the calling thread's network namespace.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// reap collects the orphans, which are all given to PID 1.
func reap() {
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
		}
		<-died
	}
}

// removeAfterDeath removes the harness's files in its place. Programs of the
// other machines, which are dying as well, may still create some: try again.
func removeAfterDeath(dir string) {
	if dir == "" {
		return
	}
	for range 100 {
		if os.RemoveAll(dir) == nil {
			if _, err := os.Lstat(dir); os.IsNotExist(err) {
				return
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}
