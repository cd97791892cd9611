package reconcile_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// pods are the containers in the store.
func (n *testNode) pods() (ids []string) {
	n.t.Helper()
	inStore(n.t, n.config, func(st *store.Attachments) error {
		all, err := st.All()
		for _, at := range all {
			ids = append(ids, at.ContainerID)
		}
		return err
	})
	return ids
}

// damage overwrites the store while nobody has it open.
func (n *testNode) damage() {
	n.t.Helper()
	path := store.AttachmentsPath(n.config.RunDir)
	lock, err := os.Open(path + ".lock")
	if err != nil {
		n.t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(path, make([]byte, 3*os.Getpagesize()), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// Pods that existed before the plugin stay unmanaged elsewhere.
func TestAdoptsAtStart(t *testing.T) {
	n := newNode(t)
	put(t, n.config, pod("known", neighbour))
	n.adoptable = []store.Attachment{pod("found", outsider), pod("known", addrs("10.244.201.1")...)}
	n.joins()
	n.holds("nft set pods 10.244.200.6 10.244.200.7")
	n.announced("both pods", func(r registry.Record) bool { return len(r.Pods) == 1 && r.Pods[0].Prefix.Bits() == 31 })
	if diff := cmp.Diff([]string{"known", "found"}, n.pods()); diff != "" {
		t.Errorf("pods (-want +got):\n%s", diff)
	}
}

// A damaged store costs no pod: it is filled again from the runtime's cache,
// whether the helper or the plugin comes upon it.
func TestDamagedStore(t *testing.T) {
	for _, finder := range []string{"helper", "helper's resync", "plugin"} {
		t.Run(finder, func(t *testing.T) {
			n := newNode(t)
			if finder == "helper's resync" {
				n.resync = shortResync
			}
			put(t, n.config, pod("x", outsider))
			n.joins()
			n.holds("nft set pods 10.244.200.7")
			n.mu.Lock()
			n.adoptable = []store.Attachment{pod("x", outsider)}
			asked := n.adoptions
			n.mu.Unlock()
			var lost atomic.Bool
			n.kernel.set(func(k *fakeKernel) {
				k.onApply = func(ops []mesh.Op) error {
					for _, op := range ops {
						if f, ok := op.(mesh.SetFilterPods); ok && len(f.Remove) > 0 {
							lost.Store(true)
						}
					}
					return nil
				}
			})
			n.damage()
			if finder == "plugin" {
				put(t, n.config, pod("y", neighbour))
			}
			eventually(t, "the pods to be adopted", func() bool {
				ids := n.pods()
				return n.adopted() > asked && slices.Contains(ids, "x")
			})
			n.holds("10.244.200.7")
			if lost.Load() {
				t.Error("a pod was cut off meanwhile")
			}
			aside, err := filepath.Glob(store.AttachmentsPath(n.config.RunDir) + ".damaged-*")
			if err != nil || len(aside) == 0 {
				t.Errorf("moved aside: %v, %v", aside, err)
			}
		})
	}
}

func TestDamagedPeersFile(t *testing.T) {
	n := newNode(t, record("b"))
	if err := os.WriteFile(store.KnownPath(n.config.StateDir), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.joins()
	n.holds(plannedAlone)
	if n.log.count("the store was damaged") != 1 {
		t.Errorf("not said:\n%s", n.log)
	}
}

// A crash between ADD and the save means that DEL never comes (containerd#12923):
// what has no sandbox any more is forgotten.
func TestSweep(t *testing.T) {
	sandboxes := t.TempDir()
	in := func(name string, at store.Attachment) store.Attachment {
		at.Sandbox = filepath.Join(sandboxes, name)
		return at
	}
	alive := in("alive", pod("alive", outsider))
	if err := os.WriteFile(alive.Sandbox, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	elsewhere := pod("elsewhere", addrs("10.244.202.1")...)
	elsewhere.Sandbox = "/no/such/folder/ns" // a mount that this process may not see
	n := newNode(t)
	n.resync = shortResync
	put(t, n.config, alive, elsewhere, pod("unknown", addrs("10.244.203.1")...), in("gone", pod("gone", neighbour)))
	n.joins()
	n.holds("nft set pods 10.244.200.7 10.244.202.1 10.244.203.1\n")
	if err := os.Remove(alive.Sandbox); err != nil {
		t.Fatal(err)
	}
	n.holds("nft set pods 10.244.202.1 10.244.203.1\n")
	n.announced("the others only", func(r registry.Record) bool { return len(r.Pods) == 2 })
	if diff := cmp.Diff([]string{"elsewhere", "unknown"}, n.pods()); diff != "" {
		t.Errorf("pods (-want +got):\n%s", diff)
	}
	if got := n.log.count("forgot a pod"); got != 2 {
		t.Errorf("said %d times", got)
	}
}

// Killed after any op, with or without the registry and the disk having got
// theirs, the next helper brings the kernel to the same state.
func TestKilledAnywhere(t *testing.T) {
	steps := []func(*testNode){
		func(n *testNode) { n.registry.put(record("b")) },
		func(n *testNode) { n.registry.put(record("c")) },
		func(n *testNode) {
			if err := errInStore(n.config, func(st *store.Attachments) error { return st.Put(pod("x", outsider)) }); err != nil {
				n.t.Error(err)
			}
		},
		func(n *testNode) { n.registry.put(tombstone("c", 11)) },
		func(n *testNode) { n.kernel.KillTunnel() },
	}
	for seed := range 12 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(7, uint64(seed)))
			n := newNode(t)
			n.resync = shortResync
			left := r.IntN(25)
			var once sync.Once
			dead := make(chan struct{})
			die := func() { once.Do(func() { close(dead) }) }
			n.kernel.FailAt = func(mesh.Op) error {
				if left--; left < 0 { // under the kernel's lock
					die()
					return fmt.Errorf("killed")
				}
				return nil
			}
			n.registry.onPublish = func(registry.Record) error {
				select {
				case <-dead:
					return errAway
				default:
					return nil
				}
			}
			n.start()
			for _, step := range steps {
				step(n)
				select {
				case <-dead:
				case n.kernel.events <- kernel.Event{Ours: true}:
				}
			}
			if r.IntN(2) == 0 {
				die() // at no op at all
			}
			<-deadOrSettled(n, dead)
			n.stop()
			n.kernel.FailAt = nil
			n.registry.set(func(r *fakeRegistry) { r.onPublish = nil })
			n.start()
			n.holds(planned)
			n.announced("the pod", func(r registry.Record) bool { return len(r.Pods) == 1 })
			n.quiet()
			if diff := cmp.Diff(planned, n.kernel.String()); diff != "" {
				t.Errorf("kernel (-want +got):\n%s", diff)
			}
		})
	}
}

// deadOrSettled is closed when the helper was killed, or has nothing left to do.
func deadOrSettled(n *testNode, dead <-chan struct{}) <-chan struct{} {
	out := make(chan struct{})
	go func() {
		defer close(out)
		for {
			select {
			case <-dead:
				return
			case <-n.t.Context().Done():
				return
			case <-time.After(time.Millisecond):
				if n.kernel.String() == planned {
					return
				}
			}
		}
	}()
	return out
}
