package reconcile_test

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// knowing writes what the node knew before it was stopped.
func (n *testNode) knowing(k store.Known) {
	n.t.Helper()
	if err := store.SaveKnown(n.t.Context(), n.config.StateDir, store.Known{}, k); err != nil {
		n.t.Fatal(err)
	}
}

// A node comes up encrypted while the registry is away (kilo's Node.Ready: the
// API away for a minute emptied the mesh), and joins when it is back.
func TestRegistryAwayAtStart(t *testing.T) {
	n := newNode(t, record("c"))
	n.registry.away = errAway
	n.knowing(store.Known{
		Records:   registry.NewSnapshot(record("b")),
		Endpoints: map[string]netip.AddrPort{"b": netip.MustParseAddrPort("192.0.2.2:51820")},
	})
	n.start()
	n.holds(plannedAlone)
	eventually(t, "the report", func() bool {
		r := n.report()
		return r.RegistryError == errAway.Error() && !r.RegistrySince.IsZero()
	})
	eventually(t, "attempts to publish", func() bool { return len(n.registry.publications()) > 2 })
	if _, there := n.registry.own(); there {
		t.Error("published to a registry that is away")
	}
	// Said once, not at each of the attempts.
	if told, failed := n.log.count("registry cannot be read"), n.log.count("record not published"); told != 1 || failed != 1 {
		t.Errorf("logged %d and %d times:\n%s", told, failed, n.log)
	}
	n.registry.set(func(r *fakeRegistry) { r.away = nil })
	n.announced("this node", anyRecord)
	n.holds("peer b", "peer c endpoint 192.0.2.3:51820")
	eventually(t, "the report", func() bool { return n.report().RegistryError == "" })
}

// What the kernel is to have of a peer's new key is on the disk before, by a helper that
// has just begun as well.
func TestNewKeyIsSavedFirst(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		rekeyed := record("b")
		rekeyed.Revision, rekeyed.PublicKey = 12, wgtypes.Key{5}
		n := newNode(t, record("b"))
		n.joins()
		if restarted {
			n.stop()
		}
		applied := make(chan wgtypes.Key, 1)
		n.kernel.set(func(k *fakeKernel) {
			k.onApply = func([]mesh.Op) error {
				select {
				case applied <- n.savedRecord("b").PublicKey:
				default:
				}
				return nil
			}
		})
		n.registry.put(rekeyed)
		if restarted {
			n.start()
		}
		n.holds("peer e endpoint 192.0.2.2:51820")
		if got := <-applied; got != rekeyed.PublicKey {
			t.Errorf("restarted %v: when the kernel was changed the disk had %v, want %v", restarted, got, rekeyed.PublicKey)
		}
	}
}

// A helper that was killed before it had written what the kernel holds does not take
// the kernel back: a peer's new key would be replaced by the one before, and traffic
// lost until the registry is heard.
func TestRestartWithAnOlderMeshOnDisk(t *testing.T) {
	older, rekeyed := record("b"), record("b")
	rekeyed.Revision, rekeyed.PublicKey = 12, wgtypes.Key{5}
	n := newNode(t, older)
	n.joins()
	n.stop()
	disk := n.saved()
	n.registry.put(rekeyed)
	n.start()
	n.holds("peer e endpoint 192.0.2.2:51820")
	n.stop()
	before := len(n.kernel.calls())
	if err := os.Remove(store.KnownPath(n.config.StateDir)); err != nil {
		t.Fatal(err)
	}
	n.knowing(disk)
	slow := make(chan struct{})
	n.registry.set(func(r *fakeRegistry) { r.silent = slow })
	n.start()
	time.AfterFunc(100*time.Millisecond, func() { close(slow) })
	eventually(t, "the pass after the first word", func() bool { return n.savedRecord("b").PublicKey == rekeyed.PublicKey })
	for _, ops := range n.kernel.calls()[before:] {
		t.Errorf("applied\n%s", mesh.Text(ops))
	}
}

