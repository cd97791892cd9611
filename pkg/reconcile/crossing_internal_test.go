package reconcile

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// planet is a mesh in which each second everybody looks, sends to everybody, and
// hears what others have published, some of it late.
type planet struct {
	now    time.Time
	nodes  []*planetNode
	random *rand.Rand
}

type planetNode struct {
	name          string
	current, next int // keys
	made          *int
	stage         mesh.Stage
	crossings     *crossings
	asleep        int // seconds that the helper does nothing
	fails         int // passes to come that change nothing
	closed        bool
	// as the kernel has it
	routes   map[string]mesh.Plane // of those with which there is a spare tunnel
	sessions map[string]map[mesh.Plane]*planetSession
	records  map[string]planetRecord // of others, as last heard
	late     map[string]bool
	waiting  []RotationWait
}

type planetRecord struct {
	current, spare int
	stage          mesh.Stage
}

// A planetSession is one end of one: it carries packets from the end with the same keys.
type planetSession struct {
	own, theirs int
	at          time.Time
	received    int64
}

func (n *planetNode) spare() int {
	if n.stage == mesh.Back {
		return n.current
	}
	return n.next
}

func (n *planetNode) record() planetRecord { return planetRecord{n.current, n.spare(), n.stage} }

// keys are those of both ends on a plane, as this node believes; false if it has no such tunnel.
func (n *planetNode) keys(other string, p mesh.Plane) (own, theirs int, ok bool) {
	r := n.records[other]
	if p == mesh.Primary {
		return n.current, r.current, true
	}
	_, ok = n.routes[other]
	return n.spare(), r.spare, ok && !n.closed
}

func newPlanet(seed uint64, nodes int) *planet {
	p := &planet{now: time.Unix(1_000_000, 0), random: rand.New(rand.NewPCG(seed, 7))}
	made := 2 * nodes
	for i := range nodes {
		p.nodes = append(p.nodes, &planetNode{
			name: fmt.Sprint(i), current: 2*i + 1, next: 2*i + 2, made: &made, crossings: newCrossings(mesh.Resting, nil, p.now),
			sessions: map[string]map[mesh.Plane]*planetSession{}, records: map[string]planetRecord{}, late: map[string]bool{},
		})
	}
	for _, n := range p.nodes {
		for _, o := range p.nodes {
			n.sessions[o.name] = map[mesh.Plane]*planetSession{}
			n.records[o.name] = o.record()
		}
	}
	return p
}

// second lets one pass. It returns what was lost.
func (p *planet) second() (lost []string) {
	p.now = p.now.Add(time.Second)
	for _, i := range p.random.Perm(len(p.nodes)) {
		n := p.nodes[i]
		if n.asleep > 0 {
			n.asleep--
			continue
		}
		for _, o := range p.nodes {
			if n.late[o.name] || p.random.IntN(3) > 0 {
				n.records[o.name], n.late[o.name] = o.record(), false
			} else { // the registry's word comes with the next look
				n.late[o.name] = true
			}
		}
		p.shake()
		n.look(p)
		lost = append(lost, p.traffic()...) // new keys come before new routes
		n.pass()
		lost = append(lost, p.traffic()...)
	}
	return lost
}

// shake lets handshakes happen wherever both ends have the other's right key.
func (p *planet) shake() {
	for i, a := range p.nodes {
		for _, b := range p.nodes[:i] {
			for _, plane := range []mesh.Plane{mesh.Primary, mesh.Spare} {
				aOwn, aTheirs, aOK := a.keys(b.name, plane)
				bOwn, bTheirs, bOK := b.keys(a.name, plane)
				if !aOK { // and b believes that its session goes on
					delete(a.sessions[b.name], plane)
				}
				if !bOK {
					delete(b.sessions[a.name], plane)
				}
				if aOK && bOK && aOwn == bTheirs && bOwn == aTheirs {
					a.shaken(b.name, plane, aOwn, aTheirs, p.now)
					b.shaken(a.name, plane, bOwn, bTheirs, p.now)
				}
			}
		}
	}
}

func (n *planetNode) shaken(other string, plane mesh.Plane, own, theirs int, now time.Time) {
	s := n.sessions[other][plane]
	if s == nil {
		s = &planetSession{}
		n.sessions[other][plane] = s
	}
	s.own, s.theirs, s.at = own, theirs, now
	s.received += 32 // a keepalive
}

