package chaos

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// quietClock counts the time in which the machine lets the mesh's processes run: a
// helper that waits for a CPU, since others have it, is not late.
type quietClock struct {
	passed atomic.Int64
	done   chan struct{}
}

// startQuietClock starts at 0, for the helpers and tunnels that run, and those that
// they start.
func startQuietClock(b *bed) *quietClock {
	const (
		tick  = 10 * time.Millisecond
		count = 10 // ticks until it looks for processes again
	)
	c := &quietClock{done: make(chan struct{})}
	pids := b.pids()
	waited := waits{}
	waited.most(pids)
	go func() {
		ticks := 0
		for last := time.Now(); ; {
			select {
			case <-c.done:
				return
			case <-time.After(tick):
			}
			if ticks++; ticks%count == 0 {
				pids = b.pids()
			}
			now := time.Now()
			c.passed.Add(int64(max(min(now.Sub(last), 2*tick)-waited.most(pids), 0)))
			last = now
		}
	}()
	return c
}

// pids are of all helpers and tunnels. Who asks them how they are is not of the mesh.
func (b *bed) pids() (pids []int) {
	for _, m := range b.members {
		found, _ := m.FindProcesses("wgcnid") // without, it is a clock as others are
		for _, p := range found {
			if slices.Contains(p.Args, "run") || slices.Contains(p.Args, "tunnel") {
				pids = append(pids, p.HostPID)
			}
		}
	}
	return pids
}

func (c *quietClock) now() time.Duration { return time.Duration(c.passed.Load()) }

func (c *quietClock) stop() { close(c.done) }

// await returns when the first judgement that finds all well began.
func (c *quietClock) await(ctx context.Context, judge func() error) (time.Duration, error) {
	for {
		at := c.now()
		err := judge()
		if err == nil {
			return at, nil
		}
		if at > cluster.Patience(patience) || ctx.Err() != nil {
			return at, err
		}
		time.Sleep(5 * time.Millisecond) // as cluster.Poll does
	}
}

// waits are how long threads have waited on a run queue, by their schedstat file:
// its second number, in ns (Documentation/scheduler/sched-stats.rst).
type waits map[string]int64

// most is the longest that a thread of these processes has waited since it was
// asked last, or since it began.
func (w waits) most(pids []int) (most time.Duration) {
	for _, pid := range pids {
		folder := fmt.Sprintf("/proc/%d/task/", pid)
		threads, _ := os.ReadDir(folder) // a process that has ended waits for nothing
		for _, t := range threads {
			file := folder + t.Name() + "/schedstat"
			text, _ := os.ReadFile(file)
			words := strings.Fields(string(text))
			if len(words) != 3 {
				continue
			}
			now, _ := strconv.ParseInt(words[1], 10, 64)
			most = max(most, time.Duration(now-w[file])) // what is new has not waited before
			w[file] = now
		}
	}
	return most
}
