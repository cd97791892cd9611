package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// ranges are all addresses that are to be seen in the tunnel only.
func ranges(more ...string) (out []netip.Prefix) {
	out = append(out, podRanges...)
	for _, s := range more {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// A laptop behind NAT is added, talks with all pods in both directions, goes on by
// its second entry node when the first is gone, stays there when that is back, and
// is cut off when it is removed. Nothing of it is seen in plaintext.
func TestPeer(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 3, 1, cluster.NetworkOptions{Stanza: peerRanges, Secrets: []string{newSecret(t)}})
	a, b := m.Nodes[0], m.Nodes[1]
	laptop := newOutsiders(t, m.Cluster, "laptop")[0]
	marker := []byte("plaintext-marker-0123456789")
	capture, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{
		Markers: [][]byte{marker}, Prefixes: ranges("10.99.0.0/24", "fd99::/64"),
	})
	if err != nil {
		t.Fatal(err)
	}
	file, notes := printed(t, a, "peer", "add", "laptop", "--via", "node-a", "--via", "node-b")
	if !strings.Contains(notes, "laptop is added: 10.99.0.1/32 fd99::1/128, by node-a, then node-b.") {
		t.Errorf("it says %s", notes)
	}
	if strings.Count(file, "PresharedKey = ") != 2 {
		t.Errorf("the mesh has a secret, and the file not two preshared keys")
	}
	laptop.take(t, file)
	laptop.mustWgQuick(t, "up")
	serveAll(t, m.pods)
	serve(t, laptop)
	laptop.reaches(t, m.pods, marker)
	for _, n := range m.Nodes {
		want := map[bool]string{true: "connected", false: "elsewhere"}[n == a]
		if out := run(t, n, bin("wgcnid"), "peer", "list"); !strings.Contains(out, "node-a node-b  node-a ") || !strings.Contains(out, want) {
			t.Errorf("%s: want it %s, and carried by node-a:\n%s", n.Name, want, out)
		}
	}

	out := mustStream(t, laptop, m.pods[2].IPv4())
	in := mustStream(t, m.pods[2], laptop.addresses[0])
	calling := mustStream(t, m.pods[0], laptop.addresses[0])
	run(t, a, "mount", "-t", "tmpfs", "-o", "ro", "registry-away", m.Shared)
	mustLose(t, a, 1000)
	begun := time.Now()
	awaitCarrier(t, b, "node-b")
	err = cluster.Poll(t.Context(), "the laptop to be reached by node-b", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(time.Second))
		defer cancel()
		_, err := cluster.UDP(ctx, m.pods[2], netip.AddrPortFrom(laptop.addresses[0], echoPort), marker)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("node-b carries the laptop %v after node-a was cut off", time.Since(begun).Round(time.Millisecond))
	laptop.reaches(t, m.pods[1:], marker)

	// node-a has not heard of that. When it is back it calls the laptop, which answers:
	// that is not the laptop coming back.
	before := handshakeWith(t, a, "10.99.0.1")
	mustLose(t, a, 0)
	err = cluster.Poll(t.Context(), "node-a to call the laptop", func() error {
		if at := handshakeWith(t, a, "10.99.0.1"); at == before {
			return fmt.Errorf("the last handshake is still that of %s", at)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, a, "umount", m.Shared)
	err = cluster.Poll(t.Context(), "node-a to let go of the laptop", func() error {
		if at := handshakeWith(t, a, "10.99.0.1"); at != "" {
			return errors.New("it still allows it its address")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	calling.Stop()
	laptop.reaches(t, m.pods, marker)
	for from, s := range map[string]*cluster.Stream{"laptop": out, "pod": in} {
		r := s.Stop()
		t.Logf("stream from the %s: %s", from, r)
		if r.LongestGap > cluster.Patience(15*time.Second) {
			t.Errorf("from the %s it took %v", from, r.LongestGap)
		}
	}
	awaitCarrier(t, a, "node-b")

	run(t, b, bin("wgcnid"), "peer", "remove", "laptop")
	err = cluster.Poll(t.Context(), "the laptop to be shut out", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(300*time.Millisecond))
		defer cancel()
		if _, err := cluster.Ping(ctx, laptop, m.pods[2].IPv4(), nil); err == nil {
			return fmt.Errorf("it reaches a pod")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for _, n := range m.Nodes {
		awaitStatus(t, n, "the laptop to be no peer", func(s cluster.Status) bool { return s.OK && len(s.Peers) == 2 })
	}
	laptop.mustWgQuick(t, "down")
	mustBeGone(t, laptop)
	mustBeClean(t, capture)
}

// handshakeWith is when a node's peer with that allowed IP has shaken hands last, ""
// if there is no such peer.
func handshakeWith(t *testing.T, n *cluster.Node, allowed string) string {
	t.Helper()
	for line := range strings.Lines(run(t, n, "wg", "show", cluster.Interface, "dump")) {
		if words := strings.Fields(line); len(words) == 8 && strings.HasPrefix(words[3], allowed+"/32") {
			return words[4]
		}
	}
	return ""
}

func mustStream(t *testing.T, from cluster.Endpointer, to netip.Addr) *cluster.Stream {
	t.Helper()
	s, err := cluster.StartStream(from, netip.AddrPortFrom(to, echoPort), cluster.StreamOptions{Rate: 20})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustLose(t *testing.T, n *cluster.Node, perMille int) {
	t.Helper()
	if err := n.SetLoss(t.Context(), perMille); err != nil {
		t.Fatal(err)
	}
}

// awaitCarrier waits until a node says that this one carries the only peer.
func awaitCarrier(t *testing.T, at *cluster.Node, want string) {
	t.Helper()
	err := cluster.Poll(t.Context(), want+" to carry the peer", func() error {
		out, err := at.Wgcnid(t.Context(), "peer", "list", "--json")
		if err == nil && !strings.Contains(out, fmt.Sprintf(`"carriedBy": %q`, want)) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// mustBeGone waits until nothing of the file's hooks runs any more.
func mustBeGone(t *testing.T, o *outsider) {
	t.Helper()
	err := cluster.Poll(t.Context(), "the hooks to end", func() error {
		ps, err := o.Processes()
		if err != nil || len(ps) == 0 {
			return err
		}
		return fmt.Errorf("%v", ps)
	})
	if err != nil {
		t.Error(err)
	}
}

// wg-quick of Debian 12 does all that it can do with a file with hooks: up, strip,
// save, down, and up again with what it has saved. The hooks are the same then.
func TestPeerFileAndWgQuick(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, 1, cluster.NetworkOptions{Stanza: peerRanges})
	serveAll(t, m.pods)
	laptop := newOutsiders(t, m.Cluster, "laptop")[0]
	serve(t, laptop)
	const keyPath = "/etc/wireguard/laptop.key"
	public := laptop.key(t, keyPath)
	file, _ := printed(t, m.Nodes[0], "peer", "add", "laptop", "--via", "node-b", "--via", "node-a", "--public-key", public)
	if strings.Contains(file, "PrivateKey") || !strings.Contains(file, "wg set %i private-key "+keyPath) {
		t.Errorf("the file has another way to the key than its path:\n%s", file)
	}
	again, _ := printed(t, m.Nodes[1], "peer", "config", "laptop", "--key-path", keyPath)
	if again != file {
		t.Errorf("printed again it is\n%s\nand was\n%s", again, file)
	}
	laptop.take(t, file)
	for _, saved := range []bool{false, true} {
		laptop.mustWgQuick(t, "up")
		laptop.reaches(t, m.pods, []byte("x"))
		stripped := laptop.mustWgQuick(t, "strip")
		if _, err := laptop.Batch(t.Context(), stripped, "wg", "syncconf", "wgcni", "/dev/stdin"); !saved && err != nil {
			t.Error(err)
		}
		laptop.mustWgQuick(t, "save")
		text, err := laptop.ReadFile(outsideFile)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"PostUp = ", "PreDown = "} {
			if got := lines(text, want); !slices.Equal(got, lines(file, want)) {
				t.Errorf("saved: %q\nwant %q", got, lines(file, want))
			}
		}
		laptop.mustWgQuick(t, "down")
		mustBeGone(t, laptop)
	}

	// Without its private key the file is refused, loudly.
	bare, _ := printed(t, m.Nodes[1], "peer", "config", "laptop")
	laptop.take(t, bare)
	if out, err := laptop.wgQuick(t.Context(), "up"); err == nil || !strings.Contains(out, "THE-PRIVATE-KEY-OF-laptop") {
		t.Errorf("wg-quick takes a file without a private key: %v\n%s", err, out)
	}
}

func lines(text, prefix string) (out []string) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, prefix) {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

// Two sites have the same addresses, and enter by different nodes with --nat: the
// pods see each as its node, and it reaches all pods.
func TestPeerMasqueraded(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 3, 1, cluster.NetworkOptions{Stanza: peerRanges})
	serveAll(t, m.pods)
	capture, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{
		Prefixes: ranges("10.99.0.0/24", "fd99::/64", "192.168.1.0/24"),
	})
	if err != nil {
		t.Fatal(err)
	}
	sites := newOutsiders(t, m.Cluster, "ulm", "rom")
	entries := m.Nodes[:2]
	printer := netip.MustParseAddr("192.168.1.9")
	for i, site := range sites {
		file, _ := printed(t, entries[i], "peer", "add", site.Name, "--nat", "--subnet", "192.168.1.0/24")
		site.take(t, file)
		setUp(t, site.Machine, "ip link add printer type bridge; ip link set printer up; ip address add 192.168.1.9/24 dev printer; ip link set lo up")
		site.mustWgQuick(t, "up")
	}
	for i, site := range sites {
		tunnel := []netip.Addr{m.Nodes[i].PodCIDRs()[0].Addr(), m.Nodes[i].PodCIDRs()[1].Addr()}
		for j, p := range m.pods {
			seenAs := tunnel
			if j == i {
				seenAs = site.addresses // beside its entry nobody else is asked
			}
			err := cluster.Poll(t.Context(), site.Name+" to reach "+p.Name, func() error {
				return exchange(t.Context(), site, podAddresses(p), seenAs, []byte("x"))
			})
			if err != nil {
				t.Error(err)
			}
			if j != i {
				seen, err := from(site, printer, p.IPv4())
				if err != nil || seen != tunnel[0] {
					t.Errorf("what is behind %s is seen as %v, %v; want %s", site.Name, seen, err, tunnel[0])
				}
			}
		}
	}
	if _, errs, err := tryPrinted(t, m.Nodes[2], "peer", "add", "third", "--nat", "--via", "node-a", "--subnet", "192.168.0.0/16"); err == nil ||
		!strings.Contains(errs, "192.168.0.0/16 overlaps 192.168.1.0/24 of ulm, which enters by node-a too") {
		t.Errorf("%v: %s", err, errs)
	}
	mustBeClean(t, capture)
}

// from connects from an address of the machine's, and returns what the far end sees.
func from(o *outsider, source, to netip.Addr) (seen netip.Addr, err error) {
	err = o.Do(func() error {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0)), Timeout: cluster.Patience(3 * time.Second)}
		conn, err := d.Dial("tcp", netip.AddrPortFrom(to, echoPort).String())
		if err != nil {
			return err
		}
		defer conn.Close()
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil {
			return err
		}
		at, err := netip.ParseAddrPort(strings.TrimSpace(strings.TrimPrefix(line, "from ")))
		seen = at.Addr()
		return err
	})
	return seen, err
}
