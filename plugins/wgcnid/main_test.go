package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// asEnv makes the test binary be something else.
const (
	asEnv     = "WGCNID_TEST_AS"
	asHelper  = "wgcnid"  // main, with the arguments as they are
	asControl = "control" // a process that reads the file that its last argument names
)

func TestMain(m *testing.M) {
	if os.Getenv(asEnv) != "" {
		letCore()
	}
	switch os.Getenv(asEnv) {
	case asHelper:
		main()
	case asControl:
		if _, err := os.ReadFile(os.Args[len(os.Args)-1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	default:
		time.Local = time.UTC // of the times that are compared
		os.Exit(m.Run())
	}
}

// letCore raises the limit of core files, which the race detector sets to zero,
// to a megabyte: what is larger is cut off, and has been dumped all the same.
func letCore() {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err == nil {
		limit.Cur = min(limit.Max, 1<<20)
		_ = unix.Setrlimit(unix.RLIMIT_CORE, &limit) // no more than that is asked for
	}
}

// as is a process of the test binary that is something else.
func as(ctx context.Context, what string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	// The race detector would wait for a second at the end of each process.
	cmd.Env = append(os.Environ(), asEnv+"="+what, "GORACE=atexit_sleep_ms=0")
	return cmd
}

// A crash of the helper, in the middle of a command, leaves no core file. It is
// compared with another process, which shows whether this machine makes any at
// all: into a file or, where core_pattern says so, into a pipe.
func TestNoCore(t *testing.T) {
	control, helper := crash(t, asControl), crash(t, asHelper)
	if control.owner == helper.owner {
		t.Errorf("files in /proc belong to %s for both: want root's for the helper (proc(5))", control.owner)
	}
	if helper.owner != "0:0" {
		t.Errorf("the helper's files in /proc belong to %s: it is dumpable (proc(5))", helper.owner)
	}
	if helper.dumped || len(helper.cores) > 0 {
		t.Errorf("the helper dumped core: %v %v", helper.dumped, helper.cores)
	}
	t.Logf("core_pattern dumps the control: %v %v", control.dumped, control.cores)
}

type crashed struct {
	owner  string   // of its files in /proc
	dumped bool     // as wait(2) tells, wherever the core went
	cores  []string // files that it left in its folder
}

// crash starts a process, waits until it reads its configuration, which is a
// named pipe, and has it dump core there and then.
func crash(t *testing.T, what string) (c crashed) {
	t.Helper()
	dir := t.TempDir()
	pipe := filepath.Join(dir, "conflist")
	if err := unix.Mkfifo(pipe, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := as(ctx, what, "status", "--config", pipe)
	cmd.Dir = dir
	cmd.Env = append(cmd.Env, "GOTRACEBACK=crash")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if os.Geteuid() == 0 { // else root's files and its own could not be told apart
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 0, Gid: 65534, NoSetGroups: true}}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	for { // until the other end is open
		f, err := os.OpenFile(pipe, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			defer f.Close()
			break
		}
		if ctx.Err() != nil || !errors.Is(err, unix.ENXIO) {
			t.Fatalf("%v: %v", ctx.Err(), err)
		}
		time.Sleep(time.Millisecond)
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/environ", cmd.Process.Pid), &st); err != nil {
		t.Fatal(err)
	}
	c.owner = fmt.Sprintf("%d:%d", st.Uid, st.Gid)
	if err := cmd.Process.Signal(unix.SIGABRT); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("it ended with %v:\n%s", err, &stderr)
	}
	status := exit.Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != unix.SIGABRT {
		t.Fatalf("it ended with %v and not by SIGABRT:\n%s", err, &stderr)
	}
	c.dumped = status.CoreDump()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "core") {
			c.cores = append(c.cores, e.Name())
		}
	}
	return c
}
