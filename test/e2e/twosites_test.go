package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/wgcni/wgcni/test/cluster"
)

// exampleFile reads a file of conflist/examples.
func exampleFile(t *testing.T, example, name string) string {
	t.Helper()
	root, err := cluster.RepoRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "conflist", "examples", example, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// newGateway starts site B's gateway, a machine on the underlay with nothing of ours
// on it, and a pod behind it, which has 10.244.2.2.
func newGateway(t *testing.T, c *cluster.Cluster) (*outsider, *cluster.Pod) {
	t.Helper()
	m, err := cluster.StartMachine(t.Context(), "gateway")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	mustDo(t, c.Underlay, func() error {
		if err := veth("gateway", cluster.Bridge, m, cluster.Uplink); err != nil {
			return err
		}
		link, err := netlink.LinkByName("gateway")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
	setUp(t, m, `ip address add 192.0.2.240/24 dev eth0; ip link set eth0 up; ip route add default via 192.0.2.1
		ip link add cni0 type bridge; ip address add 10.244.2.1/24 dev cni0; ip link set cni0 up
		ip netns add pod; ip link add pod0 master cni0 type veth peer name eth0 netns pod; ip link set pod0 up
		ip -n pod link set lo up; ip -n pod address add 10.244.2.2/24 dev eth0; ip -n pod link set eth0 up
		ip -n pod route add default via 10.244.2.1`)
	return &outsider{Machine: m}, &cluster.Pod{Name: "pod", Node: &cluster.Node{Machine: m}, Netns: cluster.NetnsPath("pod")}
}

// A pod reaches a service of another cluster whose pods have the very same
// addresses, by the example's own files, and by what its README says to type.
func TestTwoSitesExample(t *testing.T) {
	t.Parallel()
	const example, port = "two-sites", 5432
	m := &mesh{Cluster: cluster.NewT(t, 2)}
	a, b := m.Nodes[0], m.Nodes[1]
	for _, n := range m.Nodes {
		o := cluster.NetworkOptions{Example: "examples/" + example + "/entry.conflist"}
		if n != a {
			o.Stanza = map[string]any{"subnets": nil}
		}
		if err := n.Configure(o); err != nil {
			t.Fatal(err)
		}
		startHelper(t, n)
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	service := addPod(t, b, cluster.NetworkName, "db", cluster.PodOptions{})
	s, err := cluster.StartServer(service, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	gateway, pod := newGateway(t, m.Cluster)
	if service.IPv4() != netip.MustParseAddr("10.244.2.2") {
		t.Fatalf("the service is at %s; the test is about 10.244.2.2, which site B's pod has too", service.IPv4())
	}
	marker := []byte("plaintext-marker-0123456789")
	capture, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{
		Markers: [][]byte{marker}, Prefixes: ranges("10.250.255.0/24", "10.99.0.0/24"),
	})
	if err != nil {
		t.Fatal(err)
	}
	setUp(t, a.Machine, "ip address add 10.96.0.10/32 dev lo") // the cluster's name server
	startNameServer(t, a, "10.96.0.10", service.IPv4())
	if err := a.WriteFile("/etc/wgcni/endpoint.json", exampleFile(t, example, "endpoint.json"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := gateway.WriteFile("/run/masquerade.nft", exampleFile(t, example, "masquerade.nft"), 0o644); err != nil {
		t.Fatal(err)
	}
	at := map[string]*cluster.Machine{"node-a": a.Machine, "gateway": gateway.Machine}
	env := "cd /run; PATH=" + filepath.Dir(bin("wgcnid")) + ":$PATH; export PATH WG_QUICK_USERSPACE_IMPLEMENTATION=" + bin("wireguard") + "\n"
	var p *cluster.Process
	for _, b := range blocksOf(t, example) {
		on := at[b.at]
		if on == nil {
			t.Fatalf("there is no %q", b.at)
		}
		if strings.Contains(b.script, "wgcnid endpoint") { // it stays
			if p, err = on.Start("sh", "-ec", env+"exec "+strings.TrimSpace(b.script)); err != nil {
				t.Fatal(err)
			}
			awaitHealth(t, a, p, 200)
			continue
		}
		if strings.Contains(b.script, "wg-quick up") { // taken there
			text, err := a.ReadFile("/run/site-b.conf")
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(text, "AllowedIPs = 10.250.255.1/32\n") {
				t.Errorf("the file would take more than the endpoint's address away from site B:\n%s", text)
			}
			if err := gateway.WriteFile("/run/site-b.conf", text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if out, err := on.Batch(t.Context(), env+b.script, "sh", "-es"); err != nil {
			t.Fatalf("on %s:\n%s\n%v\n%s", b.at, b.script, err, out)
		}
	}
	if p == nil {
		t.Fatal("the README starts no endpoint")
	}
	to := netip.AddrPortFrom(netip.MustParseAddr("10.250.255.1"), port)
	for _, network := range []string{"tcp", "udp"} {
		served(t, network, pod, to, marker)
		served(t, network, gateway, to, marker)
	}
	tunnel := a.PodCIDRs()[0].Addr()
	for from := range s.Sources() {
		if from != tunnel {
			t.Errorf("the service was called from %s, want node-a's tunnel address %s", from, tunnel)
		}
	}
	mustReset(t, b, to) // of the mesh, and not on the list
	awaitMetric(t, a, fmt.Sprintf(`wgcni_endpoint_refused_total{forward="tcp/%d",reason="source"} 1`, port))
	gateway.mustWgQuick(t, "down")
	if t.Failed() {
		t.Log(p.Log)
	}
	mustBeClean(t, capture)
}
