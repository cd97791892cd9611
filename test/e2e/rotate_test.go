package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// rotating is a mesh whose pods all talk to each other, each pair in both
// directions, while the underlay is watched.
type rotating struct {
	*mesh
	capture *cluster.Capture
	streams []*cluster.Stream
	warm    []int // what each had lost when all had begun
}

// rotationRate is that of each stream, in datagrams a second and direction, where
// WGCNI_RATE names no other. A machine that runs other tests beside loses some of
// 1,000 before they come to a tunnel, whose device queues 1,024.
const rotationRate = 250

func newRotating(t *testing.T, nodes, streams int) *rotating {
	t.Helper()
	rate := int(number(t, "WGCNI_RATE", rotationRate))
	m := &rotating{mesh: newMesh(t, nodes, 1, cluster.NetworkOptions{})}
	routeAroundTunnel(t, m.Cluster)
	for _, p := range m.pods {
		serve(t, p)
	}
	m.capture = watchUnderlay(t, m.Cluster)
	for i, from := range m.pods {
		for _, to := range m.pods[i+1:] {
			if len(m.streams) < streams { // the answers are the other direction
				m.streams = append(m.streams, stream(t, from, to.IPv4(), rate))
			}
		}
	}
	for _, s := range m.streams {
		flowing(t, s)
	}
	for _, s := range m.streams {
		m.warm = append(m.warm, s.Report().Lost)
	}
	return m
}

func keyOf(t *testing.T, n *cluster.Node) string {
	t.Helper()
	return strings.TrimSpace(run(t, n, "wg", "show", "wgcni0", "public-key"))
}

// rotated waits until all nodes are as they were, but for the keys: of the given
// nodes there is a new one, and nobody knows the old one any more.
func (m *rotated) await(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(2*time.Minute))
	defer cancel()
	err := cluster.Poll(ctx, "the rotation to end", func() error {
		for _, n := range m.mesh.Nodes {
			all := run(t, n, "wg", "show", "all", "dump")
			if strings.Contains(all, "wgcni0x") {
				return fmt.Errorf("%s still has the spare interface", n.Name)
			}
			for _, old := range m.old {
				if strings.Contains(all, old) {
					return fmt.Errorf("%s still knows the key %s", n.Name, old)
				}
			}
			for _, other := range m.mesh.Nodes {
				if !strings.Contains(all, keyOf(t, other)) {
					return fmt.Errorf("%s does not know %s's key", n.Name, other.Name)
				}
			}
		}
		return nil
	})
	if err != nil {
		for i, n := range m.mesh.Nodes {
			t.Log(n.Name, run(t, n, "wg", "show", "all"), m.mesh.helpers[i].Log)
		}
		t.Fatal(err)
	}
	if err := m.mesh.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// rotated are the keys that a rotation takes away.
type rotated struct {
	mesh *rotating
	old  []string
}

func (m *rotating) rotate(t *testing.T, nodes ...*cluster.Node) *rotated {
	t.Helper()
	r := &rotated{mesh: m}
	for _, n := range nodes {
		r.old = append(r.old, keyOf(t, n))
	}
	return r
}

// untouched fails the test if anything was lost, or went in the clear.
func (m *rotating) untouched(t *testing.T) {
	t.Helper()
	for i, s := range m.streams {
		if r := s.Stop(); r.Lost > m.warm[i] || r.Duplicates > 0 {
			t.Errorf("stream %d: %s; want no loss after the first handshake, which took %d; lost: %v", i, r, m.warm[i], s.Losses(10))
			for _, n := range m.Nodes {
				t.Logf("%s: %s", n, run(t, n, "sh", "-c", "ip -s -o link show wgcni0; grep ^Udp: /proc/net/snmp"))
			}
		}
	}
	mustBeClean(t, m.capture)
}

// A node's key is replaced, then all nodes', with steady traffic in both
// directions: none is lost, and afterwards all is as before but for the keys
// (cilium#25492: a key change filtered out as "no change"; cilium#35644: node
// addresses lost after a key change).
func TestRotateKeys(t *testing.T) {
	m := newRotating(t, 3, 2)
	one := m.rotate(t, m.Nodes[0])
	if out, err := m.Nodes[0].Wgcnid(t.Context(), "key", "rotate"); err != nil {
		t.Fatal(err, out, m.helpers[0].Log)
	}
	one.await(t)
	all := m.rotate(t, m.Nodes...)
	if out, err := m.Nodes[1].Wgcnid(t.Context(), "key", "rotate", "--cluster"); err != nil {
		t.Fatal(err, out, m.helpers[1].Log)
	}
	all.await(t)
	m.untouched(t)
}

// A node whose rotation port is closed lags: its pairs stay on the old key, and
// nothing is lost, neither then nor when the port is opened.
func TestRotationWaitsForWhoLags(t *testing.T) {
	m := newRotating(t, 3, 2)
	lagging := m.Nodes[2]
	run(t, lagging, "nft", "add table inet closed; add chain inet closed in { type filter hook input priority 0; }; add rule inet closed in udp dport 51821 drop")
	run(t, lagging, "nft", "add chain inet closed out { type filter hook output priority 0; }; add rule inet closed out udp dport 51821 drop")
	r := m.rotate(t, m.Nodes[0])
	if out, err := m.Nodes[0].Wgcnid(t.Context(), "key", "rotate", "--no-wait"); err != nil {
		t.Fatal(err, out)
	}
	err := cluster.Poll(t.Context(), "the rotation to wait for the one that lags only", func() error {
		s, err := m.Nodes[0].Status(t.Context())
		if err != nil {
			return err
		}
		if s.Report == nil || s.Report.Rotation == nil {
			return fmt.Errorf("no rotation is reported")
		}
		w := s.Report.Rotation.Waiting
		if len(w) != 1 || w[0].Node != lagging.Name || s.Report.Rotation.Moved != 1 {
			return fmt.Errorf("%+v", *s.Report.Rotation)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err, m.helpers[0].Log)
	}
	if got := keyOf(t, m.Nodes[0]); got != r.old[0] {
		t.Errorf("the key is %s while a node lags, want %s", got, r.old[0])
	}
	// One pair sends by the second interface now, and one by the first.
	if out, err := m.Nodes[0].Wgcnid(t.Context(), "verify"); err != nil || !strings.Contains(out, "Encrypted: traffic to 2 peers") {
		t.Errorf("verify while a node lags: %v\n%s", err, out)
	}
	run(t, lagging, "nft", "delete", "table", "inet", "closed")
	r.await(t)
	m.untouched(t)
}

// Helpers are killed at any moment of a rotation: it goes on where it was.
func TestRotationSurvivesKills(t *testing.T) {
	seed := number(t, "WGCNI_SEED", uint64(time.Now().UnixNano()))
	random := rand.New(rand.NewPCG(seed, 3))
	m := newRotating(t, 2, 1)
	r := m.rotate(t, m.Nodes...)
	if out, err := m.Nodes[0].Wgcnid(t.Context(), "key", "rotate", "--cluster", "--no-wait"); err != nil {
		t.Fatal(err, out)
	}
	for range 8 {
		i := random.IntN(2)
		moment := time.After(time.Duration(random.IntN(2500)) * time.Millisecond)
		<-moment
		if err := m.helpers[i].Signal(t.Context(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = m.helpers[i].Wait(t.Context()) // it was killed
		m.helpers[i] = startHelper(t, m.Nodes[i])
	}
	r.await(t)
	m.untouched(t)
}
