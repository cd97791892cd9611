package e2e

import (
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// Peers that had a session with an interface that is gone go on using it until
// WireGuard's timers end it after 15 s (KEEPALIVE_TIMEOUT + REKEY_TIMEOUT), unless
// the new interface greets them. The stream runs towards the node, which sends nothing by itself.
func TestPeersFindARecreatedTunnel(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	serve(t, m.pods[0])
	s := stream(t, m.pods[1], m.pods[0].IPv4(), 100)
	flowing(t, s)
	loseTunnel(t, m.Nodes[0])
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	flowing(t, s)
	if r := s.Stop(); r.LongestGap > 8*time.Second {
		t.Errorf("%s; want the peers to be greeted at once, long before 15 s", r)
	} else {
		t.Log(r)
	}
}
