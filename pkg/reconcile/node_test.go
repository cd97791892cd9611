package reconcile_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// testNode is a helper with everything around it. It survives a restart.
type testNode struct {
	t        *testing.T
	kernel   *fakeKernel
	registry *fakeRegistry
	names    *nameServer
	log      *logLines
	key      wgtypes.Key
	keys     identity.Keys // optional: with a next one
	resync   time.Duration // 0: so rarely that no test sees one
	now      func() time.Time

	mu        sync.Mutex
	config    config.Config
	adoptable []store.Attachment
	adoptions int
	reports   []reconcile.Report
	passed    []reconcile.Passed

	cancel context.CancelFunc
	done   chan error
}

func newNode(t *testing.T, records ...registry.Record) *testNode {
	t.Helper()
	return &testNode{
		t: t, kernel: newKernel(), registry: newRegistry(records...), log: &logLines{}, key: keyA,
		names: &nameServer{answers: map[string][]netip.Addr{}}, config: testConfig(t), now: time.Now,
	}
}

func (n *testNode) loop() *reconcile.Loop {
	keys := n.keys
	if keys.Current == (wgtypes.Key{}) {
		keys.Current = n.key
	}
	return &reconcile.Loop{
		Load: func() (config.Config, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.config, nil
		},
		Keys: keys, Kernel: n.kernel, Registry: n.registry, Now: n.now, Log: n.log.logger(), Resync: cmp.Or(n.resync, time.Minute),
		Resolver: &reconcile.Resolver{Lookup: n.names.lookup},
		Adopt: func(config.Config) ([]store.Attachment, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.adoptions++
			return n.adoptable, nil
		},
		Report: func(r reconcile.Report) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.reports = append(n.reports, r)
		},
		Passed: func(p reconcile.Passed) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.passed = append(n.passed, p)
		},
	}
}

// start runs the helper until stop, or the test's end.
func (n *testNode) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	n.cancel, n.done = cancel, done
	loop := n.loop()
	go func() { done <- loop.Run(ctx) }()
	n.t.Cleanup(func() {
		cancel()
		select {
		case <-done:
		case <-time.After(patience):
			n.t.Error("the loop does not end")
		}
	})
}

// ended waits for Run's error.
func (n *testNode) ended() error {
	n.t.Helper()
	select {
	case err := <-n.done:
		n.done <- err // for Cleanup
		return err
	case <-time.After(patience):
		n.t.Fatal("the loop does not end")
		return nil
	}
}

func (n *testNode) stop() {
	n.t.Helper()
	n.cancel()
	if err := n.ended(); err != nil {
		n.t.Errorf("Run: %v, want nil", err)
	}
}

func (n *testNode) report() reconcile.Report {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.reports) == 0 {
		return reconcile.Report{}
	}
	return n.reports[len(n.reports)-1]
}

func (n *testNode) adopted() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.adoptions
}

func (n *testNode) configure(f func(*config.Config)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(&n.config)
}

// tell sends a kernel event.
func (n *testNode) tell(e kernel.Event) {
	n.t.Helper()
	select {
	case n.kernel.events <- e:
	case <-time.After(patience):
		n.t.Fatal("nobody takes the kernel's event")
	}
}

// holds waits until the kernel's text has all of these.
func (n *testNode) holds(lines ...string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("kernel to hold %q", lines), func() bool {
		text := n.kernel.String()
		for _, l := range lines {
			if !strings.Contains(text, l) {
				return false
			}
		}
		return true
	})
}

// lacks waits until the kernel's text has it no more.
func (n *testNode) lacks(line string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("kernel to lack %q", line), func() bool { return !strings.Contains(n.kernel.String(), line) })
}

// announced waits until the registry's record of this node is as wanted.
func (n *testNode) announced(what string, wanted func(registry.Record) bool) registry.Record {
	n.t.Helper()
	var last registry.Record
	eventually(n.t, "the registry to have "+what, func() bool {
		rec, ok := n.registry.own()
		last = rec
		return ok && !rec.Left && wanted(rec)
	})
	return last
}

func anyRecord(registry.Record) bool { return true }

// joins starts the helper and waits until it is a member and at rest.
func (n *testNode) joins() registry.Record {
	n.t.Helper()
	n.start()
	var rec registry.Record
	eventually(n.t, "a pass that knows of this node's record", func() (there bool) {
		rec, there = n.registry.own()
		return there && n.savedRecord("a").Equal(rec)
	})
	return rec
}

// saved is what peers.db holds.
func (n *testNode) saved() store.Known {
	n.t.Helper()
	known, damaged, err := store.LoadKnown(n.t.Context(), n.config.StateDir)
	if err := errors.Join(err, asError(damaged)); err != nil {
		n.t.Fatal(err)
	}
	return known
}

// savedRecord is a record of those; the zero Record where there is none.
func (n *testNode) savedRecord(name string) registry.Record {
	n.t.Helper()
	r, _ := n.saved().Records.Record(name)
	return r
}

func asError(d *store.Damaged) error {
	if d == nil {
		return nil
	}
	return d
}

// quiet waits until several resyncs pass without a trace: no ops, nothing
// published, nothing logged. The node's resync must be short.
func (n *testNode) quiet() {
	n.t.Helper()
	trace := func() string {
		return fmt.Sprint(len(n.kernel.calls()), len(n.registry.publications()), n.log.String())
	}
	eventually(n.t, "rest", func() bool {
		before, seen := trace(), n.kernel.observations()
		eventually(n.t, "resyncs", func() bool { return n.kernel.observations() > seen+5 })
		return trace() == before
	})
}

const shortResync = 10 * time.Millisecond

func (n *testNode) allReports() []reconcile.Report {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.reports)
}
