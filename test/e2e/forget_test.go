package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

// sealedMesh is a sealed mesh of three nodes whose pods have talked with each other. Each has a
// server, and ordinary routes lead around the tunnel.
type sealedMesh struct {
	*mesh
	options cluster.NetworkOptions
	servers []*cluster.Server
}

func newSealedMesh(t *testing.T) *sealedMesh {
	t.Helper()
	o := cluster.NetworkOptions{Secrets: []string{newSecret(t)}}
	m := &sealedMesh{mesh: newMesh(t, 3, 1, o), options: o}
	routeAroundTunnel(t, m.Cluster)
	for _, p := range m.pods {
		m.servers = append(m.servers, server(t, p))
	}
	talkAll(t, m.pods)
	return m
}

func server(t *testing.T, at cluster.Endpointer) *cluster.Server {
	t.Helper()
	s, err := cluster.StartServer(at, echoPort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// record is a node's, as the registry has it.
func (m *sealedMesh) record(t *testing.T, name string) (r registry.Record) {
	t.Helper()
	if err := json.Unmarshal(rawFile(m.RegistryFile()).read(t)[name], &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// losing waits until a good number of each stream's datagrams were lost one after the other.
func losing(t *testing.T, all ...*cluster.Stream) {
	t.Helper()
	var last []cluster.StreamReport
	for _, s := range all {
		last = append(last, s.Report())
	}
	err := cluster.Poll(t.Context(), "datagrams to be lost", func() error {
		for i, s := range all {
			now := s.Report()
			if now.Received > last[i].Received {
				last[i] = now
			}
			if gone := now.Sent - last[i].Sent; gone < 100 {
				return fmt.Errorf("%d of stream %d lost since its last answer", gone, i)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// mustHearNothing fails if what a function does brings a packet of one pod to another's server.
func mustHearNothing(t *testing.T, from *cluster.Pod, at *cluster.Server, do func()) {
	t.Helper()
	heard := func() int { s := at.Sources(); return s[from.IPv4()] + s[from.IPv6()] }
	before := heard()
	do()
	if n := heard() - before; n > 0 {
		t.Errorf("%d packets of %s arrived", n, from)
	}
}

// mustRefuseCommand runs a command of the helper's that must fail, and say this.
func mustRefuseCommand(t *testing.T, n *cluster.Node, want string, args ...string) {
	t.Helper()
	out, err := n.Wgcnid(t.Context(), args...)
	if err == nil || !strings.Contains(out, want) {
		t.Errorf("wgcnid %s: %v\n%swant an error with %q", strings.Join(args, " "), err, out, want)
	}
}

// A node that leaves puts a sealed tombstone; what it said before is refused from then on.
func TestSealedLeave(t *testing.T) {
	m := newSealedMesh(t)
	stays, leaves := m.Nodes[0], m.Nodes[2]
	raw := rawFile(m.RegistryFile())
	before := raw.read(t)["node-c"]
	run(t, leaves, bin("wgcnid"), "leave")
	if err := m.helpers[2].Wait(t.Context()); err != nil {
		t.Errorf("the helper ended with %v", err)
	}
	gone := m.record(t, "node-c")
	if err := trusting(t, m.options.Secrets...).Check(gone); err != nil || !gone.Left || m.record(t, "node-a").Left {
		t.Errorf("the tombstone %+v: %v", gone, err)
	}
	for _, n := range m.Nodes[:2] {
		awaitStatus(t, n, "one peer", func(s cluster.Status) bool { return len(s.Peers) == 1 })
	}
	if out := run(t, stays, bin("wgcnid"), "nodes"); !strings.Contains(out, "node-c  left") {
		t.Errorf("wgcnid nodes:\n%s", out)
	}
	mustRefuseCommand(t, stays, "node-c has left already", "forget", "node-c")

	buried := raw.read(t)
	replayed := maps.Clone(buried)
	replayed["node-c"] = before
	raw.write(t, replayed)
	for _, n := range m.Nodes[:2] {
		s := awaitStatus(t, n, "the replayed record to be refused", func(s cluster.Status) bool {
			return s.Report.RefusedTotal[reconcile.KindReplayed] == 1 && len(s.Report.Refused) == 1
		})
		if len(s.Peers) != 1 {
			t.Errorf("%s has %d peers", n.Name, len(s.Peers))
		}
	}
	startHelper(t, leaves)
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	if back := m.record(t, "node-c"); back.Revision <= gone.Revision {
		t.Errorf("revision %d after the tombstone's %d", back.Revision, gone.Revision)
	}
	talkAll(t, m.pods)
}

// A node is forgotten while its helper runs: that keeps the guard. Its pods reach
// each other and no others, and nothing leaves them in the clear.
func TestForget(t *testing.T) {
	m := newSealedMesh(t)
	a, c := m.Nodes[0], m.Nodes[2]
	capture := watchUnderlay(t, m.Cluster)
	bystander := newFlows(t, func() []*cluster.Stream { return []*cluster.Stream{stream(t, m.pods[0], m.pods[1].IPv4(), 100)} })
	streams := []*cluster.Stream{
		stream(t, m.pods[2], m.pods[0].IPv4(), 100), stream(t, m.pods[2], m.pods[0].IPv6(), 100),
		stream(t, m.pods[0], m.pods[2].IPv4(), 100), stream(t, m.pods[0], m.pods[2].IPv6(), 100),
	}
	allFlowing(t, streams)

	mustRefuseCommand(t, a, `no node "node-cc": did you mean "node-c"?`, "forget", "node-cc")
	mustRefuseCommand(t, a, "node-a is this node: it goes with `wgcnid leave`", "forget", "node-a")
	mustRefuseCommand(t, a, "name one node to forget: `wgcnid forget NAME`", "forget")
	key := m.record(t, "node-c").PublicKey
	if out := run(t, a, bin("wgcnid"), "forget", "node-c"); !strings.Contains(out, "node-c is forgotten and its key revoked") {
		t.Errorf("wgcnid forget: %s", out)
	}
	mustRefuseCommand(t, a, "node-c is forgotten already", "forget", "node-c")
	gone := m.record(t, "node-c")
	if revoked, ok := gone.Revoked(); !ok || revoked != key {
		t.Errorf("the tombstone revokes %v %v; want %v", revoked, ok, key)
	}
	for _, n := range m.Nodes[:2] {
		awaitStatus(t, n, "one peer", func(s cluster.Status) bool { return len(s.Peers) == 1 })
	}
	s := awaitStatus(t, c, "to know that it is forgotten", func(s cluster.Status) bool { return s.Report.Forgotten && len(s.Pending) == 0 })
	if s.OK || !s.Helper || len(s.Peers) > 0 || !strings.Contains(s.Verdict, "the mesh has forgotten this node and revoked its key") || !strings.Contains(s.Verdict, "leave --purge") {
		t.Errorf("status of the forgotten node: %+v", s)
	}
	if out, err := c.Run(t.Context(), "ip", "link", "show", "wgcni0"); err == nil {
		t.Errorf("it still has its tunnel: %s", out)
	}
	mustHearNothing(t, m.pods[2], m.servers[0], func() { losing(t, streams...) })
	beside, err := c.AddPod(t.Context(), cluster.NetworkName, "beside", cluster.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := talk(t.Context(), beside, m.pods[2], []byte("x")); err != nil {
		t.Error(err)
	}
	mustHearNothing(t, beside, m.servers[0], func() { losing(t, stream(t, beside, m.pods[0].IPv4(), 100)) })
	if dropped, err := c.Status(t.Context()); err != nil || dropped.OK {
		t.Errorf("status %+v, %v", dropped, err)
	}
	for _, f := range streams {
		f.Stop()
	}
	bystander.lossless(t)
	mustBeClean(t, capture)
}

// A node is forgotten while its helper is dead and its tunnel is up, as a stolen
// machine's may be: nobody answers it. Neither the same helper nor another name
// brings its key back; a new key is another node.
func TestForgottenKeyIsRevoked(t *testing.T) {
	m := newSealedMesh(t)
	a, b, c := m.Nodes[0], m.Nodes[1], m.Nodes[2]
	key := m.record(t, "node-c").PublicKey.String()
	if err := m.helpers[2].Signal(t.Context(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = m.helpers[2].Wait(t.Context()) // it was killed
	capture := watchUnderlay(t, m.Cluster)
	streams := []*cluster.Stream{
		stream(t, m.pods[2], m.pods[0].IPv4(), 100), stream(t, m.pods[2], m.pods[1].IPv6(), 100),
		stream(t, m.pods[0], m.pods[2].IPv4(), 100), stream(t, m.pods[1], m.pods[2].IPv6(), 100),
	}
	allFlowing(t, streams)
	run(t, a, bin("wgcnid"), "forget", "node-c")
	for _, n := range []*cluster.Node{a, b} {
		awaitStatus(t, n, "one peer", func(s cluster.Status) bool { return s.OK && len(s.Peers) == 1 })
		left := run(t, n, "sh", "-c", "wg show wgcni0 peers; ip route show table 30567; ip -6 route show table 30567")
		for _, trace := range []string{key, "10.244.3.0", "fd00:244:3:"} {
			if strings.Contains(left, trace) {
				t.Errorf("%s still has %s:\n%s", n.Name, trace, left)
			}
		}
	}
	mustHearNothing(t, m.pods[2], m.servers[0], func() {
		mustHearNothing(t, m.pods[2], m.servers[1], func() { losing(t, streams...) })
	})
	if out := run(t, c, "wg", "show", "wgcni0", "peers"); len(strings.Fields(out)) != 2 {
		t.Errorf("nobody touched the tunnel of node-c, which has the peers %s", out)
	}

	again := startHelper(t, c)
	awaitStatus(t, c, "to know that it is forgotten", func(s cluster.Status) bool { return s.Report.Forgotten && len(s.Pending) == 0 })
	if !strings.Contains(again.Log.String(), "the mesh has forgotten this node and revoked its key") {
		t.Errorf("log:\n%s", again.Log)
	}
	m.mustBeOut(t, streams)
	stopHelper(t, again)

	other := m.options
	other.Stanza = map[string]any{"nodeName": "node-x"}
	if err := c.Configure(other); err != nil {
		t.Fatal(err)
	}
	startHelper(t, c)
	for _, n := range m.Nodes {
		s := awaitStatus(t, n, "the revoked key to be shown", func(s cluster.Status) bool { return len(s.Report.Conflicts) > 0 })
		want := "node-x: public key " + key + " refused: it was revoked when node-c was forgotten"
		if len(s.Report.Conflicts) != 1 || !strings.HasPrefix(s.Report.Conflicts[0].String(), want) {
			t.Errorf("%s: conflicts %v; want one: %s", n.Name, s.Report.Conflicts, want)
		}
		if out := run(t, n, bin("wgcnid"), "status"); !strings.Contains(out, "conflict: "+want) {
			t.Errorf("%s does not show the conflict:\n%s", n.Name, out)
		}
	}
	m.mustBeOut(t, streams)
	for _, f := range streams {
		f.Stop()
	}

	run(t, c, bin("wgcnid"), "leave", "--purge")
	if err := c.Configure(m.options); err != nil {
		t.Fatal(err)
	}
	startHelper(t, c)
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	if fresh := m.record(t, "node-c").PublicKey.String(); fresh == key {
		t.Error("it came back with the revoked key")
	}
	talkAll(t, m.pods)
	mustBeClean(t, capture)
}

// mustBeOut fails unless node-c is a peer of nobody and none of the streams from
// and to it flows.
func (m *sealedMesh) mustBeOut(t *testing.T, streams []*cluster.Stream) {
	t.Helper()
	losing(t, streams...)
	for _, n := range m.Nodes[:2] {
		s, err := n.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Peers) != 1 || !s.OK {
			t.Errorf("%s: %d peers; %s", n.Name, len(s.Peers), s.Verdict)
		}
	}
}
