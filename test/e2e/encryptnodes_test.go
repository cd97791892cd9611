package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/test/cluster"
)

var nodeMarker = []byte("node-plaintext-marker-0123456789")

// sshPort is direct by default.
const sshPort = 22

func nodesOn(more map[string]any) cluster.NetworkOptions {
	stanza := map[string]any{"encryptNodes": true}
	for key, value := range more {
		stanza[key] = value
	}
	return cluster.NetworkOptions{Stanza: stanza}
}

// strictNodes are two nodes whose reverse path filters are strict, and which know
// no neighbour: WireGuard's own packets and ARP have to pass them (felix#2781, felix#2820).
func strictNodes(t *testing.T) *cluster.Cluster {
	t.Helper()
	c := cluster.NewT(t, 2)
	for _, n := range c.Nodes {
		strict(t, n)
	}
	return c
}

func strict(t *testing.T, n *cluster.Node) {
	t.Helper()
	run(t, n, "sh", "-c", "for f in all default "+cluster.Uplink+"; do echo 1 >/proc/sys/net/ipv4/conf/$f/rp_filter; done; ip neighbour flush all")
}

// awaitNodesEncrypted waits until each of the nodes encrypts its traffic with all
// of the others.
func awaitNodesEncrypted(t *testing.T, nodes ...*cluster.Node) {
	t.Helper()
	for _, n := range nodes {
		awaitStatus(t, n, "its node traffic to be encrypted", func(s cluster.Status) bool {
			for _, other := range nodes {
				if other != n && nodeTrafficOf(s, other) != "encrypted" {
					return false
				}
			}
			return s.OK
		})
	}
}

func nodeTrafficOf(s cluster.Status, n *cluster.Node) string {
	for _, p := range s.Peers {
		if p.Name == n.Name {
			return p.NodeTraffic
		}
	}
	return ""
}

func addressesOf(at cluster.Endpointer) []netip.Addr {
	switch e := at.(type) {
	case *cluster.Node:
		return []netip.Addr{e.IPv4, e.IPv6}
	case *cluster.Pod:
		return []netip.Addr{e.IPv4(), e.IPv6()}
	}
	return nil
}

// reach checks TCP, UDP and ICMP in both families. The far end must see one of
// the sender's own addresses, or for a node one that it has in the tunnel.
func reach(ctx context.Context, from, to cluster.Endpointer, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(5*time.Second))
	defer cancel()
	own := addressesOf(from)
	if n, ok := from.(*cluster.Node); ok {
		for _, p := range n.PodCIDRs() {
			own = append(own, p.Addr(), p.Addr().Next()) // in the tunnel, on the bridge
		}
	}
	for _, dst := range addressesOf(to) {
		for name, probe := range map[string]func(context.Context, cluster.Endpointer, netip.AddrPort, []byte) (netip.AddrPort, error){
			"TCP": cluster.TCP, "UDP": cluster.UDP,
		} {
			seen, err := probe(ctx, from, netip.AddrPortFrom(dst, echoPort), payload)
			if err != nil {
				return fmt.Errorf("%s %s -> %s: %w", name, from, to, err)
			}
			if !slices.Contains(own, seen.Addr().Unmap()) {
				return fmt.Errorf("%s %s -> %s: the far end sees %s as the source", name, from, to, seen.Addr())
			}
		}
		if _, err := cluster.Ping(ctx, from, dst, payload); err != nil {
			return fmt.Errorf("ping %s -> %s: %w", from, to, err)
		}
	}
	return nil
}

func watchNodes(t *testing.T, c *cluster.Cluster) *cluster.Capture {
	t.Helper()
	capture, err := cluster.StartCapture(c.Underlay, cluster.Bridge, cluster.CaptureOptions{Prefixes: podRanges, Markers: [][]byte{nodeMarker}})
	if err != nil {
		t.Fatal(err)
	}
	return capture
}

