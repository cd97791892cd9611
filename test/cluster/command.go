package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// searchPath is PATH inside a machine: root's programs are in the sbin folders.
const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Executor is an Endpointer that can also run programs.
type Executor interface {
	Endpointer
	Command(ctx context.Context, name string, args ...string) *exec.Cmd
}

var (
	_ Executor = (*Machine)(nil)
	_ Executor = (*Pod)(nil)
)

// Command returns a command that runs inside the machine. The name is looked up
// there, the working directory is /, and the environment is the harness's with
// a PATH of root's. The end of ctx kills the program, not only the nsenter in
// front of it.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return m.command(ctx, "", name, args)
}

// command enters the machine's network namespace, or the one at netns.
func (m *Machine) command(ctx context.Context, netns, name string, args []string) *exec.Cmd {
	pid := strconv.Itoa(m.PID())
	net := "-n"
	if netns != "" {
		net = "--net=" + netns
	}
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", pid, "-m", net, "-p", "-u", "-i", "--", name}, args...)...)
	cmd.Env = append(os.Environ(), searchPath)
	// nsenter forks, since only a child is in the new PID namespace, and a
	// SIGKILL for the parent alone would leave the child running.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		err := unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		if errors.Is(err, unix.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	}
	// Programs that stay in the background may hold the output pipes.
	cmd.WaitDelay = 5 * time.Second
	if pid == "0" {
		cmd.Err = fmt.Errorf("run %s: machine %s is stopped", name, m.Name)
	}
	return cmd
}

// Run runs a command inside the machine and returns what it wrote to stdout and
// stderr. The error, if any, has that text too.
func (m *Machine) Run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := output(m.Command(ctx, name, args...))
	if err != nil {
		return out, fmt.Errorf("on %s: %w", m.Name, err)
	}
	return out, nil
}

// Batch feeds text to a command's stdin inside the machine: `ip -batch -`,
// `nft -f -`, `sh -s`.
func (m *Machine) Batch(ctx context.Context, text, name string, args ...string) (string, error) {
	cmd := m.Command(ctx, name, args...)
	cmd.Stdin = strings.NewReader(text)
	out, err := output(cmd)
	if err != nil {
		return out, fmt.Errorf("on %s: %w", m.Name, err)
	}
	return out, nil
}

// output runs cmd and returns its combined output. A memory file takes it, and
// not a pipe: what a command leaves running in the background would hold the
// pipe open, and us waiting.
func output(cmd *exec.Cmd) (string, error) {
	file, err := memoryFile(commandName(cmd))
	if err != nil {
		return "", err
	}
	defer file.Close()
	cmd.Stdout, cmd.Stderr = file, file
	runErr := cmd.Run()
	out, err := contents(file)
	if err != nil {
		return "", err
	}
	if runErr != nil {
		return out, fmt.Errorf("%s: %w: %s", commandLine(cmd), runErr, strings.TrimSpace(out))
	}
	return out, nil
}

func memoryFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a memory file for the output of %s: %w", name, err)
	}
	// Two descriptors of one file, as stdout and stderr may be, share the
	// offset; appending also holds when somebody seeks.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_APPEND); err != nil {
		return nil, fmt.Errorf("set append mode: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func contents(f *os.File) (string, error) {
	var b bytes.Buffer
	if _, err := io.Copy(&b, io.NewSectionReader(f, 0, 1<<40)); err != nil {
		return "", fmt.Errorf("read the output of %s: %w", f.Name(), err)
	}
	return b.String(), nil
}

// commandLine is the command as the caller gave it, without our nsenter.
func commandLine(cmd *exec.Cmd) string {
	for i, a := range cmd.Args {
		if a == "--" {
			return strings.Join(cmd.Args[i+1:], " ")
		}
	}
	return strings.Join(cmd.Args, " ")
}

func commandName(cmd *exec.Cmd) string {
	name, _, _ := strings.Cut(commandLine(cmd), " ")
	return name
}
