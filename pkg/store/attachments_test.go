package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// writerMarker makes the test binary a process that writes to a store.
const writerMarker = "WGCNI_STORE_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerMarker); dir != "" {
		if err := writer(dir, os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var compareAddrs = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{})

func pod(i int) Attachment {
	return Attachment{
		Network: "pods", ContainerID: "container-" + strconv.Itoa(i), IfName: "eth0",
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)})},
		Sandbox:   "/run/netns/pod-" + strconv.Itoa(i), SandboxID: uint64(1000 + i), Pod: "default/pod-" + strconv.Itoa(i),
	}
}

// with opens the store, as one verb does.
func with(t *testing.T, dir string, f func(*Attachments)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := OpenAttachments(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	f(s)
}

func all(t *testing.T, dir string) (out []Attachment) {
	t.Helper()
	with(t, dir, func(s *Attachments) {
		var err error
		if out, err = s.All(); err != nil {
			t.Fatal(err)
		}
	})
	return out
}

func TestAttachments(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by", "the", "store")
	put := func(a Attachment) {
		with(t, dir, func(s *Attachments) {
			if err := s.Put(a); err != nil {
				t.Fatal(err)
			}
		})
	}
	check := func(what string, want ...Attachment) {
		t.Helper()
		got := all(t, dir)
		if diff := cmp.Diff(want, got, compareAddrs, cmpopts.IgnoreFields(Attachment{}, "Sequence"), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
		if !slices.IsSortedFunc(got, func(a, b Attachment) int { return int(a.Sequence) - int(b.Sequence) }) {
			t.Errorf("%s: sequences are not in order", what)
		}
	}
	check("new")
	put(pod(9))
	put(pod(1))
	put(pod(5))
	check("in the order of putting, not of the keys", pod(9), pod(1), pod(5))
	second := pod(1)
	second.IfName = "eth1"
	put(second)
	check("two interfaces of one container", pod(9), pod(1), pod(5), second)
	again := pod(9)
	again.Addresses = append(again.Addresses, netip.MustParseAddr("fd00:244::9"))
	put(again)
	check("put again: replaced, and now the latest", pod(1), pod(5), second, again)
	with(t, dir, func(s *Attachments) {
		if err := s.Delete(pod(1), pod(77)); err != nil {
			t.Error(err)
		}
	})
	check("deleted, one of them not there", pod(5), second, again)
	with(t, dir, func(s *Attachments) {
		if err := s.Delete(pod(1), pod(5), second, again); err != nil {
			t.Error(err)
		}
	})
	check("all deleted")
	put(pod(2))
	if got := all(t, dir); got[0].Sequence <= 5 {
		t.Errorf("sequence %d was used before", got[0].Sequence)
	}
	info, err := os.Stat(AttachmentsPath(dir))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode of the folder %v, %v", info.Mode(), err)
	}
}

// TestAddresses: ADD x for A, ADD x for B, DEL A: B keeps x
// (plugins/pkg/ip/ipmasq_nftables_linux.go).
func TestAddresses(t *testing.T) {
	x, y := netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00:244:1::2")
	a, b := Attachment{ContainerID: "a", Addresses: []netip.Addr{y, x}}, Attachment{ContainerID: "b", Addresses: []netip.Addr{x}}
	for _, tt := range []struct {
		name string
		in   []Attachment
		want []netip.Addr
	}{
		{"none", nil, nil},
		{"sorted", []Attachment{a}, []netip.Addr{x, y}},
		{"each once", []Attachment{a, b}, []netip.Addr{x, y}},
		{"one of two owners left", []Attachment{b}, []netip.Addr{x}},
		{"without addresses", []Attachment{{ContainerID: "c"}}, nil},
	} {
		if got := Addresses(tt.in); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if a.Addresses[0] != y {
		t.Error("Addresses has sorted what belongs to its caller")
	}
}

// SetMTU is of what was seen a while ago: a pod that is gone, or whose place another
// has taken, is left alone, and whose an address is does not change.
func TestSetMTU(t *testing.T) {
	dir := t.TempDir()
	a, b := pod(1), pod(2)
	b.Addresses = a.Addresses
	replaced := pod(3)
	with(t, dir, func(s *Attachments) {
		for _, at := range []Attachment{a, b, replaced} {
			if err := s.Put(at); err != nil {
				t.Fatal(err)
			}
		}
		var want []Attachment
		all, err := s.All()
		if err != nil {
			t.Fatal(err)
		}
		var changed []Attachment
		for i, at := range append(all, pod(4)) {
			at.LinkMTU, at.TunnelMTU = 1500, 1420
			if i < 2 {
				want = append(want, at)
			}
			at.Pod = "default/renamed"
			if at.ContainerID == replaced.ContainerID {
				at.SandboxID++
			}
			changed = append(changed, at)
		}
		want = append(want, all[2])
		if err := s.SetMTU(changed...); err != nil {
			t.Fatal(err)
		}
		got, err := s.All()
		if diff := cmp.Diff(want, got, compareAddrs); err != nil || diff != "" {
			t.Errorf("%v (-want +got):\n%s", err, diff)
		}
	})
}

func TestApplied(t *testing.T) {
	dir := t.TempDir()
	want := Applied{
		Settings: "digest", MTU: 1420, At: time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC),
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:244:1::/64")},
	}
	with(t, dir, func(s *Attachments) {
		if _, ok, err := s.Applied(); ok || err != nil {
			t.Errorf("on a new store: %v, %v", ok, err)
		}
		if err := s.SetApplied(want); err != nil {
			t.Fatal(err)
		}
	})
	with(t, dir, func(s *Attachments) {
		got, ok, err := s.Applied()
		if diff := cmp.Diff(want, got, compareAddrs); !ok || err != nil || diff != "" {
			t.Errorf("%v, %v (-want +got):\n%s", ok, err, diff)
		}
		if all, err := s.All(); err != nil || len(all) != 0 {
			t.Errorf("it is taken for an attachment: %v, %v", all, err)
		}
	})
}

// TestLockDeadline: a store that somebody holds is an error in time, of which
// the plugin makes "try again later", and works once it is let go.
func TestLockDeadline(t *testing.T) {
	const wait = 150 * time.Millisecond
	for _, tt := range []struct {
		name string
		hold func(t *testing.T, path string) (release func() error)
	}{
		{"our lock", func(t *testing.T, path string) func() error {
			f, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
				t.Fatal(err)
			}
			return f.Close
		}},
		{"bbolt's lock", func(t *testing.T, path string) func() error {
			db, err := bolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			return db.Close
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			with(t, dir, func(*Attachments) {})
			release := tt.hold(t, AttachmentsPath(dir))
			for range 3 { // each leaves a waiter behind that must not keep the lock
				ctx, cancel := context.WithTimeout(t.Context(), wait)
				start := time.Now()
				s, err := OpenAttachments(ctx, dir)
				cancel()
				if !errors.Is(err, ErrLocked) || s != nil {
					t.Fatalf("opened a locked store: %v", err)
				}
				if took := time.Since(start); took < wait/2 || took > 20*wait {
					t.Errorf("it took %v, want about %v", took, wait)
				}
				if IsDamage(err) {
					t.Error("a lock is taken for damage")
				}
			}
			if err := release(); err != nil {
				t.Fatal(err)
			}
			with(t, dir, func(*Attachments) {})
			with(t, dir, func(*Attachments) {})
		})
	}
}

