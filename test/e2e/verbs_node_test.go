package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/test/cluster"
)

// netns makes network namespaces, which are gone with the node at the latest.
func netns(t *testing.T, n *cluster.Node, names ...string) {
	t.Helper()
	if _, err := n.Batch(t.Context(), strings.Join(names, "\n"), "sh", "-c", `while read -r n || [ "$n" ]; do ip netns add "$n" || exit; done`); err != nil {
		t.Fatal(err)
	}
}

func removeNetns(t *testing.T, n *cluster.Node, names ...string) {
	t.Helper()
	if _, err := n.Batch(t.Context(), strings.Join(names, "\n"), "sh", "-c", `while read -r n || [ "$n" ]; do ip netns delete "$n" || exit; done`); err != nil {
		t.Fatal(err)
	}
}

// attachments are those that a node has stored, by container.
func attachments(t *testing.T, n *cluster.Node) map[string]store.Attachment {
	t.Helper()
	out, err := stored(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func stored(ctx context.Context, n *cluster.Node) (map[string]store.Attachment, error) {
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(20*time.Second))
	defer cancel()
	s, err := store.OpenAttachments(ctx, n.Path("/run/wgcni"))
	if err != nil {
		return nil, err
	}
	all, err := s.All()
	out := map[string]store.Attachment{}
	for _, a := range all {
		out[a.ContainerID] = a
	}
	return out, errors.Join(err, s.Close())
}

func containers(t *testing.T, n *cluster.Node) []string {
	t.Helper()
	return slices.Sorted(maps.Keys(attachments(t, n)))
}

// leases are the addresses that host-local has given to pods, less its own files.
func leases(t *testing.T, n *cluster.Node) []string {
	t.Helper()
	entries, err := os.ReadDir(n.Path("/var/lib/cni/networks/" + cluster.NetworkName))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if _, err := netip.ParseAddr(e.Name()); err == nil {
			out = append(out, e.Name())
		}
	}
	return out
}

// mustRun runs a command on a node.
func mustRun(t *testing.T, n *cluster.Node, name string, args ...string) string {
	t.Helper()
	out, err := n.Run(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// synced checks that store and kernel agree: a pass that asks both finds nothing to do.
func synced(t *testing.T, n *cluster.Node) {
	t.Helper()
	if err := cluster.Poll(t.Context(), n.Name+" to hold the plan", func() error {
		out, err := n.Wgcnid(t.Context(), "sync")
		if err == nil && !strings.Contains(out, "The kernel holds the plan already.") {
			err = fmt.Errorf("sync had to change:\n%s", out)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// agrees is synced, at the first look.
func agrees(t *testing.T, n *cluster.Node) {
	t.Helper()
	out, err := n.Wgcnid(t.Context(), "sync")
	if err != nil || !strings.Contains(out, "The kernel holds the plan already.") {
		t.Errorf("store and kernel of %s disagree: %v\n%s", n, err, out)
	}
}

// configured is a cluster of which no helper runs, or has ever run.
func configured(t *testing.T, nodes int, o cluster.NetworkOptions) *cluster.Cluster {
	t.Helper()
	c := cluster.NewT(t, nodes)
	for _, n := range c.Nodes {
		if err := n.Configure(o); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func helperUp(t *testing.T, n *cluster.Node) *cluster.Process {
	t.Helper()
	h, err := n.StartHelper()
	if err != nil {
		t.Fatal(err)
	}
	awaitOK(t, n)
	return h
}

// awaitOK waits until the helper runs and the kernel holds the plan, tunnel included.
func awaitOK(t *testing.T, n *cluster.Node) {
	t.Helper()
	if err := cluster.Poll(t.Context(), n.Name+" to be in the mesh", func() error {
		s, err := n.Status(t.Context())
		if err == nil && (!s.OK || !s.Helper) {
			err = fmt.Errorf("%s %v", s.Verdict, s.Pending)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func helperDown(t *testing.T, h *cluster.Process) {
	t.Helper()
	if err := h.Stop(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, h.Log)
	}
}

func addPod(t *testing.T, n *cluster.Node, network, name string, o cluster.PodOptions) *cluster.Pod {
	t.Helper()
	p, err := n.AddPod(t.Context(), network, name, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func deletePod(t *testing.T, p *cluster.Pod) {
	t.Helper()
	if err := p.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

// withTimeout is for what is expected not to come.
func withTimeout(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), 500*time.Millisecond)
}
