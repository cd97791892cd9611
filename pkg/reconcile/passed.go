package reconcile

import (
	"time"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Passed is a pass of the Loop, for those who count and show.
type Passed struct {
	Report Report
	// Peers are as planned, by public key. They are the loop's own: not to be changed.
	Peers []mesh.Peer
	Spare []mesh.Peer // the same, of the spare interface
	Pods  int         // attached to this node; 0 where the pass failed before it had read them
	// Repairs is how many ops put back what somebody had changed: no fact had asked
	// for them since the pass before.
	Repairs int
	Took    Took
}

// Took is how long the parts of a pass took.
type Took struct {
	Observe time.Duration // 0: what the kernel holds was known
	Plan    time.Duration
	Apply   time.Duration // 0: the kernel held the plan already
}

// repairs counts the ops of a pass that looked at the kernel, but for those that
// lead from the last plan to this one. A peer that has roamed and fallen silent is
// called where its record says again: that puts back nothing that anybody broke.
func repairs(last *mesh.State, o Outcome, c mesh.Context) (n int) {
	if last == nil || len(o.Ops) == 0 {
		return 0
	}
	asked := map[string]bool{}
	for _, op := range mesh.Diff(*last, o.Plan.State, c) {
		asked[op.String()] = true
	}
	for _, op := range o.Ops {
		if _, greet := op.(mesh.Greet); greet || callsAnew(op) || asked[op.String()] {
			continue
		}
		n++
	}
	return n
}

// callsAnew is true of an op that sets a peer's endpoint alone.
func callsAnew(op mesh.Op) bool {
	p, ok := op.(mesh.SetPeer)
	return ok && p.Endpoint.IsValid() && p.PresharedKey == nil && p.Keepalive == nil && len(p.Add) == 0 && len(p.Remove) == 0
}
