package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

const echoPort = 7777

// mesh is a converged cluster with pods.
type mesh struct {
	*cluster.Cluster
	helpers []*cluster.Process
	pods    []*cluster.Pod
}

func newMesh(t *testing.T, nodes, podsEach int, o cluster.NetworkOptions) *mesh {
	t.Helper()
	m := &mesh{Cluster: cluster.NewT(t, nodes)}
	var err error
	if m.helpers, err = m.JoinAll(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	for _, n := range m.Nodes {
		for i := range podsEach {
			p, err := n.AddPod(t.Context(), cluster.NetworkName, fmt.Sprintf("%s-pod%d", n.Name, i), cluster.PodOptions{})
			if err != nil {
				t.Fatal(err)
			}
			m.pods = append(m.pods, p)
		}
	}
	return m
}

func serve(t *testing.T, at cluster.Endpointer) {
	t.Helper()
	s, err := cluster.StartServer(at, echoPort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
}

// talk checks TCP, UDP and ICMP, that the far end sees the real source, and both families.
func talk(ctx context.Context, from, to *cluster.Pod, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(10*time.Second))
	defer cancel()
	for _, pair := range [][2]netip.Addr{{from.IPv4(), to.IPv4()}, {from.IPv6(), to.IPv6()}} {
		src, dst := pair[0], pair[1]
		if !src.IsValid() || !dst.IsValid() {
			continue
		}
		for name, probe := range map[string]func(context.Context, cluster.Endpointer, netip.AddrPort, []byte) (netip.AddrPort, error){
			"TCP": cluster.TCP, "UDP": cluster.UDP,
		} {
			seen, err := probe(ctx, from, netip.AddrPortFrom(dst, echoPort), payload)
			if err != nil {
				return fmt.Errorf("%s %s -> %s: %w", name, from, to, err)
			}
			if seen.Addr().Unmap() != src {
				return fmt.Errorf("%s %s -> %s: the far end sees %s as the source, want %s", name, from, to, seen.Addr(), src)
			}
		}
		if _, err := cluster.Ping(ctx, from, dst, payload); err != nil {
			return fmt.Errorf("ping %s -> %s: %w", from, to, err)
		}
	}
	return nil
}

func TestAllPodsReachAllPods(t *testing.T) {
	for _, example := range []string{"bridge.conflist", "ptp.conflist"} {
		t.Run(example, func(t *testing.T) {
			m := newMesh(t, 3, 2, cluster.NetworkOptions{Example: example})
			marker := []byte("plaintext-marker-0123456789")
			capture, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{
				Markers: [][]byte{marker}, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")},
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range m.pods {
				serve(t, p)
			}
			for _, from := range m.pods {
				for _, to := range m.pods {
					if from != to {
						if err := talk(t.Context(), from, to, marker); err != nil {
							t.Error(err)
						}
					}
				}
			}
			report, err := capture.Stop(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := report.Clean(); err != nil {
				t.Error(err)
			}
			if report.WireGuard == 0 {
				t.Errorf("no WireGuard packet on the underlay: %s", report)
			}
			for _, p := range m.pods {
				if err := p.Delete(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
