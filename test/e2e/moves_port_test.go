package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// takePort holds a node's UDP port, until release.
func takePort(t *testing.T, n *cluster.Node, port int) (release func()) {
	t.Helper()
	var conn net.PacketConn
	err := cluster.Poll(t.Context(), fmt.Sprintf("port %d of %s to be free", port, n), func() error {
		return n.Do(func() (err error) {
			conn, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return func() { _ = conn.Close() }
}

// mustWait is for a node whose port is taken: it says so and by which port, its pods
// start, and neither they nor those that call them are heard in the clear. Between two
// tries the tunnel has another port, by which it may call the other node, and then they
// reach each other.
func mustWait(t *testing.T, m *mesh, helper *cluster.Process, from, to *cluster.Pod) {
	t.Helper()
	a := m.Nodes[0]
	const port, says = "UDP port 51820", "is taken by another program"
	if err := helper.WaitFor(t.Context(), says); err != nil {
		t.Fatal(err)
	}
	awaitStatus(t, a, "its status to name the port", func(s cluster.Status) bool {
		return !s.OK && s.Report != nil && strings.Contains(s.Report.Error, port) && strings.Contains(s.Report.Error, says)
	})
	for _, pair := range [][2]*cluster.Pod{{from, to}, {to, from}} {
		ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(500*time.Millisecond))
		_, _ = cluster.UDP(ctx, pair[0], netip.AddrPortFrom(pair[1].IPv4(), echoPort), []byte("x"))
		cancel()
	}
}

// Another program has the tunnel's port: when the helper starts, and when the tunnel
// was lost. The helper says which port, tries again each second, and all is well
// once the port is free.
func TestListenPortIsTaken(t *testing.T) {
	c := cluster.NewT(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	m := &mesh{Cluster: c}
	release := takePort(t, a, 51820)
	for i, n := range c.Nodes {
		if err := n.Configure(cluster.NetworkOptions{}); err != nil {
			t.Fatal(err)
		}
		m.helpers = append(m.helpers, startHelper(t, n))
		m.pods = append(m.pods, addPod(t, n, cluster.NetworkName, fmt.Sprintf("pod%d", i), cluster.PodOptions{}))
		serve(t, m.pods[i])
	}
	routeAroundTunnel(t, c)
	awaitStatus(t, b, "node-a to be announced", func(s cluster.Status) bool { return len(s.Peers) == 1 })
	capture := watchUnderlay(t, c)
	mustWait(t, m, m.helpers[0], m.pods[0], m.pods[1])
	mended := func() {
		t.Helper()
		begun := time.Now()
		release()
		if err := c.AwaitConverged(t.Context()); err != nil {
			t.Fatal(err)
		}
		took := time.Since(begun)
		if t.Logf("as planned %v after the port was free", took); took > cluster.Patience(4*time.Second) {
			t.Errorf("it took %v until the tunnel had its port, want one try a second", took)
		}
		talkSoon(t, m.pods[0], m.pods[1])
		talkSoon(t, m.pods[1], m.pods[0])
	}
	mended()

	stopHelper(t, m.helpers[0])
	loseTunnel(t, a)
	release = takePort(t, a, 51820)
	m.helpers[0] = startHelper(t, a)
	mustWait(t, m, m.helpers[0], m.pods[0], m.pods[1])
	if said := strings.Count(m.helpers[0].Log.String(), "pass failed"); said > 2 {
		t.Errorf("the helper says %d times that the port is taken:\n%s", said, m.helpers[0].Log)
	}
	mended()

	resume := pauseHelper(t, a)
	loseTunnel(t, a)
	release = takePort(t, a, 51820)
	resume()
	mustWait(t, m, m.helpers[0], m.pods[0], m.pods[1])
	mended()
	mustBeClean(t, capture)
}
