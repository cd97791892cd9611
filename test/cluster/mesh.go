package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"
)

// EchoPort is where the servers of [ServeT] listen.
const EchoPort = 7777

// Main is TestMain for packages whose tests make clusters: they need root, and fail
// without.
func Main(m *testing.M) {
	Init()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests make network namespaces: run them as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// NewMeshT makes a cluster of nodes that have all joined, with some pods on each,
// in the nodes' order. It fails the test where that cannot be done.
func NewMeshT(t testing.TB, nodes, podsEach int, o NetworkOptions) (*Cluster, []*Process, []*Pod) {
	t.Helper()
	c := NewT(t, nodes)
	helpers, err := c.JoinAll(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var pods []*Pod
	for _, n := range c.Nodes {
		for i := range podsEach {
			p, err := n.AddPod(t.Context(), NetworkName, fmt.Sprintf("%s-pod%d", n.Name, i), PodOptions{})
			if err != nil {
				t.Fatal(err)
			}
			pods = append(pods, p)
		}
	}
	return c, helpers, pods
}

// ServeT starts an echo server for a test.
func ServeT(t testing.TB, at Endpointer) {
	t.Helper()
	s, err := StartServer(at, EchoPort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
}

// Talk checks TCP, UDP and ICMP with a pod that serves, that the far end sees the
// real source, and both families.
func Talk(ctx context.Context, from, to *Pod, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, Patience(10*time.Second))
	defer cancel()
	for _, pair := range [][2]netip.Addr{{from.IPv4(), to.IPv4()}, {from.IPv6(), to.IPv6()}} {
		src, dst := pair[0], pair[1]
		if !src.IsValid() || !dst.IsValid() {
			continue
		}
		for name, probe := range map[string]func(context.Context, Endpointer, netip.AddrPort, []byte) (netip.AddrPort, error){
			"TCP": TCP, "UDP": UDP,
		} {
			seen, err := probe(ctx, from, netip.AddrPortFrom(dst, EchoPort), payload)
			if err != nil {
				return fmt.Errorf("%s %s -> %s: %w", name, from, to, err)
			}
			if seen.Addr().Unmap() != src {
				return fmt.Errorf("%s %s -> %s: the far end sees %s as the source, want %s", name, from, to, seen.Addr(), src)
			}
		}
		if _, err := Ping(ctx, from, dst, payload); err != nil {
			return fmt.Errorf("ping %s -> %s: %w", from, to, err)
		}
	}
	return nil
}

// PodRanges are the clusterCIDRs of conflist/.
var PodRanges = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}

// RouteAround gives every node ordinary routes to the others' pods, as the routing
// of any cluster does: whatever is not held back arrives in the clear.
func (c *Cluster) RouteAround(ctx context.Context) error {
	for _, n := range c.Nodes {
		for _, other := range c.Nodes {
			if n == other {
				continue
			}
			for i, p := range other.PodCIDRs() {
				via := []netip.Addr{other.IPv4, other.IPv6}[i]
				if _, err := n.Run(ctx, "ip", "route", "replace", p.String(), "via", via.String()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
