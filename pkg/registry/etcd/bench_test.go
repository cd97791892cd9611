package etcd

import (
	"fmt"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func benchStore(b *testing.B, nodes int) *Store {
	b.Helper()
	s := open(b, sharedConfig(b))
	admin := sharedServer(b).Client(b)
	for from := 0; from < nodes; from += 100 {
		if _, err := admin.Txn(b.Context()).Then(putOps(s, from, min(100, nodes-from), strings.Repeat("x", 600))...).Commit(); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

func BenchmarkEntries(b *testing.B) {
	for _, nodes := range []int{10, 5000} {
		b.Run(fmt.Sprint(nodes), func(b *testing.B) {
			s := benchStore(b, nodes)
			for b.Loop() {
				if _, err := s.Entries(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAnnounce is one node's change, seen by another's Watch.
func BenchmarkAnnounce(b *testing.B) {
	for _, nodes := range []int{10, 5000} {
		b.Run(fmt.Sprint(nodes), func(b *testing.B) {
			s := benchStore(b, nodes)
			changes, own := open(b, s.cfg).Watch(b.Context()), s.Watch(b.Context())
			<-changes
			<-own
			for i := 0; b.Loop(); i++ {
				value := fmt.Sprint(i)
				if err := s.Update(b.Context(), "node-0", set(value)); err != nil {
					b.Fatal(err)
				}
				for string((<-changes).Entries["node-0"]) != value {
				}
				<-own
			}
		})
	}
}

// BenchmarkPutToWatch is the same with nothing around it.
func BenchmarkPutToWatch(b *testing.B) {
	c, other := sharedServer(b).Client(b), sharedServer(b).Client(b)
	changes := other.Watch(b.Context(), "bare", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-changes
	for b.Loop() {
		if _, err := c.Put(b.Context(), "bare", "x"); err != nil {
			b.Fatal(err)
		}
		<-changes
	}
}
