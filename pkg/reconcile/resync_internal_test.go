package reconcile

import (
	"slices"
	"testing"
	"time"
)

// A small mesh is looked at often, a large one is not looked at for more than its share.
func TestUntilResync(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		set  time.Duration
		cost looks
		want time.Duration
	}{
		{0, nil, resyncLeast},
		{0, looks{9 * time.Second}, resyncLeast}, // the first ones read what is not in memory yet
		{0, looks{3 * ms, 3 * ms, 3 * ms, 3 * ms, 3 * ms}, resyncLeast},
		{0, looks{40 * ms, 40 * ms, 40 * ms, 40 * ms, 40 * ms}, 2 * time.Second},
		{0, looks{3 * ms, 900 * ms, 900 * ms, 900 * ms, 900 * ms}, resyncLeast}, // a busy machine
		{0, looks{3 * ms, 40 * ms, 40 * ms, 40 * ms, 40 * ms, 40 * ms}, 2 * time.Second},
		{0, looks{40 * ms, 40 * ms, 40 * ms, 40 * ms, 40 * ms, 3 * ms}, resyncLeast}, // the others are gone
		{0, slices.Repeat(looks{time.Second}, 9), resyncMost},
		{time.Minute, slices.Repeat(looks{time.Second}, 9), time.Minute},
	} {
		l := Loop{Resync: c.set}
		for _, used := range c.cost {
			l.looks.add(used)
		}
		if got := l.untilResync(); got != c.want {
			t.Errorf("Resync %v, looks that used %v: the next after %v, want %v", c.set, c.cost, got, c.want)
		}
	}
	before := cpuTime()
	for begun := time.Now(); time.Since(begun) < time.Second && cpuTime() == before; {
	}
	if cpuTime() <= before {
		t.Error("a process that works uses no CPU time")
	}
}
