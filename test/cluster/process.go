package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a long-running program inside a machine.
type Process struct {
	// Log is what the program has written to stdout and stderr.
	Log *Log

	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; read after done
}

// Start starts a long-running program inside the machine. It ends with the
// machine at the latest.
func (m *Machine) Start(name string, args ...string) (*Process, error) {
	return StartCommand(m.Command(context.Background(), name, args...))
}

// StartCommand starts a command that Command of a machine or pod returned, for
// those that need an environment of their own.
func StartCommand(cmd *exec.Cmd) (*Process, error) {
	p := &Process{Log: &Log{}, name: commandName(cmd), cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.Log, p.Log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", commandLine(cmd), err)
	}
	go func() {
		defer close(p.done)
		p.err = cmd.Wait()
	}()
	return p, nil
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the program's end and returns its error, which carries its exit status.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("wait for %s to end: %w", p.name, ctx.Err())
	}
}

// WaitFor waits until the log contains text. It fails early when the program ends.
// Without a deadline in ctx it gives up after a minute of [Patience].
func (p *Process) WaitFor(ctx context.Context, text string) error {
	ctx, end := withDefaultTimeout(ctx, time.Minute)
	defer end()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-p.done:
			cancel(fmt.Errorf("%s has ended: %w", p.name, errors.Join(p.err)))
		case <-ctx.Done():
		}
	}()
	if err := p.Log.WaitFor(ctx, text); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	return nil
}

// Signal sends a signal to the program itself, not to the nsenter in front of
// it, which then ends with the program's exit status. One that SIGSTOP has stopped goes
// on at the next signal.
func (p *Process) Signal(ctx context.Context, sig unix.Signal) error {
	var child int
	err := Poll(ctx, p.name+" to be started by nsenter", func() error {
		select {
		case <-p.done:
			return nil
		default:
		}
		var err error
		child, err = onlyChild(p.cmd.Process.Pid)
		return err
	})
	if err != nil {
		return err
	}
	if child == 0 {
		return fmt.Errorf("send %v to %s: %w", sig, p.name, os.ErrProcessDone)
	}
	if err := unix.Kill(child, sig); err != nil {
		return fmt.Errorf("send %v to %s: %w", sig, p.name, err)
	}
	if sig == unix.SIGSTOP {
		return p.awaitStopped(ctx, child)
	}
	// An nsenter that has stopped itself with its child would never wait for it. It has
	// the child go on, too: one that is stopped does not heed a signal to end.
	_ = unix.Kill(p.cmd.Process.Pid, unix.SIGCONT)
	return nil
}

// awaitStopped waits until the program has stopped, and nsenter itself with it.
func (p *Process) awaitStopped(ctx context.Context, child int) error {
	return Poll(ctx, p.name+" to stop", func() error {
		for _, pid := range []int{child, p.cmd.Process.Pid} {
			if state, _, err := ProcessState(pid); err != nil || state != "T" {
				return errors.Join(err, fmt.Errorf("process %d is in state %q", pid, state))
			}
		}
		return nil
	})
}

// ProcessState is a process's state, as ps shows it, and its parent.
func ProcessState(pid int) (state string, parent int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0, fmt.Errorf("look at process %d: %w", pid, err)
	}
	// The name in front is in brackets, and may have some of its own (proc(5)).
	if _, err := fmt.Sscan(string(text[bytes.LastIndexByte(text, ')')+1:]), &state, &parent); err != nil {
		return "", 0, fmt.Errorf("look at process %d: %w", pid, err)
	}
	return state, parent, nil
}

// Stop ends the program with SIGTERM and, when ctx ends first, with SIGKILL. It
// returns the program's error, as Wait does.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.Signal(ctx, unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return errors.Join(err, p.Kill())
	}
	if err := p.Wait(ctx); ctx.Err() != nil {
		return errors.Join(err, p.Kill())
	}
	return p.err
}

// Kill ends the program with SIGKILL, along with the processes that it started
// in its own process group, and waits for its end.
func (p *Process) Kill() error {
	select {
	case <-p.done: // the group's number may be another's by now
		return nil
	default:
	}
	err := unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	<-p.done
	return nil
}

func onlyChild(pid int) (int, error) {
	file := fmt.Sprintf("/proc/%d/task/%d/children", pid, pid)
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return searchChild(pid)
	}
	if err != nil {
		return 0, err
	}
	children := strings.Fields(string(b))
	if len(children) == 0 {
		return 0, fmt.Errorf("%s is empty", file)
	}
	return strconv.Atoi(children[0])
}

