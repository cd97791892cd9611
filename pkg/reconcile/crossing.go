package reconcile

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

const (
	// waveBytes is what a wave (see kernel.Wave) adds at least to the bytes that its
	// receiver counts. What else comes without anybody having sent something, both
	// messages of a handshake and a few keepalives within one look, is less.
	waveBytes = 400
	// arrivals are the looks in which the other is seen on the plane that it should
	// be on, and not on the other one, before that is believed.
	arrivals = 2
	// crossPatience is how long a node waits, with each stage of its rotation, for
	// others that may have heard of it but do not answer. After that it waits for
	// those only that talk to it.
	crossPatience = 20 * time.Second
	// deafAfter is how long nothing comes by a tunnel that is well: whoever only gets
	// packets answers after KEEPALIVE_TIMEOUT, 10 s, and all others send keepalives.
	deafAfter = 16 * time.Second
	// hearsayAfter is how soon after it is published a stage is known to all who hear
	// of it at all. Until then one may still take down a spare tunnel of before.
	hearsayAfter = 3 * time.Second
	// A pair waves with each look at first, and then, for whoever lags, with some.
	waveOften, waveSeldom = 30, 10
)

// crossings moves pairs of nodes between the planes; see mesh.Plane. It is a pure
// state machine: handshakes, counters and time go in, planes come out.
//
// A pair's target is the spare plane while one of the two is Out, and the primary
// while one is Back. A node sends by the target as soon as it has a handshake there.
// That the other does so too is seen from what comes: each side waves, once a
// second, by the way that its routes have.
type crossings struct {
	pairs map[string]*crossing
	stage mesh.Stage // of this node
	since time.Time  // when it came to it, in this run
	force bool       // do not wait for anybody
}

// A crossing is one pair of nodes that changes planes.
type crossing struct {
	target, sends mesh.Plane
	routed        mesh.Plane // what sends was as of the last pass that succeeded
	since         time.Time  // when the target became this one
	looks         int
	arrived       int  // looks in which the other was seen at the target only
	home          bool // on the primary plane, both: there is no second tunnel
	ears          map[mesh.Plane]*planeEar
}

// A planeEar is what has come by a plane.
type planeEar struct {
	received int64     // bytes, as of the last look
	at       time.Time // when there were more than before
	came     bool      // somebody has sent something since the last look
}

// news is what this node and the registry know of each other.
type news struct {
	announced bool // the registry has this node's stage
	informed  bool // this node has what the registry has
}

// A neighbour is the other side of a pair, at one look.
type neighbour struct {
	name    string
	stage   mesh.Stage
	crosses bool // it has a spare end
	plain   bool // it knows this node's key from a file
	talks   bool // both have addresses that the other sends to
	heard   map[mesh.Plane]kernel.Handshake
}

// newCrossings goes on where an earlier run has stopped.
func newCrossings(stage mesh.Stage, observed map[string]mesh.Plane, now time.Time) *crossings {
	c := &crossings{pairs: map[string]*crossing{}, stage: stage, since: now}
	for name, sends := range observed {
		c.pairs[name] = newCrossing(sends, sends)
	}
	return c
}

func newCrossing(target, sends mesh.Plane) *crossing {
	return &crossing{target: target, sends: sends, routed: sends, ears: map[mesh.Plane]*planeEar{}}
}

// enter notes the node's own stage.
func (c *crossings) enter(stage mesh.Stage, now time.Time) {
	if c.stage != stage {
		c.stage, c.since = stage, now
	}
	if stage == mesh.Resting {
		c.force = false
	}
}

// planes are those by which this node sends, for each pair that has both tunnels.
func (c *crossings) planes() map[string]mesh.Plane {
	if len(c.pairs) == 0 {
		return nil
	}
	out := make(map[string]mesh.Plane, len(c.pairs))
	for name, x := range c.pairs {
		if !x.home {
			out[name] = x.sends
		}
	}
	return out
}

// carriedOut notes that the kernel has the planes of the last look.
func (c *crossings) carriedOut() {
	for _, x := range c.pairs {
		x.routed = x.sends
	}
}

