package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

// A block is what an example's README has its reader type, and where.
type block struct{ at, script string }

var shellBlock = regexp.MustCompile("(?ms)^ *```sh\n *# on (?:the )?([^\n]+)\n(.*?)^ *```$")

func blocksOf(t *testing.T, example string) (out []block) {
	t.Helper()
	root, err := cluster.RepoRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "conflist", "examples", example, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range shellBlock.FindAllStringSubmatch(string(text), -1) {
		out = append(out, block{m[1], m[2]})
	}
	if want := strings.Count(string(text), "```sh"); len(out) != want {
		t.Fatalf("%d of %d blocks say where they are to be typed", len(out), want)
	}
	return out
}

// The example's own files, and what its README says to type.
func TestLaptopExample(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, 1, cluster.NetworkOptions{Example: "examples/laptop/node.conflist"})
	serveAll(t, m.pods)
	laptop := newOutsiders(t, m.Cluster, "laptop")[0]
	serve(t, laptop)
	at := map[string]*cluster.Machine{"node-a": m.Nodes[0].Machine, "node-b": m.Nodes[1].Machine, "laptop": laptop.Machine}
	const file = "/run/laptop.conf"
	for _, b := range blocksOf(t, "laptop") {
		on := at[b.at]
		if on == nil {
			t.Fatalf("there is no %q", b.at)
		}
		if strings.Contains(b.script, "remove") {
			laptop.reaches(t, m.pods, []byte("x"))
		}
		if b.at == "laptop" && strings.Contains(b.script, "wg-quick up") { // taken there
			text, err := m.Nodes[0].ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			laptop.take(t, text)
			if err := laptop.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		env := "cd /run; PATH=" + filepath.Dir(bin("wgcnid")) + ":$PATH; export PATH WG_QUICK_USERSPACE_IMPLEMENTATION=" + bin("wireguard") + "\n"
		out, err := on.Batch(t.Context(), env+b.script, "sh", "-es")
		if err != nil {
			t.Fatalf("on %s:\n%s\n%v", b.at, b.script, err)
		}
		if strings.Contains(b.script, "peer list") && !strings.Contains(out, "node-a node-b  node-a ") {
			t.Errorf("the list is\n%s", out)
		}
	}
	err := cluster.Poll(t.Context(), "the laptop to be shut out", func() error {
		if _, err := cluster.Ping(t.Context(), laptop, m.pods[0].IPv4(), nil); err == nil {
			return fmt.Errorf("it reaches a pod")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	laptop.mustWgQuick(t, "down")
}
