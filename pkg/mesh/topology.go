package mesh

import (
	"cmp"
	"slices"
)

// Topology says which way packets take from machine to machine. It depends only
// on the records, so that every machine that holds the same snapshot decides
// alike, and each hop agrees with the one before.
//
// By default all machines talk directly. Where a location has gateways, one of
// them carries what enters and leaves it: the first by name that is not
// silenced. A spoke talks to that gateway only. Two machines that can only call
// others meet at a gateway that can be called. A plain machine hangs at the node
// that carries it, if it is in all segments of that:
//
//	laptop --- a1 --- gateway a === gateway b --- b1      (locations a and b)
//	                        \       /
//	                       gateway h                      (if neither can be called)
//
// Any part of a path is the path of its ends, and the way back is the same.
type Topology struct {
	places   []place // sorted by name
	index    map[string]int
	gateways map[string]int // the active one of each location
	relays   []int          // active gateways that can be called, by name
}

type place struct {
	name, location string
	role           Role
	callsOnly      bool
	calledInside   bool // its location only
	plain          bool
	carrier        int // of a plain machine; none: nowhere
	segments       []string
}

const nowhere = -1

// everyone is the segment of the machines that name none.
var everyone = []string{""}

func orEveryone(segments []string) []string {
	if len(segments) == 0 {
		return everyone
	}
	return segments
}

// MayCarry reports whether a node with these segments may carry a plain machine
// with those: it has to be in all of the node's. The machine has no plan that could
// refuse what comes, and no need of one then: whatever the node lets in may talk to
// the machine as well.
func MayCarry(node, machine []string) bool { return covered(orEveryone(node), orEveryone(machine)) }

// covered reports whether all of the segments are among the others.
func covered(segments, others []string) bool {
	return !slices.ContainsFunc(segments, func(s string) bool { return !slices.Contains(others, s) })
}

// NewTopology arranges the machines, whose names must differ. Carrier says, by
// name, which node carries each plain machine.
func NewTopology(nodes []Node, carrier map[string]string) Topology {
	t := Topology{
		places: make([]place, len(nodes)), index: make(map[string]int, len(nodes)), gateways: map[string]int{},
	}
	for i, n := range nodes {
		p := place{
			name: n.Name, location: n.Location, role: n.Role, callsOnly: n.CallsOnly, calledInside: n.CalledInside,
			plain: n.Plain(), carrier: nowhere, segments: n.Segments,
		}
		p.segments = orEveryone(p.segments)
		t.places[i] = p
	}
	slices.SortFunc(t.places, func(a, b place) int { return cmp.Compare(a.name, b.name) })
	for i, p := range t.places {
		t.index[p.name] = i
	}
	for plain, by := range carrier {
		i, known := t.index[plain]
		c, there := t.index[by]
		if known && there && t.places[i].plain && !t.places[c].plain && covered(t.places[c].segments, t.places[i].segments) {
			t.places[i].carrier = c
		}
	}
	t.chooseGateways(nodes)
	return t
}

// chooseGateways goes by what the gateways of a location say of each other. The
// latest word counts, unless its author is silenced by a later one: of two that
// do not hear each other, the one that spoke last was certainly alive then. So at
// least one remains.
func (t *Topology) chooseGateways(nodes []Node) {
	type word struct {
		by, of int
		Silence
	}
	var words []word
	gateway := func(i int) bool { return t.places[i].role == RoleGateway && !t.places[i].plain }
	for _, n := range nodes {
		by := t.index[n.Name]
		for _, s := range n.Silent {
			of, known := t.index[s.Node]
			if known && of != by && gateway(by) && gateway(of) && t.places[by].location == t.places[of].location {
				words = append(words, word{by, of, s})
			}
		}
	}
	slices.SortFunc(words, func(a, b word) int {
		return cmp.Or(b.Since.Compare(a.Since), cmp.Compare(a.by, b.by), cmp.Compare(a.of, b.of))
	})
	silenced := map[int]bool{}
	for _, w := range words {
		if !silenced[w.by] {
			silenced[w.of] = true
		}
	}
	for i, p := range t.places {
		if _, chosen := t.gateways[p.location]; gateway(i) && !silenced[i] && !chosen {
			t.gateways[p.location] = i
			if callable(p.callsOnly, p.calledInside, false) {
				t.relays = append(t.relays, i)
			}
		}
	}
}

// Gateway is the active gateway of a location, "" if it has none.
func (t Topology) Gateway(location string) string {
	if i, ok := t.gateways[location]; ok {
		return t.places[i].name
	}
	return ""
}

// Path is the way from one machine to another, both included; nil if there is
// none, or if no segment is common to all machines on it.
func (t Topology) Path(from, to string) []string {
	a, known := t.index[from]
	b, there := t.index[to]
	if !known || !there {
		return nil
	}
	way := t.way(a, b)
	if !t.shareSegment(way.hops()) {
		return nil
	}
	var out []string
	for _, i := range way.hops() {
		out = append(out, t.places[i].name)
	}
	return out
}

// Next is the first hop of the Path, "" if there is none.
func (t Topology) Next(from, to string) string {
	a, known := t.index[from]
	b, there := t.index[to]
	if !known || !there {
		return ""
	}
	way := t.way(a, b)
	if way.n < 2 || !t.shareSegment(way.hops()) {
		return ""
	}
	return t.places[way.at[1]].name
}

