package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// A reader who looks at those names alone that are said to have changed has all
// that the store has, however slow it is; and nothing is sent that it has.
func TestLatest(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var latest registry.Latest
	if _, news := latest.News(); news {
		t.Fatal("there is news of nothing")
	}
	present, reader := registry.Entries{}, registry.Entries{}
	var failure, told error
	begun := false
	for step := range 5000 {
		switch random.IntN(10) {
		case 0:
			failure = errors.New([]string{"away", "damaged"}[random.IntN(2)])
			latest.Put(registry.Change{Err: failure})
		case 1, 2, 3:
			failure = nil
			latest.Put(registry.Change{Entries: present}) // as after a new listing: any may have changed
		default:
			failure = nil
			present = maps.Clone(present)
			var names []string
			for range 1 + random.IntN(2) {
				name := fmt.Sprint("node-", random.IntN(4))
				names = append(names, name)
				if random.IntN(3) == 0 {
					delete(present, name)
				} else {
					present[name] = []byte{byte(random.IntN(2))}
				}
			}
			latest.Put(registry.Change{Entries: present, Changed: names})
		}
		if random.IntN(3) > 0 {
			continue
		}
		c, news := latest.News()
		same := begun && fmt.Sprint(told) == fmt.Sprint(failure) && (failure != nil || maps.EqualFunc(reader, present, bytes.Equal))
		if news == same {
			t.Fatalf("step %d: news %v; the reader has %v, %v, and the store %v, %v", step, news, reader, told, present, failure)
		}
		if !news {
			continue
		}
		latest.Sent()
		begun = true
		if told = c.Err; told != nil {
			continue
		}
		registrytest.Follow(reader, c)
		if !maps.EqualFunc(reader, present, bytes.Equal) {
			t.Fatalf("step %d: told of %v, the reader has %v, and the store %v", step, c.Changed, reader, present)
		}
	}
}

// The same of records, whose trust changes meanwhile.
func TestUpdateNamesWhatHasChanged(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	store := &scripted{changes: make(chan registry.Change)}
	both := registrytest.Secrets(t, 2)
	r := registry.New(store, both)
	updates := r.Watch(t.Context())
	var latest registry.Latest // of the script
	present, reader := registry.Entries{}, registry.NewSnapshot()
	put := func() {
		present = maps.Clone(present)
		name := fmt.Sprint("node-", random.IntN(4))
		switch random.IntN(4) {
		case 0:
			delete(present, name)
		case 1:
			present[name] = fmt.Appendf(nil, `{"name": %q, "broken": %d}`, name, random.IntN(2))
		default:
			trust := registry.Trust{Secrets: both.Secrets[random.IntN(2):][:1]}
			present[name] = registrytest.Text(t, registrytest.Seal(t, trust, registrytest.Record(name, 1+random.Uint64N(3))))
		}
		latest.Put(registry.Change{Entries: present, Changed: []string{name}})
	}
	tell := func() {
		c, news := latest.News()
		if !news {
			return
		}
		latest.Sent()
		for {
			select {
			case store.changes <- c:
				return
			case u := <-updates:
				apply(&reader, u)
			}
		}
	}
	trust := both
	for step := range 2000 {
		switch random.IntN(4) {
		case 0:
			trust = []registry.Trust{both, {Secrets: both.Secrets[:1]}, {Secrets: both.Secrets[1:]}}[random.IntN(3)]
			r.SetTrust(trust)
		case 1:
			latest.Put(registry.Change{Err: errors.New("away")})
		default:
			put()
		}
		tell()
		if step%7 > 0 {
			continue
		}
		latest.Put(registry.Change{Entries: present}) // it is back
		tell()
		want := registry.New(&scripted{entries: present}, trust)
		s, err := want.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		timeout := time.After(registrytest.Deadline)
		for !reader.Equal(s) {
			select {
			case u := <-updates:
				apply(&reader, u)
			case <-timeout:
				t.Fatalf("step %d: the reader has %+v, want %+v", step, reader, s)
			}
		}
	}
}

// apply takes from an update what is said to have changed.
func apply(reader *registry.Snapshot, u registry.Update) {
	if u.Err != nil {
		return
	}
	reader.Invalid = u.Snapshot.Invalid
	names := u.Changed
	if len(names) == 0 {
		names = slices.Concat(slices.Collect(maps.Keys(u.Snapshot.Nodes)), slices.Collect(maps.Keys(reader.Nodes)))
	}
	for _, name := range names {
		if record, there := u.Snapshot.Nodes[name]; there {
			reader.Nodes[name] = record
		} else {
			delete(reader.Nodes, name)
		}
	}
}

// scripted is a store that tells what the test says.
type scripted struct {
	changes chan registry.Change
	entries registry.Entries
}

func (s *scripted) Entries(context.Context) (registry.Entries, error) { return s.entries, nil }

func (s *scripted) String() string { return "scripted:" }

func (s *scripted) Update(context.Context, string, func([]byte) ([]byte, error)) error {
	return errors.ErrUnsupported
}

func (s *scripted) Watch(ctx context.Context) <-chan registry.Change {
	out := make(chan registry.Change)
	go func() {
		defer close(out)
		for {
			select {
			case c := <-s.changes:
				select {
				case out <- c:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}