// TestWaiterGetsTheLock: one that waits is served as soon as the lock is free.
func TestWaiterGetsTheLock(t *testing.T) {
	dir := t.TempDir()
	opened := make(chan error, 1)
	with(t, dir, func(*Attachments) {
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			o, err := OpenAttachments(ctx, dir)
			if err == nil {
				err = o.Close()
			}
			opened <- err
		}()
		select {
		case err := <-opened:
			t.Errorf("two have the store at once: %v", err)
		case <-time.After(100 * time.Millisecond): // how long the first one holds it
		}
	})
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

const writes = 25

// writer is another process: a verb of the plugin.
func writer(dir, name string) error {
	for i := range writes {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		s, err := OpenAttachments(ctx, dir)
		cancel()
		if err != nil {
			return err
		}
		before, err := s.All()
		if err != nil {
			return err
		}
		a := pod(i)
		a.ContainerID = name + "-" + a.ContainerID
		if err := errors.Join(s.Put(a), s.Close()); err != nil {
			return err
		}
		if len(before) > 0 && s.Damaged() != nil {
			return s.Damaged()
		}
	}
	return nil
}

func TestConcurrentProcesses(t *testing.T) {
	const processes = 6
	dir := t.TempDir()
	var running []*exec.Cmd
	var outputs [processes]bytes.Buffer
	for i := range processes {
		cmd := exec.Command("/proc/self/exe", "p"+strconv.Itoa(i))
		cmd.Env = append(os.Environ(), writerMarker+"="+dir)
		cmd.Stdout, cmd.Stderr = &outputs[i], &outputs[i]
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		running = append(running, cmd)
	}
	for i, cmd := range running {
		if err := cmd.Wait(); err != nil {
			t.Errorf("process %d: %v: %s", i, err, &outputs[i])
		}
	}
	got := all(t, dir)
	if len(got) != processes*writes {
		t.Errorf("%d attachments, want %d", len(got), processes*writes)
	}
	for i, a := range got {
		if a.Sequence != uint64(i+1) {
			t.Fatalf("sequence %d at %d: two had the same", a.Sequence, i)
		}
	}
}

// Of two attachments with one address the later one says since when it is there.
func TestPods(t *testing.T) {
	early, late := time.UnixMilli(1), time.UnixMilli(2)
	a, b := netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("10.244.1.4")
	got := Pods([]Attachment{
		{ContainerID: "x", Addresses: []netip.Addr{a, b}, Since: late, Sequence: 1},
		{ContainerID: "y", Addresses: []netip.Addr{a}, Since: early, Sequence: 2},
	})
	want := []mesh.Pod{{Addr: b, Since: late}, {Addr: a, Since: early}}
	if !slices.EqualFunc(want, got, mesh.Pod.Equal) {
		t.Errorf("got %v, want %v", got, want)
	}
}
