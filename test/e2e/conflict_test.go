package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	wgmesh "github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/test/cluster"
)

// A member that claims what it may not is refused by every node alike, and shown.
// Its record has the right seal: only what it says is wrong.
func TestClaims(t *testing.T) {
	secret := newSecret(t)
	// Where pods share the nodes' network, an endpoint lies inside clusterCIDRs.
	m := newMesh(t, 3, 1, cluster.NetworkOptions{
		Secrets: []string{secret},
		Stanza:  map[string]any{"clusterCIDRs": []string{"10.244.0.0/16", "fd00:244::/32", "192.0.2.0/24"}},
	})
	serveAll(t, m.pods)
	trust := trusting(t, secret)
	members := registry.New(file.New(m.RegistryFile()), trust)
	before, err := members.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	twin := before.Nodes["node-b"].PublicKey

	var revision uint64
	publish := func(r registry.Record) {
		t.Helper()
		r.Revision = registry.NextRevision(revision, time.Now())
		r, err := trust.Seal(r)
		if err == nil {
			err = members.Publish(t.Context(), r, revision)
		}
		if err != nil {
			t.Fatal(err)
		}
		revision = r.Revision
	}
	honest := newRecord(t, "rogue")
	honest.Prefixes = claimNow("10.244.66.0/24")
	const sameKey = " has the same key; delete the private key of the copy and restart it"
	for _, row := range []struct {
		name      string
		claims    string // beside its own prefix, separated by spaces
		edit      func(*registry.Record)
		conflicts []string
		cut       bool // the claim costs another node its peers
	}{
		{name: "nothing wrong"},
		{name: "another's prefixes", claims: "10.244.1.0/24 fd00:244:1::/64", conflicts: []string{
			"rogue: 10.244.1.0/24 refused: node-a has held 10.244.1.0/24 longer",
			"rogue: fd00:244:1::/64 refused: node-a has held fd00:244:1::/64 longer",
		}},
		{name: "a part of another's prefix", claims: "10.244.1.128/25", conflicts: []string{
			"rogue: 10.244.1.128/25 refused: node-a has held 10.244.1.0/24 longer",
		}},
		{name: "a prefix around another's", claims: "10.244.0.0/23", conflicts: []string{
			"rogue: 10.244.0.0/23 refused: node-a has held 10.244.1.0/24 longer",
		}},
		{name: "default routes", claims: "0.0.0.0/0 ::/0", conflicts: []string{
			"rogue: 0.0.0.0/0 refused: a default route may not be claimed",
			"rogue: ::/0 refused: a default route may not be claimed",
		}},
		{name: "outside of clusterCIDRs", claims: "198.51.100.0/24 10.0.0.0/8", conflicts: []string{
			"rogue: 10.0.0.0/8 refused: not inside clusterCIDRs",
			"rogue: 198.51.100.0/24 refused: not inside clusterCIDRs",
		}},
		{name: "an endpoint", claims: "192.0.2.10/32", conflicts: []string{
			"rogue: 192.0.2.10/32 refused: the endpoint 192.0.2.10:51820 of node-a lies inside it",
		}},
		{name: "around endpoints", claims: "192.0.2.8/29", conflicts: []string{
			"rogue: 192.0.2.8/29 refused: the endpoint 192.0.2.10:51820 of node-a lies inside it",
		}},
		{name: "another's pod's address as its own", edit: func(r *registry.Record) {
			r.Addresses = []netip.Addr{m.pods[0].IPv4()}
		}, conflicts: []string{
			fmt.Sprintf("rogue: address %s refused: it lies inside 10.244.1.0/24, which node-a has held longer", m.pods[0].IPv4()),
		}},
		{name: "another's public key", edit: func(r *registry.Record) { r.PublicKey = twin }, cut: true, conflicts: []string{
			"node-b: public key " + twin.String() + " refused: rogue" + sameKey,
			"rogue: public key " + twin.String() + " refused: node-b" + sameKey,
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			var traffic flows
			if !row.cut {
				traffic = flowAll(t, m.pods)
			}
			r := honest
			r.Prefixes = append(slices.Clone(honest.Prefixes), claimNow(strings.Fields(row.claims)...)...)
			if row.edit != nil {
				row.edit(&r)
			}
			publish(r)
			want := map[string][]netip.Prefix{"rogue": {netip.MustParsePrefix("10.244.66.0/24")}}
			for _, n := range m.Nodes {
				want[n.Name] = n.PodCIDRs()
			}
			if row.cut {
				delete(want, "node-b")
				delete(want, "rogue")
			}
			for _, n := range m.Nodes {
				mustDecide(t, n, row.conflicts, want)
			}
			if !row.cut {
				traffic.lossless(t)
			}
		})
	}
	publish(registry.Record{Name: "rogue", Left: true})
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitTalk(t, m.pods) // node-b still has sessions that the others have given up
}

func claimNow(prefixes ...string) (out []wgmesh.Claim) {
	for _, p := range prefixes {
		out = append(out, wgmesh.Claim{Prefix: netip.MustParsePrefix(p), Since: time.Now()})
	}
	return out
}

// mustDecide waits until a node shows exactly these conflicts, and has given its
// peers these prefixes. allowed has the node itself too.
func mustDecide(t *testing.T, n *cluster.Node, conflicts []string, allowed map[string][]netip.Prefix) {
	t.Helper()
	var shown []string
	s := awaitStatus(t, n, "the conflicts to be shown", func(s cluster.Status) bool {
		shown = nil
		for _, c := range s.Report.Conflicts {
			shown = append(shown, c.String())
		}
		return s.OK && cmp.Equal(conflicts, shown) && len(s.Peers) >= len(allowed)-1
	})
	got := map[string][]netip.Prefix{n.Name: allowed[n.Name]}
	for _, p := range s.Peers {
		got[p.Name] = p.AllowedIPs
	}
	want := allowed
	if _, itself := want[n.Name]; !itself { // the others refuse it, and it none of them
		delete(got, n.Name)
	}
	same := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	if diff := cmp.Diff(want, got, same); diff != "" {
		t.Errorf("%s: peers' prefixes (-want +got):\n%s", n.Name, diff)
	}
	out := run(t, n, bin("wgcnid"), "status")
	for _, c := range conflicts {
		if !strings.Contains(out, "conflict: "+c+"\n") {
			t.Errorf("%s: status does not say %q:\n%s", n.Name, c, out)
		}
	}
}
