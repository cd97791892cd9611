// Package operate does what an operator does with whole clusters: it installs,
// looks, asks and removes, with the real command line.
package operate

import (
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

func TestMain(m *testing.M) { cluster.Main(m) }