// Node to node, pod to node and node to pod, both ways: large and small packets
// of every kind are encrypted, with a strict reverse path filter everywhere. The
// answers are as well: elsewhere a node's replies to a pod left in the clear
// (cilium#46864).
func TestEncryptNodesTraffic(t *testing.T) {
	m := join(t, strictNodes(t), nodesOn(nil))
	a, b := m.Nodes[0], m.Nodes[1]
	awaitNodesEncrypted(t, a, b)
	for _, n := range m.Nodes {
		run(t, n, "ip", "neighbour", "flush", "all")
	}
	all := []cluster.Endpointer{a, b, m.pods[0], m.pods[1]}
	for _, e := range all {
		serve(t, e)
	}
	for _, p := range m.pods {
		if out, err := p.CNI(t.Context(), "check"); err != nil {
			t.Errorf("CHECK: %v: %s", err, out)
		}
	}
	capture := watchNodes(t, m.Cluster)
	large := slices.Concat(nodeMarker, make([]byte, 1<<14))
	for _, from := range all {
		for _, to := range all {
			if from == to {
				continue
			}
			for _, payload := range [][]byte{nodeMarker, large} {
				if err := reach(t.Context(), from, to, payload); err != nil {
					t.Errorf("%d bytes: %v", len(payload), err)
				}
			}
		}
	}
	mustNotBeTurned(t, a, b)
	mustBeClean(t, capture)
}

// mustNotBeTurned forges packets in the clear, for which what a node then begins
// to send looks like an answer; it goes by the tunnel all the same.
func mustNotBeTurned(t *testing.T, victim, forged *cluster.Node) {
	t.Helper()
	const far, udpPort, tcpPort = 9999, 40000, 40001
	dial := func(at *cluster.Node, network string, local, remote netip.AddrPort, plain bool) (conn net.Conn, err error) {
		d := net.Dialer{Timeout: cluster.Patience(3 * time.Second), LocalAddr: net.UDPAddrFromAddrPort(local)}
		if network == "tcp" {
			d.LocalAddr = net.TCPAddrFromAddrPort(local)
		}
		d.Control = func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) {
				if plain {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0x4)
				}
			}), err)
		}
		err = at.Do(func() error {
			conn, err = d.DialContext(t.Context(), network, remote.String())
			return err
		})
		return conn, err
	}
	for network, port := range map[string]uint16{"udp": udpPort, "tcp": tcpPort} {
		conn, err := dial(forged, network, netip.AddrPortFrom(forged.IPv4, far), netip.AddrPortFrom(victim.IPv4, port), true)
		if network == "tcp" {
			if err == nil {
				t.Error("nobody listens there")
			}
			continue
		}
		if err == nil {
			_, err = conn.Write([]byte("forged"))
			_ = conn.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s, err := cluster.StartServer(forged, far)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for network, port := range map[string]uint16{"udp": udpPort, "tcp": tcpPort} {
		conn, err := dial(victim, network, netip.AddrPortFrom(victim.IPv4, port), netip.AddrPortFrom(forged.IPv4, far), false)
		if err != nil {
			t.Errorf("%s: %v", network, err)
			continue
		}
		_ = conn.SetDeadline(time.Now().Add(cluster.Patience(3 * time.Second)))
		_, err = conn.Write(nodeMarker)
		if err == nil {
			_, err = conn.Read(make([]byte, 1000))
		}
		if err != nil {
			t.Errorf("%s: %v", network, err)
		}
		_ = conn.Close()
	}
}

// tcp checks that a server answers on a port, by IPv4 and IPv6.
func tcp(ctx context.Context, from, to *cluster.Node, port uint16, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(3*time.Second))
	defer cancel()
	for _, dst := range addressesOf(to) {
		if _, err := cluster.TCP(ctx, from, netip.AddrPortFrom(dst, port), payload); err != nil {
			return err
		}
	}
	return nil
}

// mustAnswerSSH checks that each node's port 22 is open to the other.
func mustAnswerSSH(t *testing.T, when string, a, b *cluster.Node) {
	t.Helper()
	for _, pair := range [][2]*cluster.Node{{a, b}, {b, a}} {
		err := cluster.Poll(t.Context(), "port 22 to answer "+when, func() error { return tcp(t.Context(), pair[0], pair[1], sshPort, []byte("ssh")) })
		if err != nil {
			t.Error(err)
		}
	}
}

