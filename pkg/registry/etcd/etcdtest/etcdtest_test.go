package etcdtest

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestBinaryMissing(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if _, err := Binary("etcd"); err == nil || !strings.Contains(err.Error(), "no go.mod") {
		t.Errorf("outside of a repository: error %v", err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "go.mod"), nil, 0o644))
	if _, err := Run(t.Context(), Options{}); err == nil || !strings.Contains(err.Error(), ".bin/etcd is missing: run \"make tools\"") {
		t.Errorf("error %v", err)
	}
}

// A server is what it was after each of the ways to end it, and gone after Close.
func TestServer(t *testing.T) {
	s, err := Run(t.Context(), Options{})
	must(t, err)
	c, err := s.NewClient()
	must(t, err)
	defer c.Close()
	_, err = c.Put(t.Context(), "a", "1")
	must(t, err)
	for _, end := range []func() error{s.Stop, s.Kill, func() error { return errors.Join(s.Pause(), s.Kill()) }} {
		pid := s.PID()
		must(t, end())
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is still there: %v", pid, err)
		}
		must(t, s.Restart(t.Context()))
		if resp, err := c.Get(t.Context(), "a"); err != nil || resp.Count != 1 {
			t.Errorf("after restarting: %v, error %v", resp, err)
		}
	}
	must(t, s.Wipe(t.Context()))
	if resp, err := c.Get(t.Context(), "a"); err != nil || resp.Count != 0 {
		t.Errorf("after wiping: %v, error %v", resp, err)
	}
	pid := s.PID()
	must(t, s.Close())
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is still there: %v", pid, err)
	}
	if _, err := os.Stat(s.dir); !os.IsNotExist(err) {
		t.Errorf("its files are still there: %v", err)
	}
}

func TestNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root, to make a network namespace")
	}
	var ns netns.NsHandle
	made := make(chan error, 1)
	go func() { // on a thread that ends with it
		runtime.LockOSThread()
		made <- func() (err error) {
			if ns, err = netns.New(); err != nil {
				return err
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return netlink.LinkSetUp(lo)
		}()
	}()
	must(t, <-made)
	defer ns.Close()
	inside := func(f func() error) error {
		done := make(chan error, 1)
		go func() {
			runtime.LockOSThread()
			if err := netns.Set(ns); err != nil {
				done <- err
				return
			}
			done <- f()
		}()
		return <-done
	}
	s := Start(t, Options{In: inside})
	_, err := s.Client(t).Put(t.Context(), "a", "1")
	must(t, err)
	s.o.In = func(f func() error) error { return f() }
	if _, err := s.dial(t.Context(), strings.TrimPrefix(s.clientURL, "http://")); err == nil {
		t.Error("the server can be reached from outside of its namespace")
	}
}
