// Package registrytest holds the tests that every registry.Store must pass.
package registrytest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// Deadline is how long a condition may take to come about; reached only by a
// test that fails.
const Deadline = 30 * time.Second

// Registry is what the helpers below work on: a *registry.Registry.
type Registry interface {
	Publish(ctx context.Context, record registry.Record, seen uint64) error
	Snapshot(ctx context.Context) (registry.Snapshot, error)
	Watch(ctx context.Context) <-chan registry.Update
	String() string
}

var _ Registry = (*registry.Registry)(nil)

// Backend makes a new, empty store, which lives until the end of t. The function
// it returns opens handles onto that one store, each as good as one of another
// process.
type Backend func(t *testing.T) (open func() registry.Store)

// Run runs the whole suite.
func Run(t *testing.T, backend Backend) {
	runStore(t, backend)
	for _, c := range []struct {
		name string
		test func(t *testing.T, open func() Registry)
	}{
		{"read back", readBack},
		{"empty at first", emptyAtFirst},
		{"same again is no-op", sameAgain},
		{"invalid is refused", invalidRefused},
		{"stale is refused", staleRefused},
		{"tombstone", tombstone},
		{"names are isolated", namesIsolated},
		{"concurrent publishers", concurrentPublishers},
		{"watch: present state, then changes", watchChanges},
		{"watch: last state of a burst", watchBurst},
		{"watch: slow reader gets the last state", watchSlowReader},
		{"watch: ends with ctx", watchEnds},
		{"cancelled ctx", cancelled},
		{"made without knowing", madeUnknowing},
	} {
		t.Run(c.name, func(t *testing.T) {
			store := backend(t)
			c.test(t, func() Registry { return registry.New(store(), registry.Trust{}) })
		})
	}
	t.Run("sealed", func(t *testing.T) { sealed(t, backend(t)) })
	t.Run("watch: trust changes", func(t *testing.T) { trustChanges(t, backend(t)) })
}

// Record returns a valid record with something in every field, its times cut to
// what is stored.
func Record(name string, revision uint64) registry.Record {
	since := time.Date(2026, 3, 1, 12, 0, 0, 250e6, time.UTC)
	r := registry.Record{
		Name:      name,
		Endpoints: []string{name + ".example.net:51820", "192.0.2.7:51820", "[2001:db8::7]:51820"},
		Prefixes:  []mesh.Claim{{Prefix: netip.MustParsePrefix("10.244.1.0/24"), Since: since}},
		Pods:      []mesh.Claim{{Prefix: netip.MustParsePrefix("fd00::7/128"), Since: since.Add(time.Minute)}},
		Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")},
		Since:     since,
		Revision:  revision,
	}
	copy(r.PublicKey[:], name)
	r.PublicKey[31] |= 1
	return r
}

// Await reads updates until one fulfils done, and returns that one.
func Await(t *testing.T, updates <-chan registry.Update, what string, done func(registry.Update) bool) registry.Update {
	t.Helper()
	timeout := time.After(Deadline)
	var last registry.Update
	for {
		select {
		case u, open := <-updates:
			if !open {
				t.Fatalf("channel closed while waiting for: %s", what)
			}
			if done(u) {
				return u
			}
			last = u
		case <-timeout:
			t.Fatalf("not within %v: %s; the last update was %+v", Deadline, what, last)
		}
	}
}

// Has returns the condition that an update shows r.
func Has(r registry.Record) func(registry.Update) bool {
	return func(u registry.Update) bool {
		got, ok := u.Snapshot.Record(r.Name)
		return u.Err == nil && ok && got.Equal(r)
	}
}

// Publish publishes, and fails the test if that fails.
func Publish(t *testing.T, r Registry, records ...registry.Record) {
	t.Helper()
	for _, record := range records {
		if err := r.Publish(t.Context(), record, record.Revision-1); err != nil {
			t.Fatalf("publish %s revision %d: %v", record.Name, record.Revision, err)
		}
	}
}

// Expect fails the test unless the registry holds exactly these records.
func Expect(t *testing.T, r Registry, want ...registry.Record) {
	t.Helper()
	got, err := r.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(registry.NewSnapshot(want...), got); diff != "" {
		t.Fatalf("%s (-want +got):\n%s", r, diff)
	}
}

func readBack(t *testing.T, open func() Registry) {
	want := Record("node-a", 3)
	want.Since = want.Since.Add(123 * time.Microsecond).In(time.FixedZone("", 3600))
	Publish(t, open(), want)
	Expect(t, open(), want)
	if open().String() == "" {
		t.Error("the registry has no name")
	}
}

func emptyAtFirst(t *testing.T, open func() Registry) { Expect(t, open()) }

func sameAgain(t *testing.T, open func() Registry) {
	r := open()
	Publish(t, r, Record("node-a", 3), Record("node-a", 3))
	Publish(t, open(), Record("node-a", 3))
	Expect(t, r, Record("node-a", 3))
}

