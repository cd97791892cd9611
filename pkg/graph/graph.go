// Package graph draws a mesh: as DOT for Graphviz, as Mermaid, and as SVG.
//
// It is pure. New turns the nodes into a Graph, which also is the JSON form, and
// the writers turn that into text. Everything is sorted: equal nodes give
// byte-equal pictures.
package graph

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Graph is what there is to draw.
type Graph struct {
	Self      string     `json:"self,omitempty"` // the machine that draws; may be among none
	Locations []Location `json:"locations"`      // by name
	Tunnels   int        `json:"tunnels"`        // by which traffic goes
	// Edges are the tunnels by which traffic goes, but for those inside of Meshes.
	Edges []Edge `json:"edges"`
	// Meshes are machines that are too many for single lines, each of which has a
	// tunnel to each other.
	Meshes []Mesh `json:"meshes,omitempty"`
	// Apart are the machines that share a segment and cannot talk all the same, but
	// for those that can talk to nobody.
	Apart []Apart `json:"apart,omitempty"`
}

// Location is where machines stand. The name of one of them is empty.
type Location struct {
	Name     string    `json:"name"`
	Machines []Machine `json:"machines"` // gateways, nodes, spokes, plain peers; each by name
}

// The kinds of machines.
const (
	KindGateway = "gateway"
	KindNode    = "node"
	KindSpoke   = "spoke"
	KindPeer    = "peer" // it runs nothing but WireGuard
)

// Machine is one of them.
type Machine struct {
	Name string `json:"name"`
	Kind string `json:"kind"`
	// Active says of a gateway that it carries its location's traffic now.
	Active bool `json:"active,omitempty"`
	// Silent says of a gateway that another one does not hear it.
	Silent bool `json:"silent,omitempty"`
	// CallsOnly says that it is behind NAT.
	CallsOnly bool     `json:"callsOnly,omitempty"`
	Segments  []string `json:"segments,omitempty"`
	// Via is who carries a plain peer now, "" if nobody does.
	Via string `json:"via,omitempty"`
	// Alone says why it can talk to nobody, of those with whom it shares a segment.
	Alone string `json:"alone,omitempty"`
	// Tunnel is the one that the machine that draws has to it; nil if there is none,
	// or nothing is known of it.
	Tunnel *Tunnel `json:"tunnel,omitempty"`
}

// Edge joins two machines, the lesser name first.
type Edge struct {
	From string `json:"from"`
	To   string `json:"to"`
	// Tunnel is set for those of the machine that draws, if anything is known of them.
	Tunnel *Tunnel `json:"tunnel,omitempty"`
}

// Mesh is a set of machines, by name.
type Mesh struct {
	Machines []string `json:"machines"`
}

// Apart are two machines, the lesser name first.
type Apart struct {
	Edge
	Why string `json:"why"`
}

// few is up to how many machines that all talk to each other have a line each.
const few = 6

// New arranges the nodes of a mesh. Carrier says which node carries each plain
// peer, as mesh.Ownership does.
func New(nodes []mesh.Node, carrier map[string]string, self string) Graph {
	nodes = slices.SortedFunc(slices.Values(nodes), func(a, b mesh.Node) int { return cmp.Compare(a.Name, b.Name) })
	t := mesh.NewTopology(nodes, carrier)
	g := Graph{Self: self, Edges: []Edge{}, Locations: locations(nodes, t, carrier)}
	l := newLinks(nodes, t, carrier)
	g.Meshes = l.meshes(nodes)
	for i, a := range nodes {
		for j := i + 1; j < len(nodes); j++ {
			b := nodes[j]
			if l.direct(i, j) {
				g.Tunnels++
			}
			switch {
			case l.direct(i, j) && !l.covered[i][j]:
				g.Edges = append(g.Edges, Edge{From: a.Name, To: b.Name})
			case l.pair(i, j).apart:
				g.Apart = append(g.Apart, Apart{Edge{From: a.Name, To: b.Name}, t.WhyNot(a.Name, b.Name)})
			}
		}
	}
	g.findAlone()
	return g
}

// findAlone has one word for what else would be a fault with each other machine.
func (g *Graph) findAlone() {
	talks, alone := map[string]bool{}, map[string]string{}
	for _, e := range g.Edges {
		talks[e.From], talks[e.To] = true, true
	}
	for _, m := range g.Meshes {
		for _, name := range m.Machines {
			talks[name] = true
		}
	}
	g.Apart = slices.DeleteFunc(g.Apart, func(a Apart) bool {
		for _, name := range []string{a.From, a.To} {
			if !talks[name] && alone[name] == "" {
				alone[name] = a.Why
			}
		}
		return alone[a.From] != "" || alone[a.To] != ""
	})
	for _, l := range g.Locations {
		for i := range l.Machines {
			l.Machines[i].Alone = alone[l.Machines[i].Name]
		}
	}
}

