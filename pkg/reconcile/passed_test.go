package reconcile_test

import (
	"errors"
	"testing"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

// passes returns what the loop has told of its passes.
func (n *testNode) passes() []reconcile.Passed {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]reconcile.Passed(nil), n.passed...)
}

// lastPass is the latest one. The kernel may be as planned before the first is told of.
func (n *testNode) lastPass() reconcile.Passed {
	if all := n.passes(); len(all) > 0 {
		return all[len(all)-1]
	}
	return reconcile.Passed{}
}

func (n *testNode) repairs() (sum int) {
	for _, p := range n.passes() {
		sum += p.Repairs
	}
	return sum
}

// What a fact has asked for is no repair; what somebody broke is.
func TestLoopCountsRepairs(t *testing.T) {
	n := newNode(t, record("b"))
	n.joins()
	n.holds(plannedAlone)
	n.registry.put(record("c"))
	n.holds("peer c")
	// The kernel tells of what the loop itself has done, too.
	n.tell(kernel.Event{Ours: true})
	// A fact that changes in the moment in which all is looked at is no repair either.
	n.kernel.set(func(k *fakeKernel) {
		k.onObserve = func() { k.set(func(k *fakeKernel) { k.onObserve = nil }); n.registry.put(record("d")) }
	})
	n.tell(kernel.Event{Ours: true})
	n.holds("peer d")
	if got := n.repairs(); got != 0 {
		t.Fatalf("%d repairs of what nobody broke", got)
	}
	var broken []mesh.Op
	for _, r := range lastPlan(t, n).Routes {
		if r.Type == mesh.ViaLink {
			broken = append(broken, mesh.RemoveRoute{Route: r})
		}
	}
	if err := n.kernel.Kernel.Apply(broken); err != nil || len(broken) == 0 {
		t.Fatalf("%d routes broken, %v", len(broken), err)
	}
	n.tell(kernel.Event{Ours: true})
	eventually(t, "the repairs to be counted", func() bool { return n.repairs() == len(broken) })
	last := n.lastPass()
	if len(last.Peers) != 3 || last.Took.Plan <= 0 || last.Report.At.IsZero() {
		t.Errorf("%d peers, took %+v, at %v", len(last.Peers), last.Took, last.Report.At)
	}
}

// lastPlan is what the kernel holds after the loop's last pass.
func lastPlan(t *testing.T, n *testNode) mesh.State {
	t.Helper()
	s, err := n.kernel.Kernel.Observe()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What a pass could not repair is counted by the one that does.
func TestLoopPassFails(t *testing.T) {
	n := newNode(t, record("b"))
	n.joins()
	n.holds(plannedAlone)
	n.kernel.KillTunnel()
	n.kernel.set(func(k *fakeKernel) {
		k.onApply = func([]mesh.Op) error { return errors.New("operation not permitted") }
	})
	n.tell(kernel.Event{Ours: true})
	eventually(t, "a pass that fails", func() bool { return n.lastPass().Report.Error != "" })
	if last := n.lastPass(); last.Repairs != 0 || len(last.Peers) != 1 {
		t.Errorf("a pass that failed repaired %d, peers %v", last.Repairs, last.Peers)
	}
	n.kernel.set(func(k *fakeKernel) { k.onApply = nil })
	n.holds(plannedAlone)
	eventually(t, "the repairs to be counted", func() bool { return n.repairs() > 3 })
}
