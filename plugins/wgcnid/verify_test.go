package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// Who has nothing to send to is told why.
func TestVerifyTargets(t *testing.T) {
	b := registrytest.Record("b", 1)
	records := registry.NewSnapshot(registrytest.Record("a", 1), b)
	prefix := b.Prefixes[0].Prefix
	there := mesh.State{
		Peers:  []mesh.Peer{{PublicKey: b.PublicKey, AllowedIPs: []netip.Prefix{prefix}}},
		Routes: []mesh.Route{{Prefix: prefix, Type: mesh.ViaLink}},
	}
	targets, err := verifyTargets(there, records, "a", nil)
	if err != nil || len(targets) != 1 || targets[0].Name != "b" || targets[0].Address != prefix.Addr() {
		t.Fatalf("%+v, %v", targets, err)
	}
	unrouted := mesh.State{Peers: there.Peers}
	for _, c := range []struct {
		name  string
		state mesh.State
		names []string
		want  string
	}{
		{"no route", unrouted, nil, "none of the peers (b): `wgcnid doctor`"},
		{"no route to the one that is meant", unrouted, []string{"b"}, "`wgcnid doctor b`"},
		{"no such peer", there, []string{"c"}, `no peer "c": it has b`},
		{"no peers", mesh.State{}, nil, "no peers yet"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := verifyTargets(c.state, records, "a", c.names); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want %q in it", err, c.want)
			}
		})
	}
}
