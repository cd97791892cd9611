package reconcile_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// newPass is a pass of node a, which knows b, with one pod inside its prefix and
// one outside.
func newPass(t *testing.T) (reconcile.Pass, *fakeKernel) {
	t.Helper()
	c, k := testConfig(t), newKernel()
	inStore(t, c, (*store.Attachments).SetComplete)
	put(t, c, pod("inside", addrs("10.244.1.5")...), pod("outside", outsider))
	return reconcile.Pass{
		Config: c, Kernel: k, Key: keyA, Context: mesh.Context{Now: epoch},
		Known: store.Known{
			Self:      registry.Record{Name: "a", Prefixes: claims(epoch, "10.244.1.0/24"), Since: epoch},
			Records:   registry.NewSnapshot(record("b"), tombstone("c", 3)),
			Endpoints: map[string]netip.AddrPort{"b": netip.MustParseAddrPort("192.0.2.2:51820")},
			MTU:       1440,
		},
	}, k
}

const planned = `ip link wgcni0 mtu 1440 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key a listen-port 51820 fwmark 0x4
wg wgcni0 peer b endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24
ip route unreachable 10.244.0.0/16 metric 1048576 table 77
ip route throw 10.244.1.0/24 table 77
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 77
ip route throw 10.244.200.7/32 table 77
ip rule ipv4 priority 110 not fwmark 0x4/0x4 lookup 77
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
nft set pods 10.244.200.7
`

