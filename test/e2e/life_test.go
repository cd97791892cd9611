package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/test/cluster"
)

// openRegistry opens the mesh's shared file, as somebody who trusts everybody.
func openRegistry(m *mesh) *registry.Registry {
	return registry.New(file.New(m.RegistryFile()), registry.Trust{})
}

// An emptied, truncated or deleted file removes no peer ("the API away
// 60 s empties the mesh": kilo Node.Ready), and is filled again.
func TestDamagedRegistryRemovesNoPeer(t *testing.T) {
	m := newMesh(t, 3, 1, cluster.NetworkOptions{})
	serve(t, m.pods[1])
	s := stream(t, m.pods[0], m.pods[1].IPv4(), 200)
	flowing(t, s)
	warm := s.Report().Lost
	path := m.RegistryFile()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func() error{
		"emptied":   func() error { return os.Truncate(path, 0) },
		"truncated": func() error { return os.Truncate(path, int64(len(whole)/2)) },
		"deleted":   func() error { return os.Remove(path) },
		"nonsense":  func() error { return os.WriteFile(path, []byte("\x00\x01"), 0o644) },
		"no nodes":  func() error { return os.WriteFile(path, []byte(`{"version":1,"nodes":{}}`), 0o644) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		err := cluster.Poll(t.Context(), "the registry to be whole again after it was "+name, func() error {
			s, err := openRegistry(m).Snapshot(t.Context())
			if err == nil && len(s.Nodes) != 3 {
				err = fmt.Errorf("%d records", len(s.Nodes))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range m.Nodes {
			if got, err := n.Status(t.Context()); err != nil || !got.OK || len(got.Peers) != 2 {
				t.Errorf("%s: registry %s: status %+v, %v", n.Name, name, got, err)
			}
		}
	}
	if r := s.Stop(); r.Lost > warm {
		t.Errorf("%s; want no loss after the first handshake, which took %d", r, warm)
	}
}

// A node boots encrypted while the registry is away; its pods are protected from the
// first on, and its key and peers survive (flannel, wormhole, wesher made keys anew).
func TestRebootWithoutRegistry(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	a, b := m.Nodes[0], m.pods[1]
	serve(t, b)
	if err := talk(t.Context(), m.pods[0], b, []byte("x")); err != nil {
		t.Fatal(err)
	}
	before, err := m.Nodes[1].Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(m.Shared, m.Shared+".away"); err != nil {
		t.Fatal(err)
	}
	if err := a.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	routeAroundTunnel(t, m.Cluster)
	capture := watchUnderlay(t, m.Cluster)
	// The helper is not up yet: the pod starts, and nothing leaves in the clear.
	pod, err := a.AddPod(t.Context(), cluster.NetworkName, "early", cluster.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	_, _ = cluster.UDP(ctx, pod, netip.AddrPortFrom(b.IPv4(), echoPort), []byte("x")) // with a kernel's own WireGuard it even arrives
	cancel()
	startHelper(t, a)
	err = cluster.Poll(t.Context(), "the rebooted node to talk", func() error { return talk(t.Context(), pod, b, []byte("x")) })
	if err != nil {
		t.Fatal(err)
	}
	mustBeClean(t, capture)
	if err := os.Rename(m.Shared+".away", m.Shared); err != nil {
		t.Fatal(err)
	}
	after, err := m.Nodes[1].Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if before.Peers[0].PublicKey != after.Peers[0].PublicKey {
		t.Error("the reboot gave the node another key")
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Error(err)
	}
}

// A node that leaves is a peer of nobody any more, and may come back.
func TestLeaveAndRejoin(t *testing.T) {
	m := newMesh(t, 3, 0, cluster.NetworkOptions{})
	gone, stay := m.Nodes[2], m.Nodes[0]
	if out, err := gone.Wgcnid(t.Context(), "leave"); err != nil {
		t.Fatal(err, out)
	}
	if err := m.helpers[2].Wait(t.Context()); err != nil {
		t.Errorf("the helper of a node that left ended with %v", err)
	}
	if err := awaitPeers(t, stay, 1); err != nil {
		t.Fatal(err)
	}
	startHelper(t, gone)
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func awaitPeers(t *testing.T, n *cluster.Node, want int) error {
	return cluster.Poll(t.Context(), fmt.Sprintf("%s to have %d peers", n.Name, want), func() error {
		s, err := n.Status(t.Context())
		if err == nil && len(s.Peers) != want {
			err = fmt.Errorf("it has %d", len(s.Peers))
		}
		return err
	})
}

// The node's underlay address changes: the others follow.
func TestNodeAddressChanges(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	serve(t, m.pods[1])
	a := m.Nodes[0]
	run(t, a, "ip", "address", "del", a.IPv4.String()+"/24", "dev", cluster.Uplink)
	run(t, a, "ip", "address", "add", "192.0.2.99/24", "dev", cluster.Uplink)
	run(t, a, "ip", "route", "replace", "default", "via", cluster.Gateway4.String())
	err := cluster.Poll(t.Context(), "node-b to know the new address", func() error {
		s, err := m.Nodes[1].Status(t.Context())
		if err == nil && s.Peers[0].Endpoint.Addr() != netip.MustParseAddr("192.0.2.99") {
			err = fmt.Errorf("endpoint %s", s.Peers[0].Endpoint)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := talk(t.Context(), m.pods[0], m.pods[1], []byte("x")); err != nil {
		t.Error(err)
	}
}

// Two nodes of one name: the one that was there first keeps it, and both say so.
func TestNameTaken(t *testing.T) {
	m := newMesh(t, 2, 0, cluster.NetworkOptions{})
	late, err := m.AddNode(t.Context(), "node-c")
	if err != nil {
		t.Fatal(err)
	}
	if err := late.Configure(cluster.NetworkOptions{Stanza: map[string]any{"nodeName": "node-a"}}); err != nil {
		t.Fatal(err)
	}
	startHelper(t, late)
	if err := m.helpers[0].WaitFor(t.Context(), "another node publishes under this node's name"); err != nil {
		t.Error(err)
	}
}

// machineState is all of a node that wgcni could have changed.
func machineState(t *testing.T, n *cluster.Node) string {
	t.Helper()
	var parts []string
	for _, line := range []string{
		"ip rule; ip -6 rule", "ip route show table all; ip -6 route show table all", "nft -s list ruleset",
		"ip -o link | sed 's/^[0-9]*: //'", "ip -o addr | sed 's/^[0-9]*: //'",
		"find /proc/sys/net -type f -perm -u+r | sort | xargs grep -s . | grep -v 'stat\\|random\\|secret\\|nf_conntrack_count\\|netdev_rss_key\\|gc_\\|_lft'",
		"ls -A /run/wireguard /run/wgcni /var/lib/wgcni 2>/dev/null; true", "ps -eo args | grep '[w]gcni' || true",
	} {
		parts = append(parts, line+"\n"+run(t, n, "sh", "-c", line))
	}
	return strings.Join(parts, "\n")
}

// Foreign routes, rules, interfaces, tables and sysctls are as before after
// install, work and uninstall.
func TestNothingIsLeft(t *testing.T) {
	c := cluster.NewT(t, 2)
	a := c.Nodes[0]
	run(t, a, "sh", "-c", `ip rule add priority 110 fwmark 0x10/0x10 lookup 99; ip route add 10.244.77.0/24 via 192.0.2.1
ip route add unreachable 198.51.100.0/24 table 30567; nft 'table ip wgcni { chain c { type filter hook forward priority 0; ip saddr 10.244.9.9 counter drop; }; }'
iptables -A FORWARD -s 203.0.113.1 -j DROP
mkdir -p /run/wireguard`)
	for _, n := range c.Nodes {
		if err := n.Configure(cluster.NetworkOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	// The primary plugin leaves its bridge behind: so it is there before, with a
	// pod of a network that does not chain wgcni.
	plain, err := a.Conflist(cluster.NetworkOptions{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.WriteConflist("20-plain.conflist", strings.Replace(plain, `"name": "pods"`, `"name": "plain"`, 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.AddPod(t.Context(), "plain", "stays", cluster.PodOptions{}); err != nil {
		t.Fatal(err)
	}
	err = cluster.Poll(t.Context(), "duplicate address detection to end", func() error {
		if out := run(t, a, "ip", "-6", "address", "show", "tentative"); out != "" {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	before := machineState(t, a)

	for _, n := range c.Nodes {
		startHelper(t, n)
	}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		p, err := a.AddPod(t.Context(), cluster.NetworkName, fmt.Sprintf("pod%d", i), cluster.PodOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Delete(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := a.Wgcnid(t.Context(), "leave", "--purge"); err != nil {
		t.Fatal(err, out)
	}
	var diff string
	err = cluster.Poll(t.Context(), "the tunnel process to end", func() error {
		if diff = cmp.Diff(before, machineState(t, a)); diff != "" {
			return fmt.Errorf("the node is not as before (-before +after):\n%s", diff)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