// traffic has everybody send to everybody by the plane that its routes have.
func (p *planet) traffic() (lost []string) {
	for _, a := range p.nodes {
		for _, b := range p.nodes {
			if a == b {
				continue
			}
			plane := a.routes[b.name]
			out, in := a.sessions[b.name][plane], b.sessions[a.name][plane]
			own, theirs, ok := a.keys(b.name, plane)
			if !ok || out == nil || in == nil || out.own != own || out.theirs != theirs || in.theirs != own || in.own != theirs {
				lost = append(lost, fmt.Sprintf("%s -> %s by %s", a.name, b.name, plane))
				continue
			}
			in.received += 2 * waveBytes
		}
	}
	return lost
}

func (n *planetNode) look(p *planet) {
	var neighbours []neighbour
	for _, o := range p.nodes {
		if o == n {
			continue
		}
		heard := map[mesh.Plane]kernel.Handshake{}
		for plane, s := range n.sessions[o.name] {
			own, theirs, ok := n.keys(o.name, plane)
			if !ok || s.theirs != theirs {
				continue // a peer of another key has not been heard
			}
			h := kernel.Handshake{At: s.at, Received: s.received}
			if s.own != own {
				h.At = time.Time{} // rekeyed since
			}
			heard[plane] = h
		}
		neighbours = append(neighbours, neighbour{
			name: o.name, stage: n.records[o.name].stage, crosses: true, talks: true, heard: heard,
		})
	}
	n.crossings.enter(n.stage, p.now)
	n.waiting = n.crossings.look(neighbours, news{true, true}, p.now)
	if len(n.waiting) > 0 {
		return
	}
	switch n.stage {
	case mesh.Out:
		n.current, n.stage = n.next, mesh.Back
	case mesh.Back:
		*n.made++
		n.next, n.stage = *n.made, mesh.Resting
	}
	n.crossings.enter(n.stage, p.now)
}

// pass makes the kernel have what the last look has led to, unless it fails.
func (n *planetNode) pass() {
	if n.fails > 0 {
		n.fails--
		return
	}
	n.routes = n.crossings.planes()
	n.crossings.carriedOut()
}

// Whoever rotates and when, whatever is heard late, whichever helper sleeps for a
// while: no packet is sent by a tunnel that its receiver does not have, and all
// rotations come to an end.
func TestCrossingsLoseNothing(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		p := newPlanet(seed, 2+r.IntN(4))
		p.shake()
		rotations := 0
		for second := range 400 {
			for _, n := range p.nodes {
				if second < 250 && n.stage == mesh.Resting && r.IntN(40) == 0 {
					n.stage = mesh.Out
					rotations++
				}
				if second < 250 && n.asleep == 0 && r.IntN(60) == 0 {
					n.asleep = r.IntN(30)
				}
				if second < 250 && n.fails == 0 && r.IntN(30) == 0 {
					n.fails = r.IntN(5)
				}
			}
			if lost := p.second(); len(lost) > 0 {
				t.Fatalf("seed %d, second %d: lost %v", seed, second, lost)
			}
		}
		for _, n := range p.nodes {
			if n.stage != mesh.Resting || len(n.crossings.planes()) > 0 {
				t.Fatalf("seed %d: after %d rotations node %s is still at %q, with tunnels %v, and waits for %v", seed, rotations, n.name, n.stage, n.crossings.planes(), n.waiting)
			}
		}
		if rotations == 0 {
			t.Fatalf("seed %d: nothing was rotated", seed)
		}
	}
}

// What the other side does may be seen before this node's own routes have moved: the
// new key would be set first.
func TestARotationWaitsForItsOwnRoutes(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	c := newCrossings(mesh.Out, nil, now)
	x := newCrossing(mesh.Spare, mesh.Primary)
	x.sends, x.arrived = mesh.Spare, arrivals
	c.pairs["b"] = x
	b := neighbour{name: "b", crosses: true, talks: true}
	if why := c.waitsFor(b, now); why != "this node's routes to it have not moved yet" {
		t.Errorf("it waits: %q", why)
	}
	if moved, of := c.moved([]neighbour{b}); moved != 0 || of != 1 {
		t.Errorf("%d of %d moved", moved, of)
	}
	c.carriedOut()
	if why := c.waitsFor(b, now); why != "" {
		t.Errorf("it still waits: %q", why)
	}
}
