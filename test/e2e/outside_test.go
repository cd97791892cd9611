package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/wgcni/wgcni/test/cluster"
)

// peerRanges is what a stanza has for machines that run nothing but WireGuard.
var peerRanges = map[string]any{"peerCIDRs": []string{"10.99.0.0/24", "fd99::/64"}}

// outsider is a machine with nothing of ours on it, behind a NAT box at the
// underlay: stock wg and wg-quick, and stock wireguard-go where the kernel has no
// WireGuard.
type outsider struct {
	*cluster.Machine
	addresses []netip.Addr // inside the tunnel
}

// newOutsiders starts machines that share a NAT box: 10.77.0.2, and so on.
func newOutsiders(t *testing.T, c *cluster.Cluster, names ...string) (out []*outsider) {
	t.Helper()
	start := func(name string) *cluster.Machine {
		m, err := cluster.StartMachine(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = m.Close() })
		return m
	}
	box := start("nat")
	mustDo(t, c.Underlay, func() error { return veth("nat", cluster.Bridge, box, "eth0") })
	setUp(t, c.Underlay, "ip link set nat up")
	setUp(t, box, `ip link add lan type bridge; ip link set lan up; ip address add 10.77.0.1/24 dev lan
		ip address add 192.0.2.250/24 dev eth0; ip link set eth0 up
		sysctl -q net.ipv4.ip_forward=1
		nft 'table ip nat { chain post { type nat hook postrouting priority 100; oifname "eth0" masquerade; }; }'`)
	for i, name := range names {
		m := start(name)
		mustDo(t, box, func() error { return veth(name, "lan", m, "eth0") })
		setUp(t, box, "ip link set "+name+" up")
		setUp(t, m, fmt.Sprintf("ip address add 10.77.0.%d/24 dev eth0; ip link set eth0 up; ip route add default via 10.77.0.1", i+2))
		out = append(out, &outsider{Machine: m})
	}
	return out
}

// veth makes a port of a bridge in the calling thread's network namespace, with its
// other end in the machine.
func veth(name, bridge string, m *cluster.Machine, inside string) error {
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = name, master.Attrs().Index
	link := netlink.NewVeth(attrs)
	link.PeerName, link.PeerNamespace = inside, netlink.NsPid(m.PID())
	return netlink.LinkAdd(link)
}

func mustDo(t *testing.T, at cluster.Endpointer, f func() error) {
	t.Helper()
	if err := at.Do(f); err != nil {
		t.Fatal(err)
	}
}

func setUp(t *testing.T, m *cluster.Machine, script string) {
	t.Helper()
	if out, err := m.Batch(t.Context(), script, "sh", "-es"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// printed runs a command of wgcnid on a node and returns what it prints to stdout, and to stderr.
func printed(t *testing.T, n *cluster.Node, args ...string) (stdout, stderr string) {
	t.Helper()
	stdout, stderr, err := tryPrinted(t, n, args...)
	if err != nil {
		t.Fatalf("wgcnid %q: %v: %s", args, err, stderr)
	}
	return stdout, stderr
}

func tryPrinted(t *testing.T, n *cluster.Node, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := n.Command(t.Context(), bin("wgcnid"), args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

const outsideFile = "/etc/wireguard/wgcni.conf"

// take writes a machine's file, and reads its addresses from that.
func (o *outsider) take(t *testing.T, file string) {
	t.Helper()
	if err := o.WriteFile(outsideFile, file, 0o600); err != nil {
		t.Fatal(err)
	}
	o.addresses = nil
	for line := range strings.Lines(file) {
		if list, ok := strings.CutPrefix(line, "Address = "); ok {
			for word := range strings.SplitSeq(strings.TrimSpace(list), ", ") {
				o.addresses = append(o.addresses, netip.MustParsePrefix(word).Addr())
			}
		}
	}
}

// wgQuick runs stock wg-quick on the machine.
func (o *outsider) wgQuick(ctx context.Context, verb string) (string, error) {
	return o.Run(ctx, "env", "WG_QUICK_USERSPACE_IMPLEMENTATION="+bin("wireguard"), "wg-quick", verb, "wgcni")
}

func (o *outsider) mustWgQuick(t *testing.T, verb string) string {
	t.Helper()
	out, err := o.wgQuick(t.Context(), verb)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func podAddresses(p *cluster.Pod) []netip.Addr { return []netip.Addr{p.IPv4(), p.IPv6()} }

// exchange checks TCP, UDP and ICMP in both families, and that the far end sees one
// of these as the source.
func exchange(ctx context.Context, from cluster.Endpointer, to, seenAs []netip.Addr, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(10*time.Second))
	defer cancel()
	for _, dst := range to {
		for name, probe := range map[string]func(context.Context, cluster.Endpointer, netip.AddrPort, []byte) (netip.AddrPort, error){
			"TCP": cluster.TCP, "UDP": cluster.UDP,
		} {
			seen, err := probe(ctx, from, netip.AddrPortFrom(dst, echoPort), payload)
			if err != nil {
				return fmt.Errorf("%s %s -> %s: %w", name, from, dst, err)
			}
			if !contains(seenAs, seen.Addr().Unmap()) {
				return fmt.Errorf("%s %s -> %s: the far end sees %s as the source, want one of %s", name, from, dst, seen.Addr(), seenAs)
			}
		}
		if _, err := cluster.Ping(ctx, from, dst, payload); err != nil {
			return fmt.Errorf("ping %s -> %s: %w", from, dst, err)
		}
	}
	return nil
}

func contains(addrs []netip.Addr, a netip.Addr) bool {
	for _, b := range addrs {
		if a == b {
			return true
		}
	}
	return false
}

// reaches waits until the machine and all pods talk, both ways.
func (o *outsider) reaches(t *testing.T, pods []*cluster.Pod, payload []byte) {
	t.Helper()
	err := cluster.Poll(t.Context(), o.Name+" to reach a pod", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(time.Second))
		defer cancel()
		_, err := cluster.Ping(ctx, o, pods[0].IPv4(), payload)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if err := exchange(t.Context(), o, podAddresses(p), o.addresses, payload); err != nil {
			t.Error(err)
		}
		if err := exchange(t.Context(), p, o.addresses, podAddresses(p), payload); err != nil {
			t.Error(err)
		}
	}
}

// key makes a key pair on the machine with stock wg, and returns the public one.
func (o *outsider) key(t *testing.T, path string) string {
	t.Helper()
	out, err := o.Batch(t.Context(), "umask 077; mkdir -p /etc/wireguard; wg genkey > "+path+"; wg pubkey < "+path, "sh", "-es")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}
