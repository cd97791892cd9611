package mesh_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// machine reads "name@location role" with any of the words gateway, spoke, nat,
// seg=a,b and via=x,y behind it.
func machine(text string) (n mesh.Node) {
	words := strings.Fields(text)
	n.Name, n.Location, _ = strings.Cut(words[0], "@")
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "gateway", "spoke":
			n.Role = mesh.Role(key)
		case "nat":
			n.CallsOnly = true
		case "inside":
			n.CalledInside = true
		case "seg":
			n.Segments = strings.Split(value, ",")
		case "via":
			n.Via = strings.Split(value, ",")
		default:
			panic("machine " + text)
		}
	}
	return n
}

func machines(texts ...string) (out []mesh.Node) {
	for _, text := range texts {
		out = append(out, machine(text))
	}
	return out
}

func TestPaths(t *testing.T) {
	clouds := []string{"a1@a gateway", "a2@a gateway", "a3@a", "b1@b gateway", "b2@b spoke", "b3@b spoke", "lone@c"}
	for _, c := range []struct {
		name    string
		nodes   []string
		carrier map[string]string
		want    []string // paths; a lone pair with a bar cannot talk
	}{
		{"a full mesh", []string{"a", "b", "c"}, nil, []string{"a b", "a c", "b c"}},
		{"hub and spoke", []string{"hub gateway", "s1 spoke", "s2 spoke", "n"}, nil, []string{
			"hub s1", "hub s2", "hub n", "s1 hub s2", "s1 hub n", "n hub s2",
		}},
		{"locations", clouds, nil, []string{
			"a1 a2", "a1 a3", "a2 a3", "a1 b1", "a1 lone", "b1 lone",
			"a3 a1 b1", "a2 a1 b1 b2", "a3 a1 b1 b3", "a3 a1 lone", "b2 b1 b3", "b2 b1 lone", "b2 b1",
		}},
		{"locations without a gateway", []string{"a1@a", "a2@a", "b1@b", "s@b spoke"}, nil, []string{
			"a1 a2", "a1 b1", "a2 b1", "s|b1", "s|a1",
		}},
		{"both behind NAT", []string{"a1@a nat", "a2@a nat", "b1@b nat", "g@g gateway", "h@h gateway", "k@h nat"}, nil, []string{
			"a1 g a2", "a1 g b1", "a1 g", "a1 h", "a1 h k", "g h k",
		}},
		{"gateways behind NAT", []string{"a1@a gateway nat", "a2@a", "a3@a nat", "b1@b gateway nat", "b2@b", "r@r gateway"}, nil, []string{
			"a1 r b1", "a2 a1 r b1 b2", "a2 a3", "a1|a3", "a3|b2", "a1 a2", "r b1 b2",
		}},
		{"gateways that their own location can call", []string{"a1@a gateway inside", "a2@a gateway inside", "a3@a", "b1@b gateway inside", "h@h gateway"}, nil, []string{
			"a1 a2", "a2 a1 h", "a2 a1 h b1", "a3 a1 h b1", "a2 a3",
		}},
		{"nobody to relay", []string{"a@a nat", "b@b nat", "c@c"}, nil, []string{"a|b", "a c", "c b"}},
		{"segments", []string{"hub gateway seg=x,y", "s1 spoke seg=x", "s2 spoke seg=y", "s3 spoke seg=x,y", "s4 spoke"}, nil, []string{
			"s1 hub s3", "s2 hub s3", "s1|s2", "s4|hub", "s4|s1", "hub s1",
		}},
		{"a segment that the way between has not", []string{"a1@a gateway seg=x", "a2@a seg=x,y", "b1@b gateway seg=x,y", "b2@b seg=y"}, nil, []string{
			"a2|b2", "b1 b2", "a2 a1 b1", "a1|b2",
		}},
		{"plain peers", append([]string{"p via=b2,a3", "q via=a3", "r via=lone", "u via=a1", "v via=a1 seg=x"}, clouds...), map[string]string{"p": "b2", "q": "a3", "r": "lone", "v": "a1"}, []string{
			"a1 b1 b2 p", "p b2 b1 a1 a3 q", "r lone a1 a3 q", "q a3 a2", "u|a1", "u|p", "v|a1", "v|q",
		}},
		{"peers of one node", []string{"p via=a", "q via=a", "a", "b"}, map[string]string{"p": "a", "q": "a"}, []string{"p a q", "p a b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			top := mesh.NewTopology(machines(c.nodes...), c.carrier)
			for _, want := range c.want {
				ends, none := strings.Fields(want), false
				if a, b, found := strings.Cut(want, "|"); found {
					ends, none = []string{a, b}, true
				}
				from, to := ends[0], ends[len(ends)-1]
				got := top.Path(from, to)
				if none {
					ends = nil
				}
				if !slices.Equal(got, ends) {
					t.Errorf("path from %s to %s is %q, want %q", from, to, got, ends)
				}
			}
		})
	}
}

