package reconcile_test

import (
	"errors"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// plannedAlone is planned without the pod outside of the prefix.
var plannedAlone = strings.NewReplacer("ip route throw 10.244.200.7/32 table 77\n", "", "nft set pods 10.244.200.7\n", "").Replace(planned)

func TestLoopJoins(t *testing.T) {
	n := newNode(t, record("b"), tombstone("c", 3))
	n.joins()
	n.holds(plannedAlone)
	rec := n.announced("the record", anyRecord)
	want := registry.Record{
		Name: "a", PublicKey: keyA, Endpoints: []string{"192.0.2.1:51820"}, Addresses: addrs("192.0.2.1"),
		Prefixes: claims(rec.Since, "10.244.1.0/24"), Since: rec.Since, Revision: rec.Revision,
	}
	if diff := cmp.Diff(want, rec, byValue); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	if since := time.Since(rec.Since); since < 0 || since > patience {
		t.Errorf("member since %v", rec.Since)
	}
	if r := n.report(); r.Error != "" || r.RegistryError != "" || len(r.Conflicts) != 0 || r.Rival {
		t.Errorf("report %+v", r)
	}
	if got := applied(t, n.config); got.MTU != 1440 {
		t.Errorf("applied %+v", got)
	}
}

// What is on the disk is what is known, so that the node comes up after a reboot.
func TestLoopSaves(t *testing.T) {
	n := newNode(t, record("b"), tombstone("c", 3))
	own := n.joins()
	eventually(t, "the own record to be saved", func() bool { return n.saved().Self.Equal(own) })
	want := store.Known{
		Self: own, Records: registry.NewSnapshot(own, record("b"), tombstone("c", 3)),
		Endpoints: map[string]netip.AddrPort{"b": netip.MustParseAddrPort("192.0.2.2:51820")}, MTU: 1440,
	}
	if got := n.saved(); !got.Equal(want) {
		t.Errorf("saved (-want +got):\n%s", cmp.Diff(want, got, byValue))
	}
	n.registry.put(tombstone("b", 11))
	eventually(t, "the tombstone to be saved", func() bool {
		got := n.saved()
		return got.Records.Nodes["b"] != nil && got.Records.Nodes["b"].Left && len(got.Endpoints) == 0
	})
}

func TestLoopFollowsRegistry(t *testing.T) {
	n := newNode(t)
	n.joins()
	n.registry.put(record("b"))
	n.holds("peer b endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24", "ip route 10.244.2.0/24 dev wgcni0")
	more := record("b")
	more.Revision, more.Prefixes = 11, claims(epoch, "10.244.2.0/24", "10.244.9.0/24")
	n.registry.put(more)
	n.holds("allowed-ips 10.244.2.0/24,10.244.9.0/24")
	// cilium#25492: a key change was filtered out as "no change".
	rekeyed := more
	rekeyed.Revision, rekeyed.PublicKey = 12, [32]byte{5}
	n.registry.put(rekeyed)
	n.holds("peer e endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24,10.244.9.0/24")
	n.lacks("peer b")
	n.registry.put(tombstone("b", 13))
	n.lacks("peer")
	n.lacks("10.244.2.0/24")
}

func TestLoopFollowsStore(t *testing.T) {
	n := newNode(t, record("b"))
	n.joins()
	put(t, n.config, pod("x", outsider))
	n.holds("nft set pods 10.244.200.7", "ip route throw 10.244.200.7/32")
	n.announced("the pod", func(r registry.Record) bool { return len(r.Pods) == 1 && r.Pods[0].Prefix.Addr() == outsider })
	put(t, n.config, pod("y", neighbour))
	n.announced("both merged", func(r registry.Record) bool {
		return len(r.Pods) == 1 && r.Pods[0].Prefix == netip.MustParsePrefix("10.244.200.6/31")
	})
	inStore(t, n.config, func(st *store.Attachments) error { return st.Delete(pod("x"), pod("y")) })
	n.announced("neither", func(r registry.Record) bool { return len(r.Pods) == 0 })
	n.lacks("10.244.200.7")
}

// The tunnel's process dies, interface and routes vanish (flannel, any userspace
// WireGuard): the traffic does not follow the default route, and the tunnel comes back.
func TestLoopFollowsKernel(t *testing.T) {
	n := newNode(t, record("b"))
	n.joins()
	n.holds(plannedAlone)
	n.kernel.KillTunnel()
	local, remote := netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("10.244.2.5")
	if got := n.kernel.Verdict(local, remote); got == kerneltest.Plaintext {
		t.Error("plaintext leaves while there is no tunnel")
	}
	n.tell(kernel.Event{Ours: true})
	n.holds(plannedAlone)
	n.kernel.BreakFilter()
	n.tell(kernel.Event{Ours: true})
	n.holds(plannedAlone)
}

func TestLoopFollowsUnderlay(t *testing.T) {
	n := newNode(t)
	n.joins()
	n.kernel.set(func(k *fakeKernel) { k.underlay = underlay("192.0.2.77") })
	n.tell(kernel.Event{Underlay: true})
	n.announced("the new address", func(r registry.Record) bool { return r.Endpoints[0] == "192.0.2.77:51820" })
	n.kernel.set(func(k *fakeKernel) { k.underlay.MTU = 9001 })
	n.tell(kernel.Event{Underlay: true})
	n.holds("mtu 8941")
}

// One family's default route goes a moment before the other's, or goes and comes: peers
// that were told of it called the other address, and went back and forth.
func TestFadingUnderlayIsBelievedLater(t *testing.T) {
	n := newNode(t)
	n.resync = shortResync
	var clock atomic.Int64
	n.now = func() time.Time { return time.Now().Add(time.Duration(clock.Load())) }
	n.kernel.set(func(k *fakeKernel) { k.underlay = underlay("192.0.2.1", "2001:db8:1::1") })
	n.joins()
	look := func(u kernel.Underlay) {
		t.Helper()
		n.kernel.set(func(k *fakeKernel) { k.underlay = u })
		n.quiet()
	}
	published := len(n.registry.publications())
	for _, u := range []kernel.Underlay{underlay("2001:db8:1::1"), {}, underlay("192.0.2.1"), underlay("192.0.2.1", "2001:db8:1::1")} {
		look(u)
	}
	if got := n.registry.publications()[published:]; len(got) != 0 {
		t.Errorf("published %v, while addresses were away for a moment", got)
	}
	look(underlay("2001:db8:1::1"))
	clock.Add(int64(2 * time.Second))
	n.announced("one family alone", func(r registry.Record) bool { return slices.Equal(r.Endpoints, []string{"[2001:db8:1::1]:51820"}) })
}

// flannel writes its subnet file when it starts, perhaps after us.
func TestLoopFollowsConfiguration(t *testing.T) {
	n := newNode(t)
	n.resync = shortResync
	n.config.PodCIDRs = nil
	n.joins()
	n.configure(func(c *config.Config) { c.PodCIDRs = prefixes("10.244.1.0/24"); c.RunDir = "/nowhere" })
	n.announced("the range", func(r registry.Record) bool { return len(r.Prefixes) == 1 })
	n.holds("nft set local 10.244.1.0/24", "ip address 10.244.1.0/32 dev wgcni0")
}

func TestLoopResolvesNames(t *testing.T) {
	named := record("b")
	named.Endpoints = []string{"b.example.org:51820"}
	n := newNode(t, named)
	n.names.gate = make(chan struct{})
	n.names.set("b.example.org", addrs("192.0.2.2")...)
	n.joins()
	n.holds("peer b allowed-ips 10.244.2.0/24") // b may call us meanwhile
	close(n.names.gate)
	n.holds("peer b endpoint 192.0.2.2:51820")
}

// A peer that roamed and talks to us stays where it is (the mesh of
// cilium#36491 lost it), until its record says that it has moved.
func TestLoopEndpoints(t *testing.T) {
	n := newNode(t, record("b"))
	n.resync = shortResync
	n.joins()
	n.holds("peer b endpoint 192.0.2.2:51820")
	n.kernel.Roam([32]byte{2}, netip.MustParseAddrPort("203.0.113.2:4000"), time.Now())
	n.quiet()
	n.holds("peer b endpoint 203.0.113.2:4000")
	moved := record("b")
	moved.Revision, moved.Endpoints = 11, []string{"192.0.2.99:51820"}
	n.registry.put(moved)
	n.holds("peer b endpoint 192.0.2.99:51820")
}

func TestLoopAppliesAgain(t *testing.T) {
	n := newNode(t, record("b"))
	refused := errors.New("operation not permitted")
	n.kernel.onApply = func(ops []mesh.Op) error {
		for _, op := range ops {
			if _, ok := op.(mesh.SetPeer); ok {
				return refused
			}
		}
		return nil
	}
	n.start()
	eventually(t, "three attempts", func() bool { return len(n.kernel.calls()) >= 4 }) // the first in two parts
	if failed, ops := n.log.count("pass failed"), n.log.count("apply"); failed != 1 || ops > 20 {
		t.Errorf("the failure was logged %d times, ops %d times:\n%s", failed, ops, n.log)
	}
	if r := n.report(); r.Error != refused.Error() {
		t.Errorf("reported %q, want %q", r.Error, refused)
	}
	n.kernel.set(func(k *fakeKernel) { k.onApply = nil })
	n.holds(plannedAlone)
	eventually(t, "a report without an error", func() bool { return n.report().Error == "" })
}

// Rules were churned for ever because what was read back looked different (felix
// 3d5b83b). Whatever is looked at again: where nothing changes, nothing is done.
func TestLoopIsQuiet(t *testing.T) {
	n := newNode(t, record("b"), record("c"), tombstone("d", 3))
	n.resync = shortResync
	put(t, n.config, pod("x", outsider), pod("y", addrs("10.244.1.9")...))
	n.joins()
	n.quiet()
	n.tell(kernel.Event{Ours: true, Underlay: true})
	n.registry.set(func(*fakeRegistry) {}) // told again of the same
	ops := len(n.kernel.calls())
	put(t, n.config, pod("z", addrs("10.244.1.10")...)) // inside the prefix: nothing to do
	n.quiet()
	if got := len(n.kernel.calls()); got != ops {
		t.Errorf("%d more Applies", got-ops)
	}
}

// What a node knows is there for its next boot, whatever becomes of the file
// meanwhile. `wgcnid sync` would go by an empty one, too.
func TestLoopSavesAgain(t *testing.T) {
	n := newNode(t, record("b"))
	n.resync = shortResync
	n.joins()
	n.holds("peer b endpoint 192.0.2.2:51820")
	path := store.KnownPath(n.config.StateDir)
	for name, damage := range map[string]func() error{
		"deleted":   func() error { return os.Remove(path) },
		"emptied":   func() error { return os.Truncate(path, 0) },
		"truncated": func() error { return os.Truncate(path, 100) },
		"garbage":   func() error { return os.WriteFile(path, make([]byte, 9000), 0o600) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the records to be on the disk again, after the file was "+name, func() bool {
			known, _, err := store.LoadKnown(t.Context(), n.config.StateDir)
			_, b := known.Records.Nodes["b"]
			_, a := known.Records.Nodes["a"]
			return err == nil && a && b
		})
		n.quiet()
	}
}