func locations(nodes []mesh.Node, t mesh.Topology, carrier map[string]string) []Location {
	at, silent := map[string]string{}, map[string]bool{}
	for _, n := range nodes {
		at[n.Name] = n.Location
		for _, s := range n.Silent {
			silent[s.Node] = true
		}
	}
	by := map[string][]Machine{}
	for _, n := range nodes {
		m := Machine{Name: n.Name, Kind: KindNode, CallsOnly: n.CallsOnly || n.CalledInside, Segments: n.Segments, Silent: silent[n.Name] && n.Role == mesh.RoleGateway}
		where := n.Location
		switch {
		case n.Plain():
			m.Kind, m.Via, m.Silent = KindPeer, carrier[n.Name], false
			where = at[cmp.Or(m.Via, n.Via[0])]
		case n.Role == mesh.RoleGateway:
			m.Kind, m.Active = KindGateway, t.Gateway(n.Location) == n.Name
		case n.Role == mesh.RoleSpoke:
			m.Kind = KindSpoke
		}
		by[where] = append(by[where], m)
	}
	out := make([]Location, 0, len(by))
	for name, machines := range by {
		slices.SortStableFunc(machines, func(a, b Machine) int { return cmp.Compare(rank(a), rank(b)) })
		out = append(out, Location{name, machines})
	}
	slices.SortFunc(out, func(a, b Location) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func rank(m Machine) int {
	return slices.Index([]string{KindGateway, KindNode, KindSpoke, KindPeer}, m.Kind)
}

// links are the tunnels by which traffic goes, by the numbers of their ends. What
// is between two machines depends on their kinds only, of which there are few
// however many machines there are.
type links struct {
	kind    []int
	pairs   [][]pair // by kinds
	covered [][]bool
	first   func(i, j int) pair
}

// pair is what is between two machines.
type pair struct{ known, direct, apart bool }

func newLinks(nodes []mesh.Node, t mesh.Topology, carrier map[string]string) links {
	var l links
	numbers, carries := map[string]int{}, map[string]bool{}
	for _, by := range carrier {
		carries[by] = true
	}
	for _, n := range nodes {
		// Gateways, plain peers and who carries these are each of a kind of their own.
		kind := fmt.Sprintf("%q %q %v %q", n.Location, n.Role, n.CallsOnly || n.CalledInside, n.Segments)
		if n.Role == mesh.RoleGateway || n.Plain() || carries[n.Name] {
			kind = n.Name
		}
		if _, known := numbers[kind]; !known {
			numbers[kind] = len(numbers)
		}
		l.kind = append(l.kind, numbers[kind])
		l.covered = append(l.covered, make([]bool, len(nodes)))
	}
	for range numbers {
		l.pairs = append(l.pairs, make([]pair, len(numbers)))
	}
	l.first = func(i, j int) pair {
		a, b := nodes[i].Name, nodes[j].Name
		return pair{known: true, direct: t.Next(a, b) == b, apart: t.WhyNot(a, b) != ""}
	}
	return l
}

func (l links) pair(i, j int) pair {
	p := &l.pairs[l.kind[i]][l.kind[j]]
	if !p.known {
		*p = l.first(i, j)
	}
	return *p
}

func (l links) direct(i, j int) bool { return i != j && l.pair(i, j).direct }

// meshes finds sets in which all are joined, first those across locations.
func (l links) meshes(nodes []mesh.Node) (out []Mesh) {
	var order []int
	for i, n := range nodes {
		if !n.Plain() {
			order = append(order, i)
		}
	}
	across := slices.DeleteFunc(slices.Clone(order), func(i int) bool {
		return !slices.ContainsFunc(order, func(j int) bool { return l.direct(i, j) && nodes[i].Location != nodes[j].Location })
	})
	slices.SortStableFunc(order, func(i, j int) int { return cmp.Compare(nodes[i].Location, nodes[j].Location) })
	for _, from := range [][]int{across, order} {
		for found := l.clique(from); found != nil; found = l.clique(from) {
			m := Mesh{}
			for _, i := range found {
				m.Machines = append(m.Machines, nodes[i].Name)
				for _, j := range found {
					l.covered[i][j] = i != j
				}
			}
			out = append(out, m)
		}
	}
	return out
}

// clique is the first set that saves enough lines, of those that begin with each
// machine in turn and take what is joined to all so far; sorted.
func (l links) clique(from []int) []int {
	for at, first := range from {
		if l.uncovered(first, from) <= few/2 { // it saves nothing here
			continue
		}
		set, uncovered := []int{first}, 0
		for _, i := range from[at+1:] {
			if slices.ContainsFunc(set, func(j int) bool { return !l.direct(i, j) }) {
				continue
			}
			for _, j := range set {
				if !l.covered[i][j] {
					uncovered++
				}
			}
			set = append(set, i)
		}
		if len(set) > few && uncovered > len(set) {
			slices.Sort(set)
			return set
		}
	}
	return nil
}

// uncovered counts the tunnels of a machine that are in no mesh.
func (l links) uncovered(i int, to []int) (n int) {
	for _, j := range to {
		if l.direct(i, j) && !l.covered[i][j] {
			n++
		}
	}
	return n
}
