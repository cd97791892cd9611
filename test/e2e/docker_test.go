package e2e

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

const dockerExample = "examples/docker-hosts/"

// Containers of a machine that runs Docker, and no Kubernetes, have their real
// addresses for pods and pods theirs for them, encrypted: Docker masquerades what
// leaves its bridge, and lets nobody in.
func TestDockerHost(t *testing.T) {
	c := strictNodes(t)
	secrets := []string{newSecret(t)}
	m := join(t, c, cluster.NetworkOptions{Example: dockerExample + "node.conflist", Secrets: secrets})
	host, err := c.AddMachine(t.Context(), "docker-1")
	if err != nil {
		t.Fatal(err)
	}
	strict(t, host)
	root, err := cluster.RepoRoot()
	if err != nil {
		t.Fatal(err)
	}
	daemon, err := os.ReadFile(filepath.Join(root, "conflist", dockerExample, "daemon.json"))
	if err != nil {
		t.Fatal(err)
	}
	docker, err := host.StartDocker(t.Context(), daemon)
	if err != nil {
		t.Fatal(err)
	}
	all := append([]*cluster.Pod{}, m.pods...)
	var containers []*cluster.Pod
	for _, name := range []string{"web", "cache"} {
		p, err := docker.AddContainer(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		containers = append(containers, p)
	}
	all = append(all, containers...)
	for _, p := range all {
		serve(t, p)
	}
	if err := host.Configure(cluster.NetworkOptions{Example: dockerExample + "docker.json", Secrets: secrets}); err != nil {
		t.Fatal(err)
	}
	m.helpers = append(m.helpers, startHelper(t, host))
	for _, n := range c.Nodes {
		if err := awaitPeers(t, n, 2); err != nil {
			t.Fatal(err)
		}
	}
	awaitStatus(t, host, "the nodes", func(s cluster.Status) bool { return s.OK && len(s.Peers) == 2 })

	want := "machine    docker-1, reached at none of its own addresses, subnets behind it 172.17.0.0/16 fd00:172:17::/64\ninterface"
	if out := run(t, host, bin("wgcnid"), "status"); !strings.Contains(out, want) {
		t.Errorf("status does not say %q:\n%s", want, out)
	}

	// Without the rule nobody gets in, as Docker says.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	if _, err := cluster.UDP(ctx, m.pods[0], netip.AddrPortFrom(containers[0].IPv4(), echoPort), nodeMarker); err == nil {
		t.Error("Docker lets a pod in: the rule proves nothing")
	}
	cancel()
	for range 2 { // it may be run again
		if out, err := host.Run(t.Context(), "sh", filepath.Join(root, "conflist", dockerExample, "firewall.sh")); err != nil {
			t.Fatal(err, out)
		}
	}

	watch := func() *cluster.Capture {
		capture, err := cluster.StartCapture(c.Underlay, cluster.Bridge, cluster.CaptureOptions{
			Prefixes: append(mustPrefixes("172.17.0.0/16", "fd00:172:17::/64"), podRanges...), Markers: [][]byte{nodeMarker},
		})
		if err != nil {
			t.Fatal(err)
		}
		return capture
	}
	capture := watch()
	for _, pod := range m.pods {
		for _, container := range containers {
			for _, pair := range [][2]*cluster.Pod{{pod, container}, {container, pod}} {
				for _, payload := range [][]byte{nodeMarker, append(append([]byte{}, nodeMarker...), make([]byte, 1<<14)...)} {
					err := cluster.Poll(t.Context(), "containers and pods to reach each other", func() error { return talk(t.Context(), pair[0], pair[1], payload) })
					if err != nil {
						t.Error(err)
					}
				}
			}
		}
	}
	// The nodes themselves reach the containers too, and the Docker host the pods.
	for i, dst := range addressesOf(containers[0]) {
		if _, err := cluster.TCP(t.Context(), c.Nodes[0], netip.AddrPortFrom(dst, echoPort), nodeMarker); err != nil {
			t.Error(err)
		}
		if _, err := cluster.TCP(t.Context(), host, netip.AddrPortFrom(addressesOf(m.pods[0])[i], echoPort), nodeMarker); err != nil {
			t.Error(err)
		}
	}
	mustBeClean(t, capture)

	// What is no part of the mesh is masqueraded as before.
	serveNode(t, c.Nodes[0])
	if seen, err := cluster.TCP(t.Context(), containers[0], netip.AddrPortFrom(c.Nodes[0].IPv4, sshPort), nil); err != nil || seen.Addr().Unmap() != host.IPv4 {
		t.Errorf("a node sees a container as %v, %v; want %s", seen, err, host.IPv4)
	}

	stopHelper(t, m.helpers[2])
	loseTunnel(t, host)
	capture = watch()
	for _, pair := range [][2]*cluster.Pod{{m.pods[0], containers[0]}, {containers[0], m.pods[0]}} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if err := talk(ctx, pair[0], pair[1], nodeMarker); err == nil {
			t.Errorf("%s reaches %s without a tunnel", pair[0], pair[1])
		}
		cancel()
	}
	report, err := capture.Stop(t.Context())
	if err := errors.Join(err, report.Clean()); err != nil {
		t.Error(err)
	}
}

func mustPrefixes(texts ...string) (out []netip.Prefix) {
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
