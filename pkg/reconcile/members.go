package reconcile

import (
	"cmp"
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// members are the machines of the mesh, sorted by name, with what a Loop has made
// of each one's record. It is kept for as long as the record stays the same one:
// of thousands a pass then looks closer at those only that have changed.
type members struct {
	list []member
	// The following are what has been made of all.
	nodes   []*mesh.Node
	revoked map[wgtypes.Key]string
	wide    bool // an endpoint may need an IPv6 header's room; see Room
	enters  bool // plain machines enter by this node, be it in its stead
	entry   bool // plain machines enter by this node
	// rotating says that another replaces its key; ordered is the latest order to all to do so.
	rotating bool
	ordered  struct {
		at time.Time
		by string
	}

	outdated map[string]bool // names whose records read has yet to look at

	self  string // this node's name
	below []netip.Addr
	pairs *identity.Pairs
	own   identity.SecretID // that sealed this node's record
}

type member struct {
	record   *registry.Record
	node     *mesh.Node // nil until it is asked for
	endpoint netip.AddrPort
	// named says that an endpoint is a DNS name, whose address may change; unresolved
	// that endpoint is not of this record.
	named, unresolved bool
	// The following are of the record. Thousands of those lie all over the memory,
	// the members in a row.
	other    bool // takes part, and is not this node
	wide     bool
	enters   bool // by this node
	masked   bool // Masqueraded
	rotating bool
	revoked  bool        // the record revokes key
	key      wgtypes.Key // that is revoked
	ordered  time.Time   // when its operator last asked all nodes to rotate; zero if the node has left
}

// note says that the records of these names are others than at the last read.
func (m *members) note(names ...string) {
	if m.outdated == nil {
		m.outdated = map[string]bool{}
	}
	for _, name := range names {
		m.outdated[name] = true
	}
}

// rekeyed reports whether any of these names has another key than at the last read.
func (m *members) rekeyed(records registry.Snapshot, names []string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		i, there := slices.BinarySearchFunc(m.list, name, compareMember)
		now, known := records.Nodes[name]
		return there && known && m.list[i].record.PublicKey != now.PublicKey
	})
}

// read takes in the records of the mesh as the named node knows them. But for the
// first time, it looks at those alone that note was told of.
func (m *members) read(records registry.Snapshot, self string) {
	if self != m.self {
		m.self, m.list = self, nil
		m.note(slices.Collect(maps.Keys(records.Nodes))...)
	}
	if len(m.outdated) == 0 {
		return
	}
	var come []member
	gone := false
	for name := range m.outdated {
		record, known := records.Nodes[name]
		switch i, there := slices.BinarySearchFunc(m.list, name, compareMember); {
		case !there && known:
			come = append(come, m.newMember(record, netip.AddrPort{}))
		case there && known && record != m.list[i].record:
			m.list[i] = m.newMember(record, m.list[i].endpoint)
		case there && !known:
			gone = true
		}
	}
	if gone {
		m.list = slices.DeleteFunc(m.list, func(at member) bool {
			_, known := records.Nodes[at.record.Name]
			return !known
		})
	}
	if len(come) > 0 {
		m.list = append(m.list, come...)
		slices.SortFunc(m.list, func(a, b member) int { return cmp.Compare(a.record.Name, b.record.Name) })
	}
	m.outdated = nil // it may have been all
	m.survey()
}

func compareMember(m member, name string) int { return cmp.Compare(m.record.Name, name) }

func (m *members) newMember(r *registry.Record, endpoint netip.AddrPort) member {
	at := member{
		record: r, endpoint: endpoint, unresolved: true,
		other: !r.Left && r.Name != m.self, wide: wide(*r), enters: r.Enters(m.self), masked: r.Masqueraded,
	}
	at.rotating = at.other && r.Stage != mesh.Resting
	if at.key, at.revoked = r.Revoked(); !r.Left {
		at.ordered = r.RotateAll
	}
	for _, e := range r.Endpoints {
		host, _, err := net.SplitHostPort(e)
		if err == nil {
			_, err = netip.ParseAddr(host)
		}
		at.named = at.named || err != nil
	}
	return at
}

// survey looks at what is to be said of all.
func (m *members) survey() {
	m.nodes, m.revoked, m.wide, m.enters, m.entry, m.rotating = nil, map[wgtypes.Key]string{}, false, false, false, false
	m.ordered.at, m.ordered.by = time.Time{}, ""
	for i := range m.list {
		at := &m.list[i]
		m.wide = m.wide || at.wide
		m.enters = m.enters || at.enters
		m.entry = m.entry || at.enters && !at.masked
		m.rotating = m.rotating || at.rotating
		if at.ordered.After(m.ordered.at) {
			m.ordered.at, m.ordered.by = at.ordered, at.record.Name
		}
		if at.revoked && m.revoked[at.key] == "" {
			m.revoked[at.key] = at.record.Name
		}
	}
}

// resolve finds out where each is reached from a machine with these addresses. It
// brings endpoints, which are by name, up to date, returns the names of those that have
// changed, and reports to moved the records of those that had another.
func (m *members) resolve(
	ctx context.Context, r *Resolver, below []netip.Addr, endpoints map[string]netip.AddrPort, now time.Time, moved func(registry.Record),
) (changed []string) {
	all := !slices.Equal(m.below, below)
	m.below = slices.Clone(below)
	valid := 0
	for i := range m.list {
		at := &m.list[i]
		if !at.other {
			continue
		}
		if all || at.named || at.unresolved {
			before := endpoints[at.record.Name]
			e := r.Endpoint(ctx, *at.record, below, before, now)
			if before.IsValid() && e.IsValid() && before != e {
				moved(*at.record)
			}
			if e.IsValid() && before != e {
				endpoints[at.record.Name] = e
				changed = append(changed, at.record.Name)
			}
			if at.unresolved = false; at.endpoint != e {
				at.endpoint, at.node, m.nodes = e, nil, nil
			}
		}
		if at.endpoint.IsValid() {
			valid++
		}
	}
	if valid == len(endpoints) {
		return changed
	}
	for name := range endpoints { // of machines that are gone, or have none any more
		i, known := slices.BinarySearchFunc(m.list, name, compareMember)
		if !known || !m.list[i].other || !m.list[i].endpoint.IsValid() {
			delete(endpoints, name)
			changed = append(changed, name)
		}
	}
	return changed
}

// asNodes are those that Facts has, sorted by name. Those that have not changed are
// the same ones as at the last time.
func (m *members) asNodes(pairs *identity.Pairs, own identity.SecretID) []*mesh.Node {
	anew := pairs != m.pairs || own != m.own
	if m.nodes != nil && !anew {
		return m.nodes
	}
	m.pairs, m.own = pairs, own
	m.nodes = make([]*mesh.Node, 0, len(m.list))
	for i := range m.list {
		at := &m.list[i]
		if !at.other {
			continue
		}
		if at.node == nil || anew {
			n := peerNode(*at.record, at.endpoint, pairs, own)
			at.node = &n
		}
		m.nodes = append(m.nodes, at.node)
	}
	return m.nodes
}
