package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// timerArg makes this program the timer of a node. The harness enters a node by
// nsenter, whose own start would be a good part of what is measured; the timer
// enters once, and then executes the plugins as a runtime's libcni does.
const timerArg = "be-the-timer-of-a-node"

// execution is one process to be timed.
type execution struct {
	Path  string
	Env   []string // beside the timer's own
	Stdin []byte
}

// timing is what one process has cost.
type timing struct {
	Elapsed time.Duration // from its start until it has ended and its output is read
	Ended   time.Duration // when that was; see monotonic
	CPU     time.Duration // with that of its children
	Stdout  string
	Failure string // empty: it exited with 0
}

// serveTimings is the timer: an execution a line in, a timing a line out.
func serveTimings(in io.Reader, out io.Writer) error {
	requests, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var e execution
		if err := requests.Decode(&e); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read what to execute: %w", err)
		}
		if err := answers.Encode(execute(e)); err != nil {
			return fmt.Errorf("write a timing: %w", err)
		}
	}
}

// execute does what invoke.RawExec of libcni does.
func execute(e execution) timing {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(e.Path)
	cmd.Env = append(os.Environ(), e.Env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(e.Stdin), &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	t := timing{Elapsed: time.Since(start), Ended: monotonic(), Stdout: stdout.String()}
	if cmd.ProcessState != nil {
		t.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	if err != nil {
		t.Failure = fmt.Sprintf("%v: %s%s", err, stdout.String(), stderr.String())
	}
	return t
}

// monotonic reads the one clock that all processes of a machine share and nobody
// sets (CLOCK_MONOTONIC, clock_gettime(2)).
func monotonic() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err) // a clock that every Linux has
	}
	return time.Duration(now.Nano())
}

// timer is the harness's side of a node's timer.
type timer struct {
	cmd     *exec.Cmd
	stdin   io.Closer
	encoder *json.Encoder
	decoder *json.Decoder
}

// startTimer starts a timer that ends with ctx, or by close.
func startTimer(ctx context.Context, n *cluster.Node) (*timer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	cmd := n.Command(ctx, self, timerArg)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start the timer of %s: %w", n, err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start the timer of %s: %w", n, err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the timer of %s: %w", n, err)
	}
	return &timer{cmd: cmd, stdin: stdin, encoder: json.NewEncoder(stdin), decoder: json.NewDecoder(stdout)}, nil
}

// time executes a program. One that fails is an error.
func (t *timer) time(e execution) (timing, error) {
	var got timing
	if err := errors.Join(t.encoder.Encode(e), t.decoder.Decode(&got)); err != nil {
		return got, fmt.Errorf("execute %s: the timer has ended: %w", e.Path, err)
	}
	if got.Failure != "" {
		return got, fmt.Errorf("execute %s: %s", e.Path, strings.TrimSpace(got.Failure))
	}
	return got, nil
}

func (t *timer) close() error {
	if err := errors.Join(t.stdin.Close(), t.cmd.Wait()); err != nil {
		return fmt.Errorf("end a timer: %w", err)
	}
	return nil
}
