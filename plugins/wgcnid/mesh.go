package main

import (
	"context"
	"errors"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// registryTimeout bounds what a command waits for the registry.
const registryTimeout = 10 * time.Second

// meshView is the mesh as a command sees it: what the registry says, taken into
// what this node knows already, as the helper does.
type meshView struct {
	registry *registry.Registry
	known    store.Known
	records  registry.Snapshot // accepted ones; Invalid has those of the registry that are refused
	stale    []registry.Stale
	away     error // why the registry cannot be read
}

// viewMesh reads the mesh. A registry that is away is no error of viewMesh.
func viewMesh(ctx context.Context, c config.Config) (v meshView, err error) {
	if v.registry, err = openRegistry(c); err != nil {
		return v, err
	}
	if v.known, _, err = store.LoadKnown(ctx, c.StateDir); err != nil {
		return v, err
	}
	trust := v.registry.Trust()
	for name, r := range v.known.Records.Nodes {
		if trust.Check(r) != nil {
			delete(v.known.Records.Nodes, name)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	fresh, err := v.registry.Snapshot(ctx)
	v.away = err
	v.records, v.stale = registry.Merge(v.known.Records, fresh)
	return v, nil
}

// bury puts a tombstone in the place of a node's record, until it stands. It
// revokes the node's key where that is asked for. A node that is not there, or
// has left, is left alone, but for a key that is yet to be revoked.
func (v meshView) bury(ctx context.Context, name string, revoke bool) error {
	for {
		fresh, err := v.registry.Snapshot(ctx)
		if err != nil {
			return err
		}
		merged, _ := registry.Merge(v.records, fresh)
		record, there := merged.Nodes[name]
		if !there || record.Left {
			return nil
		}
		gone := registry.Record{Name: name, Left: true, Revision: registry.NextRevision(record.Revision, time.Now())}
		if revoke {
			gone.PublicKey = record.PublicKey
		}
		if gone, err = v.registry.Trust().Seal(gone); err != nil {
			return err
		}
		if err := v.registry.Publish(ctx, gone, record.Revision); !errors.Is(err, registry.ErrStale) {
			return err
		}
	}
}