// Peers are the machines that one talks to without any other in between, by name.
func (t Topology) Peers(name string) (out []string) {
	a, known := t.index[name]
	if !known {
		return nil
	}
	for b, p := range t.places {
		if way := t.way(a, b); way.n == 2 && t.shareSegment(way.hops()) {
			out = append(out, p.name)
		}
	}
	return out
}

// warm reports whether two machines keep a session although nothing may go by it
// now: a gateway that takes over does not have to shake hands first, where both
// ends would do so at the same moment, collide, and wait for REKEY_TIMEOUT, 5 s.
func (t Topology) warm(name, other string) bool {
	a, known := t.index[name]
	b, there := t.index[other]
	if !known || !there {
		return false
	}
	p, q := t.places[a], t.places[b]
	both := p.role == RoleGateway && q.role == RoleGateway
	either := p.role == RoleGateway || q.role == RoleGateway
	return (both || either && p.location == q.location) && !p.plain && !q.plain &&
		t.canCall(a, b) && t.shareSegment([]int{a, b})
}

// way is a path by index. The longest one is from a plain machine by its node,
// its gateway, a relay, and down again; one made of two such halves may count
// the machine where they meet twice.
type way struct {
	n  int
	at [8]int
}

func (w *way) hops() []int { return w.at[:w.n] }

// add leaves out a machine that the way has just come to.
func (w *way) add(i int) {
	if w.n == 0 || w.at[w.n-1] != i {
		w.at[w.n] = i
		w.n++
	}
}

// way is empty if there is none.
func (t *Topology) way(a, b int) (w way) {
	from, to := t.attached(a), t.attached(b)
	if from == nowhere || to == nowhere {
		return w
	}
	w.add(a)
	w.add(from)
	if a != b && !t.between(&w, from, to) {
		return way{}
	}
	w.add(to)
	w.add(b)
	return w
}

// attached is the node at which a machine takes part.
func (t *Topology) attached(i int) int {
	if t.places[i].plain {
		return t.places[i].carrier
	}
	return i
}

// between adds what is between two nodes.
func (t *Topology) between(w *way, a, b int) bool {
	if a == b || t.neighbours(a, b) {
		return true
	}
	up, down, ok := t.up(a), t.up(b), true
	if up == nowhere || down == nowhere || !t.canCall(a, up) || !t.canCall(down, b) {
		return false
	}
	w.add(up)
	if up != down && !t.canCall(up, down) {
		i := slices.IndexFunc(t.relays, func(r int) bool { return r != up && r != down })
		if ok = i >= 0; ok {
			w.add(t.relays[i])
		}
	}
	w.add(down)
	return ok
}

// neighbours are nodes of one location that need nobody between them.
func (t *Topology) neighbours(a, b int) bool {
	p, q := t.places[a], t.places[b]
	if p.location != q.location || !t.canCall(a, b) {
		return false
	}
	gateway, there := t.gateways[p.location]
	content := func(node place, other int) bool { return node.role != RoleSpoke || there && other == gateway }
	return content(p, b) && content(q, a)
}

// up is by whom a node talks to those who are not its neighbours.
func (t *Topology) up(i int) int {
	p := t.places[i]
	if g, there := t.gateways[p.location]; there {
		return g
	}
	if p.role == RoleSpoke {
		return nowhere
	}
	return i
}

// canCall reports whether one of the two can call the other.
func (t *Topology) canCall(a, b int) bool {
	p, q := t.places[a], t.places[b]
	inside := p.location == q.location
	return a == b || callable(p.callsOnly, p.calledInside, inside) || callable(q.callsOnly, q.calledInside, inside)
}

// callable reports whether a machine can be called from inside its location, or
// from elsewhere; see Node.
func callable(callsOnly, calledInside, inside bool) bool {
	return !callsOnly && (inside || !calledInside)
}

func (t *Topology) shareSegment(hops []int) bool {
	if len(hops) == 0 {
		return false
	}
	return slices.ContainsFunc(t.places[hops[0]].segments, func(s string) bool {
		return !slices.ContainsFunc(hops[1:], func(i int) bool { return !slices.Contains(t.places[i].segments, s) })
	})
}

// WhyNot says why two machines that share a segment cannot talk; "" if they can,
// or share none.
func (t Topology) WhyNot(from, to string) string {
	a, known := t.index[from]
	b, there := t.index[to]
	if !known || !there || !t.shareSegment([]int{a, b}) || t.attached(a) == nowhere || t.attached(b) == nowhere {
		return ""
	}
	w := t.way(a, b)
	if w.n == 0 {
		for _, i := range []int{t.attached(a), t.attached(b)} {
			if t.up(i) == nowhere {
				return t.places[i].name + " is a spoke, and its location has no gateway"
			}
		}
		return "neither end can be called, and no gateway that can be stands between them"
	}
	for _, i := range w.hops() {
		if !t.shareSegment([]int{a, i, b}) {
			return t.places[i].name + " is on the way, and not in their segment"
		}
	}
	if !t.shareSegment(w.hops()) {
		return "no segment is common to all machines on the way"
	}
	return ""
}
