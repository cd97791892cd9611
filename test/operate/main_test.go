// Package operate does what an operator does with whole clusters: it installs,
// looks, asks and removes, with the real command line.
package operate

import (
	"fmt"
	"os"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

func TestMain(m *testing.M) {
	cluster.Init()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the operator's tests make network namespaces: run them as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}