func invalidRefused(t *testing.T, open func() Registry) {
	r := open()
	if err := r.Publish(t.Context(), registry.Record{Name: "Node_A", Revision: 1}, 0); err == nil {
		t.Error("an invalid record was published")
	}
	Expect(t, r)
}

func staleRefused(t *testing.T, open func() Registry) {
	r := open()
	Publish(t, r, Record("node-a", 5))
	changed := Record("node-a", 5)
	changed.Endpoints = nil
	for _, offered := range []registry.Record{Record("node-a", 4), changed, {Name: "node-a", Revision: 5, Left: true}} {
		err := open().Publish(t.Context(), offered, 5)
		var stale registry.Stale
		if !errors.Is(err, registry.ErrStale) || !errors.As(err, &stale) {
			t.Fatalf("revision %d after 5: got error %v, want ErrStale", offered.Revision, err)
		}
		if diff := cmp.Diff(registry.Stale{Name: "node-a", Known: 5, Offered: offered.Revision}, stale); diff != "" {
			t.Error(diff)
		}
	}
	Expect(t, r, Record("node-a", 5))
}

func tombstone(t *testing.T, open func() Registry) {
	r := open()
	left := registry.Record{Name: "node-a", Revision: 6, Left: true}
	Publish(t, r, Record("node-a", 5), Record("node-b", 1), left)
	Expect(t, r, left, Record("node-b", 1))
	if err := r.Publish(t.Context(), Record("node-a", 5), 6); !errors.Is(err, registry.ErrStale) {
		t.Errorf("the record from before it left: got error %v, want ErrStale", err)
	}
	Publish(t, r, Record("node-a", 7))
	Expect(t, r, Record("node-a", 7), Record("node-b", 1))
}

func namesIsolated(t *testing.T, open func() Registry) {
	// Prefixes of one another: a key range must not take one for the other.
	names := []string{"a", "a.b", "aa", "a-b", "b"}
	r := open()
	var want []registry.Record
	for i, name := range names {
		want = append(want, Record(name, uint64(100-i)))
	}
	Publish(t, r, want...)
	want[0] = Record("a", 101)
	Publish(t, open(), want[0])
	Expect(t, r, want...)
}

func concurrentPublishers(t *testing.T, open func() Registry) {
	const publishers, revisions = 8, 5
	var want []registry.Record
	var wg sync.WaitGroup
	for i := range publishers {
		name, r := fmt.Sprintf("node-%d", i), open()
		want = append(want, Record(name, revisions))
		wg.Go(func() {
			for rev := range uint64(revisions) {
				if err := r.Publish(t.Context(), Record(name, rev+1), rev); err != nil {
					t.Errorf("publish %s: %v", name, err)
				}
			}
		})
	}
	wg.Wait()
	Expect(t, open(), want...)
}

func watchChanges(t *testing.T, open func() Registry) {
	writer := open()
	Publish(t, writer, Record("node-a", 1))
	updates := open().Watch(t.Context())
	first := Await(t, updates, "the first update", func(registry.Update) bool { return true })
	if !Has(Record("node-a", 1))(first) {
		t.Fatalf("the first update is %+v, not the present state", first)
	}
	for rev := uint64(2); rev < 6; rev++ {
		Publish(t, writer, Record("node-b", rev))
		u := Await(t, updates, fmt.Sprintf("node-b at revision %d", rev), Has(Record("node-b", rev)))
		if !Has(Record("node-a", 1))(u) {
			t.Fatalf("an update without node-a: %+v", u)
		}
	}
}

func watchBurst(t *testing.T, open func() Registry) {
	updates := open().Watch(t.Context())
	writer := open()
	const last = 40
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for rev := range uint64(last) {
			if err := writer.Publish(t.Context(), Record("node-a", rev+1), rev); err != nil {
				t.Errorf("publish: %v", err)
			}
		}
	})
	first, before := true, uint64(0)
	Await(t, updates, "the last state", func(u registry.Update) bool {
		r, _ := u.Snapshot.Record("node-a")
		got := r.Revision
		if u.Err != nil || got < before || got == before && !first {
			t.Fatalf("after revision %d: %+v; want a later one", before, u)
		}
		first, before = false, got
		return got == last
	})
}

func watchSlowReader(t *testing.T, open func() Registry) {
	updates := open().Watch(t.Context())
	Await(t, updates, "the first update", func(registry.Update) bool { return true })
	// Nobody reads during all this, and other watchers must not wait for it.
	other, writer := open().Watch(t.Context()), open()
	for rev := range uint64(20) {
		Publish(t, writer, Record("node-a", rev+1))
	}
	Await(t, other, "the last state", Has(Record("node-a", 20)))
	Await(t, updates, "the last state", Has(Record("node-a", 20)))
}

