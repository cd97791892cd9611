package registry

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// ErrStale is what a Publish of an outdated record returns.
var ErrStale = errors.New("stale revision")

// Stale is a record that was refused because of another that is known. As an
// error it is ErrStale. With equal revisions the contents differ: two nodes use
// one name, or somebody altered the record. An offered revision that is later
// was made without knowing of the other record.
type Stale struct {
	Name    string `json:"name"`
	Known   uint64 `json:"known"`   // the revision that stands
	Offered uint64 `json:"offered"` // the revision that was refused
}

func (s Stale) Error() string {
	if s.Known == s.Offered {
		return fmt.Sprintf("record %s: %v: %d is known with other content; does another node use this name?", s.Name, ErrStale, s.Known)
	}
	if s.Known < s.Offered {
		return fmt.Sprintf("record %s: %v: %d offered, without knowing of %d", s.Name, ErrStale, s.Offered, s.Known)
	}
	return fmt.Sprintf("record %s: %v: %d offered, %d is known; publish with a later revision", s.Name, ErrStale, s.Offered, s.Known)
}

// Is makes every Stale an ErrStale.
func (s Stale) Is(target error) bool { return target == ErrStale }

// Accept decides whether offered may take the place of known, a record of the
// same name: true if it is later, false if it is the same, else a Stale.
func Accept(known, offered Record) (bool, error) {
	switch {
	case offered.Revision > known.Revision:
		return true, nil
	case offered.Equal(known):
		return false, nil
	default:
		return false, Stale{Name: known.Name, Known: known.Revision, Offered: offered.Revision}
	}
}

// Snapshot is the records at one moment. Do not modify one that you were given.
type Snapshot struct {
	// Nodes has the records by node name, tombstones included. The same record is
	// shared by all snapshots that it is in: one of thousands is as large as a page
	// of text, and nearly all of them stay as they are from snapshot to snapshot.
	Nodes map[string]*Record
	// Invalid says, by the name that it is stored under, why a record is not
	// among Nodes.
	Invalid map[string]error
}

// NewSnapshot returns the snapshot of these records. Of several records of one
// name the latest revision counts, the first of them if they are equal.
func NewSnapshot(records ...Record) Snapshot {
	s := Snapshot{Nodes: make(map[string]*Record, len(records))}
	for _, r := range records {
		if known, ok := s.Nodes[r.Name]; !ok || r.Revision > known.Revision {
			s.Nodes[r.Name] = &r
		}
	}
	return s
}

// Record returns the record of a node; the zero Record where there is none.
func (s Snapshot) Record(name string) (record Record, known bool) {
	if r, ok := s.Nodes[name]; ok {
		return *r, true
	}
	return Record{}, false
}

// sameRecord reports whether two snapshots have the same of one name.
func sameRecord(a, b *Record) bool { return a == b || a.Equal(*b) }

// Records returns all records, tombstones included, sorted by name.
func (s Snapshot) Records() []Record {
	out := make([]Record, 0, len(s.Nodes))
	for _, r := range s.Nodes {
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b Record) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Equal reports whether both snapshots say the same.
func (s Snapshot) Equal(o Snapshot) bool {
	return s.SameRecords(o) &&
		maps.EqualFunc(s.Invalid, o.Invalid, func(a, b error) bool { return a.Error() == b.Error() })
}

// SameRecords reports whether both snapshots have the same records.
func (s Snapshot) SameRecords(o Snapshot) bool { return maps.EqualFunc(s.Nodes, o.Nodes, sameRecord) }

// Merge takes what a registry says now into what was accepted before. No name
// is ever lost and no revision ever goes back:
//
//   - a record that only cached has is kept: the registry may have been emptied;
//   - a later revision replaces an earlier one, be it a tombstone or not;
//   - an earlier revision, or an equal one with other content, is refused and
//     returned as Stale: the registry may have been rolled back.
//
// Invalid is fresh's; a node whose record has become invalid keeps its last
// valid one. The stale are sorted by name.
func Merge(cached, fresh Snapshot) (merged Snapshot, stale []Stale) {
	merged = Snapshot{Nodes: maps.Clone(cached.Nodes)}
	_, stale = merged.Take(fresh, slices.Collect(maps.Keys(fresh.Nodes)))
	return merged, stale
}

// Take is Merge, of the records of these names, for a snapshot that nobody else has: s
// becomes what is merged. Those that have changed are those, in no order, whose record
// in s is another one than before, be it equal; no record is ever lost.
func (s *Snapshot) Take(fresh Snapshot, names []string) (changed []string, stale []Stale) {
	s.Invalid = maps.Clone(fresh.Invalid)
	if len(s.Nodes) == 0 {
		s.Nodes = make(map[string]*Record, len(fresh.Nodes))
	}
	for _, name := range names {
		offered, there := fresh.Nodes[name]
		if !there {
			continue
		}
		if known, ok := s.Nodes[name]; ok {
			if known == offered {
				continue
			}
			later, err := Accept(*known, *offered)
			if s := (Stale{}); errors.As(err, &s) {
				stale = append(stale, s)
			}
			if !later && err != nil {
				continue
			} // else an equal one takes its place, so that the next time it is the same
		}
		s.Nodes[name] = offered
		changed = append(changed, name)
	}
	slices.SortFunc(stale, func(a, b Stale) int { return cmp.Compare(a.Name, b.Name) })
	return changed, stale
}
