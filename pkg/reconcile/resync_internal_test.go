package reconcile

import (
	"testing"
	"time"
)

// A small mesh is looked at often, a large one is not looked at for more than its share.
func TestUntilResync(t *testing.T) {
	for _, c := range []struct{ set, cost, want time.Duration }{
		{0, 0, resyncLeast},
		{0, 3 * time.Millisecond, resyncLeast},
		{0, 40 * time.Millisecond, 2 * time.Second},
		{0, time.Second, resyncMost},
		{time.Minute, time.Second, time.Minute},
	} {
		l := Loop{Resync: c.set}
		if got := l.untilResync(c.cost); got != c.want {
			t.Errorf("Resync %v, a look that cost %v: the next after %v, want %v", c.set, c.cost, got, c.want)
		}
	}
	before := cpuTime()
	for begun := time.Now(); time.Since(begun) < time.Second && cpuTime() == before; {
	}
	if cpuTime() <= before {
		t.Error("a process that works uses no CPU time")
	}
}