// No peer is removed because the registry forgets it, and what it forgets of us it is told again.
func TestRegistryLosesRecords(t *testing.T) {
	later := record("b")
	later.Revision, later.Prefixes = 20, claims(epoch, "10.244.2.0/24", "10.244.9.0/24")
	for _, tt := range []struct {
		name string
		lose func(r *fakeRegistry, own registry.Record)
	}{
		{"emptied", func(r *fakeRegistry, _ registry.Record) { clear(r.records) }},
		{"own record deleted", func(r *fakeRegistry, _ registry.Record) { delete(r.records, "a") }},
		{"rolled back to a state of long ago", func(r *fakeRegistry, own registry.Record) {
			own.Revision, own.Endpoints = own.Revision-1000, []string{"198.51.100.1:1"}
			r.records = map[string]registry.Record{"a": own, "b": record("b")}
		}},
		// The others refuse what they know a later revision of, even if it says the same.
		{"rolled back to the same content", func(r *fakeRegistry, own registry.Record) {
			own.Revision -= 1000
			r.records = map[string]registry.Record{"a": own, "b": record("b")}
		}},
		{"rolled back to an earlier key", func(r *fakeRegistry, own registry.Record) {
			own.Revision, own.PublicKey = own.Revision-1000, wgtypes.Key{9}
			r.records = map[string]registry.Record{"a": own}
		}},
		{"rolled back to a tombstone", func(r *fakeRegistry, own registry.Record) {
			r.records = map[string]registry.Record{"a": tombstone("a", own.Revision-1000)}
		}},
		{"wiped while away", func(r *fakeRegistry, _ registry.Record) { clear(r.records); r.away = errAway }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, later)
			own := n.joins()
			n.holds("allowed-ips 10.244.2.0/24,10.244.9.0/24")
			kernelBefore := n.kernel.String()
			n.registry.set(func(r *fakeRegistry) { tt.lose(r, own) })
			if tt.name == "wiped while away" {
				eventually(t, "the outage to be noticed", func() bool { return n.report().RegistryError != "" })
				n.registry.set(func(r *fakeRegistry) { r.away = nil })
			}
			n.announced("this node's record again", func(r registry.Record) bool {
				return r.Revision >= own.Revision && r.PublicKey == keyA && slices.Equal(r.Endpoints, own.Endpoints)
			})
			eventually(t, "the report", func() bool { return n.report().RegistryError == "" })
			if got := n.kernel.String(); got != kernelBefore {
				t.Errorf("the kernel has changed to\n%s", got)
			}
			if n.report().Rival {
				t.Error("reported a rival")
			}
		})
	}
}

// After an outage thousands of nodes are back at once. If each one changed its
// record, each would wake all others (KubeSpan's O(n²)).
func TestOutageChangesNoRecord(t *testing.T) {
	n := newNode(t, record("b"))
	own := n.joins()
	n.registry.set(func(r *fakeRegistry) { r.away = errAway })
	eventually(t, "attempts to publish", func() bool { return len(n.registry.publications()) > 2 })
	n.registry.set(func(r *fakeRegistry) { r.away = nil })
	eventually(t, "the registry to be back", func() bool { return n.log.count("registry can be read again") == 1 })
	n.kernel.set(func(k *fakeKernel) { k.underlay = underlay("192.0.2.77") }) // and then something does change
	n.tell(kernel.Event{Underlay: true})
	n.announced("the change", func(r registry.Record) bool { return r.Endpoints[0] == "192.0.2.77:51820" })
	for _, p := range n.registry.publications() {
		if p.Revision != own.Revision && p.Endpoints[0] == own.Endpoints[0] {
			t.Errorf("the same was offered as revision %d and as %d", own.Revision, p.Revision)
		}
	}
}

