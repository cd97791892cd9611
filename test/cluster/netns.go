package cluster

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Endpointer is a place that has a network namespace: a Machine, Node or Pod.
type Endpointer interface {
	// Do calls f on an operating system thread inside the network namespace,
	// and returns its error. Sockets that f opens stay in that namespace and
	// may be used from any goroutine. Goroutines that f starts are NOT in the
	// namespace, and f must not call t.Fatal.
	Do(f func() error) error
	String() string
}

var (
	_ Endpointer = (*Machine)(nil)
	_ Endpointer = (*Node)(nil)
	_ Endpointer = (*Pod)(nil)
)

var errGoexit = errors.New("the function ended its goroutine instead of returning")

// doIn runs f in a goroutine whose thread is never unlocked: the Go runtime
// ends such a thread with its goroutine, so that none that may be in a foreign
// namespace, or pinned to a CPU, is used again.
func doIn(netns string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errGoexit
		defer func() { done <- err }()
		runtime.LockOSThread()
		if err = enter(netns); err == nil {
			err = errGoexit
			err = f()
		}
	}()
	return <-done
}

func enter(netns string) error {
	ns, err := os.Open(netns)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", netns, err)
	}
	return nil
}
