package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// Members that were told of each change are those that are read anew.
func TestMembersFollowChanges(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 12))
	const self = "node-0"
	record := func(i int, revision uint64) *registry.Record {
		r := &registry.Record{Name: fmt.Sprint("node-", i), Revision: revision}
		switch rng.IntN(5) {
		case 0:
			r.Left = true
			if rng.IntN(2) == 0 {
				r.PublicKey = wgtypes.Key{1, byte(rng.IntN(3))}
			}
			return r
		case 1:
			r.Via, r.Masqueraded = []string{fmt.Sprint("node-", rng.IntN(3))}, rng.IntN(2) == 0
		case 2:
			r.Stage, r.RotateAll = mesh.Out, time.Unix(int64(rng.IntN(100)), 0)
		}
		r.PublicKey = wgtypes.Key{2, byte(i)}
		r.Endpoints = [][]string{nil, {"192.0.2.1:51820"}, {"[2001:db8::1]:51820"}, {"a.example:51820"}}[rng.IntN(4)]
		return r
	}
	known := registry.NewSnapshot()
	var m members
	resolver := Resolver{Changed: func() {}, Lookup: func(context.Context, string, string) ([]netip.Addr, error) { return nil, errors.New("no such host") }}
	endpoints := map[string]netip.AddrPort{}
	for revision := range uint64(2000) {
		switch names := slices.Sorted(maps.Keys(known.Nodes)); {
		case rng.IntN(20) == 0 && len(names) > 0: // no longer trusted
			name := names[rng.IntN(len(names))]
			delete(known.Nodes, name)
			m.note(name)
		default:
			fresh := registry.NewSnapshot()
			for _, i := range rng.Perm(12)[:rng.IntN(4)] {
				r := record(i, revision+1)
				fresh.Nodes[r.Name] = r
			}
			before := maps.Clone(known.Nodes)
			changed, _ := known.Take(fresh, slices.Collect(maps.Keys(fresh.Nodes)))
			var want []string
			for name, r := range known.Nodes {
				if before[name] != r {
					want = append(want, name)
				}
			}
			slices.Sort(changed)
			slices.Sort(want)
			if !slices.Equal(changed, want) {
				t.Fatalf("told of %v, want %v", changed, want)
			}
			m.note(changed...)
			if rng.IntN(3) == 0 {
				continue // several words of the registry before the next pass
			}
		}
		m.read(known, self)
		before := maps.Clone(endpoints)
		below := []netip.Addr{{}, netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")}[rng.IntN(3):][:1]
		changed := m.resolve(t.Context(), &resolver, below, endpoints, time.Unix(0, 0), func(registry.Record) {})
		want := registry.Differing(before, endpoints, func(a, b netip.AddrPort) bool { return a == b })
		if slices.Sort(changed); !slices.Equal(changed, slices.Sorted(slices.Values(want))) {
			t.Fatalf("told of the endpoints of %v, want %v", changed, want)
		}
		var anew members
		anew.read(known, self)
		if !slices.EqualFunc(m.list, anew.list, func(a, b member) bool {
			a.node, a.endpoint, a.unresolved = nil, netip.AddrPort{}, true
			return a == b
		}) {
			t.Fatalf("members are %+v, want %+v", m.list, anew.list)
		}
		if !maps.Equal(m.revoked, anew.revoked) || m.wide != anew.wide || m.enters != anew.enters || m.entry != anew.entry ||
			m.rotating != anew.rotating || m.ordered != anew.ordered {
			t.Fatalf("it says %+v of all, want %+v", m, anew)
		}
	}
}
