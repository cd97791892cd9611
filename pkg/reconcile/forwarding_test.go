package reconcile_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

func TestForwardingNote(t *testing.T) {
	prefix := netip.MustParsePrefix
	known := store.Known{Records: registry.NewSnapshot()}
	entered := store.Known{Records: registry.NewSnapshot()}
	entered.Records.Nodes["laptop"] = new(registry.Record{Name: "laptop", Place: registry.Place{Via: []string{"b", "a"}}})
	removed := store.Known{Records: registry.NewSnapshot()}
	removed.Records.Nodes["laptop"] = new(registry.Record{Name: "laptop", Left: true, Place: registry.Place{Via: []string{"a"}}})
	v4 := config.Config{NodeName: "a", Settings: mesh.Settings{ClusterCIDRs: []netip.Prefix{prefix("10.244.0.0/16")}}}
	gateway, router, host := v4, v4, v4
	gateway.Role = mesh.RoleGateway
	router.Subnets, host.Subnets = []netip.Prefix{prefix("10.244.9.0/24")}, []netip.Prefix{prefix("10.244.9.1/32")}
	dual := gateway
	dual.PeerCIDRs = []netip.Prefix{prefix("fd00:250::/64")}
	for _, tt := range []struct {
		name  string
		c     config.Config
		known store.Known
		on    map[bool]bool // forwarding, by being IPv6
		want  string        // the sysctls
	}{
		{"a node", v4, known, nil, ""},
		{"a gateway that forwards", gateway, known, map[bool]bool{false: true}, ""},
		{"a gateway that does not", gateway, known, nil, "net.ipv4.ip_forward=1"},
		{"of both families", dual, known, nil, "net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"},
		{"of one of them", dual, known, map[bool]bool{false: true}, "net.ipv6.conf.all.forwarding=1"},
		{"a range behind it", router, known, nil, "net.ipv4.ip_forward=1"},
		{"an address of its own", host, known, nil, ""},
		{"a laptop enters by it", v4, entered, nil, "net.ipv4.ip_forward=1"},
		{"no more", v4, removed, nil, ""},
	} {
		got := reconcile.ForwardingNote(tt.c, tt.known, func(ipv6 bool) bool { return tt.on[ipv6] })
		if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
