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
func plainNodes(t *testing.T, nodes int) *cluster.Cluster {
	t.Helper()
	c := cluster.NewT(t, nodes)
	for _, n := range c.Nodes {
		bare(t, n)
	}
	return c
}

// bare makes a node one with a primary plugin alone.
func bare(t *testing.T, n *cluster.Node) {
	t.Helper()
	entry, err := n.Stanza(cluster.NetworkOptions{})
	must(t, err)
	must(t, n.WriteFile(entryFile, entry, 0o600))
	must(t, n.Configure(cluster.NetworkOptions{Plain: true}))
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

// installedNodes are two that have joined; the second one has a pod that serves.
func installedNodes(t *testing.T) (c *cluster.Cluster, helpers []*cluster.Process, far *cluster.Pod) {
	t.Helper()
	c = plainNodes(t, 2)
	for _, n := range c.Nodes {
		installNode(t, n)
	}
	helpers = startHelpers(t, c)
	far = addPod(t, c.Nodes[1], "far")
	cluster.ServeT(t, far)
	return c, helpers, far
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
			c := plainNodes(t, 2)
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

// After a boot the primary's agent rewrites its conflist before wgcnid runs
// (istio#14327, istio#60882): a pod that is started just then is guarded all the
// same, since the runtime takes the copy.
func TestInstalledNodeReboots(t *testing.T) {
	t.Parallel()
	c, helpers, far := installedNodes(t)
	n := c.Nodes[0]
	near := addPod(t, n, "near")
	talk(t, near, far)
	plain, err := n.ReadFile(primaryFile)
	must(t, err)

	capture := watchUnderlay(t, c)
	must(t, helpers[0].Kill())
	must(t, n.Reboot(t.Context()))
	must(t, n.WriteFile(primaryFile, strings.Replace(plain, `"ipMasq": true`, `"ipMasq": false`, 1), 0o644))
	for i, p := range c.Nodes[1].PodCIDRs() { // plaintext would get there
		_, err := n.Run(t.Context(), "ip", "route", "replace", p.String(), "via", []netip.Addr{c.Nodes[1].IPv4, c.Nodes[1].IPv6}[i].String())
		must(t, err)
	}
	early := addPod(t, n, "early")
	for _, to := range []netip.Addr{far.IPv4(), far.IPv6()} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		if _, err := cluster.Ping(ctx, early, to, []byte("early")); err == nil {
			t.Errorf("%s answers before wgcnid runs", to)
		}
		cancel()
	}
	_, err = n.StartHelper()
	must(t, err)
	must(t, c.AwaitConverged(t.Context()))
	talk(t, early, far)
	mustBeClean(t, capture)
	must(t, poll(t, "the copy to be the rewritten file's", func() error {
		if text, err := n.ReadFile(copyFile); err != nil || !strings.Contains(text, `"ipMasq": false`) {
			return errors.Join(fmt.Errorf("it is %s", text), err)
		}
		return nil
	}))
}

// In place, the entry is lost when the agent rewrites the file while wgcnid is down:
// wgcnid puts it back at its start, and whenever it runs.
func TestInstalledInPlace(t *testing.T) {
	t.Parallel()
	c := plainNodes(t, 2)
	n := c.Nodes[0]
	plain, err := n.ReadFile(primaryFile)
	must(t, err)
	for _, n := range c.Nodes {
		installNode(t, n, "--in-place")
	}
	chained, err := n.ReadFile(primaryFile)
	must(t, err)
	helpers := startHelpers(t, c)
	must(t, helpers[0].Stop(t.Context()))
	must(t, n.WriteFile(primaryFile, plain, 0o644))
	helper, err := n.StartHelper()
	must(t, err)
	must(t, c.AwaitConverged(t.Context()))
	back := func() error {
		if text, err := n.ReadFile(primaryFile); err != nil || text != chained {
			return errors.Join(fmt.Errorf("it is %s", text), err)
		}
		return nil
	}
	must(t, poll(t, "the entry to be put back at wgcnid's start", back))
	must(t, n.WriteFile(primaryFile, plain, 0o644))
	must(t, poll(t, "the entry to be put back", back))
	a, b := addPod(t, n, "a"), addPod(t, c.Nodes[1], "b")
	cluster.ServeT(t, b)
	talk(t, a, b)

	// Gone altogether, at boot: wgcnid waits for it, with the tunnel up.
	must(t, helper.Stop(t.Context()))
	must(t, os.Remove(n.Path(primaryFile)))
	helper, err = n.StartHelper()
	must(t, err)
	must(t, helper.WaitFor(t.Context(), "starting"))
	must(t, n.WriteFile(primaryFile, plain, 0o644))
	must(t, poll(t, "the entry to be put back", back))
	wgcnid(t, n, "uninstall")
	if text, err := n.ReadFile(primaryFile); err != nil || text != plain {
		t.Errorf("%v\n%s", err, text)
	}
}

// While wgcnid runs, pods start and are guarded whatever becomes of the files: an
// agent rewrites the conflist all the time, and somebody deletes copy and binary.
func TestInstalledNodeIsKept(t *testing.T) {
	t.Parallel()
	c, helpers, far := installedNodes(t)
	n := c.Nodes[0]
	plain, err := n.ReadFile(primaryFile)
	must(t, err)
	capture := watchUnderlay(t, c)
	agent, err := n.Start("sh", "-c", fmt.Sprintf(`while :; do
		cat %[1]s.orig >%[1]s; sleep 0.02
		cp %[1]s.orig %[1]s.tmp; mv %[1]s.tmp %[1]s; sleep 0.02
		rm %[1]s; sleep 0.02; head -c 100 %[1]s.orig >%[1]s; sleep 0.02; tail -c +101 %[1]s.orig >>%[1]s; sleep 0.02
	done`, primaryFile))
	must(t, err)
	must(t, n.WriteFile(primaryFile+".orig", plain, 0o644))
	for i := range 5 {
		talk(t, addPod(t, n, fmt.Sprint("pod", i)), far)
	}
	must(t, agent.Kill())
	must(t, n.WriteFile(primaryFile, plain, 0o644))
	for _, path := range []string{copyFile, pluginDir + "/wgcni"} {
		want, err := n.ReadFile(path)
		must(t, err)
		must(t, os.Remove(n.Path(path)))
		must(t, poll(t, path+" to be put back", func() error {
			if text, err := n.ReadFile(path); err != nil || text != want {
				return errors.Join(fmt.Errorf("it has %d bytes", len(text)), err)
			}
			return nil
		}))
	}
	talk(t, addPod(t, n, "last"), far)
	mustBeClean(t, capture)
	for _, word := range []string{"the copy was deleted", "binary was deleted"} {
		if strings.Count(helpers[0].Log.String(), word) != 1 {
			t.Errorf("want one line with %q in\n%s", word, helpers[0].Log)
		}
	}
	if strings.Contains(helpers[0].Log.String(), "cannot keep") {
		t.Errorf("it gave up on something:\n%s", helpers[0].Log)
	}
}

// A node whose primary is not there yet: install waits, says so, and is not misled
// by the half of a file.
func TestInstallWaits(t *testing.T) {
	t.Parallel()
	c := plainNodes(t, 1)
	n := c.Nodes[0]
	plain, err := n.ReadFile(primaryFile)
	must(t, err)
	must(t, os.Remove(n.Path(primaryFile)))
	before := files(t, n)
	out, err := n.Wgcnid(t.Context(), "install", "--bin-dir", pluginDir, "--entry", entryFile, "--wait", "700ms")
	if err == nil || !strings.Contains(out, "has no network configuration yet") || !strings.Contains(out, "waiting") {
		t.Errorf("%v: %s", err, out)
	}
	if diff := cmp.Diff(before, files(t, n)); diff != "" {
		t.Errorf("(-before +after):\n%s", diff)
	}
	p, err := n.Start(wgcnidBinary(t), "install", "--bin-dir", pluginDir, "--entry", entryFile)
	must(t, err)
	must(t, p.WaitFor(t.Context(), "waiting"))
	must(t, n.WriteFile(primaryFile, plain[:len(plain)/2], 0o644))
	must(t, n.WriteFile(primaryFile, plain, 0o644))
	must(t, p.Wait(t.Context()))
	if text, err := n.ReadFile(copyFile); err != nil || !strings.Contains(text, `"wgcni"`) {
		t.Errorf("%v: %s", err, text)
	}
	// A helper that finds nothing of it at its first start waits as well.
	must(t, os.Remove(n.Path(copyFile)))
	must(t, os.Remove(n.Path(primaryFile)))
	for _, back := range []bool{false, true} {
		helper, err := n.StartHelper()
		must(t, err)
		must(t, helper.WaitFor(t.Context(), "waiting for the primary plugin"))
		if back {
			must(t, n.WriteFile(primaryFile, plain, 0o644))
			must(t, helper.WaitFor(t.Context(), "starting"))
			must(t, c.AwaitConverged(t.Context()))
			break
		}
		if err := helper.Stop(t.Context()); err != nil {
			t.Errorf("stopped while it waits: %v\n%s", err, helper.Log)
		}
	}
	if out := wgcnid(t, n, "uninstall", "--purge"); !strings.Contains(out, copyFile) {
		t.Errorf("uninstall says nothing of the copy:\n%s", out)
	}
}

// A single plugin's .conf file, which the copy makes a list of, beside other networks.
func TestInstallSinglePlugin(t *testing.T) {
	t.Parallel()
	c := plainNodes(t, 2)
	for i, n := range c.Nodes {
		must(t, os.Remove(n.Path(primaryFile)))
		must(t, n.WriteFile(cluster.ConfDir+"/10-pods.conf", fmt.Sprintf(`{ "cniVersion": "0.4.0", "name": "pods", "type": "ptp",
  "ipam": { "type": "host-local", "subnet": "10.244.%d.0/24", "routes": [{ "dst": "0.0.0.0/0" }] } }`, i+1), 0o644))
		must(t, n.WriteFile(cluster.ConfDir+"/05-loopback.conf", `{ "cniVersion": "0.4.0", "name": "lo", "type": "loopback" }`, 0o644))
		must(t, n.WriteFile(cluster.ConfDir+"/87-other.conflist", `{ "cniVersion": "0.4.0", "name": "other", "plugins": [{ "type": "ptp" }] }`, 0o644))
		before := files(t, n)
		installNode(t, n)
		wgcnid(t, n, "uninstall", "--force", "--purge")
		if diff := cmp.Diff(before, files(t, n)); diff != "" {
			t.Errorf("what uninstall left (-before +after):\n%s", diff)
		}
		installNode(t, n)
	}
	startHelpers(t, c)
	a, b := addPod(t, c.Nodes[0], "a"), addPod(t, c.Nodes[1], "b")
	cluster.ServeT(t, b)
	capture := watchUnderlay(t, c)
	talk(t, a, b)
	mustBeClean(t, capture)
	for _, p := range []*cluster.Pod{a, b} {
		must(t, p.Delete(t.Context()))
	}
}

// Uninstall refuses before it has changed anything; what was cut short in the middle
// is finished by the next run; an installation by hand is for hands to undo.
func TestUninstallRefuses(t *testing.T) {
	t.Parallel()
	c := plainNodes(t, 1)
	n := c.Nodes[0]
	before := files(t, n)
	installNode(t, n)
	helpers := startHelpers(t, c)
	installed := files(t, n)
	refuse := func(want string, args ...string) {
		t.Helper()
		out, err := n.Wgcnid(t.Context(), append([]string{"uninstall"}, args...)...)
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("want %q: %v\n%s", want, err, out)
		}
		if diff := cmp.Diff(configs(installed), configs(files(t, n))); diff != "" {
			t.Errorf("(-before +after):\n%s", diff)
		}
	}
	must(t, os.Rename(c.Shared, c.Shared+".away"))
	refuse("the other nodes cannot be told")
	refuse("systemctl stop wgcnid", "--force")
	must(t, helpers[0].Stop(t.Context()))
	refuse("--force")
	out := wgcnid(t, n, "uninstall", "--force", "--purge")
	if !strings.Contains(out, "wgcnid forget") {
		t.Errorf("it does not say that the others keep it:\n%s", out)
	}
	must(t, os.Rename(c.Shared+".away", c.Shared))
	if diff := cmp.Diff(before, files(t, n)); diff != "" {
		t.Errorf("what uninstall left (-before +after):\n%s", diff)
	}

	must(t, n.Configure(cluster.NetworkOptions{})) // by hand
	installed = files(t, n)
	refuse("wgcnid leave")
	if out := installNode(t, n); !strings.Contains(out, "chains wgcni already") {
		t.Errorf("%s", out)
	}
	installed = files(t, n)
	refuse("take it out")
}

