package registry

import "context"

// Store is where the records of a mesh lie, as bytes by node name. It looks at
// none of them: that is Registry's work, the same for every store. Package file
// and package etcd are stores.
//
// Handles are safe for concurrent use, and any number of them, in any number of
// processes, may be open on one store.
type Store interface {
	// Update replaces the entry of that name in one atomic step. change is given
	// what is stored, nil for nothing, and returns what is to be stored; it returns
	// nil to leave things as they are, and an error to give up, which Update
	// passes on. It may be called again, with other bytes, where somebody else was
	// quicker, so it must have no other effect. The other entries stay as they
	// are, to the byte. An Update that ctx ended may or may not have taken place.
	Update(ctx context.Context, name string, change func(stored []byte) ([]byte, error)) error

	// Entries returns all entries.
	Entries(ctx context.Context) (Entries, error)

	// Watch sends the present entries at once and then one Change after every
	// change. Changes in quick succession may be sent as one; the last state
	// always is sent. While the store cannot be read it sends one Change with Err
	// for every new cause, and Entries again when it is back. The channel is
	// closed when ctx ends, and by nothing else.
	Watch(ctx context.Context) <-chan Change

	// String names the store, such as "file:/srv/shared/mesh.json".
	String() string
}

// Entries are what is stored, by node name. Do not modify one that you were given.
type Entries map[string][]byte

// Change is either the present Entries or the reason why there are none.
type Change struct {
	Entries Entries
	// Changed are the names by which Entries may differ from those of the last Change
	// that had any, so that of a mesh of thousands nobody need look at all. If it is
	// empty all may differ.
	Changed []string
	Err     error
}

// Differing are the names, in no order, that only one of the two has, or both with
// another value.
func Differing[V any](before, now map[string]V, equal func(a, b V) bool) (names []string) {
	both := 0
	for name, v := range now {
		was, ok := before[name]
		if ok {
			both++
		}
		if !ok || !equal(was, v) {
			names = append(names, name)
		}
	}
	if both == len(before) {
		return names
	}
	for name := range before {
		if _, ok := now[name]; !ok {
			names = append(names, name)
		}
	}
	return names
}
