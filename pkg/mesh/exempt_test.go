package mesh_test

import (
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// TestSharedKeyExemptsNobodysPods: a node loses its peers to a copy of its public
// key. A third that names one of its pods as its own address, or endpoint, must not
// have the others send to that pod in the clear.
func TestSharedKeyExemptsNobodysPods(t *testing.T) {
	pod, since := netip.MustParseAddr("10.244.2.2"), time.Unix(1000, 0)
	nodes := func(copied bool, edit func(*mesh.Node)) []mesh.Node {
		victim := mesh.Node{Name: "b", PublicKey: wgtypes.Key{2}, Since: since, Prefixes: []mesh.Claim{{Prefix: netip.MustParsePrefix("10.244.2.0/24"), Since: since}}}
		copycat := mesh.Node{Name: "copy", PublicKey: wgtypes.Key{3}, Since: since.Add(time.Hour)}
		if copied {
			copycat.PublicKey = victim.PublicKey
		}
		third := mesh.Node{Name: "third", PublicKey: wgtypes.Key{4}, Since: since.Add(time.Hour)}
		edit(&third)
		return []mesh.Node{victim, copycat, third}
	}
	bounds := mesh.Bounds{Cluster: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}
	for name, edit := range map[string]func(*mesh.Node){
		"address":  func(n *mesh.Node) { n.Addresses = []netip.Addr{pod} },
		"endpoint": func(n *mesh.Node) { n.Endpoint = netip.AddrPortFrom(pod, 51820) },
	} {
		for _, copied := range []bool{false, true} {
			if o := mesh.Owners(nodes(copied, edit), bounds, nil); len(o.Exempt) > 0 {
				t.Errorf("%s, key copied: %v: exempt is %v; want nobody", name, copied, o.Exempt)
			}
		}
	}
}
