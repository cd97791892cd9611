package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

var podRanges = cluster.PodRanges

// routeAroundTunnel is [cluster.Cluster.RouteAround].
func routeAroundTunnel(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	if err := c.RouteAround(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, n *cluster.Node, name string, args ...string) string {
	t.Helper()
	out, err := n.Run(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// watchUnderlay captures until the test ends, and fails it if a plaintext packet
// with a pod's address was seen.
func watchUnderlay(t *testing.T, c *cluster.Cluster) *cluster.Capture {
	t.Helper()
	capture, err := cluster.StartCapture(c.Underlay, cluster.Bridge, cluster.CaptureOptions{Prefixes: podRanges})
	if err != nil {
		t.Fatal(err)
	}
	return capture
}

func mustBeClean(t *testing.T, c *cluster.Capture) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), cluster.Patience(10*time.Second))
	defer cancel()
	report, err := c.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := report.Clean(); err != nil {
		t.Error(err)
	}
	if report.WireGuard == 0 {
		t.Error("the capture saw no WireGuard packet: it proves nothing")
	}
}

func stream(t *testing.T, from *cluster.Pod, to netip.Addr, rate int) *cluster.Stream {
	t.Helper()
	s, err := cluster.StartStream(from, netip.AddrPortFrom(to, echoPort), cluster.StreamOptions{Rate: rate})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func flowing(t *testing.T, s *cluster.Stream) {
	t.Helper()
	before := s.Report().Received
	err := cluster.Poll(t.Context(), "the stream to flow", func() error {
		if got := s.Report().Received - before; got < 20 {
			return fmt.Errorf("%d datagrams came back", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func stopHelper(t *testing.T, p *cluster.Process) {
	t.Helper()
	if err := p.Stop(t.Context()); err != nil {
		t.Fatalf("stop wgcnid: %v\n%s", err, p.Log)
	}
}

// loseTunnel takes a node's tunnel away; see [cluster.Node.LoseTunnel].
func loseTunnel(t *testing.T, n *cluster.Node) {
	t.Helper()
	if _, err := n.LoseTunnel(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func startHelper(t *testing.T, n *cluster.Node) *cluster.Process {
	t.Helper()
	p, err := n.StartHelper()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The tunnel process dies, or flannel deletes its device: interface and routes
// vanish, and traffic would follow the ordinary routes.
func TestNoPlaintextWhileTunnelIsGone(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	routeAroundTunnel(t, m.Cluster)
	a, b := m.pods[0], m.pods[1]
	serve(t, b)
	if err := talk(t.Context(), a, b, []byte("x")); err != nil {
		t.Fatal(err)
	}
	capture := watchUnderlay(t, m.Cluster)
	s4, s6 := stream(t, a, b.IPv4(), 500), stream(t, a, b.IPv6(), 500)
	flowing(t, s4)
	stopHelper(t, m.helpers[0])
	loseTunnel(t, m.Nodes[0])
	// What follows must be refused: wait until a good number was.
	before := s4.Report()
	err := cluster.Poll(t.Context(), "datagrams to be lost", func() error {
		if now := s4.Report(); now.Lost-before.Lost < 300 {
			return fmt.Errorf("%d lost so far", now.Lost-before.Lost)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	status, err := m.Nodes[0].Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if status.OK {
		t.Errorf("status says %q while the tunnel is gone", status.Verdict)
	}
	startHelper(t, m.Nodes[0])
	flowing(t, s4)
	flowing(t, s6)
	s4.Stop()
	s6.Stop()
	mustBeClean(t, capture)
}

// With a running helper a tunnel that is lost is made again by itself.
func TestTunnelIsRestarted(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	routeAroundTunnel(t, m.Cluster)
	serve(t, m.pods[1])
	capture := watchUnderlay(t, m.Cluster)
	s := stream(t, m.pods[0], m.pods[1].IPv4(), 500)
	flowing(t, s)
	for range 5 {
		loseTunnel(t, m.Nodes[0])
		if err := m.AwaitConverged(t.Context()); err != nil {
			t.Fatal(err)
		}
		flowing(t, s)
	}
	t.Log(s.Stop())
	mustBeClean(t, capture)
}

// The helper may come and go, and be killed: traffic does not notice (cilium#31979).
func TestHelperRestartLosesNothing(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	serve(t, m.pods[1])
	s := stream(t, m.pods[0], m.pods[1].IPv4(), 500)
	flowing(t, s)
	tunnel, err := m.Nodes[0].Tunnel()
	if err != nil {
		t.Fatal(err)
	}
	warm := s.Report().Lost // what was sent before the first handshake
	helper := m.helpers[0]
	for i := range 6 {
		if i%2 == 0 {
			stopHelper(t, helper)
		} else if err := helper.Signal(t.Context(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		} else {
			_ = helper.Wait(t.Context()) // it was killed
		}
		flowing(t, s)
		helper = startHelper(t, m.Nodes[0])
		if err := m.AwaitConverged(t.Context()); err != nil {
			t.Fatal(err)
		}
		flowing(t, s)
	}
	if r := s.Stop(); r.Lost > warm {
		t.Errorf("%s; want no loss after the first handshake, which took %d", r, warm)
	}
	if after, err := m.Nodes[0].Tunnel(); err != nil || after != tunnel {
		t.Errorf("%s became %s (%v); want the same", tunnel, after, err)
	}
}

// A pod's last packets while it is being deleted (Cilium CVE-2025-32793), of
// pods inside the node's prefix and outside of it.
func TestLastPacketsOfADeletedPod(t *testing.T) {
	for name, o := range map[string]cluster.NetworkOptions{
		"inside the prefix":  {},
		"outside the prefix": {Stanza: map[string]any{"podCIDRs": []string{"10.244.200.0/24"}}},
	} {
		t.Run(name, func(t *testing.T) {
			c := cluster.NewT(t, 2)
			for i, n := range c.Nodes {
				if o.Stanza != nil {
					o.Stanza["podCIDRs"] = []string{fmt.Sprintf("10.244.20%d.0/24", i), fmt.Sprintf("fd00:244:20%d::/64", i)}
				}
				if err := n.Configure(o); err != nil {
					t.Fatal(err)
				}
				startHelper(t, n)
			}
			if err := c.AwaitConverged(t.Context()); err != nil {
				t.Fatal(err)
			}
			routeAroundTunnel(t, c)
			to, err := c.Nodes[1].AddPod(t.Context(), cluster.NetworkName, "server", cluster.PodOptions{})
			if err != nil {
				t.Fatal(err)
			}
			serve(t, to)
			capture := watchUnderlay(t, c)
			for i := range 5 {
				from, err := c.Nodes[0].AddPod(t.Context(), cluster.NetworkName, fmt.Sprintf("client%d", i), cluster.PodOptions{})
				if err != nil {
					t.Fatal(err)
				}
				s4, s6 := stream(t, from, to.IPv4(), 1000), stream(t, from, to.IPv6(), 1000)
				flowing(t, s4)
				flowing(t, s6)
				if err := from.Delete(t.Context()); err != nil {
					t.Error(err)
				}
				s4.Stop()
				s6.Stop()
			}
			mustBeClean(t, capture)
		})
	}
}

// What was meant for a pod of this node that is gone finds none of its routes, and
// would follow the node's others: decrypted already, or from the pod next door. So
// it is before the DEL, when only the pod's link is gone, and after it.
func TestPacketsForAPodThatIsGone(t *testing.T) {
	for _, example := range []string{"bridge.conflist", "ptp.conflist"} {
		t.Run(example, func(t *testing.T) {
			m := newMesh(t, 2, 2, cluster.NetworkOptions{Example: example})
			routeAroundTunnel(t, m.Cluster)
			target := m.pods[3]
			serve(t, target)
			s4, s6 := stream(t, m.pods[0], target.IPv4(), 500), stream(t, m.pods[2], target.IPv6(), 500)
			flowing(t, s4)
			flowing(t, s6)
			capture := watchUnderlay(t, m.Cluster)
			unanswered := func() {
				t.Helper()
				for _, s := range []*cluster.Stream{s4, s6} {
					sent(t, s, 250)
				}
			}
			if _, err := target.Run(t.Context(), "ip", "link", "delete", target.IfName); err != nil {
				t.Fatal(err)
			}
			unanswered()
			if err := target.Delete(t.Context()); err != nil {
				t.Error(err)
			}
			unanswered()
			s4.Stop()
			s6.Stop()
			mustBeClean(t, capture)
		})
	}
}

// What comes in unencrypted is dropped as well (cilium#25626): node-b here is a
// machine of the cluster's network that wgcni was never put on.
func TestPlaintextFromANodeThatHasNotJoined(t *testing.T) {
	for _, encryption := range []string{"required", "preferred"} {
		t.Run(encryption, func(t *testing.T) {
			c := cluster.NewT(t, 2)
			joined, outsider := c.Nodes[0], c.Nodes[1]
			o := cluster.NetworkOptions{Stanza: map[string]any{"encryption": encryption}}
			if err := joined.Configure(o); err != nil {
				t.Fatal(err)
			}
			// Without a masquerade, so that the pods' own addresses are on the wire.
			if err := outsider.Configure(cluster.NetworkOptions{Plain: true, Primary: map[string]any{"ipMasq": false}}); err != nil {
				t.Fatal(err)
			}
			startHelper(t, joined)
			err := cluster.Poll(t.Context(), "node-a to be ready", func() error {
				if s, err := joined.Status(t.Context()); err != nil || !s.OK {
					return errors.Join(errors.New(s.Verdict), err)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			routeAroundTunnel(t, c)
			var pods []*cluster.Pod
			for _, n := range c.Nodes {
				p, err := n.AddPod(t.Context(), cluster.NetworkName, "pod", cluster.PodOptions{})
				if err != nil {
					t.Fatal(err)
				}
				serve(t, p)
				pods = append(pods, p)
			}
			inside, outside := pods[0], pods[1]
			reach := func(from, to *cluster.Pod) error {
				ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(time.Second))
				defer cancel()
				_, err := cluster.UDP(ctx, from, netip.AddrPortFrom(to.IPv4(), echoPort), []byte("x"))
				return err
			}
			in, out := reach(outside, inside), reach(inside, outside)
			s, err := joined.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case encryption == "preferred" && in != nil:
				t.Errorf("preferred: plaintext from a node that has not joined does not arrive: %v", in)
			case encryption == "required" && (in == nil || out == nil):
				t.Errorf("required: plaintext went through (in: %v, out: %v)", in, out)
			case encryption == "required" && s.Dropped.In.Packets == 0:
				t.Error("required: nothing was counted as dropped on its way in")
			}
			// The outsider joins: from now on it is encrypted in both modes.
			if err := outsider.Configure(o); err != nil {
				t.Fatal(err)
			}
			startHelper(t, outsider)
			if err := c.AwaitConverged(t.Context()); err != nil {
				t.Fatal(err)
			}
			capture := watchUnderlay(t, c)
			if err := talk(t.Context(), inside, outside, []byte("x")); err != nil {
				t.Error(err)
			}
			if err := talk(t.Context(), outside, inside, []byte("x")); err != nil {
				t.Error(err)
			}
			mustBeClean(t, capture)
		})
	}
}
