package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// mapped is what a NAT in front of a node does to WireGuard's packets: they leave by
// another port, and only what comes to that one comes in. It is stateless, so that
// the mapping can be changed from one packet to the next, as when a router restarts.
const mapped = `table inet nat0
delete table inet nat0
table inet nat0 {
  chain out {
    type filter hook postrouting priority 300
    oifname eth0 udp sport 51820 udp sport set %[1]d
  }
  chain in {
    type filter hook prerouting priority -300
    iifname eth0 udp dport %[1]d udp dport set 51820 accept
    iifname eth0 udp dport 51820 drop
  }
}
`

// A node behind NAT announces the address that its router forwards nothing of; the
// others know where it is by what comes from it. The mapping changes: they follow
// the first packet, and are not led back to what its record says.
func TestMappingChanges(t *testing.T) {
	c := cluster.NewT(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	remap := func(port int) {
		t.Helper()
		if _, err := b.Batch(t.Context(), fmt.Sprintf(mapped, port), "nft", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	remap(40000)
	m := &mesh{Cluster: c}
	for i, n := range c.Nodes {
		if err := n.Configure(cluster.NetworkOptions{}); err != nil {
			t.Fatal(err)
		}
		args := []string{"--config", cluster.ConfDir + "/" + cluster.ConflistFile, "run", "--resync", "300ms"}
		h, err := n.Start(bin("wgcnid"), args...)
		if err != nil {
			t.Fatal(err)
		}
		m.helpers = append(m.helpers, h)
		m.pods = append(m.pods, addPod(t, n, cluster.NetworkName, fmt.Sprintf("pod%d", i), cluster.PodOptions{}))
		serve(t, m.pods[i])
	}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	routeAroundTunnel(t, c)
	capture := watchUnderlay(t, c)
	talkSoon(t, m.pods[1], m.pods[0]) // it calls
	flows := newFlows(t, func() []*cluster.Stream { return both(t, m.pods[0], m.pods[1]) })
	awaitEndpoint(t, a, netip.AddrPortFrom(b.IPv4, 40000))
	shaken := handshake(t, a)
	for i, port := range []int{41000, 42000, 43000} {
		before := lost(flows.streams)
		remap(port)
		awaitEndpoint(t, a, netip.AddrPortFrom(b.IPv4, uint16(port)))
		allFlowing(t, flows.streams)
		t.Logf("mapping %d: %d datagrams lost", i, lost(flows.streams)-before)
	}
	// Several looks at everything lead nobody back, nor does a restart.
	stopHelper(t, m.helpers[0])
	startHelper(t, a)
	for range 3 {
		synced(t, a)
		awaitEndpoint(t, a, netip.AddrPortFrom(b.IPv4, 43000))
	}
	if now := handshake(t, a); now != shaken {
		t.Errorf("a handshake of %s, after that of %s: the session should have gone on", now, shaken)
	}
	for _, r := range endAll(t, flows.streams) {
		if r.LongestGap > cluster.Patience(time.Second) {
			t.Errorf("%s; want at most a second without traffic", r)
		}
	}
	mustBeClean(t, capture)
}
