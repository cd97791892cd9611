package crash

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/test/cluster"
)

func TestMain(m *testing.M) { cluster.Main(m) }

// world is one node and its files. Each folder is at the same path for the harness
// and the node, but for those below /var/lib.
type world struct {
	t    *testing.T
	node *cluster.Node
	dir  string
	// stanza is the node's wgcni entry.
	stanza map[string]any
	// state and run are the node's state and run folder.
	state, run string
	roots      []string
	kernel     bool // what a program sends to the kernel counts too
}

// binary is what stands for the plugin where nothing executes it.
var binary = []byte("the plugin" + strings.Repeat(" and more of it", 1<<12))

const primaryEntry = `{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": {"type": "host-local", "subnet": "10.244.1.0/24"}}`

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, node: cluster.NewT(t, 1).Nodes[0], dir: t.TempDir()}
	w.state, w.run = w.path("lib/wgcni"), w.path("run/wgcni")
	w.stanza = map[string]any{
		"type": "wgcni", "clusterCIDRs": []string{"10.244.0.0/16"}, "peerCIDRs": []string{"10.99.0.0/24"}, "nodeName": "node-a",
		"stateDir": w.state, "runDir": w.run, "registry": map[string]any{"type": "file", "path": w.path("shared/mesh.json")},
	}
	for _, dir := range []string{"etc", "net.d", "bin", "lib", "run", "shared", "usr"} {
		w.must(os.Mkdir(w.path(dir), 0o755))
		w.roots = append(w.roots, w.path(dir))
	}
	w.roots = append(w.roots, config.DefaultStateDir)
	w.write("bin/bridge", []byte("the primary plugin"), 0o755)
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// real is where the harness finds a path of the node's.
func (w *world) real(p string) string {
	if strings.HasPrefix(p, w.dir) {
		return p
	}
	return w.node.Path(p)
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) write(name string, data []byte, mode os.FileMode) {
	w.t.Helper()
	w.must(os.WriteFile(w.path(name), data, mode))
	w.must(os.Chmod(w.path(name), mode))
}

// entry is the text of the node's wgcni entry.
func (w *world) entry() []byte {
	text, err := json.MarshalIndent(w.stanza, "", "  ")
	w.must(err)
	return text
}

// chained writes the conflist with the entry; plain the one without.
func (w *world) chained() { w.conflist(primaryEntry + "," + string(w.entry())) }
func (w *world) plain()   { w.conflist(primaryEntry) }

func (w *world) conflist(plugins string) {
	w.write("net.d/10-pods.conflist", fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": "pods", "plugins": [%s]}`, plugins), 0o644)
}

// wgcnid is a command of the helper's command line.
func (w *world) wgcnid(args ...string) *exec.Cmd {
	cmd := exec.Command(w.bin("wgcnid"), append([]string{"--cni-dir", w.path("net.d")}, args...)...)
	cmd.Dir = "/"
	return cmd
}

func (w *world) bin(name string) string {
	root, err := cluster.RepoRoot()
	w.must(err)
	return filepath.Join(root, ".bin", name)
}

// ended is what became of a command.
type ended struct {
	Ended
	out, err string
}

// trace runs a command on the node.
func (w *world) trace(cmd *exec.Cmd, long time.Duration, decide func(Call) Fate) ended {
	w.t.Helper()
	var files [2]*os.File
	for i := range files {
		f, err := os.CreateTemp("", "wgcni-crash-output-")
		w.must(err)
		w.must(os.Remove(f.Name()))
		defer f.Close()
		files[i] = f
	}
	cmd.Stdout, cmd.Stderr = files[0], files[1]
	if f, ok := cmd.Stdin.(*os.File); ok {
		defer f.Close()
	}
	e, err := Trace(cmd, Place{PID: w.node.PID(), Kernel: w.kernel}, long, decide)
	w.must(err)
	var texts [2]string
	for i, f := range files {
		data := make([]byte, 1<<16)
		n, _ := f.ReadAt(data, 0)
		texts[i] = string(bytes.TrimSpace(data[:n]))
	}
	return ended{Ended: e, out: texts[0], err: texts[1]}
}

// do runs a command to its end, which must be a good one.
func (w *world) do(cmd *exec.Cmd) {
	w.t.Helper()
	run := w.node.Command(context.Background(), cmd.Path, cmd.Args[1:]...)
	run.Env = append(run.Env, cmd.Env...)
	run.Stdin = cmd.Stdin
	out, err := run.CombinedOutput()
	if err != nil {
		w.t.Fatalf("%v: %v: %s", cmd.Args[1:], err, out)
	}
}

// tree is what there is now.
func (w *world) tree() Tree {
	w.t.Helper()
	tree, err := ReadTree(w.real, w.roots)
	w.must(err)
	return tree
}

func (w *world) restore(tree Tree) {
	w.t.Helper()
	w.must(tree.Write(w.real, w.roots))
}

// litter are the names in a tree that are in none of the others.
func litter(tree Tree, others ...Tree) (out []string) {
	for _, name := range tree.Names() {
		if !slices.ContainsFunc(others, func(o Tree) bool { return slices.Contains(o.Names(), name) }) {
			out = append(out, name)
		}
	}
	return out
}
