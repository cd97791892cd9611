package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// Both ends start a handshake in the same millisecond, collide and back off for 5 s
// and more (Calico's own tests allow for that). The userspace tunnel settles it; with the
// kernel's the pods have to be patient.
func TestBothEndsBeginAtOnce(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	for _, p := range m.pods {
		serve(t, p)
	}
	tunnel, err := m.Nodes[0].Tunnel()
	if err != nil {
		t.Fatal(err)
	}
	rounds, limit := 20, 4*time.Second
	if tunnel.PID == 0 {
		rounds, limit = 2, time.Minute
	}
	slow := 0
	for round := range rounds {
		for i, n := range m.Nodes {
			forgetSession(t, n, m.Nodes[1-i])
		}
		var running sync.WaitGroup
		start := time.Now()
		for i, from := range m.pods {
			running.Go(func() {
				server := netip.AddrPortFrom(m.pods[1-i].IPv4(), echoPort)
				ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(time.Minute))
				defer cancel()
				if _, err := cluster.TCP(ctx, from, server, []byte("both at once")); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		running.Wait()
		if took := time.Since(start); took > limit {
			t.Logf("round %d took %v", round, took)
			slow++
		}
	}
	// Without it a third are slow. A machine that stands still for a while may be late.
	if slow > rounds/10 {
		t.Errorf("%d of %d rounds took more than %v", slow, rounds, limit)
	}
}

// forgetSession takes the only peer of a node away and brings it back.
func forgetSession(t *testing.T, n, peer *cluster.Node) {
	t.Helper()
	key, err := n.Run(t.Context(), "wg", "show", cluster.Interface, "peers")
	if err != nil {
		t.Fatal(err)
	}
	key, pods := strings.TrimSpace(key), peer.PodCIDRs()
	if _, err := n.Run(t.Context(), "wg", "set", cluster.Interface, "peer", key, "remove"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Run(t.Context(), "wg", "set", cluster.Interface, "peer", key, "endpoint", fmt.Sprintf("%s:%d", peer.IPv4, 51820),
		"allowed-ips", fmt.Sprintf("%s,%s", pods[0], pods[1])); err != nil {
		t.Fatal(err)
	}
}
