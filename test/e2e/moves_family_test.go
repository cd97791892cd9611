package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// The nodes' endpoints become IPv6 addresses, one after the other. Switching a live
// peer's endpoint from IPv4 to IPv6 lost 0.4 s elsewhere. 20 bytes less fit into a packet
// then (cilium#23917), and the pods' links shrink.
func TestEndpointsBecomeIPv6(t *testing.T) {
	c := cluster.NewT(t, 2)
	m := &mesh{Cluster: c}
	announce := func(n *cluster.Node, addr netip.Addr) {
		t.Helper()
		o := cluster.NetworkOptions{Stanza: map[string]any{"endpoint": netip.AddrPortFrom(addr, 51820).String()}}
		if err := n.Configure(o); err != nil {
			t.Fatal(err)
		}
	}
	for i, n := range c.Nodes {
		announce(n, n.IPv4)
		h, err := n.Start(bin("wgcnid"), "--config", cluster.ConfDir+"/"+cluster.ConflistFile, "run", "--resync", "300ms")
		if err != nil {
			t.Fatal(err)
		}
		m.helpers = append(m.helpers, h)
		m.pods = append(m.pods, addPod(t, n, cluster.NetworkName, fmt.Sprintf("pod%d", i), cluster.PodOptions{}))
	}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	serveAll(t, m.pods)
	routeAroundTunnel(t, c)
	talkAll(t, m.pods)
	capture := watchUnderlay(t, c)
	for _, p := range m.pods {
		awaitMTU(t, p, 1440)
	}
	flows := newFlows(t, func() (all []*cluster.Stream) {
		return []*cluster.Stream{stream(t, m.pods[0], m.pods[1].IPv4(), movesRate), stream(t, m.pods[1], m.pods[0].IPv4(), movesRate)}
	})
	var full []*cluster.Stream
	for i, from := range m.pods {
		s, err := cluster.StartStream(from, netip.AddrPortFrom(m.pods[1-i].IPv4(), echoPort),
			cluster.StreamOptions{Rate: 100, Size: 1440 - 28 - len("from 10.244.1.2:65535 ")})
		if err != nil {
			t.Fatal(err)
		}
		full = append(full, s)
	}
	allFlowing(t, full)
	// In between they call each other at different families, and each goes by what
	// it has heard last.
	for _, n := range c.Nodes {
		announce(n, n.IPv6)
		awaitRecord(t, m, n.Name, func(endpoints []string) bool {
			return endpoints[0] == netip.AddrPortFrom(n.IPv6, 51820).String()
		})
		allFlowing(t, flows.streams)
	}
	for _, p := range m.pods {
		awaitMTU(t, p, 1420)
	}
	flows.lossless(t)
	// What is on its way when the far end's links shrink is too large for them; the sender
	// is told, and that takes its time on a busy machine.
	const onTheirWay = 30
	for _, r := range endAll(t, full) {
		if dropped := backlogDrops(t) - flows.dropped; r.Lost > onTheirWay+int(dropped) {
			t.Errorf("packets of full size: %s; want at most those that are on their way lost, and the %d that this machine has dropped", r, dropped)
		}
	}

	// Where they go on by IPv4, since both sent by it at the same moment, its end is noticed.
	s := stream(t, m.pods[0], m.pods[1].IPv4(), movesRate)
	flowing(t, s)
	t.Log(run(t, c.Nodes[0], "wg", "show", cluster.Interface, "endpoints"), run(t, c.Nodes[1], "wg", "show", cluster.Interface, "endpoints"))
	for _, n := range c.Nodes {
		run(t, n, "ip", "-4", "address", "flush", "dev", cluster.Uplink)
	}
	flowing(t, s)
	for i, n := range c.Nodes {
		awaitEndpoint(t, c.Nodes[1-i], netip.AddrPortFrom(n.IPv6, 51820))
	}
	flowing(t, s)
	if r := s.Stop(); r.LongestGap > cluster.Patience(8*time.Second) {
		t.Errorf("without IPv4: %s; want at most 8 s without traffic", r)
	} else {
		t.Logf("without IPv4: %s", r)
	}
	mustBeClean(t, capture)
}
