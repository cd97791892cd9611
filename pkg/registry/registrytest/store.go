package registrytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/registry"
)

// runStore tests what a store promises of its own: bytes, atomic steps.
func runStore(t *testing.T, backend Backend) {
	for _, c := range []struct {
		name string
		test func(t *testing.T, open func() registry.Store)
	}{
		{"update: nothing, something, something else", updateSteps},
		{"update: declined", updateDeclined},
		{"update: none is lost", updateRace},
		{"watch: again after an error is no repetition", watchOnce},
		{"watch: names what has changed", watchNames},
	} {
		t.Run("store "+c.name, func(t *testing.T) { c.test(t, backend(t)) })
	}
}

// put stores value whatever is there.
func put(t *testing.T, s registry.Store, name, value string) {
	t.Helper()
	if err := s.Update(t.Context(), name, func([]byte) ([]byte, error) { return []byte(value), nil }); err != nil {
		t.Fatalf("update %s: %v", name, err)
	}
}

// sameJSON compares what is stored with what was put: a store may indent.
func sameJSON(a, b []byte) bool {
	strip := func(x []byte) string { return string(bytes.Join(bytes.Fields(x), nil)) }
	return strip(a) == strip(b)
}

func expectEntries(t *testing.T, s registry.Store, want map[string]string) {
	t.Helper()
	got, err := s.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !maps.EqualFunc(got, want, func(a []byte, b string) bool { return sameJSON(a, []byte(b)) }) {
		t.Errorf("entries %s, want %v", got, want)
	}
}

func updateSteps(t *testing.T, open func() registry.Store) {
	steps := []string{"", `{"a":1}`, `{"a":2}`}
	for i, step := range steps[1:] {
		err := open().Update(t.Context(), "node-a", func(stored []byte) ([]byte, error) {
			if !sameJSON(stored, []byte(steps[i])) || (stored == nil) != (i == 0) {
				t.Errorf("stored is %q, want %q", stored, steps[i])
			}
			return []byte(step), nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	put(t, open(), "node-b", `{"c":[true,null]}`)
	expectEntries(t, open(), map[string]string{"node-a": steps[2], "node-b": `{"c":[true,null]}`})
}

func updateDeclined(t *testing.T, open func() registry.Store) {
	s := open()
	put(t, s, "node-a", `{"a":1}`)
	refusal := errors.New("no")
	for _, want := range []error{nil, refusal} {
		err := open().Update(t.Context(), "node-a", func([]byte) ([]byte, error) { return nil, want })
		if !errors.Is(err, want) {
			t.Errorf("got error %v, want %v", err, want)
		}
	}
	expectEntries(t, s, map[string]string{"node-a": `{"a":1}`})
}

// Each of several writers appends its mark to one entry, over and over.
func updateRace(t *testing.T, open func() registry.Store) {
	const writers, times = 4, 5
	var wg sync.WaitGroup
	for i := range writers {
		s := open()
		wg.Go(func() {
			for range times {
				err := s.Update(t.Context(), "node-a", func(stored []byte) ([]byte, error) {
					inner := bytes.Trim(bytes.Join(bytes.Fields(stored), nil), "[]")
					if len(inner) > 0 {
						inner = append(inner, ',')
					}
					return fmt.Appendf(nil, "[%s%d]", inner, i), nil
				})
				if err != nil {
					t.Errorf("update: %v", err)
				}
			}
		})
	}
	wg.Wait()
	entries, err := open().Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range writers {
		if n := bytes.Count(entries["node-a"], fmt.Append(nil, i)); n != times {
			t.Errorf("writer %d stored %d times and %d are left: %s", i, times, n, entries["node-a"])
		}
	}
}

// A change that leaves everything as it is sends nothing.
func watchOnce(t *testing.T, open func() registry.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := open()
	put(t, s, "node-a", `{"a":1}`)
	changes := open().Watch(ctx)
	next := func() registry.Change {
		select {
		case c := <-changes:
			return c
		case <-time.After(Deadline):
			t.Fatal("no change was sent")
			return registry.Change{}
		}
	}
	if c := next(); c.Err != nil || len(c.Entries) != 1 {
		t.Fatalf("at first: %+v", c)
	}
	put(t, s, "node-a", `{"a":1}`)
	put(t, s, "node-b", `{"b":1}`)
	if c := next(); c.Err != nil || len(c.Entries) != 2 {
		t.Fatalf("after a repetition and a change: %+v", c)
	}
}

// Follow takes from a change what it says has changed.
func Follow(reader registry.Entries, c registry.Change) {
	names := c.Changed
	if len(names) == 0 {
		names = registry.Differing(reader, c.Entries, bytes.Equal)
	}
	for _, name := range names {
		if entry, there := c.Entries[name]; there {
			reader[name] = entry
		} else {
			delete(reader, name)
		}
	}
}

// A reader who looks only at what is said to have changed has everything.
func watchNames(t *testing.T, open func() registry.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := open()
	put(t, s, "node-0", `{"a":1}`)
	changes := open().Watch(ctx)
	reader, named := registry.Entries{}, 0
	look := func() (last registry.Entries) {
		select {
		case c := <-changes:
			named += len(c.Changed)
			Follow(reader, c)
			if c.Err != nil || !maps.EqualFunc(reader, c.Entries, bytes.Equal) {
				t.Fatalf("told of %v of %v, %v; the reader has %v", c.Changed, c.Entries, c.Err, reader)
			}
			return c.Entries
		case <-time.After(Deadline):
			t.Fatal("no change was sent")
			return nil
		}
	}
	look()
	named = 0
	const changed = 20
	for i := range changed {
		value := fmt.Sprintf(`{"a":%d}`, i)
		put(t, s, fmt.Sprint("node-", i%5), value)
		if i%4 > 0 { // the others are told of with the next one
			continue
		}
		for !sameJSON(look()[fmt.Sprint("node-", i%5)], []byte(value)) {
		}
	}
	if named == 0 || named > changed {
		t.Errorf("%d names were told of %d changes", named, changed)
	}
}
