package mesh_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// node makes a member with key(n), that joined at(n), listens at 192.0.2.n and
// has held its prefixes since then.
func node(name string, n int, own ...string) mesh.Node {
	return mesh.Node{
		Name: name, PublicKey: key(n), Since: at(n), Prefixes: claims(n, own...),
		Endpoint: endpoint("192.0.2." + string(rune('0'+n)) + ":51820"),
	}
}

func TestNewPlan(t *testing.T) {
	a, b := node("a", 1, "10.244.1.0/24"), node("b", 2, "10.244.2.0/24")
	for _, tt := range planTests(a, b) {
		t.Run(tt.name, func(t *testing.T) {
			p := mesh.NewPlan(tt.facts)
			k := kerneltest.Kernel{Name: keyName}
			if err := k.Apply(mesh.Diff(mesh.State{}, p.State, mesh.Context{Now: at(100)})); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want[1:], k.String()); diff != "" {
				t.Errorf("kernel (-want +got):\n%s", diff)
			}
			var conflicts []string
			for _, c := range p.Conflicts {
				conflicts = append(conflicts, c.String())
			}
			if diff := cmp.Diff(tt.conflicts, conflicts); diff != "" {
				t.Errorf("conflicts (-want +got):\n%s", diff)
			}
		})
	}
}

type planTest struct {
	name      string
	facts     mesh.Facts
	want      string
	conflicts []string
}

func planTests(a, b mesh.Node) []planTest {
	v4 := settings("10.244.0.0/16")
	preferred := v4
	preferred.Encryption, preferred.Keepalive = mesh.Preferred, 25*time.Second
	noKey := a
	noKey.PublicKey = key(0)
	a6, b6 := node("a", 1, "fd00:244:1::/64"), node("b", 2, "fd00:244:2::/64")
	b6.Endpoint = endpoint("[2001:db8::2]:51820")
	outsider := b
	outsider.Pods = claims(5, "10.244.200.2/31")
	stray := a
	stray.Prefixes = append(claims(1, "192.168.0.0/24"), a.Prefixes...)
	flat, flatter := node("a", 1), node("b", 2)
	flat.Endpoint, flatter.Endpoint = endpoint("10.0.0.1:51820"), endpoint("10.0.0.2:51820")
	flat.Addresses, flatter.Addresses = addrs("10.0.0.1", "192.0.2.1"), addrs("10.0.0.2")
	flatter.Pods = claims(3, "10.0.7.7/32")
	liar := node("c", 3)
	liar.Addresses = addrs("10.244.2.9")
	secret := b
	secret.PresharedKey = psk(1)
	forgottenA := map[wgtypes.Key]string{a.PublicKey: "old-a"}
	selfForgotten := []string{"a: public key " + a.PublicKey.String() + " refused: it was revoked when old-a was forgotten; to let the machine in again, stop wgcnid there, run `wgcnid leave --purge` and start it"}
	thief := node("c", 3)
	thief.Pods = claims(9, "10.244.1.7/32")

	return []planTest{
		{"alone", mesh.Facts{Settings: v4, Self: a}, alone, nil},
		{"IPv4, required", mesh.Facts{Settings: v4, Self: a, Nodes: []mesh.Node{b, a}, LocalPods: addrs("10.244.1.5")}, required4, nil},
		{"IPv4, preferred", mesh.Facts{Settings: preferred, Self: a, Nodes: []mesh.Node{b}}, preferred4, nil},
		{"IPv6", mesh.Facts{Settings: settings("fd00:244::/32"), Self: a6, Nodes: []mesh.Node{b6}}, required6, nil},
		{"dual stack, one side of the other", mesh.Facts{
			Settings: settings("fd00:244::/32", "10.244.0.0/16"),
			Self:     node("a", 1, "10.244.1.0/24", "fd00:244:1::/64"), Nodes: []mesh.Node{b6, node("c", 3, "10.244.3.0/24")},
		}, dual, nil},
		// unknown peer, throw, plaintext (calico#3760). Without a key all is refused.
		{"no key yet", mesh.Facts{Settings: v4, Self: noKey, Nodes: []mesh.Node{b}, LocalPods: addrs("10.244.200.1")}, keyless, nil},
		{"no key yet, preferred", mesh.Facts{Settings: preferred, Self: noKey, Nodes: []mesh.Node{b}}, keylessPreferred, nil},
		// A node that was forgotten keeps its pods from being heard in plaintext, all the same.
		{
			"own key revoked",
			mesh.Facts{Settings: v4, Self: a, Nodes: []mesh.Node{b}, LocalPods: addrs("10.244.200.1"), Revoked: forgottenA},
			keyless, selfForgotten,
		},
		{"own key revoked, preferred", mesh.Facts{Settings: preferred, Self: a, Nodes: []mesh.Node{b}, Revoked: forgottenA}, keylessPreferred, selfForgotten},
		{
			"another's key revoked",
			mesh.Facts{Settings: v4, Self: a, Nodes: []mesh.Node{b}, Revoked: map[wgtypes.Key]string{b.PublicKey: "b"}},
			alone,
			[]string{"b: public key " + b.PublicKey.String() + " refused: it was revoked when b was forgotten; to let the machine in again, stop wgcnid there, run `wgcnid leave --purge` and start it"},
		},
		{"preshared key", mesh.Facts{Settings: v4, Self: a, Nodes: []mesh.Node{secret, node("c", 3)}}, presharedKey, nil},
		{"pods outside of prefixes", mesh.Facts{
			Settings: v4, Self: a, Nodes: []mesh.Node{outsider},
			LocalPods: addrs("10.244.200.1", "10.244.1.5", "192.0.2.77", "::ffff:10.244.200.9"),
		}, outside, nil},
		{"node addresses inside clusterCIDRs", mesh.Facts{
			Settings: settings("10.0.0.0/16"), Self: flat, Nodes: []mesh.Node{flatter}, LocalPods: addrs("10.0.7.1"),
		}, shared, nil},
		{
			"a tunnel address is of a prefix that peers can allow",
			mesh.Facts{Settings: v4, Self: stray},
			alone,
			[]string{"a: 192.168.0.0/24 refused: not inside clusterCIDRs"},
		},
		// Else c could have the whole mesh send in the clear to b's pod.
		{
			"node address in another's prefix",
			mesh.Facts{Settings: v4, Self: a, Nodes: []mesh.Node{b, liar}},
			withC,
			[]string{"c: address 10.244.2.9 refused: it lies inside 10.244.2.0/24, which b has held longer"},
		},
		{"a local pod in the own prefix that another claims", mesh.Facts{
			Settings: v4, Self: a, Nodes: []mesh.Node{b, thief}, LocalPods: addrs("10.244.1.7"),
		}, withC, nil},
	}
}
