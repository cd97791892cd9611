package store

import (
	"context"
	"encoding/json"
	"maps"
	"net/netip"
	"path/filepath"

	bolt "go.etcd.io/bbolt"

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

func openKnown(ctx context.Context, stateDir string) (*file, error) {
	return open(ctx, KnownPath(stateDir), layout{buckets: [][]byte{recordsBucket, endpointsBucket, nodeBucket}, check: checkJSON})
}

// LoadKnown reads what the node knew last. A damaged file yields nothing known,
// and a *Damaged beside it that tells where the file went.
func LoadKnown(ctx context.Context, stateDir string) (k Known, damaged *Damaged, err error) {
	f, err := openKnown(ctx, stateDir)
	if err != nil {
		return Known{}, nil, err
	}
	defer func() { _ = f.close() }() // nothing was written
	k = Known{Records: registry.NewSnapshot(), Endpoints: map[string]netip.AddrPort{}}
	err = f.guarded(func() error {
		return f.db.View(func(tx *bolt.Tx) error {
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
	})
	return k, f.damaged, err
}

// SaveKnown writes what differs between before, which is what the file holds,
// and now. The transaction is as large as the change, not as the mesh.
func SaveKnown(ctx context.Context, stateDir string, before, now Known) error {
	f, err := openKnown(ctx, stateDir)
	if err != nil {
		return err
	}
	if f.damaged != nil {
		before = Known{}
	}
	err = f.guarded(func() error {
		return f.db.Update(func(tx *bolt.Tx) error {
			if tx.Bucket(nodeBucket).Get(selfKey) == nil {
				before = Known{} // somebody else has put a new file in a damaged one's place
			}
			for name, r := range now.Records.Nodes {
				if was, ok := before.Records.Nodes[name]; !ok || was != r && !was.Equal(*r) {
					if err := putJSON(tx.Bucket(recordsBucket), []byte(name), r); err != nil {
						return err
					}
				}
			}
			for name := range before.Records.Nodes {
				if _, ok := now.Records.Nodes[name]; !ok {
					if err := tx.Bucket(recordsBucket).Delete([]byte(name)); err != nil {
						return err
					}
				}
			}
			for name := range before.Endpoints {
				if _, ok := now.Endpoints[name]; !ok { // else it would be used again after a reboot
					if err := tx.Bucket(endpointsBucket).Delete([]byte(name)); err != nil {
						return err
					}
				}
			}
			for name, e := range now.Endpoints {
				if before.Endpoints[name] != e {
					if err := putJSON(tx.Bucket(endpointsBucket), []byte(name), e); err != nil {
						return err
					}
				}
			}
			node := tx.Bucket(nodeBucket)
			if err := putJSON(node, selfKey, now.Self); err != nil {
				return err
			}
			return putJSON(node, mtuKey, now.MTU)
		})
	})
	if closing := f.close(); err == nil {
		err = closing
	}
	return err
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
