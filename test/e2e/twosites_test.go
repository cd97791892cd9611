package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	plan "github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/test/cluster"
)

const twoSites = "examples/two-sites/"

// exampleFile reads a file of conflist/.
func exampleFile(t *testing.T, name string) string {
	t.Helper()
	root, err := cluster.RepoRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "conflist", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// siteB is a gateway on the underlay, with stock WireGuard, and one pod behind it.
type siteB struct {
	*cluster.Machine
	pod *cluster.Pod
}

func newSiteB(t *testing.T, c *cluster.Cluster) *siteB {
	t.Helper()
	m, err := cluster.StartMachine(t.Context(), "site-b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	if err := c.Underlay.Do(func() error {
		bridge, err := netlink.LinkByName(cluster.Bridge)
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex = m.Name, bridge.Attrs().Index
		link := netlink.NewVeth(attrs)
		link.PeerName, link.PeerNamespace = cluster.Uplink, netlink.NsPid(m.PID())
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	}); err != nil {
		t.Fatal(err)
	}
	script := `ip address add 192.0.2.240/24 dev eth0; ip link set eth0 up; ip route add default via 192.0.2.1
		ip link add cni0 type bridge; ip address add 10.244.2.1/24 dev cni0; ip link set cni0 up
		ip netns add pod; ip link add pod0 master cni0 type veth peer name eth0 netns pod; ip link set pod0 up
		ip -n pod link set lo up; ip -n pod address add 10.244.2.2/24 dev eth0; ip -n pod link set eth0 up
		ip -n pod route add default via 10.244.2.1; sysctl -q net.ipv4.ip_forward=1`
	if _, err := m.Batch(t.Context(), script, "sh", "-es"); err != nil {
		t.Fatal(err)
	}
	return &siteB{m, &cluster.Pod{Name: "pod", Node: &cluster.Node{Machine: m}, Netns: cluster.NetnsPath("pod")}}
}

// let publishes the record of site B's gateway, as `wgcnid peer add --nat` does, and
// brings the tunnel up with the example's file.
func (b *siteB) let(t *testing.T, m *siteA) {
	t.Helper()
	out, err := b.Batch(t.Context(), "umask 077; mkdir -p /etc/wireguard; wg genkey > /etc/wireguard/wgcni.key; wg pubkey < /etc/wireguard/wgcni.key", "sh", "-es")
	if err != nil {
		t.Fatal(err)
	}
	key, err := wgtypes.ParseKey(strings.TrimSpace(out))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	record := registry.Record{
		Name: "site-b", PublicKey: key, Since: now, Revision: registry.NextRevision(0, now),
		Prefixes: []plan.Claim{{Prefix: netip.MustParsePrefix("10.99.0.1/32"), Since: now}},
		Place:    registry.Place{Via: []string{"node-a"}, Masqueraded: true},
	}
	r := registry.New(file.New(m.RegistryFile()), registry.Trust{AcceptUnsealed: true})
	if err := r.Publish(t.Context(), record, 0); err != nil {
		t.Fatal(err)
	}
	entry := run(t, m.Nodes[0], "wg", "show", cluster.Interface, "public-key")
	text := exampleFile(t, twoSites+"site-b.conf")
	if err := b.WriteFile("/etc/wireguard/wgcni.conf", strings.Replace(text, "PUBLIC-KEY-OF-NODE-A", strings.TrimSpace(entry), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.WriteFile("/etc/wireguard/masquerade.nft", exampleFile(t, twoSites+"masquerade.nft"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{
		{"env", "WG_QUICK_USERSPACE_IMPLEMENTATION=" + bin("wireguard"), "wg-quick", "up", "wgcni"},
		{"nft", "-f", "/etc/wireguard/masquerade.nft"},
		{"nft", "-f", "/etc/wireguard/masquerade.nft"}, // again does not add to it
	} {
		if _, err := b.Run(t.Context(), command[0], command[1:]...); err != nil {
			t.Fatal(err)
		}
	}
}

// siteA is a mesh of two nodes, the first of which is where others enter.
type siteA struct {
	*cluster.Cluster
	service *cluster.Pod
}

func newSiteA(t *testing.T) *siteA {
	t.Helper()
	m := &siteA{Cluster: cluster.NewT(t, 2)}
	for i, n := range m.Nodes {
		o := cluster.NetworkOptions{Example: twoSites + "entry.conflist"}
		if i > 0 {
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
	m.service = addPod(t, m.Nodes[1], cluster.NetworkName, "db", cluster.PodOptions{})
	return m
}

// A pod reaches a service of another cluster whose pods have the very same
// addresses, with the files of conflist/examples/two-sites.
func TestTwoSitesWithTheSameRanges(t *testing.T) {
	const port = 5432
	m := newSiteA(t)
	s, err := cluster.StartServer(m.service, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	b := newSiteB(t, m.Cluster)
	if got, want := m.service.IPv4(), netip.MustParseAddr("10.244.2.2"); got != want {
		t.Fatalf("the service is at %s; the test is about %s, which site B's pod has too", got, want)
	}
	marker := []byte("plaintext-marker-0123456789")
	capture, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{
		Markers: [][]byte{marker}, Prefixes: append(podRanges, netip.MustParsePrefix("10.250.255.0/24"), netip.MustParsePrefix("10.99.0.0/24")),
	})
	if err != nil {
		t.Fatal(err)
	}
	startNameServer(t, m.Nodes[0], m.service.IPv4())
	if err := m.Nodes[0].WriteFile("/etc/wgcni/endpoint.json", exampleFile(t, twoSites+"endpoint.json"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := startEndpoint(t, m.Nodes[0], m.BinDir, "--dns", "127.0.0.1", "--address", "10.250.255.1", "--file", "/etc/wgcni/endpoint.json")
	b.let(t, m)
	at := netip.AddrPortFrom(netip.MustParseAddr("10.250.255.1"), port)
	for _, network := range []string{"tcp", "udp"} {
		served(t, network, b.pod, at, marker)
		served(t, network, b, at, marker)
	}
	tunnel := m.Nodes[0].PodCIDRs()[0].Addr()
	for from := range s.Sources() {
		if from != tunnel {
			t.Errorf("the service was called from %s, want the entry node's tunnel address %s", from, tunnel)
		}
	}

	// Its name is the key: a machine of the mesh that is not listed has no access.
	mustReset(t, m.Nodes[1], at)
	if t.Failed() {
		t.Log(p.Log)
	}
	mustBeClean(t, capture)
}

// What the README of the example shows must be in its files.
func TestTwoSitesReadme(t *testing.T) {
	text := exampleFile(t, twoSites+"README.md")
	for _, name := range []string{"entry.conflist", "endpoint.json", "site-b.conf", "masquerade.nft"} {
		exampleFile(t, twoSites+name)
		if !strings.Contains(text, "]("+name+")") {
			t.Errorf("README.md does not tell of %s", name)
		}
	}
	var list struct {
		Plugins []struct {
			Subnets []netip.Prefix `json:"subnets"`
		} `json:"plugins"`
	}
	if err := json.Unmarshal([]byte(exampleFile(t, twoSites+"entry.conflist")), &list); err != nil {
		t.Fatal(err)
	}
	address := list.Plugins[1].Subnets[0].Addr()
	if want := fmt.Sprintf("--address %s ", address); !strings.Contains(text, want) {
		t.Errorf("README.md does not say %q", want)
	}
}
