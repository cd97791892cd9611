package operate

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/test/cluster"
)

// runtimeMesh is a mesh whose pods are made by containerd: Debian's on the first
// node, and containerd 2 on the second, which knows CNI 1.1.
type runtimeMesh struct {
	*cluster.Cluster
	runtimes []*cluster.Containerd
	helpers  []*cluster.Process
}

// newRuntimes starts two containerds whose network does not chain wgcni yet.
func newRuntimes(t *testing.T) *runtimeMesh {
	t.Helper()
	before := hostTraces(t)
	t.Cleanup(func() {
		if diff := cmp.Diff(before, hostTraces(t)); diff != "" {
			t.Errorf("containerd has left its node (-before +after):\n%s", diff)
		}
	})
	m := &runtimeMesh{Cluster: cluster.NewT(t, 2)}
	for i, n := range m.Nodes {
		skipDAD(t, n)
		plain, err := n.Conflist(cluster.NetworkOptions{
			Plain: true, CNIVersion: []string{"1.0.0", "1.1.0"}[i],
			Chain: []any{map[string]any{"type": cluster.RecordPlugin}},
		})
		if err := errors.Join(err, n.WriteConflist(cluster.ConflistFile, plain), n.AddRecordPlugin()); err != nil {
			t.Fatal(err)
		}
		var o cluster.ContainerdOptions
		if i == 1 {
			o.Dir = filepath.Join(m.BinDir, "containerd")
		}
		r, err := n.StartContainerd(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		m.runtimes = append(m.runtimes, r)
	}
	return m
}

// skipDAD saves the two seconds that the address of a new bridge is of no use,
// while nobody else can have it.
func skipDAD(t *testing.T, n *cluster.Node) {
	t.Helper()
	if out, err := n.Run(t.Context(), "sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad"); err != nil {
		t.Fatal(err, out)
	}
}

// hostTraces is what a containerd would change on the host that is not kept inside
// of its node.
func hostTraces(t *testing.T) map[string][]string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	traces := map[string][]string{"mounts": strings.Split(string(mounts), "\n")}
	for _, glob := range []string{"/opt/containerd*", "/var/lib/containerd/*", "/var/lib/cni/*", "/run/containerd/*", "/run/netns/cni-*", "/etc/containerd/*", "/etc/cni/*", "/tmp/containerd*"} {
		if traces[glob], err = filepath.Glob(glob); err != nil {
			t.Fatal(err)
		}
	}
	return traces
}

// newRuntimeMesh has wgcni installed on each node, and their helpers running.
func newRuntimeMesh(t *testing.T) *runtimeMesh {
	t.Helper()
	m := newRuntimes(t)
	m.install(t)
	m.join(t)
	return m
}

// install installs wgcni on each node and waits until containerd has seen it.
func (m *runtimeMesh) install(t *testing.T) {
	t.Helper()
	for i, n := range m.Nodes {
		text, err := n.Conflist(cluster.NetworkOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var list struct{ Plugins []json.RawMessage }
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			t.Fatal(err)
		}
		out, err := n.Batch(t.Context(), string(list.Plugins[1]), filepath.Join(m.BinDir, "wgcnid"),
			"install", "--entry", "-", "--bin-dir", cluster.RuntimeBinDir)
		if err != nil {
			t.Fatal(err, out)
		}
		m.awaitNetwork(t, i, true)
	}
}

