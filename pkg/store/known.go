package store

import (
	"context"
	"encoding/json"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"

	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/registry"
)

// Known is what a node knows of the mesh. It is durable, so that a node comes
// up encrypted while the registry is away.
type Known struct {
	// Self is this node's own record, as last made. Zero before the helper's first start.
	Self registry.Record
	// Records are all that were accepted from the registry, tombstones included.
	Records registry.Snapshot
	// Endpoints are the resolved ones, by node name.
	Endpoints map[string]netip.AddrPort
	// MTU of the interface and of the pods' links, in bytes; 0 if not yet found.
	MTU int
}

// Clone returns a copy that shares no map with k, but the records themselves.
func (k Known) Clone() Known {
	k.Records.Nodes = maps.Clone(k.Records.Nodes)
	k.Endpoints = maps.Clone(k.Endpoints)
	return k
}

var (
	recordsBucket   = []byte("records")
	endpointsBucket = []byte("endpoints")
	nodeBucket      = []byte("node")
	selfKey         = []byte("self")
	mtuKey          = []byte("mtu")
)

// KnownPath is the file of a state folder.
func KnownPath(stateDir string) string { return filepath.Join(stateDir, "peers.db") }

func openKnown(ctx context.Context, stateDir string, l layout) (*file, error) {
	l.buckets = [][]byte{recordsBucket, endpointsBucket, nodeBucket}
	return open(ctx, KnownPath(stateDir), l)
}

// LoadKnown reads what the node knew last. A damaged file yields nothing known,
// and a *Damaged beside it that tells where the file went.
func LoadKnown(ctx context.Context, stateDir string) (k Known, damaged *Damaged, err error) {
	f, err := openKnown(ctx, stateDir, layout{check: checkJSON})
	if err != nil {
		return Known{}, nil, err
	}
	defer func() { _ = f.close() }() // nothing was written
	k = Known{Records: registry.NewSnapshot(), Endpoints: map[string]netip.AddrPort{}}
	err = f.view(func(tx *bolt.Tx) error {
		err := tx.Bucket(recordsBucket).ForEach(func(name, v []byte) error {
			r, err := registry.Decode(string(name), v)
			if err == nil { // else a newer version wrote it: fetched anew
				k.Records.Nodes[r.Name] = &r
			}
			return nil
		})
		if err != nil {
			return err
		}
		err = tx.Bucket(endpointsBucket).ForEach(func(name, v []byte) error {
			var e netip.AddrPort
			if json.Unmarshal(v, &e) == nil {
				k.Endpoints[string(name)] = e
			}
			return nil
		})
		if err != nil {
			return err
		}
		node := tx.Bucket(nodeBucket)
		if v := node.Get(selfKey); v != nil {
			_ = json.Unmarshal(v, &k.Self) // made anew where it cannot be read
		}
		if v := node.Get(mtuKey); v != nil {
			_ = json.Unmarshal(v, &k.MTU)
		}
		return nil
	})
	return k, f.damaged, err
}

// SaveKnown writes what differs between before, which is what the file holds,
// and now. The transaction is as large as the change, not as the mesh.
func SaveKnown(ctx context.Context, stateDir string, before, now Known) error {
	return NewKnownFile(stateDir, before).Save(ctx, now)
}

// KnownFile writes what is known to its file, one change after another.
type KnownFile struct {
	stateDir string
	held     Known           // what the file holds
	info     fs.FileInfo     // of the file, as it was left; nil: there was none, or it is not known
	checked  bool            // all of it is as this process has written it
	noted    map[string]bool // names of which the next Save may find something else
	all      bool            // and so it may of any
	doubtful bool            // its pages are to be looked at before it is written again
}

// NewKnownFile returns the file of a state folder, which holds this.
func NewKnownFile(stateDir string, held Known) *KnownFile {
	k := &KnownFile{stateDir: stateDir, held: held.Clone(), noted: map[string]bool{}, all: true}
	if info, err := os.Stat(KnownPath(stateDir)); err == nil {
		k.info = info
	}
	return k
}

// Note says that what is known by these names may be something else than at the last
// Save, which looks at no others.
func (k *KnownFile) Note(names ...string) {
	for _, name := range names {
		k.noted[name] = true
	}
}

// NoteAll has the next Save look at all, and the next one that writes look at the
// pages of the file, too.
func (k *KnownFile) NoteAll() { k.all, k.doubtful = true, true }

