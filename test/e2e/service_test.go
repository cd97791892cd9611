package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// The ports of the services: ahead of the pods are the cluster IPs 10.96.0.n and fd00:96::n.
const (
	servicePort = 80
	hostPort    = 8080
)

// A serviceCase is a client and the address that it calls.
type serviceCase struct {
	name   string
	from   cluster.Endpointer
	to     netip.AddrPort
	source netip.Addr // that the backend must see
	// plain is true of a way whose packets between client and node are not pod
	// traffic, so that they are in the clear.
	plain bool
}

// servicesOf are the services of one family: with a backend on the other node, with
// the client itself behind it, and with externalTrafficPolicy Local.
func servicesOf(v6 bool, front, back, self *cluster.Pod) []service {
	ip := func(n int) netip.Addr {
		if v6 {
			return netip.MustParseAddr(fmt.Sprintf("fd00:96::%d", n))
		}
		return netip.MustParseAddr(fmt.Sprintf("10.96.0.%d", n))
	}
	at := func(p *cluster.Pod) backend {
		if v6 {
			return backend{p.IPv6(), p.Node}
		}
		return backend{p.IPv4(), p.Node}
	}
	return []service{
		{name: "default/back", clusterIP: ip(10), port: servicePort, nodePort: 30010, backend: at(back)},
		{name: "default/self", clusterIP: ip(11), port: servicePort, nodePort: 30011, backend: at(self)},
		{name: "default/local", clusterIP: ip(12), port: servicePort, nodePort: 30012, local: true, backend: at(front)},
	}
}

// A serviceMesh has pods on two nodes; those of the second are the backends.
type serviceMesh struct {
	*mesh
	a, b              *cluster.Node
	client, host, far *cluster.Pod // client and host (of a host port) on a, far on b
}

func newServiceMesh(t *testing.T, stanza map[string]any) *serviceMesh {
	t.Helper()
	portmap := map[string]any{"type": "portmap", "backend": "nftables", "capabilities": map[string]any{"portMappings": true}}
	m := &serviceMesh{mesh: newMesh(t, 2, 0, cluster.NetworkOptions{
		Stanza: stanza, Chain: []any{portmap}, Primary: map[string]any{"hairpinMode": true}, // as flannel has it: a pod may call itself
	})}
	m.a, m.b = m.Nodes[0], m.Nodes[1]
	mapped := fmt.Sprintf(`{"portMappings": [{"hostPort": %d, "containerPort": %d, "protocol": "tcp"}, {"hostPort": %[1]d, "containerPort": %[2]d, "protocol": "udp"}]}`, hostPort, echoPort)
	m.client = addPod(t, m.a, cluster.NetworkName, "client", cluster.PodOptions{})
	m.host = addPod(t, m.a, cluster.NetworkName, "host", cluster.PodOptions{CapabilityArgs: mapped})
	m.far = addPod(t, m.b, cluster.NetworkName, "far", cluster.PodOptions{})
	for _, p := range []*cluster.Pod{m.client, m.host, m.far} {
		serve(t, p)
	}
	return m
}

// addresses are those of one family.
type addresses struct {
	outside, nodeA, nodeB, tunnelA, gatewayA, client, far netip.Addr
}

func (m *serviceMesh) addresses(v6 bool) addresses {
	if v6 {
		tunnel := m.a.PodCIDRs()[1].Addr()
		return addresses{cluster.Gateway6, m.a.IPv6, m.b.IPv6, tunnel, tunnel.Next(), m.client.IPv6(), m.far.IPv6()}
	}
	tunnel := m.a.PodCIDRs()[0].Addr()
	return addresses{cluster.Gateway4, m.a.IPv4, m.b.IPv4, tunnel, tunnel.Next(), m.client.IPv4(), m.far.IPv4()}
}

