package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

// users are the nodes that seal with each secret, by its name, as `wgcnid secret
// list` on a node tells an operator. "none" are those that do not seal.
func users(t *testing.T, n *cluster.Node) map[string][]string {
	t.Helper()
	out := run(t, n, bin("wgcnid"), "secret", "list")
	list := map[string][]string{}
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		_, names, counted := strings.Cut(line, ": ")
		list[words[0]] = nil
		if counted {
			list[words[0]] = strings.Fields(names)
		}
	}
	delete(list, "SECRET") // the heading
	return list
}

// awaitUsers waits until `wgcnid secret list` says the same on every node.
func awaitUsers(t *testing.T, m *mesh, what string, want map[string][]string) {
	t.Helper()
	for _, n := range m.Nodes {
		err := cluster.Poll(t.Context(), what+", as "+n.Name+" sees it", func() error {
			if diff := cmp.Diff(want, users(t, n)); diff != "" {
				return fmt.Errorf("users of the secrets (-want +got):\n%s", diff)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// configure gives nodes their secrets, and what seal is to be; the helpers follow
// by themselves.
func configure(t *testing.T, nodes []*cluster.Node, seal string, secrets ...string) {
	t.Helper()
	o := cluster.NetworkOptions{Secrets: secrets}
	if seal != "" {
		o.Stanza = map[string]any{"seal": seal}
	}
	for _, n := range nodes {
		if err := n.Configure(o); err != nil {
			t.Fatal(err)
		}
	}
}

// mustRefuse waits until every helper refuses this record, and takes it away again.
func mustRefuse(t *testing.T, m *mesh, r registry.Record, kind string) {
	t.Helper()
	raw := rawFile(m.RegistryFile())
	before := raw.read(t)
	after := maps.Clone(before)
	after[r.Name], _ = json.Marshal(r)
	raw.write(t, after)
	for _, n := range m.Nodes {
		awaitStatus(t, n, "a record that is "+kind+" to be refused", func(s cluster.Status) bool {
			refused := slices.ContainsFunc(s.Report.Refused, func(f reconcile.Refusal) bool { return f.Node == r.Name && f.Kind == kind })
			return refused && len(s.Peers) == len(m.Nodes)-1
		})
	}
	raw.write(t, before)
}

// mustShakeHands ends a node's tunnel and every session with it, and lets it talk
// again: by new handshakes, which need the same preshared keys at both ends.
func mustShakeHands(t *testing.T, m *mesh, n *cluster.Node) {
	t.Helper()
	loseTunnel(t, n)
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitTalk(t, m.pods)
}

// unsealedNames are the nodes whose records a node takes without a seal, as its status says.
func unsealedNames(t *testing.T, n *cluster.Node) []string {
	t.Helper()
	s, err := n.Status(t.Context())
	if err != nil || s.Seal == nil {
		t.Fatalf("%s: seal %v, %v", n.Name, s.Seal, err)
	}
	return s.Seal.Unsealed
}

// A running mesh takes the seal on, node by node, and gives it up again: not one
// packet is lost, and not one is in the clear.
func TestSealOnAndOff(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 3, 1, cluster.NetworkOptions{})
	routeAroundTunnel(t, m.Cluster)
	serveAll(t, m.pods)
	capture := watchUnderlay(t, m.Cluster)
	traffic := flowAll(t, m.pods)
	secret := newSecret(t)
	id := secretID(t, secret)
	first, others := m.Nodes[:1], m.Nodes[1:]
	bare := func(_ [2]string, psk string) bool { return psk == noKey }
	awaitKeys(t, "no preshared keys", m.Nodes, bare)

	configure(t, first, "preferred", secret)
	awaitStatus(t, first[0], "the others to be shown as unsealed", func(s cluster.Status) bool {
		return s.Seal != nil && s.Seal.SealedBy == id && cmp.Equal(s.Seal.Unsealed, []string{"node-b", "node-c"})
	})
	err := cluster.Poll(t.Context(), "node-a to seal", func() error {
		if got := users(t, first[0])[id]; !cmp.Equal(got, []string{"node-a"}) {
			return fmt.Errorf("it is used by %v", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if out := run(t, first[0], bin("wgcnid"), "status"); !strings.Contains(out, "2: node-b node-c") {
		t.Errorf("status does not name the unsealed nodes:\n%s", out)
	}
	awaitKeys(t, "no preshared keys yet", m.Nodes, bare)
	configure(t, others, "preferred", secret)
	awaitUsers(t, m, "all nodes to seal", map[string][]string{id: {"node-a", "node-b", "node-c"}})
	mustDiffer(t, awaitKeys(t, "preshared keys", m.Nodes, hasKey))
	configure(t, first, "", secret)
	configure(t, others, "", secret)
	stranger := newRecord(t, "stranger")
	mustRefuse(t, m, stranger, reconcile.KindUnsealed)
	for _, n := range m.Nodes {
		if got := unsealedNames(t, n); len(got) > 0 {
			t.Errorf("%s: unsealed %v", n.Name, got)
		}
	}
	traffic.lossless(t)
	mustShakeHands(t, m, m.Nodes[1])

	traffic = flowAll(t, m.pods)
	configure(t, m.Nodes, "preferred", secret)
	configure(t, first, "")
	awaitKeys(t, "no preshared key with node-a", m.Nodes, func(pair [2]string, psk string) bool {
		return slices.Contains(pair[:], "node-a") == (psk == noKey)
	})
	if got := unsealedNames(t, m.Nodes[2]); !cmp.Equal(got, []string{"node-a"}) {
		t.Errorf("node-c: unsealed %v; want node-a", got)
	}
	configure(t, others, "")
	awaitKeys(t, "no preshared keys", m.Nodes, bare)
	traffic.lossless(t)
	mustShakeHands(t, m, m.Nodes[2])
	mustBeClean(t, capture)
}

// The secret is changed by the three steps that `wgcnid secret --help` tells.
func TestSecretIsChanged(t *testing.T) {
	t.Parallel()
	older := newSecret(t)
	m := newMesh(t, 3, 1, cluster.NetworkOptions{Secrets: []string{older}})
	routeAroundTunnel(t, m.Cluster)
	serveAll(t, m.pods)
	newer := newerSecret(t, older)
	oldID, newID := secretID(t, older), secretID(t, newer)
	all := []string{"node-a", "node-b", "node-c"}
	before := awaitKeys(t, "preshared keys", m.Nodes, hasKey)
	capture := watchUnderlay(t, m.Cluster)
	traffic := flowAll(t, m.pods)

	configure(t, m.Nodes, "", older, newer)
	awaitUsers(t, m, "both to be accepted", map[string][]string{oldID: all, newID: nil})
	configure(t, m.Nodes[:1], "", newer, older)
	awaitUsers(t, m, "node-a to use the new one", map[string][]string{oldID: all[1:], newID: all[:1]})
	if diff := cmp.Diff(before, awaitKeys(t, "preshared keys", m.Nodes, hasKey)); diff != "" {
		t.Errorf("a preshared key changed before both ends of the pair did (-before +after):\n%s", diff)
	}
	configure(t, m.Nodes[1:], "", newer, older)
	awaitUsers(t, m, "nobody to use the old one", map[string][]string{oldID: nil, newID: all})
	configure(t, m.Nodes, "", newer)
	awaitUsers(t, m, "the old one to be gone", map[string][]string{newID: all})
	after := awaitKeys(t, "new preshared keys", m.Nodes, func(pair [2]string, psk string) bool { return psk != noKey && psk != before[pair] })
	mustDiffer(t, after)
	sealed, err := trusting(t, older).Seal(newRecord(t, "stranger"))
	if err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, m, sealed, reconcile.KindUnknownSecret)
	traffic.lossless(t)

	late, err := m.AddNode(t.Context(), "node-d")
	if err != nil {
		t.Fatal(err)
	}
	configure(t, []*cluster.Node{late}, "", newer)
	m.helpers = append(m.helpers, startHelper(t, late))
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := late.AddPod(t.Context(), cluster.NetworkName, "late", cluster.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, p)
	m.pods = append(m.pods, p)
	routeAroundTunnel(t, m.Cluster)
	mustShakeHands(t, m, m.Nodes[0])
	mustBeClean(t, capture)
}