// searchChild is for kernels without CONFIG_PROC_CHILDREN.
func searchChild(parent int) (int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return 0, err
	}
	want := fmt.Sprintf("\nPPid:\t%d\n", parent)
	for _, file := range files {
		// Processes come and go while we look.
		if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), want) {
			return strconv.Atoi(filepath.Base(filepath.Dir(file)))
		}
	}
	return 0, fmt.Errorf("process %d has no child", parent)
}

// ProcessInfo is a process found inside a machine.
type ProcessInfo struct {
	PID     int // inside the machine
	HostPID int
	Args    []string
}

// Processes lists the machine's processes, without its init.
func (m *Machine) Processes() ([]ProcessInfo, error) {
	initPID := m.PID()
	ns, err := os.Readlink(pidNS(initPID))
	if err != nil {
		return nil, fmt.Errorf("list processes of machine %s: %w", m.Name, err)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes of machine %s: %w", m.Name, err)
	}
	var found []ProcessInfo
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == initPID {
			continue
		}
		// Processes come and go while we look, and a zombie has no namespace
		// any more: what can't be read isn't there.
		if is, err := os.Readlink(pidNS(pid)); err != nil || is != ns {
			continue
		}
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || len(cmdline) == 0 {
			continue
		}
		args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		found = append(found, ProcessInfo{PID: innerPID(pid), HostPID: pid, Args: args})
	}
	return found, nil
}

func pidNS(pid int) string { return fmt.Sprintf("/proc/%d/ns/pid", pid) }

// innerPID is the process's number in its innermost PID namespace, or 0.
func innerPID(hostPID int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", hostPID))
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(rest)
			n, _ := strconv.Atoi(f[len(f)-1])
			return n
		}
	}
	return 0
}

// FindProcesses lists the machine's processes whose command line, joined by
// spaces, contains text.
func (m *Machine) FindProcesses(text string) ([]ProcessInfo, error) {
	all, err := m.Processes()
	var found []ProcessInfo
	for _, p := range all {
		if strings.Contains(strings.Join(p.Args, " "), text) {
			found = append(found, p)
		}
	}
	return found, err
}

// Kill9 kills the machine's processes whose command line contains text, waits
// until those are gone (their successors may be there already) and returns how
// many there were.
func (m *Machine) Kill9(ctx context.Context, text string) (int, error) {
	found, err := m.FindProcesses(text)
	if err != nil {
		return 0, err
	}
	for _, p := range found {
		if err := m.kill(p.HostPID); err != nil {
			return 0, fmt.Errorf("kill %v on %s: %w", p.Args, m.Name, err)
		}
	}
	return len(found), Poll(ctx, fmt.Sprintf("processes with %q on %s to die", text, m.Name), func() error {
		left, err := m.FindProcesses(text)
		if err != nil {
			return err
		}
		for _, p := range found {
			if slices.ContainsFunc(left, func(l ProcessInfo) bool { return l.PID == p.PID && l.HostPID == p.HostPID }) {
				return fmt.Errorf("still there: %v", p)
			}
		}
		return nil
	})
}

// kill holds the process by a pidfd (os.FindProcess takes one) while it makes
// sure that the number hasn't passed to a process outside the machine.
func (m *Machine) kill(hostPID int) error {
	p, err := os.FindProcess(hostPID)
	if err != nil {
		return err
	}
	defer func() { _ = p.Release() }()
	ns, err := os.Readlink(pidNS(m.PID()))
	if err != nil {
		return err
	}
	if is, err := os.Readlink(pidNS(hostPID)); err != nil || is != ns {
		return nil // gone
	}
	if err := p.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Poll calls cond until it returns nil, with short pauses. When ctx ends first
// the error says what was waited for and cond's last error. Without a deadline
// in ctx it gives up after 30 seconds of [Patience].
func Poll(ctx context.Context, what string, cond func() error) error {
	ctx, cancel := withDefaultTimeout(ctx, 30*time.Second)
	defer cancel()
	var err error
	for {
		now := cond()
		if now == nil {
			return nil
		}
		if ctx.Err() == nil || err == nil { // the end of ctx makes conditions fail that say nothing
			err = now
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited for %s: %w; last: %w", what, ctx.Err(), err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// SlowEnv is the environment variable that says how many times slower than a
// computer this one is, since it is emulated; a whole number.
const SlowEnv = "WGCNI_SLOW"

var slowness = func() time.Duration {
	n, err := strconv.Atoi(os.Getenv(SlowEnv))
	if err != nil || n < 1 {
		n = 1
	}
	return time.Duration(n)
}()

// Patience is how long to wait here for what takes d at most on a computer.
func Patience(d time.Duration) time.Duration { return d * slowness }

// Fewer is how many of n there is time for here, where they take longer than on a
// computer: at least one.
func Fewer(n int) int { return max(1, n/int(slowness)) }

func withDefaultTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, Patience(d))
}
