package kernel_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// wgctrl sends one netlink message a peer above 32 peers or 256 allowed IPs: however
// many there are, the kernel has all of them in the end, and each once.
func TestManyPeers(t *testing.T) {
	k := open(t)
	var wide []string
	for i := range 300 {
		wide = append(wide, fmt.Sprintf("10.244.%d.%d/32", 100+i/256, i%256))
	}
	facts := mesh.Facts{Nodes: []mesh.Node{node(1, wide...)}}
	for n := 2; n <= 40; n++ {
		facts.Nodes = append(facts.Nodes, node(n, fmt.Sprintf("10.244.%d.0/24", n)))
	}
	apply(t, k, plan(facts))
	observed, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	allowed := 0
	for _, p := range observed.Peers {
		allowed += len(p.AllowedIPs)
	}
	if len(observed.Peers) != 40 || allowed != 300+39 {
		t.Errorf("%d peers with %d allowed IPs, want 40 with %d", len(observed.Peers), allowed, 300+39)
	}
	if ops := mesh.Diff(observed, plan(facts), mesh.Context{}); len(ops) > 0 {
		t.Errorf("left to be done:\n%s", mesh.Text(ops))
	}
}

// A process for each rule is what others spend their time on (kilo#113, kilo#304):
// nothing here can start one.
func TestNoProcessPerRule(t *testing.T) {
	for _, dir := range []string{".", "../mesh", "../reconcile", "../store"} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatal(dir, files, err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, text, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range parsed.Imports {
				if path, _ := strconv.Unquote(i.Path.Value); path == "os/exec" {
					t.Errorf("%s imports os/exec", file)
				}
			}
		}
	}
}