func run(t *testing.T, p reconcile.Pass) reconcile.Outcome {
	t.Helper()
	o, err := p.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestRun(t *testing.T) {
	p, k := newPass(t)
	o := run(t, p)
	if diff := cmp.Diff(planned, k.String()); diff != "" {
		t.Errorf("kernel (-want +got):\n%s", diff)
	}
	if len(o.Pods) != 2 || len(o.Ops) == 0 || o.Damaged != nil {
		t.Errorf("outcome: %d pods, %d ops, damaged %v", len(o.Pods), len(o.Ops), o.Damaged)
	}
	if again := run(t, p); len(again.Ops) != 0 {
		t.Errorf("the second run has ops:\n%s", mesh.Text(again.Ops))
	}
}

func TestCompareChangesNothing(t *testing.T) {
	p, k := newPass(t)
	for _, state := range []string{"", planned} { // an empty kernel, and one that somebody has changed
		if state != "" {
			run(t, p)
			k.KillTunnel()
			k.BreakFilter()
		}
		before, file := k.String(), applied(t, p.Config)
		o, err := p.Compare(t.Context())
		if err != nil || len(o.Ops) == 0 {
			t.Fatalf("Compare: %d ops, error %v", len(o.Ops), err)
		}
		if diff := cmp.Diff(before, k.String()); diff != "" {
			t.Errorf("Compare changed the kernel (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(file, applied(t, p.Config), byValue); diff != "" {
			t.Errorf("Compare changed the store (-before +after):\n%s", diff)
		}
		if did := run(t, p); mesh.Text(did.Ops) != mesh.Text(o.Ops) {
			t.Errorf("Compare told\n%swhereas Run did\n%s", mesh.Text(o.Ops), mesh.Text(did.Ops))
		}
	}
}

func TestObservedIsUsed(t *testing.T) {
	p, k := newPass(t)
	state := run(t, p).Plan.State
	p.Observed = &state
	seen := k.observations()
	if o := run(t, p); len(o.Ops) != 0 || k.observations() != seen {
		t.Errorf("%d ops, %d observations more; want none", len(o.Ops), k.observations()-seen)
	}
}

func TestObserveFails(t *testing.T) {
	p, k := newPass(t)
	broken := errors.New("netlink: out of memory")
	p.Kernel = failingObserver{k, broken}
	if _, err := p.Run(t.Context()); !errors.Is(err, broken) {
		t.Errorf("error %v, want %v", err, broken)
	}
}

type failingObserver struct {
	*fakeKernel
	err error
}

func (f failingObserver) Observe() (mesh.State, error) { return mesh.State{}, f.err }

// holdsPod reports whether the kernel serves a pod that is outside of the prefixes.
func holdsPod(t *testing.T, k *kerneltest.Kernel, a netip.Addr) bool {
	t.Helper()
	s, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	filtered := slices.Contains(s.Filter.Pods, a)
	thrown := slices.ContainsFunc(s.Routes, func(r mesh.Route) bool { return r.Prefix == netip.PrefixFrom(a, a.BitLen()) })
	if filtered != thrown {
		t.Errorf("pod %s: in the filter %v, thrown %v", a, filtered, thrown)
	}
	return filtered && thrown
}

// An ADD that comes at any moment of a pass is not lost.
func TestAddDuringPass(t *testing.T) {
	late := pod("late", neighbour)
	t.Run("before the store is read", func(t *testing.T) {
		p, k := newPass(t)
		k.onObserve = func() { put(t, p.Config, late) }
		run(t, p)
		if !holdsPod(t, k.Kernel, neighbour) {
			t.Error("the pod is missing from the kernel")
		}
	})
	t.Run("between Compare and the local part", func(t *testing.T) {
		p, k := newPass(t)
		o, err := p.Compare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		put(t, p.Config, late)
		if err := reconcile.ApplyLocal(p, t.Context(), &o); err != nil {
			t.Fatal(err)
		}
		if !holdsPod(t, k.Kernel, neighbour) || len(o.Pods) != 3 {
			t.Errorf("kernel:\n%s\npods: %v", k, o.Pods)
		}
	})
	t.Run("between Compare and the local part, a DEL", func(t *testing.T) {
		p, k := newPass(t)
		o, err := p.Compare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		inStore(t, p.Config, func(st *store.Attachments) error { return st.Delete(pod("outside")) })
		if err := reconcile.ApplyLocal(p, t.Context(), &o); err != nil {
			t.Fatal(err)
		}
		if holdsPod(t, k.Kernel, outsider) {
			t.Error("the pod came back after its DEL")
		}
	})
}

// change does what ADD and DEL do: store and kernel under one lock.
func change(c config.Config, k *fakeKernel, at store.Attachment, add bool) error {
	return errInStore(c, func(st *store.Attachments) error {
		before, err := st.All()
		if err != nil {
			return err
		}
		if add {
			err = st.Put(at)
		} else {
			err = st.Delete(at)
		}
		if err != nil {
			return err
		}
		after, err := st.All()
		if err != nil {
			return err
		}
		return k.Apply(reconcile.PodChange(c, prefixes("10.244.1.0/24"), before, after))
	})
}

// Whatever passes run beside them, after the last ADD and DEL the kernel and the
// store agree, without another pass.
func TestVerbsBesidePasses(t *testing.T) {
	p, k := newPass(t)
	run(t, p)
	var verbs, passes sync.WaitGroup
	done := make(chan struct{})
	passes.Go(func() {
		for {
			if _, err := p.Run(t.Context()); err != nil {
				t.Error(err)
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	for worker := range 3 {
		verbs.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(worker)))
			for range 15 {
				n := r.IntN(6)
				at := pod(fmt.Sprint(worker, n), netip.AddrFrom4([4]byte{10, 244, 201, byte(10*worker + n)}))
				if err := change(p.Config, k, at, r.IntN(2) == 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	verbs.Wait()
	close(done)
	passes.Wait()
	o, err := p.Compare(t.Context())
	if err != nil || len(o.Ops) != 0 {
		t.Errorf("error %v; the kernel lacks\n%s", err, mesh.Text(o.Ops))
	}
}

// Ops on single pods are applied under the store's lock; the rest is not, since
// an ADD would wait for it.
func TestLockDuringApply(t *testing.T) {
	p, k := newPass(t)
	var local, others int
	k.onApply = func(ops []mesh.Op) error {
		f, err := os.Open(store.AttachmentsPath(p.Config.RunDir) + ".lock")
		if err != nil {
			return err
		}
		defer f.Close()
		locked := errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
		for _, op := range ops {
			if mesh.Local(op) {
				local++
			} else {
				others++
			}
			if mesh.Local(op) && !locked {
				t.Errorf("applied without the lock: %s", op)
			}
			if _, isPeer := op.(mesh.SetPeer); isPeer && locked {
				t.Errorf("applied under the lock: %s", op)
			}
		}
		return nil
	}
	run(t, p)
	put(t, p.Config, pod("late", neighbour))
	run(t, p)
	if local == 0 || others == 0 {
		t.Errorf("%d local ops and %d others were applied", local, others)
	}
}

func applied(t *testing.T, c config.Config) (ap store.Applied) {
	t.Helper()
	inStore(t, c, func(st *store.Attachments) (err error) {
		ap, _, err = st.Applied()
		return err
	})
	return ap
}

// Without WireGuard everything else is in place, and ADD may take its short way.
func TestNoWireGuard(t *testing.T) {
	p, k := newPass(t)
	k.onApply = func(ops []mesh.Op) error {
		if !slices.ContainsFunc(ops, mesh.NeedsLink) {
			return nil
		}
		rest := slices.DeleteFunc(slices.Clone(ops), mesh.NeedsLink)
		return errors.Join(k.Kernel.Apply(rest), kernel.ErrNoWireGuard)
	}
	if _, err := p.Run(t.Context()); !errors.Is(err, kernel.ErrNoWireGuard) {
		t.Fatalf("error %v, want ErrNoWireGuard", err)
	}
	want := store.Applied{Settings: reconcile.Digest(p.Config.Settings), Prefixes: prefixes("10.244.1.0/24"), MTU: 1440, At: epoch}
	if diff := cmp.Diff(want, applied(t, p.Config), byValue); diff != "" {
		t.Errorf("applied (-want +got):\n%s", diff)
	}
}

func TestFailedPassRecordsNothing(t *testing.T) {
	p, k := newPass(t)
	k.onApply = func(ops []mesh.Op) error {
		if slices.ContainsFunc(ops, mesh.NeedsLink) {
			return errors.New("refused")
		}
		return nil
	}
	if _, err := p.Run(t.Context()); err == nil {
		t.Fatal("no error")
	}
	if got := applied(t, p.Config); !got.At.IsZero() {
		t.Errorf("applied %+v, want none", got)
	}
}

func TestAppliedIsRewrittenOnChangeOnly(t *testing.T) {
	p, _ := newPass(t)
	run(t, p)
	for i, tt := range []struct {
		name    string
		change  func()
		rewrite bool
	}{
		{"nothing", func() {}, false},
		{"a pod", func() { put(t, p.Config, pod("late", neighbour)) }, false},
		{"a node", func() { p.Known.Records = registry.NewSnapshot(record("b"), record("d")) }, false},
		{"mtu found", func() { p.Known.MTU = 1420 }, true},
		{"mtu set", func() { p.Config.MTU = 1400 }, true},
		{"settings", func() { p.Config.Keepalive = 25 * time.Second }, true},
		{"prefixes", func() { p.Known.Self.Prefixes = claims(epoch, "10.244.1.0/24", "10.244.7.0/24") }, true},
	} {
		p.Context.Now = at(i + 1)
		tt.change()
		run(t, p)
		if got := applied(t, p.Config).At.Equal(p.Context.Now); got != tt.rewrite {
			t.Errorf("%s: rewritten %v, want %v", tt.name, got, tt.rewrite)
		}
	}
}
