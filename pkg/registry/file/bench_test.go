package file

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/wgcni/wgcni/pkg/registry"

	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// benchMesh returns a registry of that many nodes.
func benchMesh(b *testing.B, nodes int) handle {
	b.Helper()
	r := open(filepath.Join(b.TempDir(), "mesh.json"))
	doc := document{nodes: registry.Entries{}}
	for i := range nodes {
		name := fmt.Sprintf("node-%d", i)
		data, err := json.MarshalIndent(registrytest.Record(name, 1), "    ", "  ")
		if err != nil {
			b.Fatal(err)
		}
		doc.nodes[name] = data
	}
	data, err := doc.encode()
	if err != nil {
		b.Fatal(err)
	}
	if err := r.store.replace(data); err != nil {
		b.Fatal(err)
	}
	return r
}

func BenchmarkSnapshot(b *testing.B) {
	for _, nodes := range []int{10, 5000} {
		b.Run(fmt.Sprint(nodes), func(b *testing.B) {
			r := benchMesh(b, nodes)
			for b.Loop() {
				if _, err := r.Snapshot(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAnnounce is one node's change: publish on one handle, seen by a
// watcher on another.
func BenchmarkAnnounce(b *testing.B) {
	for _, nodes := range []int{10, 5000} {
		b.Run(fmt.Sprint(nodes), func(b *testing.B) {
			r := benchMesh(b, nodes)
			updates := open(r.store.path).Watch(b.Context())
			<-updates
			for rev := uint64(2); b.Loop(); rev++ {
				if err := r.Publish(b.Context(), registrytest.Record("node-0", rev), rev-1); err != nil {
					b.Fatal(err)
				}
				for u := range updates {
					if r, _ := u.Snapshot.Record("node-0"); r.Revision == rev {
						break
					}
				}
			}
		})
	}
}