// mustNotReach checks that nothing new gets from one node to the other, and none of it in the clear.
func mustNotReach(t *testing.T, when string, from, to *cluster.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	if _, err := cluster.UDP(ctx, from, netip.AddrPortFrom(to.IPv4, echoPort), nodeMarker); err == nil {
		t.Errorf("%s: %s reached %s", when, from, to)
	}
}

func serveNode(t *testing.T, n *cluster.Node) {
	t.Helper()
	for _, port := range []uint16{echoPort, sshPort} {
		s, err := cluster.StartServer(n, port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
	}
}

// conversation is a TCP connection that lasts.
type conversation struct {
	net.Conn
	answers *bufio.Reader
}

func converse(t *testing.T, from *cluster.Node, to netip.Addr) conversation {
	t.Helper()
	conn, err := cluster.Dial(t.Context(), from, "tcp", netip.AddrPortFrom(to, echoPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	c := conversation{conn, bufio.NewReader(conn)}
	_ = conn.SetDeadline(time.Now().Add(cluster.Patience(10 * time.Second)))
	if _, err := c.answers.ReadString('\n'); err != nil { // the server's greeting
		t.Fatal(err)
	}
	return c
}

func (c conversation) exchange(t *testing.T, when string) {
	t.Helper()
	payload := slices.Concat(nodeMarker, make([]byte, 1<<14))
	_ = c.SetDeadline(time.Now().Add(cluster.Patience(10 * time.Second)))
	_, err := c.Write(payload)
	if err == nil {
		_, err = io.ReadFull(c.answers, make([]byte, len(payload)))
	}
	if err != nil {
		t.Errorf("a connection that was there before %s: %v", when, err)
	}
}

// A node that reboots reaches the others before its helper runs, and is reached
// by ssh; so is the registry that runs on a node of the mesh (calico#5125).
func TestEncryptNodesReboot(t *testing.T) {
	c := strictNodes(t)
	a, b := c.Nodes[0], c.Nodes[1]
	etcd := startEtcd(t, c, cluster.EtcdOptions{Node: a})
	m := join(t, c, nodesOn(map[string]any{"registry": etcd.Registry(nil)}))
	awaitNodesEncrypted(t, a, b)
	serveNode(t, a)
	serveNode(t, b)
	mustAnswerSSH(t, "before", a, b)

	reboot := func(n, other *cluster.Node) conversation {
		if err := n.Reboot(t.Context()); err != nil {
			t.Fatal(err)
		}
		strict(t, n)
		serveNode(t, n)
		withoutTunnel := func() {
			mustAnswerSSH(t, "while "+n.Name+" has no tunnel", n, other)
			// Large enough for a path that is narrower than the tunnel to show.
			for _, payload := range [][]byte{[]byte("plain"), make([]byte, 1<<14)} {
				if err := reach(t.Context(), n, other, payload); err != nil {
					t.Errorf("%s has no tunnel: %v", n.Name, err)
				}
			}
			capture := watchNodes(t, c)
			mustNotReach(t, n.Name+" has no tunnel", other, n)
			mustBeClean(t, capture)
		}
		withoutTunnel()
		talk := converse(t, n, other.IPv4)
		// What the plugin puts up before the helper runs is not in the way: all but the
		// tunnel, and the tunnel as well where the kernel has WireGuard.
		addPod(t, n, cluster.NetworkName, "early", cluster.PodOptions{})
		if kernel.HasWireGuard() {
			mustBeEncrypted(t, m, talk, n, other)
		} else {
			withoutTunnel()
		}
		return talk
	}
	talk := reboot(b, a)
	m.helpers = append(m.helpers, startHelper(t, b))
	awaitNodesEncrypted(t, a, b)
	mustBeEncrypted(t, m, talk, a, b)

	talk = reboot(a, b) // and etcd with it
	m.helpers = append(m.helpers, startHelper(t, a))
	awaitNodesEncrypted(t, a, b)
	mustBeEncrypted(t, m, talk, a, b)
	if err := etcd.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := etcd.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		awaitStatus(t, n, "the registry to be read", func(s cluster.Status) bool { return s.Report.RegistryError == "" && s.Report.PublishError == "" })
	}
	// The registry's port is direct: it needs no tunnel.
	stopHelper(t, m.helpers[len(m.helpers)-2])
	run(t, b, "ip", "link", "delete", "wgcni0")
	m.helpers = append(m.helpers, startHelper(t, b))
	awaitStatus(t, b, "the registry to be read", func(s cluster.Status) bool { return s.Report.RegistryError == "" })
	awaitNodesEncrypted(t, a, b)
}

// mustBeEncrypted checks new traffic both ways, and a connection that has begun in the clear.
func mustBeEncrypted(t *testing.T, m *mesh, talk conversation, a, b *cluster.Node) {
	t.Helper()
	capture := watchNodes(t, m.Cluster)
	talk.exchange(t, "the helper ran")
	for _, pair := range [][2]*cluster.Node{{a, b}, {b, a}} {
		err := cluster.Poll(t.Context(), "the nodes to reach each other", func() error { return reach(t.Context(), pair[0], pair[1], nodeMarker) })
		if err != nil {
			t.Error(err)
		}
	}
	mustBeClean(t, capture)
	mustAnswerSSH(t, "after", a, b)
}

// breakTunnel takes a node's interface away: with its process, where that is userspace's.
func breakTunnel(t *testing.T, n *cluster.Node) {
	t.Helper()
	killed, err := n.Kill9(t.Context(), "wgcnid tunnel")
	if err != nil {
		t.Fatal(err)
	}
	if killed == 0 {
		run(t, n, "ip", "link", "delete", "wgcni0")
	}
}

// While a node has neither tunnel nor helper, ssh works both ways and nothing
// new is sent in the clear. Both come back by themselves.
func TestEncryptNodesWithoutTunnel(t *testing.T) {
	m := join(t, strictNodes(t), nodesOn(nil))
	a, b := m.Nodes[0], m.Nodes[1]
	awaitNodesEncrypted(t, a, b)
	serveNode(t, a)
	serveNode(t, b)
	talk := converse(t, a, b.IPv6)
	talk.exchange(t, "anything")

	stopHelper(t, m.helpers[1])
	mustBeEncrypted(t, m, talk, a, b)
	breakTunnel(t, b)
	capture := watchNodes(t, m.Cluster)
	mustAnswerSSH(t, "while a tunnel is gone", a, b)
	mustNotReach(t, "the tunnel is gone", a, b)
	mustNotReach(t, "the tunnel is gone", b, a)
	pods := [][2]cluster.Endpointer{{m.pods[1], a}, {m.pods[0], b}, {a, m.pods[1]}, {b, m.pods[0]}}
	for _, pair := range pods {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if err := reach(ctx, pair[0], pair[1], nodeMarker); err == nil {
			t.Errorf("the tunnel is gone: %s reached %s", pair[0], pair[1])
		}
		cancel()
	}
	report, err := capture.Stop(t.Context())
	if err == nil {
		err = report.Clean()
	}
	if err != nil {
		t.Error(err)
	}
	if s, err := b.Status(t.Context()); err != nil || s.Dropped.Out.Packets == 0 {
		t.Errorf("dropped plaintext is not counted: %+v, %v", s.Dropped, err)
	}
	m.helpers = append(m.helpers, startHelper(t, b))
	awaitNodesEncrypted(t, a, b)
	mustBeEncrypted(t, m, talk, a, b)

	run(t, a, "ip", "link", "delete", "wgcni0") // under a helper that runs
	awaitNodesEncrypted(t, a, b)
	mustBeEncrypted(t, m, talk, a, b)
}

// A peer that WireGuard's packets do not reach is named, and ssh goes on.
func TestEncryptNodesUnreached(t *testing.T) {
	c := strictNodes(t)
	a, b := c.Nodes[0], c.Nodes[1]
	if _, err := c.Underlay.Batch(t.Context(), "table bridge wall { chain c { type filter hook forward priority 0; udp dport 51820 drop; }; }", "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	join(t, c, nodesOn(nil))
	serveNode(t, a)
	serveNode(t, b)
	awaitStatus(t, a, "the peer to be named", func(s cluster.Status) bool { return nodeTrafficOf(s, b) == "no handshake" })
	mustAnswerSSH(t, "without WireGuard", a, b)
	if out := run(t, a, filepath.Join(c.BinDir, "wgcnid"), "status"); !strings.Contains(out, "node traffic to node-b cannot be delivered") {
		t.Errorf("status does not name it:\n%s", out)
	}
	if _, err := c.Underlay.Batch(t.Context(), "delete table bridge wall", "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	awaitNodesEncrypted(t, a, b)
}

// Node by node it is switched on, and off again: nothing is lost, and what was
// changed on the machine is put back, by leave too.
func TestEncryptNodesRollOut(t *testing.T) {
	c := cluster.NewT(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	plain := cluster.NetworkOptions{}
	m := join(t, c, plain)
	serveNode(t, a)
	serveNode(t, b)
	before := ours(t, a)
	const rate = 100 // datagrams per second
	lost := func(datagrams int) time.Duration { return time.Duration(datagrams) * time.Second / rate }
	var streams []*cluster.Stream
	for _, pair := range [][2]*cluster.Node{{a, b}, {b, a}} {
		for _, dst := range addressesOf(pair[1]) {
			s, err := cluster.StartStream(pair[0], netip.AddrPortFrom(dst, echoPort), cluster.StreamOptions{Rate: rate})
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, s)
			flowing(t, s)
		}
	}
	talk := converse(t, a, b.IPv4)
	restart := func(i int, o cluster.NetworkOptions) {
		stopHelper(t, m.helpers[i]) // else it may publish the change itself
		if err := c.Nodes[i].Configure(o); err != nil {
			t.Fatal(err)
		}
		m.helpers[i] = startHelper(t, c.Nodes[i])
		if err := m.helpers[i].WaitFor(t.Context(), "published"); err != nil {
			t.Fatal(err)
		}
		if err := c.AwaitConverged(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	restart(0, nodesOn(nil))
	if s, err := a.Status(t.Context()); err != nil || nodeTrafficOf(s, b) != "clear" {
		t.Errorf("with one of two nodes: %+v, %v", s.Peers, err)
	}
	restart(1, nodesOn(nil))
	awaitNodesEncrypted(t, a, b)
	// A busy machine loses some by itself. Packets that are held too early, or the
	// two handshakes that collide, are half a second and five of each stream.
	for _, s := range streams {
		if r := s.Report(); lost(r.Lost-r.UnderWay) > cluster.Patience(200*time.Millisecond) {
			t.Errorf("switched on: %s", r)
		}
	}
	mustBeEncrypted(t, m, talk, a, b)
	restart(0, plain)
	restart(1, plain)
	for _, s := range streams {
		flowing(t, s)
		if r := s.Stop(); lost(r.Lost) > cluster.Patience(400*time.Millisecond) {
			t.Errorf("switched off: %s", r)
		}
	}
	if diff := cmp.Diff(before, ours(t, a)); diff != "" {
		t.Errorf("switched off, it is not as before (-before +after):\n%s", diff)
	}
	restart(0, nodesOn(nil))
	run(t, a, filepath.Join(c.BinDir, "wgcnid"), "leave")
	if after := ours(t, a); strings.Contains(after, "wgcni") || strings.Contains(after, "30567") || !strings.HasSuffix(after, "src_valid_mark 0\n") {
		t.Errorf("after leave:\n%s", after)
	}
}

// ours is what the nodes' own traffic changes on a machine.
func ours(t *testing.T, n *cluster.Node) string {
	t.Helper()
	return run(t, n, "sh", "-c", `ip rule; ip -6 rule; ip route show table all proto 119; ip -6 route show table all proto 119
nft list tables | grep wgcni; nft list table inet wgcni 2>/dev/null | grep chain
echo src_valid_mark $(cat /proc/sys/net/ipv4/conf/all/src_valid_mark)`)
}
