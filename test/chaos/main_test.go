// Package chaos runs campaigns: long random sequences of all that may go wrong,
// by a seed that repeats them.
package chaos

import (
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

func TestMain(m *testing.M) { cluster.Main(m) }
