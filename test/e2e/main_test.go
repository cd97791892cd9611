// Package e2e runs whole clusters: the real plugin, helper, cnitool and
// reference plugins, on nodes in namespaces.
package e2e

import (
	"fmt"
	"os"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

func TestMain(m *testing.M) {
	cluster.Init()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the end-to-end tests make network namespaces: run them as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}
