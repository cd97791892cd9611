// Package e2e runs whole clusters: the real plugin, helper, cnitool and
// reference plugins, on nodes in namespaces.
package e2e

import (
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

func TestMain(m *testing.M) { cluster.Main(m) }