// cases are the ways to a service whose packets between the nodes are pod
// traffic, and so encrypted.
func (m *serviceMesh) cases(v6 bool) []serviceCase {
	a, s := m.addresses(v6), servicesOf(v6, m.host, m.far, m.client)
	at := netip.AddrPortFrom
	return []serviceCase{
		{name: "pod -> ClusterIP -> another node", from: m.client, to: at(s[0].clusterIP, servicePort), source: a.client},
		// The masqueraded source is the tunnel's address, which peers accept (antrea#2697).
		{name: "node -> ClusterIP -> another node", from: m.a, to: at(s[0].clusterIP, servicePort), source: a.tunnelA},
		{name: "pod -> own node's NodePort -> another node", from: m.client, to: at(a.nodeA, 30010), source: a.client},
		{name: "node -> own NodePort -> another node", from: m.a, to: at(a.nodeA, 30010), source: a.tunnelA},
		{name: "pod -> ClusterIP -> itself", from: m.client, to: at(s[1].clusterIP, servicePort), source: a.gatewayA},
		{name: "another node's pod -> ClusterIP -> the client", from: m.far, to: at(s[1].clusterIP, servicePort), source: a.far},
		{name: "outside -> NodePort -> another node", from: m.Underlay, to: at(a.nodeA, 30010), source: a.tunnelA, plain: true},
		{name: "outside -> NodePort, externalTrafficPolicy Local", from: m.Underlay, to: at(a.nodeA, 30012), source: a.outside, plain: true},
		{name: "outside -> host port", from: m.Underlay, to: at(a.nodeA, hostPort), source: a.outside, plain: true},
	}
}

// podToNodeCases are the ways by another node's own address. Between pod and node
// they are traffic of a node, which is in the clear without encryptNodes.
func (m *serviceMesh) podToNodeCases(v6 bool) []serviceCase {
	a := m.addresses(v6)
	at := netip.AddrPortFrom
	return []serviceCase{
		{name: "pod -> another node's host port", from: m.far, to: at(a.nodeA, hostPort), source: a.nodeB, plain: true},
		{name: "pod -> another node's NodePort", from: m.far, to: at(a.nodeA, 30011), plain: true},
	}
}

// Services as kube-proxy makes them, over the tunnel: every call is answered, by
// TCP and UDP, and what passes between the nodes as pod traffic is encrypted.
//
// Without --cluster-cidr kube-proxy masquerades nothing that goes to a ClusterIP:
// what the node itself sends has the address of the underlay then.
func TestServices(t *testing.T) {
	m := newServiceMesh(t, nil)
	for _, tt := range []struct {
		mode string
		cidr bool
	}{{"iptables", true}, {"nftables", true}, {"iptables", false}, {"nftables", false}} {
		mode := tt.mode
		t.Run(fmt.Sprintf("%s, cluster CIDR %v", mode, tt.cidr), func(t *testing.T) {
			m.proxy(t, mode, tt.cidr)
			secret, open := []byte("between-the-nodes-"+mode), []byte("from-outside-"+mode)
			// What comes from outside is in the clear as far as the first node; the
			// second must not see it so.
			wire, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{Markers: [][]byte{secret}, Prefixes: podRanges})
			if err != nil {
				t.Fatal(err)
			}
			second, err := cluster.StartCapture(m.b, cluster.Uplink, cluster.CaptureOptions{Markers: [][]byte{secret, open}, Prefixes: podRanges})
			if err != nil {
				t.Fatal(err)
			}
			for _, v6 := range []bool{false, true} {
				callAll(t, m.cases(v6), secret, open)
			}
			mustBeClean(t, wire)
			mustBeClean(t, second)
			for _, v6 := range []bool{false, true} {
				callAll(t, m.podToNodeCases(v6), nil, open)
			}
		})
	}
}

