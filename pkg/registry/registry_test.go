package registry_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// A registry that is down, emptied, wiped or rolled back removes no peer; an API
// that was away for 60 s emptied kilo's mesh (Node.Ready).
func TestMerge(t *testing.T) {
	record := registrytest.Record
	changed := record("a", 5)
	changed.Endpoints = changed.Endpoints[:1]
	left := func(name string, revision uint64) registry.Record {
		return registry.Record{Name: name, Revision: revision, Left: true}
	}
	type records []registry.Record
	for _, c := range []struct {
		name                string
		cached, fresh, want records
		stale               []registry.Stale
	}{
		{name: "nothing"},
		{name: "first", fresh: records{record("a", 1)}, want: records{record("a", 1)}},
		{name: "emptied", cached: records{record("a", 5), record("b", 2)}, want: records{record("a", 5), record("b", 2)}},
		{name: "one missing", cached: records{record("a", 5), record("b", 2)}, fresh: records{record("b", 3)}, want: records{record("a", 5), record("b", 3)}},
		{name: "the same", cached: records{record("a", 5)}, fresh: records{record("a", 5)}, want: records{record("a", 5)}},
		{name: "later", cached: records{record("a", 5)}, fresh: records{record("a", 6)}, want: records{record("a", 6)}},
		{
			name: "rolled back", cached: records{record("b", 5), record("a", 7)}, fresh: records{record("b", 4), record("a", 6)},
			want:  records{record("b", 5), record("a", 7)},
			stale: []registry.Stale{{Name: "a", Known: 7, Offered: 6}, {Name: "b", Known: 5, Offered: 4}},
		},
		{
			name: "altered in place", cached: records{record("a", 5)}, fresh: records{changed},
			want: records{record("a", 5)}, stale: []registry.Stale{{Name: "a", Known: 5, Offered: 5}},
		},
		{name: "left", cached: records{record("a", 5)}, fresh: records{left("a", 6)}, want: records{left("a", 6)}},
		{
			name: "tombstone of before", cached: records{record("a", 7)}, fresh: records{left("a", 6)},
			want: records{record("a", 7)}, stale: []registry.Stale{{Name: "a", Known: 7, Offered: 6}},
		},
		{
			name: "risen from a rollback", cached: records{left("a", 6)}, fresh: records{record("a", 5)},
			want: records{left("a", 6)}, stale: []registry.Stale{{Name: "a", Known: 6, Offered: 5}},
		},
		{name: "joined again", cached: records{left("a", 6)}, fresh: records{record("a", 7)}, want: records{record("a", 7)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cached, fresh := registry.NewSnapshot(c.cached...), registry.NewSnapshot(c.fresh...)
			merged, stale := registry.Merge(cached, fresh)
			if diff := cmp.Diff(registry.NewSnapshot(c.want...), merged); diff != "" {
				t.Errorf("merged (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(c.stale, stale); diff != "" {
				t.Errorf("stale (-want +got):\n%s", diff)
			}
			if !cached.Equal(registry.NewSnapshot(c.cached...)) || !fresh.Equal(registry.NewSnapshot(c.fresh...)) {
				t.Error("an argument was modified")
			}
		})
	}
}

func TestMergeKeepsTheLastValidRecord(t *testing.T) {
	cached := registry.NewSnapshot(registrytest.Record("a", 1))
	merged, _ := registry.Merge(cached, registry.Snapshot{Invalid: map[string]error{"a": errors.New("bad")}})
	if !merged.Nodes["a"].Equal(*cached.Nodes["a"]) || merged.Invalid["a"] == nil {
		t.Errorf("merged: %+v", merged)
	}
	if merged, _ = registry.Merge(merged, registry.Snapshot{}); merged.Invalid != nil {
		t.Errorf("an old complaint was kept: %+v", merged.Invalid)
	}
}

// The laws of Merge on random histories. Where every record of a revision is the
// same, as one node makes them, the order of arrival does not matter.
func TestMergeLaws(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	snapshot := func() registry.Snapshot {
		s := registry.NewSnapshot()
		for i := range 5 {
			r := registrytest.Record(fmt.Sprintf("node-%d", i), 1+random.Uint64N(6))
			if r.Revision%3 == 0 {
				r = registry.Record{Name: r.Name, Revision: r.Revision, Left: true}
			}
			if random.IntN(2) == 0 {
				s.Nodes[r.Name] = &r
			}
		}
		return s
	}
	all := func(start registry.Snapshot, in []registry.Snapshot) registry.Snapshot {
		for _, s := range in {
			next, stale := registry.Merge(start, s)
			for name, before := range start.Nodes {
				if after, ok := next.Nodes[name]; !ok || after.Revision < before.Revision {
					t.Fatalf("%s went from %+v to %+v", name, before, after)
				}
			}
			for name := range s.Nodes {
				if _, ok := next.Nodes[name]; !ok {
					t.Fatalf("%s was not taken in", name)
				}
			}
			for _, x := range stale {
				if x.Known != start.Nodes[x.Name].Revision || x.Offered >= x.Known {
					t.Fatalf("stale %+v, but %+v is known", x, start.Nodes[x.Name])
				}
			}
			if again, stale := registry.Merge(next, next); !again.Equal(next) || len(stale) > 0 {
				t.Fatalf("not idempotent: %+v, stale %v", again, stale)
			}
			start = next
		}
		return start
	}
	for range 300 {
		history := []registry.Snapshot{snapshot(), snapshot(), snapshot(), snapshot()}
		want := all(registry.Snapshot{}, history)
		random.Shuffle(len(history), func(i, j int) { history[i], history[j] = history[j], history[i] })
		if got := all(registry.Snapshot{}, history); !got.Equal(want) {
			t.Fatalf("another order, another result:\n%s", cmp.Diff(want, got))
		}
	}
}

func TestRecordsAreSorted(t *testing.T) {
	s := registry.NewSnapshot(registrytest.Record("b", 1), registrytest.Record("c", 1), registrytest.Record("a", 1), registrytest.Record("a", 2), registrytest.Record("a", 1))
	var got []string
	for _, r := range s.Records() {
		got = append(got, fmt.Sprint(r.Name, r.Revision))
	}
	if diff := cmp.Diff([]string{"a2", "b1", "c1"}, got); diff != "" {
		t.Error(diff)
	}
}
