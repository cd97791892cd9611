package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// A node is announced by its DNS name. It gets another address, and so does the name,
// while a firewall lets nothing out of the node but answers: it cannot tell anybody
// where it is. Who calls it looks its name up again long before the 30 s for which an
// answer is good while the node answers.
func TestNameOfANodeLeadsElsewhere(t *testing.T) {
	c := cluster.NewT(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	names := startNameServer(t, a, "127.0.0.1", b.IPv4)
	if err := a.WriteFile("/etc/resolv.conf", "nameserver 127.0.0.1\noptions attempts:1 timeout:1\n", 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Batch(t.Context(), "table inet fw { chain c { type filter hook output priority 0; oifname eth0 meta l4proto udp ct direction original drop; }; }", "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	m := &mesh{Cluster: c}
	for i, n := range m.Nodes {
		stanza := map[string]any{}
		if n == b {
			stanza["endpoint"] = "node-b.example.org:51820"
		}
		if err := n.Configure(cluster.NetworkOptions{Stanza: stanza}); err != nil {
			t.Fatal(err)
		}
		m.helpers = append(m.helpers, startHelper(t, n))
		m.pods = append(m.pods, addPod(t, n, cluster.NetworkName, fmt.Sprintf("pod%d", i), cluster.PodOptions{}))
		serve(t, m.pods[i])
	}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	routeAroundTunnel(t, c)
	awaitEndpoint(t, a, netip.AddrPortFrom(b.IPv4, 51820))
	capture := watchUnderlay(t, c)
	s := stream(t, m.pods[0], m.pods[1].IPv4(), 100)
	flowing(t, s)

	moved := netip.MustParseAddr("192.0.2.99")
	run(t, b, "sh", "-c", fmt.Sprintf("printf '%%s\\n' 'address del %s/24 dev eth0' 'address add %s/24 dev eth0' 'route replace default via %s' | ip -batch -",
		b.IPv4, moved, cluster.Gateway4))
	losing(t, s)
	names.set(moved)
	begun := time.Now()
	awaitEndpoint(t, a, netip.AddrPortFrom(moved, 51820))
	flowing(t, s)
	took := time.Since(begun)
	r := s.Stop()
	t.Logf("it flows again %v after the name had its new address; %s", took, r)
	if took > cluster.Patience(12*time.Second) {
		t.Errorf("it took %v until the name was looked up again, want less than 12 s", took)
	}
	awaitRecord(t, m, b.Name, func(endpoints []string) bool { return slices.Equal(endpoints, []string{"node-b.example.org:51820"}) })
	mustBeClean(t, capture)
}

// A name server that is away when a node starts holds nothing up, and its peer is
// called soon after the name server is back.
func TestNameServerComesLate(t *testing.T) {
	c := cluster.NewT(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	if err := a.WriteFile("/etc/resolv.conf", "nameserver 127.0.0.1\noptions attempts:1 timeout:1\n", 0o644); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		stanza := map[string]any{}
		if n == b {
			stanza["endpoint"] = "node-b.example.org:51820"
		}
		if err := n.Configure(cluster.NetworkOptions{Stanza: stanza}); err != nil {
			t.Fatal(err)
		}
		startHelper(t, n)
	}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	startNameServer(t, a, "127.0.0.1", b.IPv4)
	awaitEndpoint(t, a, netip.AddrPortFrom(b.IPv4, 51820))
	if took := time.Since(begun); took > cluster.Patience(12*time.Second) {
		t.Errorf("its peer is called %v after the name server is back, want less than 12 s", took)
	} else {
		t.Logf("its peer is called %v after the name server is back", took)
	}
}