func TestLoopEnds(t *testing.T) {
	before := runtime.NumGoroutine()
	n := newNode(t, record("b"))
	n.joins()
	n.holds(plannedAlone)
	rec, _ := n.registry.own()
	n.stop()
	if diff := cmp.Diff(plannedAlone, n.kernel.String()); diff != "" {
		t.Errorf("the kernel was touched (-want +got):\n%s", diff)
	}
	if after, _ := n.registry.own(); !after.Equal(rec) {
		t.Errorf("the registry was touched: %+v", after)
	}
	eventually(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
}

// A registry that hangs does not keep the helper from ending.
func TestLoopEndsWhileRegistryIsAway(t *testing.T) {
	before := runtime.NumGoroutine()
	n := newNode(t)
	n.registry.away = errAway
	n.start()
	eventually(t, "attempts to publish", func() bool { return len(n.registry.publications()) > 2 })
	n.stop()
	eventually(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
}

func TestLoopCannotBegin(t *testing.T) {
	n := newNode(t)
	loop, broken := n.loop(), errors.New("no such file")
	loop.Load = func() (config.Config, error) { return config.Config{}, broken }
	if err := loop.Run(t.Context()); !errors.Is(err, broken) {
		t.Errorf("Run: %v, want %v", err, broken)
	}
	if _, err := loop.Once(t.Context()); !errors.Is(err, broken) {
		t.Errorf("Once: %v, want %v", err, broken)
	}
}

func TestOnce(t *testing.T) {
	n := newNode(t, record("b"))
	o, err := n.loop().Once(t.Context())
	if err != nil || len(o.Ops) == 0 {
		t.Fatalf("%d ops, error %v", len(o.Ops), err)
	}
	if _, there := n.registry.own(); !there || !strings.Contains(n.kernel.String(), "peer b") {
		t.Errorf("in the registry: %v; the kernel has\n%s", there, n.kernel)
	}
	if o, err = n.loop().Once(t.Context()); err != nil || len(o.Ops) != 0 {
		t.Errorf("again: error %v, ops\n%s", err, mesh.Text(o.Ops))
	}
	n = newNode(t)
	n.registry.away = errAway
	o, err = n.loop().Once(t.Context())
	if !errors.Is(err, errAway) || len(o.Ops) == 0 {
		t.Errorf("without a registry: %d ops, error %v; want the kernel's part done and %v", len(o.Ops), err, errAway)
	}
}

// Both ends of what the report tells of claims: whose, what and why.
func TestLoopReports(t *testing.T) {
	thief := record("c")
	thief.Prefixes = claims(at(1), "10.244.2.0/25")
	n := newNode(t, record("b"), thief)
	n.registry.raw = map[string]string{"Z": `{"name": "Z"}`}
	n.joins()
	eventually(t, "the conflict", func() bool { return len(n.report().Conflicts) == 1 })
	want := reconcile.Report{
		Conflicts: []mesh.Conflict{{Node: "c", What: "10.244.2.0/25", Reason: "b has held 10.244.2.0/24 longer"}},
		Refused: []reconcile.Refusal{{
			Node: "Z", Kind: reconcile.KindMalformed,
			Reason: `record "Z": name: want lower case letters, digits, '-' and '.', with a letter or digit around each '.' (RFC 1123 subdomain)`,
		}},
		RefusedTotal: map[string]uint64{reconcile.KindMalformed: 1},
	}
	if diff := cmp.Diff(want, n.report(), cmpopts.IgnoreFields(reconcile.Report{}, "At"), cmpopts.IgnoreFields(reconcile.Refusal{}, "Since")); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
}

// A default route that flaps changes nothing: nobody loses this node's endpoint.
func TestDefaultRouteFlaps(t *testing.T) {
	n := newNode(t, record("b"))
	n.resync = shortResync
	own := n.joins()
	for _, u := range []kernel.Underlay{{}, ethernet} {
		n.kernel.set(func(k *fakeKernel) { k.underlay = u })
		n.tell(kernel.Event{Underlay: true})
		n.quiet()
		if got, _ := n.registry.own(); !got.Equal(own) {
			t.Errorf("underlay %v: the record is %+v, was %+v", u, got, own)
		}
	}
	n.holds(plannedAlone)
}

// A gateway that is not heard is accused in this node's record and in its plan,
// and that survives a restart of the helper; see TestLiveness for the timing.
func TestLoopAccusesASilentGateway(t *testing.T) {
	t.Parallel() // it waits
	b := record("b")
	b.Role = mesh.RoleGateway
	n := newNode(t, b, record("c"))
	n.resync = 100 * time.Millisecond
	begin := time.Now()
	n.now = func() time.Time { return begin.Add(time.Since(begin) * 5 / 2) } // looks are still less than 3 s apart
	n.configure(func(c *config.Config) { c.Role = mesh.RoleGateway })
	n.joins()
	n.holds("persistent-keepalive 3s")
	silent := func(r registry.Record) bool { return len(r.Silent) == 1 && r.Silent[0].Node == "b" }
	said := n.announced("an accusation", silent)
	if since := n.now().Sub(said.Silent[0].Since); since < 0 || since > patience {
		t.Errorf("silent since %v", said.Silent[0].Since)
	}
	n.kernel.set(func(k *fakeKernel) {
		if len(k.greeted) < 2 || k.greeted[0] != b.PublicKey || slices.Contains(k.greeted, record("c").PublicKey) {
			t.Errorf("greeted %v", k.greeted)
		}
	})
	if !strings.Contains(n.log.String(), "not heard any more") {
		t.Errorf("log:\n%s", n.log)
	}
	n.stop()
	passes := len(n.allReports())
	n.start()
	eventually(t, "passes of the next run", func() bool { return len(n.allReports()) > passes+1 })
	again := n.announced("the accusation, unchanged", silent)
	if diff := cmp.Diff(said.Silent, again.Silent); diff != "" {
		t.Errorf("accusation after a restart (-before +after):\n%s", diff)
	}
	// Heard again: what keeps coming is counted by looks, of which there is one a second.
	n.announced("no accusation", func(r registry.Record) bool {
		n.kernel.Hear(b.PublicKey, 32)
		return len(r.Silent) == 0
	})
}

// A gateway that has lost its own network accuses nobody.
func TestLoopCutOffAccusesNobody(t *testing.T) {
	t.Parallel() // it waits
	b := record("b")
	b.Role = mesh.RoleGateway
	n := newNode(t, b)
	n.kernel.set(func(k *fakeKernel) { k.cutOff = true })
	n.resync = 100 * time.Millisecond
	begin := time.Now()
	n.now = func() time.Time { return begin.Add(time.Since(begin) * 5 / 2) }
	n.configure(func(c *config.Config) { c.Role = mesh.RoleGateway })
	n.joins()
	eventually(t, "looks of many seconds", func() bool {
		greetings := 0
		n.kernel.set(func(k *fakeKernel) { greetings = len(k.greeted) })
		return greetings > 5
	})
	if own, _ := n.registry.own(); len(own.Silent) > 0 {
		t.Errorf("accused: %v", own.Silent)
	}
}
