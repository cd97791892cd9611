package operate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/test/cluster"
)

// What the nodes of these tests install from and to. The machines' /opt is the host's.
const (
	pluginDir   = "/var/lib/cni/bin"
	entryFile   = "/etc/wgcni/entry.json"
	primaryFile = cluster.ConfDir + "/" + cluster.ConflistFile
	copyFile    = cluster.ConfDir + "/00-wgcni.conflist"
)

// plainNodes are nodes with a primary plugin alone, and the entry to be installed.
func plainNodes(t *testing.T, nodes int, o cluster.NetworkOptions) *cluster.Cluster {
	t.Helper()
	c := cluster.NewT(t, nodes)
	for _, n := range c.Nodes {
		bare(t, n, o)
	}
	return c
}

func bare(t *testing.T, n *cluster.Node, o cluster.NetworkOptions) {
	t.Helper()
	entry, err := n.Stanza(o)
	must(t, err)
	must(t, n.WriteFile(entryFile, entry, 0o600))
	plain := o
	plain.Plain = true
	must(t, n.Configure(plain))
	root, err := cluster.RepoRoot()
	must(t, err)
	must(t, os.MkdirAll(n.Path(pluginDir), 0o755))
	for _, plugin := range []string{"bridge", "host-local", "ptp", "portmap", "loopback"} {
		must(t, os.Symlink(filepath.Join(root, ".bin", plugin), n.Path(filepath.Join(pluginDir, plugin))))
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wgcnid(t *testing.T, n *cluster.Node, args ...string) string {
	t.Helper()
	out, err := n.Wgcnid(t.Context(), args...)
	must(t, err)
	return out
}

func installNode(t *testing.T, n *cluster.Node, args ...string) string {
	t.Helper()
	return wgcnid(t, n, append([]string{"install", "--bin-dir", pluginDir, "--entry", entryFile}, args...)...)
}

func startHelpers(t *testing.T, c *cluster.Cluster) (helpers []*cluster.Process) {
	t.Helper()
	for _, n := range c.Nodes {
		h, err := n.StartHelper()
		must(t, err)
		helpers = append(helpers, h)
	}
	must(t, c.AwaitConverged(t.Context()))
	return helpers
}

func addPod(t *testing.T, n *cluster.Node, name string) *cluster.Pod {
	t.Helper()
	p, err := n.AddPod(t.Context(), cluster.NetworkName, name, cluster.PodOptions{PluginDir: pluginDir})
	must(t, err)
	return p
}

func talk(t *testing.T, from, to *cluster.Pod) {
	t.Helper()
	must(t, cluster.Talk(t.Context(), from, to, []byte("installed")))
}

// files are all files of a node that an installation could touch, with content and mode.
func files(t *testing.T, n *cluster.Node) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range append(slices.Clone(cluster.Durable), "/run/wgcni") {
		err := filepath.WalkDir(n.Path(dir), func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			name := dir + strings.TrimPrefix(path, n.Path(dir))
			info, err := e.Info()
			if err != nil {
				return err
			}
			if !e.Type().IsRegular() {
				out[name] = info.Mode().String()
				return nil
			}
			data, err := os.ReadFile(path)
			if len(data) > 1<<16 {
				data = fmt.Appendf(nil, "%d bytes", len(data))
			}
			out[name] = info.Mode().String() + " " + string(data)
			return err
		})
		must(t, err)
	}
	// host-local's and libcni's own state.
	maps.DeleteFunc(out, func(name, _ string) bool {
		return strings.HasPrefix(name, "/var/lib/cni/") && !strings.HasPrefix(name, pluginDir)
	})
	return out
}

// From the first command to the last: pods of before are taken in, those of after
// are in the copy, all talk encrypted; and afterwards the node's files are those of before.
func TestInstallAndUninstall(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"copy", "in-place"} {
		t.Run(mode, func(t *testing.T) {
			c := plainNodes(t, 2, cluster.NetworkOptions{})
			n := c.Nodes[0]
			before := files(t, n)
			old := addPod(t, n, "old")
			var flags []string
			if mode == "in-place" {
				flags = append(flags, "--in-place")
			}
			dry := installNode(t, n, append(flags, "--dry-run")...)
			for _, want := range []string{"+++ " + cluster.ConfDir, `+      "type": "wgcni"`, pluginDir + "/wgcni: is placed"} {
				if !strings.Contains(dry, want) {
					t.Errorf("--dry-run says nothing of %q:\n%s", want, dry)
				}
			}
			if diff := cmp.Diff(before, files(t, n)); diff != "" {
				t.Fatalf("--dry-run has changed (-before +after):\n%s", diff)
			}
			for _, n := range c.Nodes {
				installNode(t, n, flags...)
				if out := installNode(t, n, flags...); !strings.HasPrefix(out, "Nothing to do") {
					t.Errorf("once more: %s", out)
				}
			}
			helpers := startHelpers(t, c)
			a, b := addPod(t, n, "a"), addPod(t, c.Nodes[1], "b")
			cluster.ServeT(t, b)
			cluster.ServeT(t, old)
			capture := watchUnderlay(t, c)
			talk(t, a, b)
			talk(t, old, b)
			mustBeClean(t, capture)

			out := wgcnid(t, n, "uninstall", "--purge")
			if !strings.Contains(out, "has left the mesh") {
				t.Errorf("uninstall says:\n%s", out)
			}
			must(t, helpers[0].Wait(t.Context()))
			if diff := cmp.Diff(before, files(t, n)); diff != "" {
				t.Errorf("what uninstall left (-before +after):\n%s", diff)
			}
			if out := wgcnid(t, n, "uninstall"); !strings.HasPrefix(out, "Nothing to do") {
				t.Errorf("once more: %s", out)
			}
			talk(t, a, old) // pods go on
			must(t, a.Delete(t.Context()))
			late := addPod(t, n, "late")
			talk(t, late, old)
			must(t, old.Delete(t.Context()))
		})
	}
}

var podRanges = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}

func watchUnderlay(t *testing.T, c *cluster.Cluster) *cluster.Capture {
	t.Helper()
	capture, err := cluster.StartCapture(c.Underlay, cluster.Bridge, cluster.CaptureOptions{Prefixes: podRanges})
	must(t, err)
	return capture
}

func mustBeClean(t *testing.T, c *cluster.Capture) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), cluster.Patience(10*time.Second))
	defer cancel()
	report, err := c.Stop(ctx)
	must(t, err)
	if err := report.Clean(); err != nil {
		t.Error(err)
	}
	if report.WireGuard == 0 {
		t.Error("the capture saw no WireGuard packet: it proves nothing")
	}
}
