package e2e

import (
	"context"
	"net/netip"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

const echoPort = cluster.EchoPort

// mesh is a converged cluster with pods.
type mesh struct {
	*cluster.Cluster
	helpers []*cluster.Process
	pods    []*cluster.Pod
}

func newMesh(t *testing.T, nodes, podsEach int, o cluster.NetworkOptions) *mesh {
	t.Helper()
	c, helpers, pods := cluster.NewMeshT(t, nodes, podsEach, o)
	return &mesh{Cluster: c, helpers: helpers, pods: pods}
}

func serve(t *testing.T, at cluster.Endpointer) {
	t.Helper()
	cluster.ServeT(t, at)
}

func talk(ctx context.Context, from, to *cluster.Pod, payload []byte) error {
	return cluster.Talk(ctx, from, to, payload)
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
