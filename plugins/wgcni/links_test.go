package main

import (
	"os/exec"
	"strings"
	"testing"
)

// Whatever the helper needs: the plugin is started for every pod, and talks to nobody.
func TestPluginStaysSmall(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	packages := strings.Fields(string(out))
	if len(packages) < 10 {
		t.Fatalf("go list tells of %d packages only: %s", len(packages), out)
	}
	for _, p := range packages {
		for _, heavy := range []string{"google.golang.org/grpc", "go.etcd.io/etcd/", "k8s.io/", "github.com/spf13/cobra", "github.com/prometheus/", "net/http", "github.com/wgcni/wgcni/pkg/endpoint"} {
			if strings.HasPrefix(p, heavy) {
				t.Errorf("the plugin links %s", p)
			}
		}
	}
}
