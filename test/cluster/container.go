package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Container is a program as a container runtime runs it in a pod that has its
// node's network: in a root of its own, with few capabilities.
type Container struct {
	Image        map[string]string // path inside -> file of the machine; all that is in the image
	Args         []string          // the program, by its path inside, and its arguments
	Env          []string          // NAME=value; beside PATH all it has
	Capabilities []string          // "NET_ADMIN", ...; of those that the harness has
	NoNewPrivs   bool              // allowPrivilegeEscalation: false
	Writable     bool              // the root can be written to
	UID          int
	Mounts       []ContainerMount // in order
	Devices      []string         // beside those that every container has
}

// ContainerMount is a volumeMount with its volume.
type ContainerMount struct {
	Source     string // folder of the machine; made if it is not there
	Target     string
	ReadOnly   bool
	Propagates bool // what the machine mounts below appears inside: HostToContainer
}

// containerArg is the first argument of a test binary that is to be a container;
// the second is the stage, the third describes it.
const containerArg = "wgcni-container"

// Contain returns the command that runs a container on the machine. A SIGTERM
// reaches the program.
func (m *Machine) Contain(ctx context.Context, c Container) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	spec, err := json.Marshal(c)
	cmd := m.Command(ctx, self, containerArg, "runtime", string(spec))
	cmd.Env = append(cmd.Env, "GORACE=atexit_sleep_ms=0") // else it ends a second late
	return cmd, err
}

// beContainer never returns if the process was started as a part of a container.
func beContainer() {
	if len(os.Args) != 4 || os.Args[1] != containerArg {
		return
	}
	var c Container
	err := json.Unmarshal([]byte(os.Args[3]), &c)
	switch {
	case err != nil:
	case os.Args[2] == "runtime":
		err = superviseContainer(os.Args[3])
	default:
		err = c.enter()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(max(exit.ExitCode(), 1))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "container:", err)
		os.Exit(128)
	}
	os.Exit(0)
}

// superviseContainer starts the container's first process in namespaces of its
// own, passes signals on to it, and waits for it.
func superviseContainer(spec string) error {
	cmd := exec.Command("/proc/self/exe", containerArg, "first", spec)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID, Pdeathsig: unix.SIGKILL}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	runtime.LockOSThread() // Pdeathsig is about the thread
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s)
		}
	}()
	return cmd.Wait()
}

// enter makes the container's root, and becomes its program.
func (c Container) enter() error {
	// Capabilities are those of a thread; execve(2) ends the others.
	runtime.LockOSThread()
	if err := c.makeRoot(); err != nil {
		return err
	}
	if err := c.dropCapabilities(); err != nil {
		return err
	}
	err := syscall.Exec(c.Args[0], c.Args, append([]string{"PATH=" + filepath.Dir(c.Args[0])}, c.Env...))
	return fmt.Errorf("run %s: %w", c.Args[0], err)
}

// newRoot is a folder of the machine that nothing in it needs.
const newRoot = "/mnt"

func (c Container) makeRoot() error {
	// What the machine mounts is seen here, and not the other way round.
	if err := mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return err
	}
	if err := mount("image", newRoot, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	if err := c.fillRoot(); err != nil {
		return err
	}
	if err := c.mountAll(); err != nil {
		return err
	}
	const old = newRoot + "/.old"
	if err := os.Mkdir(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(newRoot, old); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := errors.Join(os.Chdir("/"), unix.Unmount("/.old", unix.MNT_DETACH), os.Remove("/.old")); err != nil {
		return err
	}
	if c.Writable {
		return nil
	}
	return mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}

// fillRoot puts the image there, and what every runtime adds.
func (c Container) fillRoot() error {
	for inside, file := range c.Image {
		if err := bindFile(file, newRoot+inside); err != nil {
			return err
		}
	}
	for _, file := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		if real, err := filepath.EvalSymlinks(file); err == nil {
			if err := bindFile(real, newRoot+file); err != nil {
				return err
			}
		}
	}
	for _, device := range append([]string{"/dev/null", "/dev/zero", "/dev/urandom"}, c.Devices...) {
		if err := bindFile(device, newRoot+device); err != nil {
			return err
		}
	}
	if err := os.Mkdir(newRoot+"/proc", 0o755); err != nil {
		return err
	}
	if err := mount("proc", newRoot+"/proc", "proc", 0, ""); err != nil {
		return err
	}
	return bindReadOnly(newRoot+"/proc/sys", newRoot+"/proc/sys", unix.MS_PRIVATE)
}

func (c Container) mountAll() error {
	for _, m := range c.Mounts {
		to := newRoot + m.Target
		if err := errors.Join(os.MkdirAll(m.Source, 0o755), os.MkdirAll(to, 0o755)); err != nil {
			return err
		}
		propagation := uintptr(unix.MS_PRIVATE)
		if m.Propagates {
			propagation = unix.MS_SLAVE
		}
		var err error
		if m.ReadOnly {
			err = bindReadOnly(m.Source, to, propagation)
		} else if err = mount(m.Source, to, "", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = mount("", to, "", unix.MS_REC|propagation, "")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func bindReadOnly(from, to string, propagation uintptr) error {
	if err := mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := mount("", to, "", unix.MS_REC|propagation, ""); err != nil {
		return err
	}
	return mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}

func bindFile(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(to, nil, 0o755); err != nil {
		return err
	}
	return mount(from, to, "", unix.MS_BIND, "")
}

// capabilities by their numbers, of <linux/capability.h>.
var capabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
	"NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
	"SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE",
	"AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
	"PERFMON", "BPF", "CHECKPOINT_RESTORE",
}

// dropCapabilities leaves what was asked for in the bounding set, which is what
// root has after execve(2), and in no other.
func (c Container) dropCapabilities() error {
	for _, name := range c.Capabilities {
		if !slices.Contains(capabilities, name) {
			return fmt.Errorf("no capability %q: want one of %s", name, strings.Join(capabilities, ", "))
		}
	}
	for number, name := range capabilities {
		if slices.Contains(c.Capabilities, name) {
			continue
		}
		// EINVAL: this kernel does not know it.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(number), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("drop %s: %w", name, err)
		}
	}
	if c.UID != 0 {
		if err := errors.Join(unix.Setresgid(c.UID, c.UID, c.UID), unix.Setresuid(c.UID, c.UID, c.UID)); err != nil {
			return fmt.Errorf("become user %d: %w", c.UID, err)
		}
	}
	if c.NoNewPrivs {
		return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	return nil
}
