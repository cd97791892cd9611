package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// startTimeout bounds the start of a machine and its links.
var startTimeout = Patience(30 * time.Second)

// Durable are the directories of a machine that survive [Machine.Reboot]. They
// are empty when the machine is made.
var Durable = []string{"/var/lib/wgcni", "/var/lib/cni", "/var/lib/containerd", "/etc/cni", "/etc/wgcni"}

// Machine is a set of namespaces (PID, mount, network, UTS, IPC) that looks
// like a computer of its own. Its methods may be called from any goroutine.
type Machine struct {
	// Name is also the machine's host name.
	Name string

	dir    string // on the host: the durable directories and the scratch space
	remove string // on the host: what the init removes if the harness dies

	mu    sync.Mutex
	init  *exec.Cmd      // nil while the machine is stopped
	stdin io.WriteCloser // its end tells the init that the harness died

	grouped atomic.Bool // it may have control groups of its own
}

// StartMachine starts a machine that is linked to nothing. Close stops it.
func StartMachine(ctx context.Context, name string) (*Machine, error) {
	dir, err := os.MkdirTemp("", "wgcni-machine-")
	if err != nil {
		return nil, fmt.Errorf("start machine %s: %w", name, err)
	}
	m, err := startMachine(ctx, name, dir, dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return m, nil
}

// startMachine starts a machine whose files are in dir. With remove, its init
// removes that directory when the harness has died.
func startMachine(ctx context.Context, name, dir, remove string) (*Machine, error) {
	m := &Machine{Name: name, dir: dir, remove: remove}
	if err := m.start(ctx); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *Machine) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	line, err := m.spec()
	if err != nil {
		return fmt.Errorf("start machine %s: %w", m.Name, err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{initArg0, m.Name}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Setpgid:    true, // Ctrl-C at a demo's terminal is the harness's to handle
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start machine %s: %w", m.Name, err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start machine %s: %w", m.Name, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start machine %s: %w", m.Name, err)
	}
	disarm := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer disarm()
	_, werr := stdin.Write(line)
	answer, rerr := bufio.NewReader(stdout).ReadString('\n')
	if answer != readyLine+"\n" {
		_ = cmd.Process.Kill()
		return fmt.Errorf("start machine %s: init says %q: %w", m.Name, strings.TrimSpace(answer),
			errors.Join(werr, rerr, ctx.Err(), cmd.Wait()))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.init, m.stdin = cmd, stdin
	return nil
}

// spec makes the machine's directories on the host and describes them to the init.
func (m *Machine) spec() ([]byte, error) {
	s := initSpec{Name: m.Name, Scratch: filepath.Join(m.dir, "scratch"), Remove: m.remove, Cgroup: cgroupName(m.dir)}
	if err := os.MkdirAll(s.Scratch, 0o755); err != nil {
		return nil, err
	}
	for _, target := range Durable {
		source := m.durable(target)
		if err := os.MkdirAll(source, 0o755); err != nil {
			return nil, err
		}
		s.Binds = append(s.Binds, bind{source, target})
	}
	line, err := json.Marshal(s)
	return append(line, '\n'), err
}

// durable returns where the host keeps a durable directory.
func (m *Machine) durable(target string) string {
	return filepath.Join(m.dir, "durable", strings.ReplaceAll(strings.Trim(target, "/"), "/", "-"))
}

// PID returns the machine's init as the host sees it, or 0 when it is stopped.
func (m *Machine) PID() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.init == nil {
		return 0
	}
	return m.init.Process.Pid
}

// String returns the machine's name.
func (m *Machine) String() string { return m.Name }

// stop ends the machine as a power cut does. All of its processes are gone
// when it returns: an init can only be waited for after the rest of its PID
// namespace. Sockets that the harness opened inside keep the old network
// namespace, with no process in it, until they are closed.
func (m *Machine) stop() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.init == nil {
		return nil
	}
	if err := m.init.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop machine %s: %w", m.Name, err)
	}
	var killed *exec.ExitError
	if err := m.init.Wait(); err != nil && !errors.As(err, &killed) {
		return fmt.Errorf("stop machine %s: wait for its init: %w", m.Name, err)
	}
	m.init, m.stdin = nil, nil
	if m.grouped.Swap(false) {
		return removeCgroup(cgroupName(m.dir))
	}
	return nil
}

// Reboot stops the machine as a power cut does and starts it anew: no process,
// interface, rule or mount is left, /run is empty, the directories in [Durable]
// are kept, save those named in wipe. Links must be made again; see [Node.Reboot].
func (m *Machine) Reboot(ctx context.Context, wipe ...string) error {
	if err := m.stop(); err != nil {
		return err
	}
	for _, target := range wipe {
		if err := os.RemoveAll(m.durable(target)); err != nil {
			return fmt.Errorf("wipe %s of machine %s: %w", target, m.Name, err)
		}
	}
	return m.start(ctx)
}

// Close stops the machine and removes its files.
func (m *Machine) Close() error {
	return errors.Join(m.stop(), os.RemoveAll(m.dir))
}

// Path returns the path by which the host reaches the machine's absolute path
// p. The kernel resolves absolute symbolic links on the way in the host's
// root, so p must have none; /var/run, which is one everywhere, is handled.
func (m *Machine) Path(p string) string {
	p = filepath.Clean("/" + p)
	if rest, ok := strings.CutPrefix(p, "/var/run"); ok && (rest == "" || rest[0] == '/') {
		p = "/run" + rest
	}
	return "/proc/" + strconv.Itoa(m.PID()) + "/root" + p
}

// ReadFile returns the content of one of the machine's files.
func (m *Machine) ReadFile(p string) (string, error) {
	b, err := os.ReadFile(m.Path(p))
	if err != nil {
		return "", fmt.Errorf("machine %s: %w", m.Name, err)
	}
	return string(b), nil
}

// WriteFile writes one of the machine's files and makes the folders above it.
func (m *Machine) WriteFile(p, content string, perm os.FileMode) error {
	to := m.Path(p)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	if err := os.WriteFile(to, []byte(content), perm); err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	return nil
}

// Do calls f on an operating system thread in the machine's network namespace;
// see [Endpointer].
func (m *Machine) Do(f func() error) error { return doIn(m.netns(), f) }

func (m *Machine) netns() string { return "/proc/" + strconv.Itoa(m.PID()) + "/ns/net" }
