package reconcile

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// Report is how things stand after a pass.
type Report struct {
	At            time.Time       `json:"at"`
	Error         string          `json:"error,omitempty"`         // of the last pass
	RegistryError string          `json:"registryError,omitempty"` // why it cannot be read
	RegistrySince time.Time       `json:"registrySince,omitzero"`  // since when
	PublishError  string          `json:"publishError,omitempty"`  // why this node's record cannot be written
	PublishSince  time.Time       `json:"publishSince,omitzero"`   // since when
	SecretsError  string          `json:"secretsError,omitempty"`  // why the cluster's secrets cannot be read again
	Conflicts     []mesh.Conflict `json:"conflicts,omitempty"`
	Refused       []Refusal       `json:"refused,omitempty"` // records of the registry that do not count
	// RefusedTotal counts all that were refused since the helper's start, by kind.
	RefusedTotal map[string]uint64 `json:"refusedTotal,omitempty"`
	Rival        bool              `json:"rival,omitempty"`     // another node uses our name
	Forgotten    bool              `json:"forgotten,omitempty"` // the mesh has revoked our key
	Unreached    []Unreached       `json:"unreached,omitempty"` // nodes to which node traffic cannot be delivered
	// Rotation is that of this node's key, while one is going on.
	Rotation *RotationReport `json:"rotation,omitempty"`
}

// RotationReport is how far the rotation of this node's key has come.
type RotationReport struct {
	Stage mesh.Stage `json:"stage"`
	Since time.Time  `json:"since"` // when the stage began, or the helper, if that was later
	Pairs int        `json:"pairs"` // the tunnels that have to change planes
	Moved int        `json:"moved"` // those of them that have
	// Waiting are those that have not, and why.
	Waiting []RotationWait `json:"waiting,omitempty"`
}

func (r RotationReport) equal(o RotationReport) bool {
	return r.Stage == o.Stage && r.Since.Equal(o.Since) && r.Pairs == o.Pairs && r.Moved == o.Moved && slices.Equal(r.Waiting, o.Waiting)
}

// RotationWait is a node that a rotation waits for.
type RotationWait struct {
	Node string `json:"node"`
	Why  string `json:"why"`
}

// Refusal is a record of the registry that does not count.
type Refusal struct {
	Node   string    `json:"node"` // the name that it is stored under
	Kind   string    `json:"kind"`
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
}

// The kinds of refusals.
const (
	KindUnsealed      = "unsealed"
	KindUnknownSecret = "unknown secret"
	KindForged        = "forged"    // or altered: the seal is not of this record
	KindReplayed      = "replayed"  // a revision that has been followed by another
	KindNewer         = "newer"     // made by a version that this one does not understand
	KindMalformed     = "malformed" // truncated, no JSON, a field that cannot be
)

func kindOf(err error) string {
	for _, k := range []struct {
		kind string
		err  error
	}{
		{KindUnsealed, identity.ErrUnsealed},
		{KindUnknownSecret, identity.ErrUnknownSecret},
		{KindForged, identity.ErrForged},
		{KindReplayed, registry.ErrStale},
		{KindNewer, registry.ErrVersion},
	} {
		if errors.Is(err, k.err) {
			return k.kind
		}
	}
	return KindMalformed
}

// refusals are the records that do not count, and how many did not in all.
type refusals struct {
	standing map[refused]Refusal
	total    map[string]uint64 // by kind
}

// refused tells refusals apart. A reason alone may name another record: the one
// that the entry says it is.
type refused struct{ node, reason string }

// hear takes in a snapshot's refusals and returns those that are new. An
// outdated record of our own is no news: what we publish meets what we are told.
func (f *refusals) hear(own string, invalid map[string]error, stale []registry.Stale, now time.Time) (news []Refusal) {
	standing := map[refused]Refusal{}
	refuse := func(node string, err error) {
		r := Refusal{Node: node, Kind: kindOf(err), Reason: cut(err.Error()), Since: now}
		at := refused{node, r.Reason}
		if was, known := f.standing[at]; known {
			r.Since = was.Since
		} else {
			news = append(news, r)
			if f.total == nil {
				f.total = map[string]uint64{}
			}
			f.total[r.Kind]++
		}
		standing[at] = r
	}
	for name, err := range invalid {
		refuse(name, err)
	}
	for _, s := range stale {
		if s.Name != own {
			refuse(s.Name, s)
		}
	}
	f.standing = standing
	slices.SortFunc(news, compareRefusals)
	return news
}

// cut bounds a text that quotes what somebody wrote to the registry.
func cut(s string) string {
	const most = 500
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

func (f *refusals) sorted() []Refusal {
	return slices.SortedFunc(maps.Values(f.standing), compareRefusals)
}

func compareRefusals(a, b Refusal) int {
	return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Reason, b.Reason))
}

func (l *Loop) report(o Outcome, err error, mended int) {
	if l.Report == nil && l.Passed == nil {
		return
	}
	r := Report{
		At: l.Now(), Conflicts: o.Plan.Conflicts, Rival: l.rival, Forgotten: l.forgotten(), Unreached: l.nodesUnreached,
		Refused: l.refusals.sorted(), RefusedTotal: maps.Clone(l.refusals.total), SecretsError: l.secretsError,
	}
	if err != nil {
		r.Error = err.Error()
	}
	if l.away != nil {
		r.RegistryError, r.RegistrySince = l.away.Error(), l.awaySince
	}
	if l.Keys.Stage != mesh.Resting {
		turning := l.turning
		r.Rotation = &turning
	}
	if l.unpublished != "" {
		r.PublishError, r.PublishSince = l.unpublished, l.unpublishedSince
	}
	if l.Report != nil {
		l.Report(r)
	}
	if l.Passed != nil {
		p := Passed{Report: r, Pods: len(o.Pods), Repairs: mended, Took: o.Took}
		if l.planned != nil {
			p.Peers, p.Spare = l.planned.Peers, l.planned.Spare.Peers
		}
		l.Passed(p)
	}
}
