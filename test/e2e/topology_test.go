package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// keys are those of a node's wgcni entry.
type keys = map[string]any

// newTopology starts nodes that each have keys of their own, and a pod each that
// answers. It does not wait for anything.
func newTopology(t *testing.T, stanzas ...keys) *mesh {
	t.Helper()
	var options []cluster.NetworkOptions
	for _, stanza := range stanzas {
		options = append(options, cluster.NetworkOptions{Stanza: stanza})
	}
	return newTopologyOf(t, options...)
}

func newTopologyOf(t *testing.T, options ...cluster.NetworkOptions) *mesh {
	t.Helper()
	m := &mesh{Cluster: cluster.NewT(t, len(options))}
	for i, n := range m.Nodes {
		if err := n.Configure(options[i]); err != nil {
			t.Fatal(err)
		}
		m.helpers = append(m.helpers, startHelper(t, n))
	}
	t.Cleanup(func() {
		for i, h := range m.helpers {
			if t.Failed() {
				t.Logf("log of %s:\n%s", m.Nodes[i], h.Log)
			}
		}
	})
	for _, n := range m.Nodes {
		p := addPod(t, n, cluster.NetworkName, "pod", cluster.PodOptions{})
		serve(t, p)
		m.pods = append(m.pods, p)
	}
	return m
}