// A node that lost its state, or whose clock was ahead once, goes forward.
func TestStaleRevision(t *testing.T) {
	ahead := record("a")
	ahead.Revision = registry.MaxRevision / 2
	t.Run("there before", func(t *testing.T) {
		n := newNode(t, ahead)
		n.start()
		n.announced("a later record", func(r registry.Record) bool { return r.Revision == ahead.Revision+1 })
	})
	t.Run("while publishing", func(t *testing.T) {
		n := newNode(t)
		n.registry.onPublish = func(registry.Record) error {
			n.registry.set(func(r *fakeRegistry) { r.records["a"], r.onPublish = ahead, nil })
			return registry.Stale{Name: "a", Known: ahead.Revision, Offered: 1}
		}
		n.start()
		n.announced("a later record", func(r registry.Record) bool { return r.Revision == ahead.Revision+1 })
		if got := len(n.registry.publications()); got != 2 {
			t.Errorf("%d attempts, want 2", got)
		}
	})
}

// Another machine with our name: its record stays, and people are told. A cloned
// machine has our key as well.
func TestRival(t *testing.T) {
	for name, key := range map[string]wgtypes.Key{"its own key": {9}, "our key": keyA} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, record("b"))
			n.resync = shortResync
			own := n.joins()
			rival := own
			rival.Revision, rival.PublicKey, rival.Endpoints = own.Revision+100_000, key, []string{"198.51.100.1:1"}
			n.registry.put(rival)
			eventually(t, "the report", func() bool { return n.report().Rival })
			n.quiet()
			// Nor is an outage an opportunity.
			n.registry.set(func(r *fakeRegistry) { r.away = errAway })
			eventually(t, "the outage to be noticed", func() bool { return n.report().RegistryError != "" })
			n.quiet()
			n.registry.set(func(r *fakeRegistry) { r.away = nil })
			eventually(t, "the registry to be back", func() bool { return n.report().RegistryError == "" })
			n.quiet()
			if got, _ := n.registry.own(); !got.Equal(rival) {
				t.Errorf("the rival's record was replaced by %+v", got)
			}
			if got := len(n.registry.publications()); got != 1 {
				t.Errorf("%d publications, want 1", got)
			}
			if got := n.log.count("another node publishes"); got != 1 {
				t.Errorf("said %d times", got)
			}
			n.registry.set(func(r *fakeRegistry) { delete(r.records, "a") }) // it was mended
			n.announced("this node again", func(r registry.Record) bool { return slices.Equal(r.Endpoints, own.Endpoints) })
			eventually(t, "the report", func() bool { return !n.report().Rival })
		})
	}
}

// A change that is taken back while it is being published still reaches the
// registry. It is our own word, and no rival's.
func TestChangeTakenBackWhilePublishing(t *testing.T) {
	n := newNode(t)
	own := n.joins()
	release := make(chan struct{})
	n.registry.set(func(r *fakeRegistry) {
		r.onPublish = func(registry.Record) error {
			<-release
			return nil
		}
	})
	offered := len(n.registry.publications())
	for _, address := range []string{"192.0.2.77", "192.0.2.1"} {
		n.kernel.set(func(k *fakeKernel) { k.underlay = underlay(address) })
		n.tell(kernel.Event{Underlay: true})
		eventually(t, "a pass with "+address, func() bool { return n.saved().Self.Endpoints[0] == address+":51820" })
		eventually(t, "the change to be offered", func() bool { return len(n.registry.publications()) > offered })
	}
	close(release)
	eventually(t, "the change to be published", func() bool { return n.savedRecord("a").Revision > own.Revision })
	n.announced("what was before", func(r registry.Record) bool {
		return r.Revision > own.Revision && slices.Equal(r.Endpoints, own.Endpoints)
	})
	if n.log.count("another node publishes") != 0 {
		t.Error("this node was taken for a rival of itself")
	}
}