// awaitNetwork waits until a containerd has loaded a network that chains wgcni, or
// one that does not.
func (m *runtimeMesh) awaitNetwork(t *testing.T, node int, chained bool) {
	t.Helper()
	err := cluster.Poll(t.Context(), "containerd to load its network again", func() error {
		loaded, err := m.runtimes[node].Network(t.Context())
		if err == nil && strings.Contains(loaded, `"wgcni"`) != chained {
			err = errors.New(loaded)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (m *runtimeMesh) join(t *testing.T) {
	t.Helper()
	for _, n := range m.Nodes {
		h, err := n.StartHelper()
		if err != nil {
			t.Fatal(err)
		}
		m.helpers = append(m.helpers, h)
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (m *runtimeMesh) runPod(t *testing.T, node int, name string) *cluster.Sandbox {
	t.Helper()
	p, err := m.runtimes[node].RunPod(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// runPods makes a pod on each node, which serves.
func (m *runtimeMesh) runPods(t *testing.T, name string) (a, b *cluster.Sandbox) {
	t.Helper()
	a, b = m.runPod(t, 0, name), m.runPod(t, 1, name)
	cluster.ServeT(t, a)
	cluster.ServeT(t, b)
	return a, b
}

var secretOfPods = []byte("for the pods alone, and not for the wire")

// watch captures on the underlay; the function that it returns fails the test when
// anything of the pods was to be read there, or nothing was encrypted.
func (m *runtimeMesh) watch(t *testing.T) (mustBeEncrypted func()) {
	t.Helper()
	c, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")},
		Markers:  [][]byte{secretOfPods},
	})
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		report, err := c.Stop(t.Context())
		if err := errors.Join(err, report.Clean()); err != nil {
			t.Error(err)
		}
		if report.WireGuard == 0 {
			t.Error("the capture saw no WireGuard packet: it proves nothing")
		}
	}
}

// talkBothWays has two pods that serve reach each other.
func talkBothWays(t *testing.T, a, b *cluster.Sandbox) {
	t.Helper()
	for _, pair := range [][2]*cluster.Sandbox{{a, b}, {b, a}} {
		err := cluster.Poll(t.Context(), fmt.Sprintf("%s to reach %s", pair[0], pair[1]), func() error {
			return cluster.Talk(t.Context(), pair[0].Pod, pair[1].Pod, secretOfPods)
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// mustBeFree fails the test when a pod that is gone still has an address in the
// primary's IPAM, or wgcni knows of more than the one pod that stays on the node.
func mustBeFree(t *testing.T, n *cluster.Node, containerID string) {
	t.Helper()
	mustHoldNothing(t, n, containerID)
	if s, err := n.Status(t.Context()); err != nil || s.Pods != 1 {
		t.Errorf("%s: wgcni knows %d pods after the DEL, want 1: %v", n.Name, s.Pods, err)
	}
}

// mustHoldNothing fails the test when host-local still has an address for a pod.
func mustHoldNothing(t *testing.T, n *cluster.Node, containerID string) {
	t.Helper()
	held, err := filepath.Glob(n.Path("/var/lib/cni/networks/" + cluster.NetworkName + "/*"))
	if err != nil || len(held) == 0 {
		t.Fatalf("%s: host-local keeps nothing: %v", n.Name, err)
	}
	for _, file := range held {
		// Addresses are given back meanwhile.
		if owner, err := os.ReadFile(file); err == nil && strings.Contains(string(owner), containerID) {
			t.Errorf("%s: address %s of %s is still held", n.Name, filepath.Base(file), containerID)
		}
	}
}

// delsOf are the DELs of a pod that got through wgcni.
func delsOf(t *testing.T, p *cluster.Sandbox) (dels []cluster.Verb) {
	t.Helper()
	verbs, err := p.Node.Verbs()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range verbs {
		if v.Command == "DEL" && v.ContainerID == p.ID {
			dels = append(dels, v)
		}
	}
	return dels
}

// containerd's pods talk encrypted. It detaches each pod twice, the second time
// with neither netns nor prevResult, and a DEL that failed would leave the address
// in the primary's IPAM (containerd#12130).
func TestContainerdPods(t *testing.T) {
	m := newRuntimeMesh(t)
	mustBeEncrypted := m.watch(t)
	a, b := m.runPods(t, "web")
	talkBothWays(t, a, b)
	other, _ := m.runPods(t, "db")
	talkBothWays(t, other, a)
	talkBothWays(t, other, b)
	mustBeEncrypted()
	for _, p := range []*cluster.Sandbox{a, b} {
		if err := p.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		mustBeFree(t, p.Node, p.ID)
		dels := delsOf(t, p)
		if len(dels) != 2 || dels[0].Netns == "" || !dels[0].PrevResult || dels[1].Netns != "" || dels[1].PrevResult {
			t.Errorf("%s: DELs that got through wgcni: %+v; want one with netns and prevResult, and one without", p, dels)
		}
	}
}

// containerd may be restarted and killed: pods go on, and are served as before.
func TestContainerdRestart(t *testing.T) {
	m := newRuntimeMesh(t)
	a, b := m.runPods(t, "before")
	talkBothWays(t, a, b)
	s, err := cluster.StartStream(a, netip.AddrPortFrom(b.IPv4(), cluster.EchoPort), cluster.StreamOptions{Rate: 200})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.runtimes[0].Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.runtimes[1].Kill(); err != nil {
		t.Fatal(err)
	}
	talkBothWays(t, a, b)
	for _, r := range m.runtimes {
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if ready, why, err := r.Ready(t.Context()); !ready {
			t.Errorf("network not ready after the restart: %s, %v", why, err)
		}
	}
	c, d := m.runPods(t, "after")
	talkBothWays(t, a, d)
	talkBothWays(t, c, b)
	if r := s.Stop(); r.Lost > 0 || r.Received == 0 {
		t.Errorf("the restarts were to be noticed: %s", r)
	}
	for _, p := range []*cluster.Sandbox{a, b} {
		if err := p.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		mustBeFree(t, p.Node, p.ID)
	}
}