// allows waits until a node has the plan in its kernel, and what it allows each
// peer is as wanted: peers that it allows nothing are left out. Of the pods'
// ranges the IPv4 ones are enough to be named, by the letter of their node.
func allows(t *testing.T, n *cluster.Node, want ...string) {
	t.Helper()
	err := cluster.Poll(t.Context(), fmt.Sprintf("%s to allow %q", n, want), func() error {
		s, err := n.Status(t.Context())
		if err != nil {
			return err
		}
		var got []string
		for _, p := range s.Peers {
			letters := ""
			for _, q := range p.AllowedIPs {
				if q.Addr().Is4() {
					letters += string(rune('a' + q.Addr().As4()[2] - 1))
				}
			}
			if letters != "" {
				got = append(got, strings.TrimPrefix(p.Name, "node-")+":"+letters)
			}
		}
		if !s.OK || !slices.Equal(got, want) {
			return fmt.Errorf("%q; %s", got, s.Verdict)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// talkSoon is talk, once the first handshakes are through.
func talkSoon(t *testing.T, from, to *cluster.Pod) {
	t.Helper()
	err := cluster.Poll(t.Context(), fmt.Sprintf("%s to talk to %s", from, to), func() error { return talk(t.Context(), from, to, []byte("x")) })
	if err != nil {
		t.Error(err)
	}
}

// Spokes have no WireGuard peer but the hub, and talk to each other by it.
func TestHubAndSpokes(t *testing.T) {
	m := newTopology(t, keys{"role": "gateway"}, keys{"role": "spoke"}, keys{"role": "spoke"})
	capture := watchUnderlay(t, m.Cluster)
	routeAroundTunnel(t, m.Cluster)
	allows(t, m.Nodes[0], "b:b", "c:c")
	allows(t, m.Nodes[1], "a:ac")
	allows(t, m.Nodes[2], "a:ab")
	for _, n := range m.Nodes[1:] {
		if s, err := n.Status(t.Context()); err != nil || len(s.Peers) != 1 {
			t.Errorf("%s has the peers %+v (%v), want the hub alone", n, s.Peers, err)
		}
	}
	for _, from := range m.pods {
		for _, to := range m.pods {
			if from != to {
				talkSoon(t, from, to)
			}
		}
	}
	mustBeClean(t, capture)
}

// plug sets a node's port on the underlay up or down: the cable is pulled.
func plug(t *testing.T, n *cluster.Node, underlay *cluster.Machine, state string) {
	t.Helper()
	if _, err := underlay.Run(t.Context(), "ip", "link", "set", n.Name, state); err != nil {
		t.Fatal(err)
	}
}

// Two locations with two gateways each: what they send each other goes by the
// first of each, and by the second while the first cannot be reached.
func TestGatewayIsLost(t *testing.T) {
	east, west := keys{"location": "east", "role": "gateway"}, keys{"location": "west", "role": "gateway"}
	m := newTopology(t, east, east, keys{"location": "east"}, west, west)
	capture := watchUnderlay(t, m.Cluster)
	routeAroundTunnel(t, m.Cluster)
	a, node := m.Nodes[0], m.Nodes[2]
	allows(t, node, "a:ade", "b:b")
	allows(t, m.Nodes[3], "a:abc", "e:e")
	from, to := m.pods[2], m.pods[4]
	talkSoon(t, from, to)
	talkSoon(t, to, from)

	s := stream(t, from, to.IPv4(), 200)
	flowing(t, s)
	before := s.Report()
	plug(t, a, m.Underlay, "down")
	cut := time.Now()
	allows(t, node, "a:a", "b:bde")
	flowing(t, s)
	after := s.Report()
	t.Logf("the gateway was cut off: back after %v, longest gap %v, %d datagrams lost", time.Since(cut).Round(time.Millisecond), after.LongestGap.Round(time.Millisecond), after.Lost-before.Lost)
	if after.LongestGap > 15*time.Second {
		t.Errorf("no traffic for %v, want at most 15 s", after.LongestGap)
	}

	plug(t, a, m.Underlay, "up")
	back := time.Now()
	before = s.Report()
	allows(t, node, "a:ade", "b:b")
	flowing(t, s)
	switched := s.Report()
	flowing(t, s)
	end := s.Stop()
	t.Logf("the gateway came back: it carries again after %v, %d datagrams of 5 ms lost at the switch", time.Since(back).Round(time.Millisecond), switched.Lost-before.Lost)
	if end.Lost > switched.Lost {
		t.Errorf("%d datagrams lost after the switch", end.Lost-switched.Lost)
	}
	if lost := switched.Lost - before.Lost; lost > 200 {
		t.Errorf("%d datagrams lost at the switch, want less than a second of them", lost)
	}
	talkSoon(t, from, to)
	mustBeClean(t, capture)
}

// onlyReplies is what a NAT does to what comes in.
const onlyReplies = `table inet nat0 {
  chain in {
    type filter hook input priority 0
    iifname "eth0" meta l4proto { tcp, udp } ct state new counter drop
  }
}
`

func behindNAT(t *testing.T, nodes ...*cluster.Node) {
	t.Helper()
	behindNATOf(t, nil, nodes...)
}

// behindNATOf has the nodes called by those inside only.
func behindNATOf(t *testing.T, inside []*cluster.Node, nodes ...*cluster.Node) {
	t.Helper()
	for _, n := range nodes {
		rules := onlyReplies
		for _, from := range inside {
			rules += fmt.Sprintf("insert rule inet nat0 in ip saddr %s accept\n", from.IPv4)
		}
		if _, err := n.Batch(t.Context(), rules, "nft", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
}

// Two nodes that nobody can call reach each other by a gateway that can be called.
func TestBothBehindNAT(t *testing.T) {
	nat := keys{"endpoint": "none"}
	m := newTopology(t, keys{"location": "cloud", "role": "gateway"}, nat, nat)
	capture := watchUnderlay(t, m.Cluster)
	routeAroundTunnel(t, m.Cluster)
	behindNAT(t, m.Nodes[1:]...)
	allows(t, m.Nodes[1], "a:ac")
	allows(t, m.Nodes[2], "a:ab")
	allows(t, m.Nodes[0], "b:b", "c:c")
	for _, pair := range [][2]int{{1, 2}, {2, 1}, {0, 1}, {2, 0}} {
		talkSoon(t, m.pods[pair[0]], m.pods[pair[1]])
	}
	s, err := m.Nodes[0].Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range s.Peers {
		if !p.Endpoint.IsValid() {
			t.Errorf("%s has not called", p.Name)
		}
	}
	mustBeClean(t, capture)
}

// Nodes talk while they share a segment: a change of one's stanza takes effect
// while all runs. Without, no forced route and no forced peer helps.
func TestSegments(t *testing.T) {
	segments := func(names ...string) keys { return keys{"segments": names} }
	m := newTopology(t, segments("red"), segments("blue", "red"), segments("blue"))
	capture := watchUnderlay(t, m.Cluster)
	routeAroundTunnel(t, m.Cluster)
	a, b := m.Nodes[0], m.Nodes[1]
	allows(t, a, "b:b")
	allows(t, b, "a:a", "c:c")
	allows(t, m.Nodes[2], "b:b")
	talkSoon(t, m.pods[0], m.pods[1])
	talkSoon(t, m.pods[2], m.pods[1])

	if err := b.Configure(cluster.NetworkOptions{Stanza: segments("blue")}); err != nil {
		t.Fatal(err)
	}
	allows(t, a)
	allows(t, b, "c:c")
	talkSoon(t, m.pods[1], m.pods[2])
	unreached := func(how string, from, to *cluster.Pod) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(time.Second))
		defer cancel()
		for _, to := range []netip.Addr{to.IPv4(), to.IPv6()} {
			if _, err := cluster.Ping(ctx, from, to, nil); err == nil {
				t.Errorf("%s: a ping to %s got through", how, to)
			}
		}
	}
	unreached("no common segment", m.pods[0], m.pods[1])
	unreached("no common segment", m.pods[1], m.pods[0])
	// By force: the route, and the peer with its allowed IPs, on the one side.
	s, err := a.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := b.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	key, err := publicKeyOf(b)
	if err != nil {
		t.Fatal(err)
	}
	ranges := b.PodCIDRs()
	for _, p := range ranges {
		run(t, a, "ip", "route", "replace", p.String(), "dev", cluster.Interface, "table", "30567")
	}
	unreached("forced route", m.pods[0], m.pods[1])
	run(t, a, "wg", "set", cluster.Interface, "peer", key, "endpoint", netip.AddrPortFrom(b.IPv4, 51820).String(),
		"allowed-ips", ranges[0].String()+","+ranges[1].String())
	unreached("forced route and peer", m.pods[0], m.pods[1])
	if len(s.Peers) != 0 || len(theirs.Peers) != 1 {
		t.Errorf("peers: %+v and %+v; want none, and node-c", s.Peers, theirs.Peers)
	}
	mustBeClean(t, capture)
}

func publicKeyOf(n *cluster.Node) (string, error) {
	out, err := n.Run(context.Background(), "wg", "show", cluster.Interface, "public-key")
	if key := strings.TrimSpace(out); err == nil && key == "" {
		return "", errors.New(n.Name + " has no key")
	}
	return strings.TrimSpace(out), err
}

// conflist/examples/three-clouds, from its own files: the hub, two machines of
// cloud-a, and the gateways of the two others. Replaced are the registry, the name
// of the hub, which no name server here knows, and the other clouds' locations.
func TestThreeClouds(t *testing.T) {
	const folder = "examples/three-clouds/"
	secrets := []string{newSecret(t)}
	file := func(name string, stanza keys) cluster.NetworkOptions {
		return cluster.NetworkOptions{Example: folder + name + ".conflist", Stanza: stanza, Secrets: secrets}
	}
	m := newTopologyOf(t, file("hub", keys{"endpoint": "192.0.2.10:51820"}), file("gateway", nil), file("node", nil),
		file("gateway", keys{"location": "cloud-b"}), file("gateway", keys{"location": "cloud-c"}), file("gateway", nil))
	if got := m.Nodes[0].IPv4.String(); got != "192.0.2.10" {
		t.Fatalf("the hub has the address %s", got)
	}
	capture := watchUnderlay(t, m.Cluster)
	routeAroundTunnel(t, m.Cluster)
	behindNAT(t, m.Nodes[3], m.Nodes[4])
	behindNATOf(t, []*cluster.Node{m.Nodes[1], m.Nodes[2], m.Nodes[5]}, m.Nodes[1], m.Nodes[5])
	allows(t, m.Nodes[2], "b:abde", "f:f")
	allows(t, m.Nodes[5], "b:abde", "c:c") // it stands by
	allows(t, m.Nodes[1], "a:ade", "c:c", "f:f")
	allows(t, m.Nodes[3], "a:abcef")
	allows(t, m.Nodes[0], "b:bcf", "d:d", "e:e")
	for _, pair := range [][2]int{{2, 3}, {3, 2}, {4, 3}, {2, 0}, {0, 4}, {1, 2}, {5, 1}, {5, 3}} {
		talkSoon(t, m.pods[pair[0]], m.pods[pair[1]])
	}
	drawn, err := m.Nodes[2].Wgcnid(t.Context(), "graph", "--format", "mermaid")
	for _, want := range []string{`["cloud-a"]`, `["hub"]`, `{{"node-b<br>gateway<br>behind NAT<br>handshake `} {
		if err != nil || !strings.Contains(drawn, want) {
			t.Errorf("graph (%v) lacks %s:\n%s", err, want, drawn)
		}
	}
	mustBeClean(t, capture)
}