// With encryptNodes the ways by another node's own address are encrypted as well.
func TestServicesByEncryptedNodes(t *testing.T) {
	m := newServiceMesh(t, map[string]any{"encryptNodes": true})
	awaitNodesEncrypted(t, m.a, m.b)
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run(mode, func(t *testing.T) {
			m.proxy(t, mode, true)
			secret, open := []byte("between-the-nodes-"+mode), []byte("from-outside-"+mode)
			wire, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{Markers: [][]byte{secret}, Prefixes: podRanges})
			if err != nil {
				t.Fatal(err)
			}
			for _, v6 := range []bool{false, true} {
				cases := slices.Concat(m.cases(v6), m.podToNodeCases(v6))
				for i := range cases {
					cases[i].source = netip.Addr{} // a machine's own address passes as it is
					cases[i].plain = cases[i].plain && cases[i].from == m.Underlay
				}
				callAll(t, cases, secret, open)
			}
			mustBeClean(t, wire)
		})
	}
}

// proxy puts kube-proxy's rules on every node, until the test's end.
func (m *serviceMesh) proxy(t *testing.T, mode string, cidr bool) {
	t.Helper()
	for _, n := range m.Nodes {
		for _, v6 := range []bool{false, true} {
			k := kubeProxy{node: n, v6: v6, cidr: cidr, services: servicesOf(v6, m.host, m.far, m.client)}
			proxyModes[mode].apply(t, k)
			t.Cleanup(func() { proxyModes[mode].remove(t, k) })
		}
	}
}

// Somebody takes our rules away, and the ordinary routes lead around the tunnel: the
// filter alone sees that a service's packets do not leave in the clear, those that
// the node itself sends included, whose route a dnat changes behind the output hooks.
func TestServicesLeakNothing(t *testing.T) {
	m := newServiceMesh(t, nil)
	routeAroundTunnel(t, m.Cluster)
	m.proxy(t, "nftables", true)
	stopHelper(t, m.helpers[0]) // it would mend it
	for _, v6 := range []bool{false, true} {
		if err := callWithin(t, m.cases(v6)[1], cluster.UDP, cluster.Patience(3*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	for _, family := range []string{"-4", "-6"} {
		run(t, m.a, "ip", family, "rule", "delete", "priority", "110")
	}
	before := droppedOut(t, m.a)
	wire := watchUnderlay(t, m.Cluster)
	calls := 0
	for _, v6 := range []bool{false, true} {
		for _, c := range m.cases(v6)[:4] { // those of pods and of the node to the other one
			calls++
			if err := callWithin(t, c, cluster.UDP, 300*time.Millisecond); err == nil {
				t.Errorf("%s: answered", c.name)
			}
		}
	}
	if got := droppedOut(t, m.a) - before; got < uint64(calls) {
		t.Errorf("%d packets were counted as dropped, of %d", got, calls)
	}
	startHelper(t, m.a)
	err := cluster.Poll(t.Context(), "the service to be reached again", func() error {
		return callWithin(t, m.cases(false)[1], cluster.UDP, 300*time.Millisecond)
	})
	if err != nil {
		t.Error(err)
	}
	mustBeClean(t, wire)
}

func droppedOut(t *testing.T, n *cluster.Node) uint64 {
	t.Helper()
	s, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.Dropped.Out.Packets
}

// A probe is cluster.TCP or cluster.UDP.
type probe func(context.Context, cluster.Endpointer, netip.AddrPort, []byte) (netip.AddrPort, error)

func callWithin(t *testing.T, c serviceCase, p probe, limit time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	_, err := p(ctx, c.from, c.to, []byte("x"))
	return err
}

func callAll(t *testing.T, cases []serviceCase, secret, open []byte) {
	t.Helper()
	for _, c := range cases {
		payload := secret
		if c.plain {
			payload = open
		}
		for name, probe := range map[string]probe{"TCP": cluster.TCP, "UDP": cluster.UDP} {
			ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(3*time.Second))
			seen, err := probe(ctx, c.from, c.to, payload)
			cancel()
			switch {
			case err != nil:
				t.Errorf("%s, %s: %v", c.name, name, err)
			case c.source.IsValid() && seen.Addr() != c.source:
				t.Errorf("%s, %s: the backend sees %s as the source, want %s", c.name, name, seen.Addr(), c.source)
			}
		}
	}
}