// waving are the pairs that have to show now by which plane this node sends.
func (c *crossings) waving() (names []string) {
	for name, x := range c.pairs {
		if x.looks <= waveOften || x.looks%waveSeldom == 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// moved counts the pairs of which this node knows that both sides send by the target.
func (c *crossings) moved(neighbours []neighbour) (moved, of int) {
	for _, n := range neighbours {
		if x := c.pairs[n.name]; x != nil {
			of++
			if x.target == mesh.Plane(c.stage == mesh.Out) && x.done(n) {
				moved++
			}
		}
	}
	return moved, of
}

// look takes in what was heard of all other nodes, and returns whom this node
// waits for before it goes on to the next stage.
func (c *crossings) look(neighbours []neighbour, hearsay news, now time.Time) (waiting []RotationWait) {
	here := make(map[string]bool, len(neighbours))
	for _, n := range neighbours {
		here[n.name] = true
		c.lookAt(n, hearsay, now)
		if why := c.waitsFor(n, now); why != "" {
			waiting = append(waiting, RotationWait{Node: n.name, Why: why})
		}
	}
	maps.DeleteFunc(c.pairs, func(name string, _ *crossing) bool { return !here[name] })
	slices.SortFunc(waiting, func(a, b RotationWait) int { return cmp.Compare(a.Node, b.Node) })
	return waiting
}

// lookAt moves one pair on.
func (c *crossings) lookAt(n neighbour, hearsay news, now time.Time) {
	if !n.crosses || c.stage == mesh.Resting && n.stage == mesh.Resting {
		delete(c.pairs, n.name)
		return
	}
	target := mesh.Plane(c.stage == mesh.Out || n.stage == mesh.Out)
	x := c.pairs[n.name]
	if x == nil { // if the target is the primary plane: it has not left it
		x = newCrossing(target, mesh.Primary)
		x.home = target == mesh.Primary
		c.pairs[n.name] = x
	}
	if x.since.IsZero() || !hearsay.announced && c.stage == mesh.Out {
		x.since = now
	}
	if x.target != target {
		x.target, x.since, x.arrived, x.looks = target, now, 0, 0
	}
	if target == mesh.Spare {
		x.home = false
	}
	x.looks++
	x.listen(n, now)
	switch {
	case x.carries(n, target, now):
		// The other may be about to give this tunnel up after an earlier rotation:
		// something has to come by it when that cannot be any more.
		if target == mesh.Primary || x.ears[target].at.Sub(x.since) > hearsayAfter {
			x.sends = target
		}
	case x.sends == target && x.carries(n, !target, now): // the tunnel is gone at the other end, for one
		x.sends = !target
	}
	x.home = x.home || target == mesh.Primary && x.done(n) && hearsay.informed
}

// listen looks by which plane the other's packets have come since the last look.
func (x *crossing) listen(n neighbour, now time.Time) {
	for _, p := range []mesh.Plane{mesh.Primary, mesh.Spare} {
		ear, known := x.ears[p]
		if !known {
			ear = &planeEar{received: n.heard[p].Received, at: now}
			x.ears[p] = ear
		}
		more := n.heard[p].Received - ear.received
		if more != 0 { // less is the count of another interface
			ear.at = now
		}
		ear.received, ear.came = n.heard[p].Received, more >= waveBytes
	}
	switch {
	case x.ears[!x.target].came:
		x.arrived = 0
	case x.ears[x.target].came:
		x.arrived++
	}
}

// carries reports whether what is sent by a plane arrives, as far as can be seen.
func (x *crossing) carries(n neighbour, p mesh.Plane, now time.Time) bool {
	return fresh(n.heard[p], now) && now.Sub(x.ears[p].at).Abs() < deafAfter
}

// done reports whether both sides send by the target.
func (x *crossing) done(n neighbour) bool {
	return x.sends == x.target && x.routed == x.target && (x.arrived >= arrivals || !n.talks)
}

// waitsFor says why a stage of this node cannot end yet, as far as that node goes; ""
// if it does not hold it up. One with which no session is alive on the plane
// that is left loses nothing: it hears of the new key by the registry.
func (c *crossings) waitsFor(n neighbour, now time.Time) string {
	if c.force || c.stage == mesh.Resting {
		return ""
	}
	target := mesh.Plane(c.stage == mesh.Out)
	x := c.pairs[n.name]
	if x != nil && (x.target == target && x.done(n) || x.home && c.stage == mesh.Back) {
		return ""
	}
	left := fresh(n.heard[!target], now)
	if c.stage == mesh.Out && n.plain {
		return "it knows this node's key from its configuration file"
	}
	if !left && (x == nil && c.stage == mesh.Back || now.Sub(c.since) > crossPatience) {
		return ""
	}
	switch {
	case !n.crosses:
		return "its wgcnid cannot rotate keys: it is of an older version, or its \"rotationPort\" is missing"
	case x.target != target:
		return "it rotates its own key"
	case x.sends != target && target == mesh.Spare:
		return "no handshake on its rotation port yet"
	case x.sends != target:
		return "no handshake with the new key yet"
	case x.routed != target:
		return "this node's routes to it have not moved yet"
	}
	return "it does not send by the new tunnel yet"
}

// fresh reports whether the session of a handshake may still carry packets.
func fresh(h kernel.Handshake, now time.Time) bool {
	return !h.At.IsZero() && now.Sub(h.At).Abs() < mesh.HandshakeFresh
}