// silent makes a gateway that says, each "name minute", whom it does not hear.
func silent(text string, accused ...string) mesh.Node {
	n := machine(text)
	for _, a := range accused {
		var minute int
		var s mesh.Silence
		if _, err := fmt.Sscan(a, &s.Node, &minute); err != nil {
			panic(err)
		}
		s.Since = at(minute)
		n.Silent = append(n.Silent, s)
	}
	return n
}

func TestActiveGateway(t *testing.T) {
	for _, c := range []struct {
		name  string
		nodes []mesh.Node
		want  string // of location a
	}{
		{"none has the role", machines("a@a", "b@b gateway"), ""},
		{"the first by name", machines("c@a gateway", "b@a gateway", "a@a"), "b"},
		{"silenced", []mesh.Node{silent("a@a gateway"), silent("b@a gateway", "a 1")}, "b"},
		{"both are cut off from each other, b noticed it last", []mesh.Node{silent("a@a gateway", "b 1"), silent("b@a gateway", "a 2")}, "b"},
		{"both are cut off from each other, a noticed it last", []mesh.Node{silent("a@a gateway", "b 2"), silent("b@a gateway", "a 1")}, "a"},
		{"one of three is cut off", []mesh.Node{silent("a@a gateway", "b 1", "c 1"), silent("b@a gateway", "a 2"), silent("c@a gateway", "a 2")}, "b"},
		{"a ring", []mesh.Node{silent("a@a gateway", "c 1"), silent("b@a gateway", "a 3"), silent("c@a gateway", "b 2")}, "c"},
		{"of another location", []mesh.Node{silent("a@a gateway"), silent("b@b gateway", "a 1")}, "a"},
		{"by one that is no gateway", []mesh.Node{silent("a@a gateway"), silent("b@a", "a 1"), silent("c@a gateway")}, "a"},
		{"itself", []mesh.Node{silent("a@a gateway", "a 1"), silent("b@a gateway")}, "a"},
		{"alone, and accuses itself", []mesh.Node{silent("a@a gateway", "a 1")}, "a"},
		{"one that has left", []mesh.Node{silent("b@a gateway", "a 1")}, "b"},
	} {
		if got := mesh.NewTopology(c.nodes, nil).Gateway("a"); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// topologyWorld has machines that all claim addresses of their own, so that a
// plan can be made for each.
type topologyWorld struct {
	nodes   []mesh.Node
	carrier map[string]string
}

// newTopologyWorld is of 3 to 12 machines, of which some are plain peers. Each
// world has its own taste for locations, roles, NAT and segments.
func newTopologyWorld(rng *rand.Rand) topologyWorld {
	w := topologyWorld{carrier: map[string]string{}}
	locations, segments := 1+rng.IntN(4), rng.IntN(3)
	gateways, spokes, nat, plain := rng.IntN(60), rng.IntN(40), rng.IntN(110), rng.IntN(30)
	percent := func(p int) bool { return rng.IntN(100) < p }
	total := 3 + rng.IntN(10)
	numbers := rng.Perm(total) // so that what comes first by name is no matter of how it was made
	for i := range total {
		n := mesh.Node{
			Name: fmt.Sprintf("m%02d", numbers[i]), PublicKey: key(i + 1), Since: at(i),
			Endpoint: endpoint(fmt.Sprintf("192.0.2.%d:51820", i+1)),
		}
		for s := range segments {
			if percent(50) {
				n.Segments = append(n.Segments, fmt.Sprintf("s%d", s))
			}
		}
		if i > 1 && percent(plain) {
			w.addPlain(rng, n, i)
			continue
		}
		n.Location = []string{"", "east", "north", "west"}[rng.IntN(locations)]
		n.Prefixes = claims(i, fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("fd00:244:%x::/64", i), fmt.Sprintf("172.20.%d.0/24", i))
		if percent(20) {
			n.Pods = claims(i, fmt.Sprintf("10.244.200.%d/32", i))
		}
		switch {
		case percent(gateways):
			n.Role = mesh.RoleGateway
		case percent(spokes):
			n.Role = mesh.RoleSpoke
		}
		if percent(nat) {
			n.CallsOnly, n.Endpoint = true, noEndpoint
		} else if percent(nat) {
			n.CalledInside = true
		}
		w.nodes = append(w.nodes, n)
	}
	w.accuse(rng)
	return w
}

var noEndpoint = mesh.Node{}.Endpoint

// addPlain makes a peer of n, and lets one of its entry nodes carry it.
func (w *topologyWorld) addPlain(rng *rand.Rand, n mesh.Node, i int) {
	n.Prefixes = claims(i, fmt.Sprintf("10.99.0.%d/32", i+1))
	n.CallsOnly, n.Endpoint = true, noEndpoint
	var entries []int
	for at, m := range w.nodes {
		if !m.Plain() {
			entries = append(entries, at)
		}
	}
	entries = shuffled(rng, entries)[:1+rng.IntN(min(2, len(entries)))]
	for _, e := range entries {
		n.Via = append(n.Via, w.nodes[e].Name)
	}
	by := &w.nodes[entries[rng.IntN(len(entries))]]
	by.Pods = append(slices.Clone(by.Pods), n.Prefixes...)
	w.carrier[n.Name] = by.Name
	w.nodes = append(w.nodes, n)
}

// accuse lets gateways not hear each other, each at another time.
func (w *topologyWorld) accuse(rng *rand.Rand) {
	minutes := rng.Perm(200)
	for i := range w.nodes {
		a := &w.nodes[i]
		for _, b := range w.nodes {
			if a.Role == mesh.RoleGateway && b.Role == mesh.RoleGateway && a.Location == b.Location && a.Name != b.Name && rng.IntN(4) == 0 {
				a.Silent = append(a.Silent, mesh.Silence{Node: b.Name, Since: at(minutes[0])})
				minutes = minutes[1:]
			}
		}
	}
}

func (w topologyWorld) named(name string) mesh.Node {
	i := slices.IndexFunc(w.nodes, func(n mesh.Node) bool { return n.Name == name })
	return w.nodes[i]
}

func (w topologyWorld) String() string {
	var b strings.Builder
	for _, n := range w.nodes {
		fmt.Fprintf(&b, "%s@%s %q nat %v inside %v segments %q via %q carrier %q silent %v\n", n.Name, n.Location, n.Role, n.CallsOnly, n.CalledInside, n.Segments, n.Via, w.carrier[n.Name], n.Silent)
	}
	return b.String()
}

// oracle finds paths by trying: of all shapes that a path may have, the first whose
// neighbours can all be joined.
type oracle struct{ topologyWorld }

// gateway silences in rounds until nothing changes any more: an accusation counts
// unless a later one that counts is of its author.
func (o oracle) gateway(location string) string {
	type accusation struct {
		by, of string
		since  time.Time
	}
	var all []accusation
	var names []string
	for _, n := range o.nodes {
		if n.Role == mesh.RoleGateway && n.Location == location {
			names = append(names, n.Name)
			for _, s := range n.Silent {
				all = append(all, accusation{n.Name, s.Node, s.Since})
			}
		}
	}
	counts := func(accusation) bool { return true }
	for range len(all) + 1 {
		before, next := counts, map[accusation]bool{}
		for _, a := range all {
			next[a] = !slices.ContainsFunc(all, func(b accusation) bool { return b.of == a.by && b.since.After(a.since) && before(b) })
		}
		counts = func(a accusation) bool { return next[a] }
	}
	slices.Sort(names)
	for _, name := range names {
		if !slices.ContainsFunc(all, func(a accusation) bool { return a.of == name && counts(a) }) {
			return name
		}
	}
	return ""
}

func (o oracle) up(n mesh.Node) mesh.Node {
	if g := o.gateway(n.Location); g != "" {
		return o.named(g)
	}
	return n
}

func (o oracle) canCall(from, to mesh.Node) bool {
	return !to.CallsOnly && (from.Location == to.Location || !to.CalledInside)
}

// joined reports whether two machines that are no plain peers are neighbours.
func (o oracle) joined(a, b mesh.Node) bool {
	top := func(n mesh.Node) bool {
		return o.gateway(n.Location) == n.Name || o.gateway(n.Location) == "" && n.Role != mesh.RoleSpoke
	}
	spoke := func(s, other mesh.Node) bool {
		return s.Role == mesh.RoleSpoke && o.gateway(s.Location) != other.Name
	}
	switch {
	case a.Name == b.Name || !o.canCall(a, b) && !o.canCall(b, a):
		return false
	case a.Location == b.Location:
		return !spoke(a, b) && !spoke(b, a)
	}
	return top(a) && top(b)
}

func (o oracle) path(from, to string) []string {
	a, b := o.named(from), o.named(to)
	if a.Plain() || b.Plain() {
		return o.plainPath(a, b)
	}
	if a.Name == b.Name {
		return []string{a.Name}
	}
	shapes := [][]mesh.Node{{a, o.up(a), o.up(b), b}}
	if a.Location == b.Location {
		shapes = slices.Insert(shapes, 0, []mesh.Node{a, b})
	}
	relays := slices.SortedFunc(slices.Values(o.nodes), func(a, b mesh.Node) int { return strings.Compare(a.Name, b.Name) })
	for _, r := range relays {
		if r.Role == mesh.RoleGateway && o.gateway(r.Location) == r.Name && !r.CallsOnly && !r.CalledInside && r.Name != o.up(a).Name && r.Name != o.up(b).Name {
			shapes = append(shapes, []mesh.Node{a, o.up(a), r, o.up(b), b})
			break // the first alone is taken
		}
	}
	for _, shape := range shapes {
		shape = slices.CompactFunc(shape, func(a, b mesh.Node) bool { return a.Name == b.Name })
		whole := true
		for i := range shape[1:] {
			whole = whole && o.joined(shape[i], shape[i+1])
		}
		if whole {
			return names(shape)
		}
	}
	return nil
}

// carriedBy is the node that a plain machine hangs at: it has no segment that the
// machine has not.
func (o oracle) carriedBy(n mesh.Node) string {
	by := o.carrier[n.Name]
	if by == "" {
		return ""
	}
	inSegments := func(n mesh.Node) []string {
		if len(n.Segments) == 0 {
			return []string{""}
		}
		return n.Segments
	}
	for _, s := range inSegments(o.named(by)) {
		if !slices.Contains(inSegments(n), s) {
			return ""
		}
	}
	return by
}

func (o oracle) plainPath(a, b mesh.Node) []string {
	carrier := func(n mesh.Node) string {
		if n.Plain() {
			return o.carriedBy(n)
		}
		return n.Name
	}
	if carrier(a) == "" || carrier(b) == "" {
		return nil
	}
	path := o.path(carrier(a), carrier(b))
	if path == nil {
		return nil
	}
	if a.Plain() {
		path = slices.Insert(path, 0, a.Name)
	}
	if b.Plain() {
		path = append(path, b.Name)
	}
	return path
}

// talk is path, where one segment is common to all on it.
func (o oracle) talk(from, to string) []string {
	if path := o.path(from, to); path != nil && o.common(path) {
		return path
	}
	return nil
}

// common reports whether machines share a segment.
func (o oracle) common(machines []string) bool {
	for _, s := range []string{"", "s0", "s1"} {
		has := func(name string) bool {
			own := o.named(name).Segments
			return s == "" && len(own) == 0 || slices.Contains(own, s)
		}
		if !slices.ContainsFunc(machines, func(n string) bool { return !has(n) }) {
			return true
		}
	}
	return false
}

func names(nodes []mesh.Node) (out []string) {
	for _, n := range nodes {
		out = append(out, n.Name)
	}
	return out
}

// forWorlds runs a test on random worlds, and shows the world of one that fails.
func forWorlds(t *testing.T, test func(*testing.T, *rand.Rand, topologyWorld)) {
	s := seed(t)
	const worlds = 200
	for i := range uint64(worlds) {
		rng := rand.New(rand.NewPCG(s, i))
		w := newTopologyWorld(rng)
		if test(t, rng, w); t.Failed() {
			t.Fatalf("world %d:\n%s", i, w)
		}
	}
}

func TestTopologyLaws(t *testing.T) {
	talking, relayed := 0, 0
	forWorlds(t, func(t *testing.T, rng *rand.Rand, w topologyWorld) {
		top := mesh.NewTopology(shuffled(rng, w.nodes), w.carrier)
		o := oracle{w}
		for _, a := range w.nodes {
			if got, want := top.Gateway(a.Location), o.gateway(a.Location); !a.Plain() && got != want {
				t.Errorf("gateway of %q is %q, want %q", a.Location, got, want)
			}
			for _, b := range w.nodes {
				if a.Name == b.Name {
					continue
				}
				path := top.Path(a.Name, b.Name)
				if diff := cmp.Diff(o.talk(a.Name, b.Name), path); diff != "" {
					t.Errorf("path from %s to %s (-want +got):\n%s", a.Name, b.Name, diff)
				}
				checkPath(t, top, a.Name, b.Name, path)
				if path != nil {
					talking++
				}
				if len(path) > 4 {
					relayed++
				}
			}
		}
	})
	if talking < 2000 || relayed < 10 {
		t.Errorf("%d pairs talk, %d by a relay: the worlds prove little", talking, relayed)
	}
}

// checkPath holds one path against the laws that need no oracle.
func checkPath(t *testing.T, top mesh.Topology, from, to string, path []string) {
	t.Helper()
	next := ""
	if path != nil {
		next = path[1]
	}
	if got := top.Next(from, to); got != next {
		t.Errorf("next from %s to %s is %q, the path %q", from, to, got, path)
	}
	back := slices.Clone(top.Path(to, from))
	if slices.Reverse(back); !slices.Equal(back, path) {
		t.Errorf("from %s to %s %q, the way back reversed %q", from, to, path, back)
	}
	if path == nil {
		return
	}
	if path[0] != from || path[len(path)-1] != to {
		t.Errorf("path from %s to %s: %q", from, to, path)
	}
	for i, name := range path {
		if slices.Contains(path[i+1:], name) {
			t.Errorf("path from %s to %s has a loop: %q", from, to, path)
		}
		if i > 0 && !slices.Contains(top.Peers(path[i-1]), name) {
			t.Errorf("path %q: %s is no neighbour of %s: %q", path, name, path[i-1], top.Peers(path[i-1]))
		}
		if i < len(path)-1 && !slices.Equal(top.Path(name, to), path[i:]) {
			t.Errorf("from %s to %s %q, but from %s on %q", from, to, path, name, top.Path(name, to))
		}
	}
}

// Neighbours are so mutually, sorted, and one of the two can be called.
func TestNeighbours(t *testing.T) {
	forWorlds(t, func(t *testing.T, _ *rand.Rand, w topologyWorld) {
		top := mesh.NewTopology(w.nodes, w.carrier)
		for _, a := range w.nodes {
			peers := top.Peers(a.Name)
			if !slices.IsSorted(peers) || slices.Contains(peers, a.Name) {
				t.Errorf("neighbours of %s: %q", a.Name, peers)
			}
			for _, name := range peers {
				b := w.named(name)
				if !slices.Contains(top.Peers(name), a.Name) {
					t.Errorf("%s has the neighbour %s, which has %q", a.Name, name, top.Peers(name))
				}
				if o := (oracle{w}); !o.canCall(a, b) && !o.canCall(b, a) && !a.Plain() && !b.Plain() {
					t.Errorf("%s and %s are neighbours, and neither can be called", a.Name, name)
				}
			}
		}
	})
}

// A world does not depend on the order of its records, nor on records of machines
// that nobody has heard of.
func TestTopologyOfNothing(t *testing.T) {
	top := mesh.NewTopology(nil, map[string]string{"p": "gone"})
	if got := top.Path("a", "b"); got != nil {
		t.Errorf("path %q", got)
	}
	if got := top.Next("a", "b"); got != "" {
		t.Errorf("next %q", got)
	}
	if got := top.Peers("a"); len(got) != 0 {
		t.Errorf("peers %q", got)
	}
	if got := top.Gateway("x"); got != "" {
		t.Errorf("gateway %q", got)
	}
	top = mesh.NewTopology(machines("p via=gone", "a"), map[string]string{"p": "gone"})
	if got := top.Path("a", "p"); got != nil {
		t.Errorf("path %q to a peer whose entry nobody knows", got)
	}
}