// An uninstall that was cut short after the entry was out is finished by the next
// one, although nothing names wgcni any more; and the binary was there till then.
func TestUninstallGoesOn(t *testing.T) {
	t.Parallel()
	c := plainNodes(t, 1)
	n := c.Nodes[0]
	before := files(t, n)
	installNode(t, n)
	helpers := startHelpers(t, c)
	const record = "/var/lib/wgcni/install.json"
	text, err := n.ReadFile(record)
	must(t, err)
	must(t, n.WriteFile(record, strings.Replace(text, `"stage": "installed"`, `"stage": "removing"`, 1), 0o600))
	must(t, os.Remove(n.Path(copyFile)))
	if _, err := n.ReadFile(pluginDir + "/wgcni"); err != nil {
		t.Error(err)
	}
	if out := wgcnid(t, n, "uninstall", "--purge"); !strings.Contains(out, "has left the mesh") {
		t.Errorf("uninstall says:\n%s", out)
	}
	must(t, helpers[0].Wait(t.Context()))
	if diff := cmp.Diff(before, files(t, n)); diff != "" {
		t.Errorf("what uninstall left (-before +after):\n%s", diff)
	}
	if out := run(t, n, "ip", "-o", "link"); strings.Contains(out, "wgcni0") {
		t.Errorf("the tunnel is still there:\n%s", out)
	}
}

// configs are those of the files that decide whether pods start.
func configs(all map[string]string) map[string]string {
	out := maps.Clone(all)
	maps.DeleteFunc(out, func(name, _ string) bool {
		return !strings.HasPrefix(name, cluster.ConfDir) && !strings.HasPrefix(name, pluginDir)
	})
	return out
}

func poll(t *testing.T, what string, f func() error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(10*time.Second))
	defer cancel()
	return cluster.Poll(ctx, what, f)
}

func wgcnidBinary(t *testing.T) string {
	t.Helper()
	root, err := cluster.RepoRoot()
	must(t, err)
	return filepath.Join(root, ".bin", "wgcnid")
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