func watchEnds(t *testing.T, open func() Registry) {
	for _, read := range []bool{true, false} {
		ctx, cancel := context.WithCancel(t.Context())
		updates := open().Watch(ctx)
		if read {
			Await(t, updates, "the first update", func(registry.Update) bool { return true })
		}
		cancel()
		timeout := time.After(Deadline)
		for closed := false; !closed; {
			select {
			case _, more := <-updates:
				closed = !more
			case <-timeout:
				t.Fatalf("the channel is not closed %v after ctx ended", Deadline)
			}
		}
	}
}

func cancelled(t *testing.T, open func() Registry) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := open()
	if err := r.Publish(ctx, Record("node-a", 1), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("Publish: got error %v, want context.Canceled", err)
	}
	if _, err := r.Snapshot(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Snapshot: got error %v, want context.Canceled", err)
	}
	Expect(t, r)
}

// A tombstone that came while a later record was made has the last word: the
// record's maker did not know of it.
func madeUnknowing(t *testing.T, open func() Registry) {
	r := open()
	left := registry.Record{Name: "node-a", Revision: 6, Left: true}
	Publish(t, r, Record("node-a", 5), left)
	err := open().Publish(t.Context(), Record("node-a", 7), 5)
	var stale registry.Stale
	if !errors.As(err, &stale) || stale != (registry.Stale{Name: "node-a", Known: 6, Offered: 7}) {
		t.Errorf("got error %v, want a Stale", err)
	}
	Expect(t, r, left)
	Publish(t, r, Record("node-a", 7)) // knowing of 6
	Expect(t, r, Record("node-a", 7))
}

// Text returns the record as it is stored.
func Text(t testing.TB, r registry.Record) []byte {
	t.Helper()
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// Secrets returns a trust with that many fresh secrets.
func Secrets(t testing.TB, n int) registry.Trust {
	t.Helper()
	var trust registry.Trust
	for i := range n {
		s, err := identity.NewSecret(time.Date(2026, 3, 1+i, 0, 0, 0, 0, time.UTC))
		if err != nil {
			t.Fatal(err)
		}
		trust.Secrets = append(trust.Secrets, s)
	}
	return trust
}

// Seal returns the record with the trust's seal.
func Seal(t testing.TB, trust registry.Trust, r registry.Record) registry.Record {
	t.Helper()
	r, err := trust.Seal(r)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// What cannot be trusted is listed as invalid, keeps nobody from publishing, and
// is written over.
func sealed(t *testing.T, open func() registry.Store) {
	trust, attacker := Secrets(t, 1), registry.New(open(), registry.Trust{})
	r := registry.New(open(), trust)
	good := Seal(t, trust, Record("node-a", 5))
	Publish(t, r, good)
	Expect(t, r, good)

	if err := r.Publish(t.Context(), Record("node-a", 6), 5); !errors.Is(err, identity.ErrUnsealed) {
		t.Errorf("publish without a seal: error %v, want ErrUnsealed", err)
	}
	altered := good
	altered.Revision = registry.MaxRevision
	for name, c := range map[string]struct {
		record registry.Record
		want   error
	}{
		"unsealed": {Record("node-a", registry.MaxRevision), identity.ErrUnsealed},
		"altered":  {altered, identity.ErrForged},
		"other":    {Seal(t, Secrets(t, 1), Record("node-a", registry.MaxRevision)), identity.ErrUnknownSecret},
	} {
		t.Run(name, func(t *testing.T) {
			if err := attacker.Publish(t.Context(), c.record, registry.MaxRevision); err != nil {
				t.Fatal(err)
			}
			s, err := r.Snapshot(t.Context())
			if err != nil || len(s.Nodes) != 0 || !errors.Is(s.Invalid["node-a"], c.want) {
				t.Errorf("snapshot %+v, error %v; want node-a invalid: %v", s, err, c.want)
			}
			if err := r.Publish(t.Context(), good, 5); err != nil {
				t.Errorf("the node cannot publish any more: %v", err)
			}
			Expect(t, r, good)
		})
	}
}

// A secret that is no longer trusted takes its records with it, and one that is
// trusted anew brings them back, without any change in the store.
func trustChanges(t *testing.T, open func() registry.Store) {
	both := Secrets(t, 2)
	first := registry.Trust{Secrets: both.Secrets[:1]}
	second := registry.Trust{Secrets: both.Secrets[1:]}
	a, b := Seal(t, first, Record("node-a", 1)), Seal(t, second, Record("node-b", 1))
	Publish(t, registry.New(open(), both), a, b)

	r := registry.New(open(), first)
	updates := r.Watch(t.Context())
	is := func(want ...registry.Record) func(registry.Update) bool {
		return func(u registry.Update) bool {
			return u.Err == nil && u.Snapshot.SameRecords(registry.NewSnapshot(want...))
		}
	}
	Await(t, updates, "what the first secret has sealed", is(a))
	r.SetTrust(both)
	Await(t, updates, "all", is(a, b))
	r.SetTrust(second)
	Await(t, updates, "what the second secret has sealed", is(b))
}