// Save makes the file hold what is known now. All of a file is checked that was
// changed by anybody else, and all is written again: a damaged one is moved aside, and
// one that is gone would have a node that boots need the registry.
func (k *KnownFile) Save(ctx context.Context, now Known) error {
	info, err := os.Stat(KnownPath(k.stateDir))
	ours := err == nil && durable.Unchanged(k.info, info)
	if !ours {
		k.held, k.all = Known{}, true
	}
	changed := k.changes(now)
	if changed.empty() {
		k.settle()
		return nil
	}
	l := layout{check: checkJSON}
	if ours && k.checked {
		l.check, l.trusted = nil, !k.doubtful
	}
	k.info, k.checked, k.doubtful = nil, false, false
	f, err := openKnown(ctx, k.stateDir, l)
	if err != nil {
		return err
	}
	err = f.update(func(tx *bolt.Tx) error {
		if tx.Bucket(nodeBucket).Get(selfKey) == nil { // a new file, perhaps in the place of a damaged one
			k.held, k.all = Known{}, true
			changed = k.changes(now)
		}
		return changed.write(tx, now)
	})
	if closing := f.close(); err == nil {
		err = closing
	}
	if err != nil {
		return err
	}
	changed.take(&k.held, now)
	k.settle()
	left, err := os.Stat(KnownPath(k.stateDir))
	if err == nil && (info == nil || os.SameFile(info, left)) { // else somebody has put another in its place
		k.info, k.checked = left, true
	}
	return nil
}

// settle says that the file holds what has been noted.
func (k *KnownFile) settle() {
	k.all = false
	clear(k.noted)
}

// changes is what the file lacks.
func (k *KnownFile) changes(now Known) changes {
	empty := k.held.Records.Nodes == nil // then even a zero value is written
	c := changes{self: empty || !now.Self.Equal(k.held.Self), mtu: empty || now.MTU != k.held.MTU}
	// Those that are gone as well, or they would be used again after a reboot.
	if k.all {
		c.records = registry.Differing(k.held.Records.Nodes, now.Records.Nodes, sameRecord)
		c.endpoints = registry.Differing(k.held.Endpoints, now.Endpoints, sameEndpoint)
		return c
	}
	for name := range k.noted {
		if !sameOf(k.held.Records.Nodes, now.Records.Nodes, name, sameRecord) {
			c.records = append(c.records, name)
		}
		if !sameOf(k.held.Endpoints, now.Endpoints, name, sameEndpoint) {
			c.endpoints = append(c.endpoints, name)
		}
	}
	return c
}

func sameRecord(a, b *registry.Record) bool { return a == b || a.Equal(*b) }

func sameEndpoint(a, b netip.AddrPort) bool { return a == b }

// sameOf reports whether two maps have the same of one name.
func sameOf[V any](before, now map[string]V, name string, equal func(a, b V) bool) bool {
	was, had := before[name]
	is, has := now[name]
	return had == has && (!had || equal(was, is))
}

// changes are the names of what differs between two Known.
type changes struct {
	records, endpoints []string // that have come, changed or gone
	self, mtu          bool
}

func (c changes) empty() bool { return len(c.records)+len(c.endpoints) == 0 && !c.self && !c.mtu }

func (c changes) write(tx *bolt.Tx, now Known) error {
	for _, name := range c.records {
		if err := putOrDelete(tx.Bucket(recordsBucket), now.Records.Nodes, name); err != nil {
			return err
		}
	}
	for _, name := range c.endpoints {
		if err := putOrDelete(tx.Bucket(endpointsBucket), now.Endpoints, name); err != nil {
			return err
		}
	}
	node := tx.Bucket(nodeBucket)
	if c.self {
		if err := putJSON(node, selfKey, now.Self); err != nil {
			return err
		}
	}
	if c.mtu {
		return putJSON(node, mtuKey, now.MTU)
	}
	return nil
}

// take makes held what now is, as far as they differ.
func (c changes) take(held *Known, now Known) {
	if held.Records.Nodes == nil || held.Endpoints == nil {
		*held = now.Clone()
		return
	}
	for _, name := range c.records {
		takeOrDelete(held.Records.Nodes, now.Records.Nodes, name)
	}
	for _, name := range c.endpoints {
		takeOrDelete(held.Endpoints, now.Endpoints, name)
	}
	held.Self, held.MTU = now.Self, now.MTU
}

func takeOrDelete[V any](held, now map[string]V, name string) {
	if v, there := now[name]; there {
		held[name] = v
	} else {
		delete(held, name)
	}
}

func putOrDelete[V any](b *bolt.Bucket, now map[string]V, name string) error {
	if v, there := now[name]; there {
		return putJSON(b, []byte(name), v)
	}
	return b.Delete([]byte(name))
}

// Equal reports whether both say the same.
func (k Known) Equal(o Known) bool {
	return k.Self.Equal(o.Self) && k.Records.SameRecords(o.Records) &&
		maps.Equal(k.Endpoints, o.Endpoints) && k.MTU == o.MTU
}

func putJSON(b *bolt.Bucket, key []byte, value any) error {
	v, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return b.Put(key, v)
}
