package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

// newSecret makes a cluster secret as an operator does.
func newSecret(t *testing.T) string {
	t.Helper()
	out, err := exec.Command(bin("wgcnid"), "secret", "new").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// trusting is who seals with the first of these secrets and accepts all of them.
func trusting(t *testing.T, secrets ...string) (trust registry.Trust) {
	t.Helper()
	for _, text := range secrets {
		s, err := identity.ParseSecret(text)
		if err != nil {
			t.Fatal(err)
		}
		trust.Secrets = append(trust.Secrets, s)
	}
	return trust
}

// secretID names a secret as `wgcnid secret list` does.
func secretID(t *testing.T, secret string) string {
	t.Helper()
	return string(trusting(t, secret).Secrets.Current())
}

func (m *mesh) helper(n *cluster.Node) *cluster.Process { return m.helpers[slices.Index(m.Nodes, n)] }

// streams are one from each pod to each other.
func streams(t *testing.T, pods []*cluster.Pod) (all []*cluster.Stream) {
	t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			if from != to {
				all = append(all, stream(t, from, to.IPv4(), 50))
			}
		}
	}
	allFlowing(t, all)
	return all
}

// allFlowing waits until some more datagrams of each stream have come back.
func allFlowing(t *testing.T, all []*cluster.Stream) {
	t.Helper()
	var before []int
	for _, s := range all {
		before = append(before, s.Report().Received)
	}
	err := cluster.Poll(t.Context(), "the streams to flow", func() error {
		for i, s := range all {
			if got := s.Report().Received - before[i]; got < 10 {
				return fmt.Errorf("%d datagrams of stream %d came back", got, i)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// lossless ends streams that began when every tunnel had its handshake.
func lossless(t *testing.T, all []*cluster.Stream) {
	t.Helper()
	for _, s := range all {
		if r := s.Stop(); r.Lost > 0 {
			t.Errorf("%s; want no loss", r)
		}
	}
}

// serveAll starts a server in each pod, and lets each pod talk with each other.
func serveAll(t *testing.T, pods []*cluster.Pod) {
	t.Helper()
	for _, p := range pods {
		serve(t, p)
	}
	talkAll(t, pods)
}

func talkAll(t *testing.T, pods []*cluster.Pod) {
	t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			if from == to {
				continue
			}
			if err := talk(t.Context(), from, to, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// awaitStatus polls a node's status.
func awaitStatus(t *testing.T, n *cluster.Node, what string, done func(cluster.Status) bool) cluster.Status {
	t.Helper()
	var s cluster.Status
	err := cluster.Poll(t.Context(), n.Name+": "+what, func() (err error) {
		if s, err = n.Status(t.Context()); err == nil && (s.Report == nil || !done(s)) {
			text, _ := json.Marshal(s)
			err = fmt.Errorf("status is %s", text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// peersOf is what the kernel of a node knows of its peers, as `wg show` tells it.
func peersOf(t *testing.T, n *cluster.Node) []string {
	t.Helper()
	out := run(t, n, "sh", "-c", "for what in allowed-ips endpoints preshared-keys; do wg show wgcni0 $what; done")
	var lines []string
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		slices.Sort(words[1:])
		lines = append(lines, strings.Join(words, " "))
	}
	slices.Sort(lines)
	return lines
}

// pairKeys returns the preshared key of each pair of nodes, by their names. It
// fails if the two ends of a pair do not have the same.
func pairKeys(t *testing.T, nodes []*cluster.Node) (map[[2]string]string, error) {
	t.Helper()
	names := map[string]string{}
	for _, n := range nodes {
		names[strings.TrimSpace(run(t, n, "wg", "show", "wgcni0", "public-key"))] = n.Name
	}
	keys := map[[2]string]string{}
	for _, n := range nodes {
		for line := range strings.Lines(run(t, n, "wg", "show", "wgcni0", "preshared-keys")) {
			peer, psk, _ := strings.Cut(strings.TrimSpace(line), "\t")
			pair := [2]string{n.Name, names[peer]}
			slices.Sort(pair[:])
			if other, seen := keys[pair]; seen && other != psk {
				return keys, fmt.Errorf("the ends of %v have different preshared keys", pair)
			}
			keys[pair] = psk
		}
	}
	if want := len(nodes) * (len(nodes) - 1) / 2; len(keys) != want {
		return keys, fmt.Errorf("%d pairs of peers; want %d", len(keys), want)
	}
	return keys, nil
}

// noKey is how `wg show` writes that a peer has no preshared key.
const noKey = "(none)"

// awaitKeys waits until the preshared keys are as wanted.
func awaitKeys(t *testing.T, what string, nodes []*cluster.Node, right func(pair [2]string, psk string) bool) map[[2]string]string {
	t.Helper()
	var keys map[[2]string]string
	err := cluster.Poll(t.Context(), what, func() (err error) {
		keys, err = pairKeys(t, nodes)
		for pair, psk := range keys {
			if err == nil && !right(pair, psk) {
				err = fmt.Errorf("not so between %v", pair)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func hasKey(_ [2]string, psk string) bool { return psk != noKey }

// mustDiffer fails if two pairs share a key.
func mustDiffer(t *testing.T, keys map[[2]string]string) {
	t.Helper()
	if distinct := slices.Compact(slices.Sorted(maps.Values(keys))); len(distinct) != len(keys) {
		t.Errorf("%d pairs of nodes have %d preshared keys", len(keys), len(distinct))
	}
}

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
		s := awaitStatus(t, n, "a record that is "+kind+" to be refused", func(s cluster.Status) bool {
			return slices.ContainsFunc(s.Report.Refused, func(f reconcile.Refusal) bool { return f.Node == r.Name && f.Kind == kind })
		})
		if len(s.Peers) != len(m.Nodes)-1 {
			t.Errorf("%s has %d peers", n.Name, len(s.Peers))
		}
	}
	raw.write(t, before)
}

// mustShakeHands ends a node's tunnel and every session with it, and lets it talk
// again: by new handshakes, which need the same preshared keys at both ends.
func mustShakeHands(t *testing.T, m *mesh, n *cluster.Node) {
	t.Helper()
	if killed, err := n.Kill9(t.Context(), "wgcnid tunnel"); err != nil || killed != 1 {
		t.Fatalf("killed %d tunnel processes: %v", killed, err)
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitTalk(t, m.pods)
}

// awaitTalk waits until each pod talks with each other.
func awaitTalk(t *testing.T, pods []*cluster.Pod) {
	t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			if from == to {
				continue
			}
			err := cluster.Poll(t.Context(), fmt.Sprintf("%s to talk with %s", from, to), func() error {
				return talk(t.Context(), from, to, []byte("x"))
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
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
	flows := streams(t, m.pods)
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
	allFlowing(t, flows)
	lossless(t, flows)
	mustShakeHands(t, m, m.Nodes[1])

	flows = streams(t, m.pods)
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
	allFlowing(t, flows)
	lossless(t, flows)
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
	flows := streams(t, m.pods)

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
	allFlowing(t, flows)
	lossless(t, flows)

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

// newerSecret makes secrets until one is of a later second than another: the older
// of two keys a tunnel, and of two from one second that may be either.
func newerSecret(t *testing.T, than string) (secret string) {
	t.Helper()
	err := cluster.Poll(t.Context(), "the clock's next second", func() error {
		secret = newSecret(t)
		if a, b := trusting(t, secret).Secrets[0], trusting(t, than).Secrets[0]; !a.Made().After(b.Made()) {
			return fmt.Errorf("both are of %s", b.Made())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

// newRecord is of a node that nobody has seen yet.
func newRecord(t *testing.T, name string) registry.Record {
	t.Helper()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return registry.Record{
		Name: name, PublicKey: key.PublicKey(), Endpoints: []string{"192.0.2.66:51820"},
		Since: time.Now(), Revision: registry.NextRevision(0, time.Now()),
	}
}
