package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// registryTimeout bounds what a command waits for the registry: once to read it,
// once to write to it.
const registryTimeout = 10 * time.Second

// meshView is the mesh as a command sees it: what the registry says, taken into
// what this node knows already, as the helper does.
type meshView struct {
	registry *registry.Registry
	self     registry.Record   // this node's own, as its helper made it last
	records  registry.Snapshot // accepted ones; Invalid has those of the registry that are refused
	stale    []registry.Stale
	away     error // why the registry cannot be read
	mtu      int   // of this node's tunnel, in bytes; 0 if not known
}

// viewMesh reads the mesh. A registry that is away is no error of viewMesh.
func viewMesh(ctx context.Context, c config.Config) (v meshView, err error) {
	if v.registry, err = openRegistry(c); err != nil {
		return v, err
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	known, _, err := store.LoadKnown(ctx, c.StateDir)
	if err != nil {
		return v, err
	}
	trust := v.registry.Trust()
	for name, r := range known.Records.Nodes {
		if trust.Check(*r) != nil {
			delete(known.Records.Nodes, name)
		}
	}
	fresh, err := v.registry.Snapshot(ctx)
	v.self, v.mtu, v.away = known.Self, cmp.Or(c.MTU, known.MTU), err
	v.records, v.stale = registry.Merge(known.Records, fresh)
	return v, nil
}

// bury puts a tombstone in the place of a node's record, until it stands. With
// revoke it revokes the node's key; without, a tombstone that is there already
// is good enough. The registry need not have the record, nor be readable: the
// other nodes may know it all the same, and a damaged file is mended by writing.
func (v meshView) bury(ctx context.Context, name string, revoke bool) error {
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	records, key := v.records, wgtypes.Key{}
	for {
		record, _ := records.Record(name)
		if _, revoked := record.Revoked(); revoked || record.Left && !revoke {
			return nil
		}
		gone := registry.Record{Name: name, Left: true, Revision: registry.NextRevision(record.Revision, time.Now())}
		if revoke {
			if !record.Left { // else it has left meanwhile, and is not to come back with the key it had
				key = record.PublicKey
			}
			gone.PublicKey = key
		}
		gone, err := v.registry.Trust().Seal(gone)
		if err != nil {
			return err
		}
		if err := v.registry.Publish(ctx, gone, record.Revision); !errors.Is(err, registry.ErrStale) {
			return err
		}
		fresh, err := v.registry.Snapshot(ctx)
		if err != nil {
			return err
		}
		records, _ = registry.Merge(records, fresh)
	}
}

// foreign reports whether the record under this node's name is another node's.
// While this node has no key, nor ever had a record, nobody can tell.
func (v meshView) foreign(c config.Config) bool {
	record, known := v.records.Record(c.NodeName)
	own := []wgtypes.Key{v.self.PublicKey}
	if key, err := identity.Load(c.StateDir); err == nil {
		own = append(own, key.Public())
	}
	own = slices.DeleteFunc(own, func(k wgtypes.Key) bool { return k == wgtypes.Key{} })
	return known && !record.Left && len(own) > 0 && !slices.Contains(own, record.PublicKey)
}

// unheard says which other nodes have a cluster secret, if this one has none:
// they refuse what it publishes. It is empty if there are none.
func (v meshView) unheard(name string) string {
	var sealed []string
	for _, r := range v.records.Records() {
		if !r.Left && r.Name != name && !r.Seal.IsZero() {
			sealed = append(sealed, r.Name)
		}
	}
	if len(sealed) == 0 || len(v.registry.Trust().Secrets) > 0 {
		return ""
	}
	return fmt.Sprintf("this node has no cluster secret, so the nodes that have one do not believe it (%s): set \"clusterSecretFile\" here", names(sealed))
}
