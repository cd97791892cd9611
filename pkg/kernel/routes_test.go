package kernel_test

import (
	"net/netip"
	"testing"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// The late DEL of a pod that is on another node by now takes away the route to
// nowhere, if it is there still, and not the one into the tunnel that took its place.
func TestRemoveRouteThatWasReplaced(t *testing.T) {
	k := open(t)
	for _, pod := range []string{"10.244.9.9/32", "fd00:244:9::9/128"} {
		local := mesh.Facts{LocalPods: []netip.Addr{netip.MustParsePrefix(pod).Addr()}, Nodes: []mesh.Node{node(1, "10.244.1.0/24", "fd00:244:1::/64")}}
		remote := mesh.Facts{Nodes: []mesh.Node{node(1, "10.244.1.0/24", "fd00:244:1::/64", pod)}}
		for name, facts := range map[string][2]mesh.Facts{"throw": {local, remote}, "tunnel": {remote, local}} {
			before, after := plan(facts[0]), plan(facts[1])
			apply(t, k, after)
			for _, r := range before.Routes {
				if r.Prefix.String() == pod {
					if err := k.Apply([]mesh.Op{mesh.RemoveRoute{Route: r}}); err != nil {
						t.Fatal(err)
					}
				}
			}
			if ops := apply(t, k, after); len(ops) > 0 {
				t.Errorf("the removed %s route of %s took another with it: to mend\n%s", name, pod, mesh.Text(ops))
			}
		}
	}
}
