package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"sync"
)

// Registry is the records of a store, as far as they are to be trusted.
type Registry struct {
	store Store

	mu       sync.Mutex
	trust    Trust
	distrust chan struct{} // closed when trust changes
}

// New returns the registry in a store.
func New(store Store, trust Trust) *Registry {
	return &Registry{store: store, trust: trust, distrust: make(chan struct{})}
}

// String names the registry, such as "file:/srv/shared/mesh.json".
func (r *Registry) String() string { return r.store.String() }

// SetTrust looks at all records anew. Every Watch sends an Update.
func (r *Registry) SetTrust(t Trust) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.trust = t
	close(r.distrust)
	r.distrust = make(chan struct{})
}

// Trust returns whom the registry trusts.
func (r *Registry) Trust() Trust {
	t, _ := r.trusted()
	return t
}

// trusted returns the trust that counts, and what tells of its end.
func (r *Registry) trusted() (Trust, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.trust, r.distrust
}

// Publish puts the record, which must be sealed, under its name. seen is the
// revision of that name's record which the caller knew when it made this one, 0
// for none. A record of another maker that has come meanwhile stands: the error
// then is ErrStale, and a Stale. Publishing what is already there is a cheap
// no-op. What is stored and may not be trusted has no revision to respect.
//
// A Publish that ctx ended may or may not have taken place.
func (r *Registry) Publish(ctx context.Context, record Record, seen uint64) error {
	if err := record.Validate(); err != nil {
		return err
	}
	trust := r.Trust()
	if err := trust.Check(record); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	data, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("encode record %s: %w", record.Name, err)
	}
	return r.store.Update(ctx, record.Name, func(stored []byte) ([]byte, error) {
		if stored == nil {
			return data, nil
		}
		known, err := trust.decode(record.Name, stored)
		if err != nil {
			return data, nil //nolint:nilerr // nobody acts upon it
		}
		later, err := Accept(known, record)
		if err == nil && later && known.Revision > seen {
			err = Stale{Name: record.Name, Known: known.Revision, Offered: record.Revision}
		}
		if err != nil || !later {
			return nil, err
		}
		return data, nil
	})
}

// Snapshot returns the present records.
func (r *Registry) Snapshot(ctx context.Context) (Snapshot, error) {
	entries, err := r.store.Entries(ctx)
	if err != nil {
		return Snapshot{}, err
	}
	trust := r.Trust()
	s, _ := new(reader).read(Change{Entries: entries}, trust)
	return s, nil
}

// Update is either a Snapshot or the reason why there is none.
type Update struct {
	Snapshot Snapshot
	// Changed are the names by which Snapshot may differ from that of the last Update
	// that had one. If it is empty all may differ.
	Changed []string
	Err     error
}

// Watch sends the present records at once and an Update after every change, as
// Store.Watch does. The channel is closed when ctx ends, and by nothing else.
func (r *Registry) Watch(ctx context.Context) <-chan Update {
	out := make(chan Update)
	go func() {
		defer close(out)
		r.watch(ctx, out)
	}()
	return out
}

func (r *Registry) watch(ctx context.Context, out chan<- Update) {
	changes := r.store.Watch(ctx)
	trust, distrust := r.trusted()
	var (
		reader  reader
		present Change
		begun   bool
		send    chan<- Update // nil while there is nothing new
		update  Update
		changed []string // since an Update with a Snapshot was sent
	)
	for {
		select {
		case change, open := <-changes:
			if !open { // ctx has ended
				return
			}
			present, begun = change, true
		case <-distrust:
			trust, distrust = r.trusted()
			reader.forget()
			if !begun {
				continue
			}
		case send <- update:
			if send = nil; update.Err == nil {
				changed = nil
			}
			continue
		}
		update, send = Update{Err: present.Err}, out
		if present.Err == nil {
			s, names := reader.read(present, trust)
			changed = union(changed, names)
			update.Snapshot, update.Changed = s, changed
		}
	}
}

// reader remembers what it read, so that of a mesh of thousands only the records
// that changed are decoded and checked.
type reader struct {
	before Entries
	last   Snapshot // of before
	anew   bool     // all is to be read anew
}

func (d *reader) forget() { d.anew = true }

// read lists the records that are valid and trusted, and why the others are not. The
// names are those by which that may differ from what was read last.
func (d *reader) read(c Change, trust Trust) (s Snapshot, names []string) {
	switch {
	case d.anew:
		names = Differing(d.before, c.Entries, func(_, _ []byte) bool { return false })
	case d.before == nil || len(c.Changed) == 0:
		names = Differing(d.before, c.Entries, bytes.Equal)
	default:
		names = c.Changed
	}
	// What differs is put into copies: a map of thousands is copied in a tenth of
	// the time in which it is made.
	s = Snapshot{Nodes: maps.Clone(d.last.Nodes), Invalid: maps.Clone(d.last.Invalid)}
	if s.Nodes == nil {
		s.Nodes = make(map[string]*Record, len(names))
	}
	for _, name := range names {
		delete(s.Nodes, name)
		delete(s.Invalid, name)
		raw, there := c.Entries[name]
		if !there {
			continue
		}
		record, err := trust.decode(name, raw)
		switch {
		case err == nil:
			s.Nodes[name] = &record
		case s.Invalid == nil:
			s.Invalid = map[string]error{name: err}
		default:
			s.Invalid[name] = err
		}
	}
	if len(s.Invalid) == 0 {
		s.Invalid = nil
	}
	d.before, d.last, d.anew = c.Entries, s, false
	return s, names
}