// Two helpers with one name on one registry come to rest.
func TestTwoWithOneName(t *testing.T) {
	for name, key := range map[string]wgtypes.Key{"two keys": {9}, "one key": keyA} {
		t.Run(name, func(t *testing.T) {
			first, second := newNode(t, record("b")), newNode(t)
			first.resync, second.resync = shortResync, shortResync
			second.registry, second.key = first.registry, key
			second.kernel.underlay = underlay("198.51.100.1")
			first.start()
			second.start()
			eventually(t, "one to give way", func() bool { return first.report().Rival != second.report().Rival })
			first.quiet()
			second.quiet()
			if got := len(first.registry.publications()); got > 6 {
				t.Errorf("%d publications", got)
			}
			if first.report().Rival == second.report().Rival {
				t.Error("both gave way, or none")
			}
		})
	}
}

func TestTombstone(t *testing.T) {
	n := newNode(t, record("b"))
	own := n.joins()
	n.holds(plannedAlone)
	gone := tombstone("a", own.Revision+1)
	n.registry.put(gone)
	if err := n.ended(); !errors.Is(err, reconcile.ErrLeft) {
		t.Errorf("Run: %v, want ErrLeft", err)
	}
	if got, _ := n.registry.own(); !got.Equal(gone) {
		t.Errorf("the tombstone was replaced by %+v", got)
	}
	n.holds(plannedAlone) // the command takes it down
}

// The order to leave comes while this node is publishing a change: it is not to
// be overwritten.
func TestTombstoneWhilePublishing(t *testing.T) {
	n := newNode(t)
	own := n.joins()
	gone := tombstone("a", registry.MaxRevision/2)
	if own.Revision >= gone.Revision {
		t.Fatal("the clock is far ahead")
	}
	n.registry.set(func(r *fakeRegistry) {
		r.onPublish = func(registry.Record) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.records["a"] = gone // the watch has not told yet
			return nil
		}
	})
	n.kernel.set(func(k *fakeKernel) { k.underlay = underlay("192.0.2.77") })
	n.tell(kernel.Event{Underlay: true})
	eventually(t, "the refusal", func() bool { return n.log.count("record not published") == 1 })
	reports := len(n.allReports())
	eventually(t, "a pass after it", func() bool { return len(n.allReports()) > reports })
	n.registry.set(func(r *fakeRegistry) { r.onPublish = nil }) // now it tells
	if err := n.ended(); !errors.Is(err, reconcile.ErrLeft) {
		t.Errorf("Run: %v, want ErrLeft", err)
	}
	if got, _ := n.registry.own(); !got.Equal(gone) {
		t.Errorf("the tombstone was replaced by %+v", got)
	}
}

// A node that was forgotten while it was down joins again when it starts, but
// not with its old claims: others may hold its prefixes by now.
func TestTombstoneFromBefore(t *testing.T) {
	self := record("a")
	n := newNode(t, record("b"), tombstone("a", 20))
	n.knowing(store.Known{Self: self, Records: registry.NewSnapshot(self, record("b")), MTU: 1440})
	n.start()
	rec := n.announced("this node", anyRecord)
	if rec.Revision <= 20 || !rec.Since.After(self.Since) || !rec.Prefixes[0].Since.After(self.Since) {
		t.Errorf("joined with %+v", rec)
	}
	n.holds(plannedAlone)
}

// A node that was only restarted keeps its claims and its record.
func TestRestart(t *testing.T) {
	n := newNode(t, record("b"))
	own := n.joins()
	n.stop()
	offered := len(n.registry.publications())
	n.resync = shortResync
	n.start()
	eventually(t, "a pass that knows the registry", func() bool { return n.savedRecord("a").Equal(own) })
	n.quiet()
	if got, _ := n.registry.own(); !got.Equal(own) || len(n.registry.publications()) != offered {
		t.Errorf("after a restart the record is %+v, was %+v", got, own)
	}
}
