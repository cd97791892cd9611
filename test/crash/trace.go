package crash

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Fate is what becomes of a call that a traced program is about to make.
type Fate struct {
	Kill bool          // the program dies, and the call is not made
	Term bool          // the program is given SIGTERM first
	Fail syscall.Errno // the call is not made, and fails with this
}

// Place says where a program runs: in the namespaces of that process, or in those of
// the harness where it is 0. With Kernel, what it sends to the kernel (netlink(7))
// counts among its calls.
type Place struct {
	PID    int
	Kernel bool
}

// Ended tells how a traced program came to its end.
type Ended struct {
	Calls  []Call // that it made, in their order, without the one that it died before
	Killed bool
	Code   int // exit status
}

// Trace runs a program and asks decide before each call that changes a file. After
// long it is given SIGTERM, and after another 20 s it is killed, which is an error. Its
// children run on untraced. The command must have files, or nothing, as its stdin,
// stdout and stderr, and must not be waited for by anybody else.
func Trace(cmd *exec.Cmd, at Place, long time.Duration, decide func(Call) Fate) (e Ended, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		// All of a tracee's ptrace requests come from the thread that started it. It
		// ends with this goroutine, since it is in other namespaces by then.
		runtime.LockOSThread()
		e, err = trace(cmd, at, long, decide)
	}()
	<-done
	return e, err
}

func (p Place) enter() error {
	if p.PID == 0 {
		return nil
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // setns(2): for a mount namespace
		return err
	}
	for _, ns := range []struct {
		name string
		kind int
	}{{"net", unix.CLONE_NEWNET}, {"uts", unix.CLONE_NEWUTS}, {"ipc", unix.CLONE_NEWIPC}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS}} {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", p.PID, ns.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		err = unix.Setns(fd, ns.kind)
		_ = unix.Close(fd)
		if err != nil {
			return fmt.Errorf("enter the %s namespace of %d: %w", ns.name, p.PID, err)
		}
	}
	return nil
}

// tracer is the state of one run.
type tracer struct {
	pid     int
	proc    *os.File // /proc of the harness: it is another one inside of a machine
	decide  func(Call) Fate
	kernel  bool
	threads map[int]*entered
	ended   Ended
}

// entered is a call that a thread is in; nil for one that changes nothing.
type entered struct {
	call Call
	fail syscall.Errno
}

func trace(cmd *exec.Cmd, at Place, long time.Duration, decide func(Call) Fate) (Ended, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return Ended{}, err
	}
	defer proc.Close()
	if err := at.enter(); err != nil {
		return Ended{}, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Setpgid: true} // see wait4
	if err := cmd.Start(); err != nil {
		return Ended{}, err
	}
	t := &tracer{pid: cmd.Process.Pid, proc: proc, decide: decide, kernel: at.Kernel, threads: map[int]*entered{}}
	defer func() { _ = cmd.Process.Release() }()
	var hangs atomic.Bool
	term := time.AfterFunc(long, func() { _ = unix.Kill(t.pid, unix.SIGTERM) })
	kill := time.AfterFunc(long+20*time.Second, func() { hangs.Store(true); _ = unix.Kill(t.pid, unix.SIGKILL) })
	err = t.run()
	term.Stop()
	kill.Stop()
	if hangs.Load() {
		err = errors.Join(err, fmt.Errorf("%v does not end", cmd.Args))
	}
	if err != nil {
		_ = unix.Kill(t.pid, unix.SIGKILL)
		t.reap()
	}
	return t.ended, err
}

func (t *tracer) run() error {
	var status unix.WaitStatus
	if _, err := wait4(t.pid, &status); err != nil {
		return err
	}
	if !status.Stopped() { // the stop after execve(2)
		return fmt.Errorf("the program did not start: %v", status)
	}
	if err := unix.PtraceSetOptions(t.pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL); err != nil {
		return err
	}
	for tid, sig := t.pid, 0; ; {
		if err := unix.PtraceSyscall(tid, sig); err != nil && !errors.Is(err, unix.ESRCH) { // it is being killed
			return err
		}
		var err error
		if tid, err = wait4(-t.pid, &status); err != nil {
			return err
		}
		sig = 0
		switch {
		case status.Exited() || status.Signaled():
			delete(t.threads, tid)
			if tid == t.pid { // the last: the others have been waited for by the kernel
				t.ended.Code, t.ended.Killed = status.ExitStatus(), status.Signaled()
				return nil
			}
			tid = 0 // PTRACE_SYSCALL answers ESRCH
		case status.StopSignal() == unix.SIGTRAP|0x80:
			if err := t.stopped(tid); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		case status.StopSignal() == unix.SIGTRAP: // an event
		case status.StopSignal() == unix.SIGSTOP && t.threads[tid] == nil && tid != t.pid && !t.known(tid): // a new thread
		default:
			sig = int(status.StopSignal())
		}
	}
}

// known reports whether a thread has been seen before, and notes it.
func (t *tracer) known(tid int) bool {
	_, ok := t.threads[tid]
	if !ok {
		t.threads[tid] = nil
	}
	return ok
}

// wait4 waits for children of this thread alone, and for more than one by their group:
// the harness has others, and this thread too, of what it ran before it was a tracer.
func wait4(pid int, status *unix.WaitStatus) (int, error) {
	for {
		got, err := unix.Wait4(pid, status, unix.WALL|unix.WNOTHREAD, nil)
		if !errors.Is(err, unix.EINTR) {
			return got, err
		}
	}
}

func (t *tracer) reap() {
	var status unix.WaitStatus
	for {
		tid, err := wait4(-t.pid, &status)
		if err != nil || tid == t.pid && (status.Exited() || status.Signaled()) {
			return
		}
		_ = unix.PtraceCont(tid, 0)
	}
}

// syscallInfo is struct ptrace_syscall_info (linux/ptrace.h).
type syscallInfo struct {
	op    uint8
	_     [3]uint8
	arch  uint32
	ip    uint64
	sp    uint64
	entry struct { // of an exit: the first is the result
		nr   uint64
		args [6]uint64
	}
}

func (t *tracer) stopped(tid int) error {
	var info syscallInfo
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return errno
	}
	switch info.op {
	case unix.PTRACE_SYSCALL_INFO_ENTRY:
		return t.enter(tid, info)
	case unix.PTRACE_SYSCALL_INFO_EXIT:
		return t.leave(tid, info)
	}
	return nil
}

func (t *tracer) enter(tid int, info syscallInfo) error {
	t.threads[tid] = nil
	call, ok := t.read(tid, info.entry.nr, info.entry.args)
	if !ok {
		return nil
	}
	fate := t.decide(call)
	if fate.Kill {
		return unix.Kill(t.pid, unix.SIGKILL)
	}
	if fate.Term {
		if err := unix.Kill(t.pid, unix.SIGTERM); err != nil {
			return err
		}
	}
	t.threads[tid] = &entered{call: call, fail: fate.Fail}
	if fate.Fail != 0 {
		return skipCall(tid)
	}
	return nil
}

func (t *tracer) leave(tid int, info syscallInfo) error {
	e := t.threads[tid]
	if e == nil {
		return nil
	}
	t.threads[tid] = nil
	e.call.Result = int64(info.entry.nr)
	if e.fail != 0 {
		e.call.Result = -int64(e.fail)
		if err := setResult(tid, e.call.Result); err != nil {
			return err
		}
	}
	t.ended.Calls = append(t.ended.Calls, e.call)
	return nil
}
