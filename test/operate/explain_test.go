package operate

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/explain"
	"github.com/wgcni/wgcni/test/cluster"
)

const explainTrials = 28

func (b *explainBed) sample(seed uint64, state string, want ...explain.Verdict) {
	b.Helper()
	b.Logf("%s: seed %d", state, seed)
	trials := b.trials(rand.New(rand.NewPCG(seed, 0)), explainTrials)
	b.agree(trials)
	count := map[explain.Verdict]int{}
	for _, tr := range trials {
		count[tr.verdict.Verdict]++
	}
	b.Logf("%s: %v", state, count)
	for _, v := range want {
		if count[v] == 0 {
			b.Errorf("%s: no packet is %s: the seed is a bad one", state, v)
		}
	}
}

// loseTunnel ends a node's helper and takes its tunnel away.
func (b *explainBed) loseTunnel(i int) {
	b.Helper()
	b.must(b.helpers[i].Kill())
	_, err := b.Nodes[i].LoseTunnel(b.Context())
	b.must(err)
	b.must(cluster.Poll(b.Context(), "the tunnel to be gone", func() error {
		if _, err := b.Nodes[i].Tunnel(); err == nil {
			return errors.New("it is there")
		}
		return nil
	}))
}

// What explain says is what a capture on the underlay sees, while all is well and
// when a node has lost its tunnel.
func TestExplainAgreesWithTheWire(t *testing.T) {
	b := newExplainBed(t, map[string]any{}, map[string]any{}, map[string]any{})
	b.sample(61, "normal", explain.Encrypted, explain.Plaintext, explain.Dropped, explain.Local)
	if e := b.ask(b.Nodes[0], "default/node-a-pod", "node-b"); e.Verdict != explain.Plaintext || e.Fault {
		t.Errorf("a machine without encryptNodes: %+v", e)
	}
	// Somebody else's rule comes before ours: the filter holds what it takes past the tunnel.
	for _, family := range []string{"-4", "-6"} {
		_, err := b.Nodes[0].Run(t.Context(), "ip", family, "rule", "add", "priority", "50", "lookup", "main")
		b.must(err)
	}
	b.sample(68, "a stranger's rule", explain.Dropped, explain.Encrypted)
	e := b.ask(b.Nodes[0], "default/node-a-pod", b.pods[1].IPv4().String())
	if e.Verdict != explain.Dropped || !e.Fault || !slices.ContainsFunc(e.Steps, func(s explain.Step) bool { return s.Stage == explain.Rule && s.Object == "50" }) {
		t.Errorf("a stranger's rule: %+v", e)
	}
	for _, family := range []string{"-4", "-6"} {
		_, err := b.Nodes[0].Run(t.Context(), "ip", family, "rule", "del", "priority", "50")
		b.must(err)
	}
	b.loseTunnel(0)
	b.sample(62, "tunnel gone", explain.Encrypted, explain.Dropped)
	e = b.ask(b.Nodes[0], b.pods[0].IPv4().String(), b.pods[1].IPv4().String())
	if e.Verdict != explain.Dropped || !e.Fault || !strings.Contains(e.Why, "wgcni0 is missing") {
		t.Errorf("the tunnel is gone, and explain says %+v", e)
	}
}

// A node that has not joined is reached in the clear where encryption is only preferred.
func TestExplainPreferred(t *testing.T) {
	preferred := map[string]any{"encryption": "preferred"}
	b := newExplainBed(t, preferred, preferred, nil)
	b.sample(63, "preferred", explain.Encrypted, explain.Plaintext, explain.Local)
	e := b.ask(b.Nodes[0], b.pods[2].IPv4().String(), b.pods[0].IPv4().String())
	if e.Verdict != explain.Plaintext || !e.Fault {
		t.Errorf("from a node that has not joined: %+v", e)
	}
	// Of what has joined nothing leaves in the clear, while the filter is there.
	to := b.pods[1].IPv4().String()
	b.loseTunnel(0)
	b.sample(66, "preferred, tunnel gone", explain.Dropped, explain.Plaintext)
	if e := b.ask(b.Nodes[0], "default/node-a-pod", to); e.Verdict != explain.Dropped || !e.Fault {
		t.Errorf("preferred, and the tunnel is gone: %+v", e)
	}
	_, err := b.Nodes[0].Run(t.Context(), "nft", "delete", "table", "inet", "wgcni")
	b.must(err)
	b.sample(67, "preferred, tunnel and filter gone", explain.Plaintext)
	if e := b.ask(b.Nodes[0], "default/node-a-pod", to); e.Verdict != explain.Plaintext || !e.Fault || !strings.Contains(e.Why, "the filter is missing") {
		t.Errorf("preferred, and all is gone: %+v", e)
	}
}

func TestExplainEncryptNodes(t *testing.T) {
	on := map[string]any{"encryptNodes": true}
	b := newExplainBed(t, on, on, map[string]any{})
	b.must(cluster.Poll(t.Context(), "the machines' own traffic to be encrypted", func() error {
		for i := range 2 {
			s, err := b.Nodes[i].Status(t.Context())
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(s.Peers, func(p cluster.PeerStatus) bool {
				return p.Name == b.Nodes[1-i].Name && p.NodeTraffic == "encrypted"
			}) {
				return fmt.Errorf("%+v", s.Peers)
			}
		}
		return nil
	}))
	b.sample(64, "encryptNodes", explain.Encrypted, explain.Plaintext, explain.Dropped, explain.Local)
	// Direct ports go past the tunnel.
	server, err := cluster.StartServer(b.Nodes[1], 22)
	b.must(err)
	t.Cleanup(func() { _ = server.Close() })
	for port, want := range map[uint16]explain.Verdict{22: explain.Plaintext, 2222: explain.Encrypted} {
		e := b.ask(b.Nodes[0], "node-a", b.Nodes[1].IPv4.String(), "--proto", "tcp", "--dport", fmt.Sprint(port))
		if e.Verdict != want || e.Fault {
			t.Errorf("TCP port %d: %+v", port, e)
		}
	}
	marker := []byte("explain-direct-port-0123456789")
	capture, err := cluster.StartCapture(b.Underlay, cluster.Bridge, cluster.CaptureOptions{Markers: [][]byte{marker}})
	b.must(err)
	if _, err := cluster.TCP(t.Context(), b.Nodes[0], netip.AddrPortFrom(b.Nodes[1].IPv4, 22), marker); err != nil {
		t.Error(err)
	}
	if r, err := capture.Stop(t.Context()); err != nil || r.WithMarker == 0 {
		t.Errorf("port 22 was explained as plaintext: %v, %v", err, r)
	}
}

// Nodes that share no segment: explain says so.
func TestExplainSegments(t *testing.T) {
	in := func(names ...string) map[string]any { return map[string]any{"segments": names} }
	b := newExplainBed(t, in("red"), in("red", "blue"), in("blue"))
	b.sample(65, "segments", explain.Encrypted, explain.Dropped, explain.Local)
	e := b.ask(b.Nodes[0], b.pods[0].IPv4().String(), b.pods[2].IPv4().String())
	if e.Verdict != explain.Dropped || !strings.Contains(e.Why, "shares no segment") {
		t.Errorf("of segments red and blue: %+v", e)
	}
}
