package graph_test

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/graph"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// machine reads "name@location role" with any of the words gateway, spoke, nat,
// seg=a,b, via=x,y and silent=x behind it.
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
		case "seg":
			n.Segments = strings.Split(value, ",")
		case "via":
			n.Via = strings.Split(value, ",")
		case "silent":
			n.Silent = []mesh.Silence{{Node: value}}
		default:
			panic("machine " + text)
		}
	}
	return n
}

// draw lets the first entry node carry each plain peer; "via=,x" has none carry it.
func draw(self string, texts ...string) graph.Graph {
	var nodes []mesh.Node
	carrier := map[string]string{}
	for _, text := range texts {
		n := machine(text)
		if n.Plain() && n.Via[0] != "" {
			carrier[n.Name] = n.Via[0]
		}
		nodes = append(nodes, n)
	}
	return graph.New(nodes, carrier, self)
}

// clouds has one of everything.
func clouds() graph.Graph {
	return draw("gcp-2",
		"aws-gw1@aws gateway silent=aws-gw2", "aws-gw2@aws gateway", "aws-1@aws", "gcp-gw@gcp gateway", "gcp-1@gcp nat", "gcp-2@gcp nat seg=blue",
		"hub@office gateway", "printer@office spoke", "laptop via=hub", "phone via=,gcp-gw", "lost@attic spoke", "lone")
}

// full are that many machines that all talk to each other.
func full(n int) (texts []string) {
	for i := range n {
		texts = append(texts, fmt.Sprintf("node-%02d", i))
	}
	return texts
}

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// tunnel is one whose last handshake was that long ago; never if that is negative.
func tunnel(age time.Duration, received, sent int64) graph.Tunnel {
	at := now.Add(-age)
	if age < 0 {
		at = time.Time{}
	}
	return graph.NewTunnel(at, received, sent, now)
}

// liveClouds has a tunnel in each state; the one to gcp-gw is missing.
func liveClouds() graph.Graph {
	g := clouds()
	g.Self = "aws-gw1"
	return g.WithTunnels(map[string]graph.Tunnel{
		"aws-gw2": tunnel(31*time.Second, 1<<20, 3<<30), "aws-1": tunnel(2*time.Minute, 512, 92), "hub": tunnel(3*time.Hour, 77<<20, 8<<20),
		"lone": tunnel(-1, 0, 148),
	})
}

// liveNine are the tunnels of a node that are all part of one mesh.
func liveNine(n int) graph.Graph {
	tunnels := map[string]graph.Tunnel{}
	for i := range n {
		tunnels[fmt.Sprintf("node-%02d", i)] = tunnel(time.Duration(i)*40*time.Second, 1<<(4*i), 1<<(3*i))
	}
	delete(tunnels, "node-03")
	tunnels["node-07"], tunnels["node-06"] = tunnel(-1, 0, 444), tunnel(-1, 0, 0)
	return draw("node-03", append(full(n), "spoke spoke")...).WithTunnels(tunnels)
}

func TestGolden(t *testing.T) {
	for name, g := range map[string]graph.Graph{
		"clouds": clouds(), "nine": draw("node-03", append(full(9), "spoke spoke")...),
		"clouds-live": liveClouds(), "nine-live": liveNine(9),
	} {
		text, err := json.MarshalIndent(g, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		for ext, got := range map[string]string{"dot": g.DOT(), "mmd": g.Mermaid(), "json": string(text) + "\n"} {
			file := filepath.Join("testdata", name+"."+ext)
			if os.Getenv("WGCNI_UPDATE") != "" {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s; if it is right, run the test with WGCNI_UPDATE=1 (-want +got):\n%s", file, diff)
			}
		}
	}
}

// Names come from a registry that others write to.
func TestNamesAreQuoted(t *testing.T) {
	const name = `a"]<b>&\#;--`
	g := graph.New([]mesh.Node{{Name: name, Location: name, Segments: []string{name}}, {Name: "b", Location: "x"}}, nil, name)
	if want := `"a\"]<b>&\\#;--"`; !strings.Contains(g.DOT(), want) {
		t.Errorf("no %s in\n%s", want, g.DOT())
	}
	if want := `["a#quot;]#lt;b#gt;&\#35;;--"]`; !strings.Contains(g.Mermaid(), want) {
		t.Errorf("no %s in\n%s", want, g.Mermaid())
	}
	if want := "a&#34;]&lt;b&gt;&amp;"; !strings.Contains(g.SVG(), want) {
		t.Errorf("no %s in\n%s", want, g.SVG())
	}
	parse(t, g.SVG())
}

func TestNothing(t *testing.T) {
	g := graph.New(nil, nil, "")
	parse(t, g.SVG())
	text, err := json.Marshal(g)
	if diff := cmp.Diff(`{"locations":[],"tunnels":0,"edges":[]}`, string(text)); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if want := "flowchart LR\n"; !strings.HasPrefix(g.Mermaid(), want) || !strings.HasPrefix(g.DOT(), "graph mesh {") {
		t.Error(g.Mermaid(), g.DOT())
	}
}

// box is a rectangle, with its class.
type box struct {
	class      string
	x, y, w, h float64
}

// parse reads a picture strictly and returns its rectangles, and what it says.
func parse(t *testing.T, svg string) (boxes []box, texts []string) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(svg))
	inText := false
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return boxes, texts
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
		switch e := token.(type) {
		case xml.StartElement:
			inText = e.Name.Local == "text"
			if e.Name.Local == "rect" {
				boxes = append(boxes, readBox(t, e))
			}
		case xml.CharData:
			if inText {
				texts = append(texts, string(e))
			}
		case xml.EndElement:
			inText = false
		}
	}
}

func readBox(t *testing.T, e xml.StartElement) (b box) {
	t.Helper()
	for _, a := range e.Attr {
		var to *float64
		switch a.Name.Local {
		case "class":
			b.class = a.Value
			continue
		case "x":
			to = &b.x
		case "y":
			to = &b.y
		case "width":
			to = &b.w
		case "height":
			to = &b.h
		default:
			continue
		}
		f, err := strconv.ParseFloat(a.Value, 64)
		if err != nil {
			t.Fatal(err)
		}
		*to = f
	}
	return b
}

func (b box) overlaps(o box) bool {
	return b.x < o.x+o.w && o.x < b.x+b.w && b.y < o.y+o.h && o.y < b.y+b.h
}

func (b box) inside(o box) bool {
	const rounding = 0.2
	return b.x >= o.x-rounding && b.y >= o.y-rounding && b.x+b.w <= o.x+o.w+rounding && b.y+b.h <= o.y+o.h+rounding
}

// Machines of all kinds, in numbers from 1 to 60: nothing overlaps, each machine is
// in a card, and each is named.
func TestPicturesAreTidy(t *testing.T) {
	const seed = 20261
	t.Logf("seed %d", seed)
	for i := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, i))
		texts := someMachines(rng, 1+int(i)*60/100)
		plain := draw("m-0", texts...)
		g := plain
		if rng.IntN(2) == 0 {
			g = g.WithTunnels(someTunnels(rng, texts))
		}
		boxes, said := parse(t, g.SVG())
		var cards, chips []box
		for _, b := range boxes {
			switch {
			case b.class == "card":
				cards = append(cards, b)
			case strings.HasPrefix(b.class, "chip") && len(chips) < len(texts): // those behind are the legend's
				chips = append(chips, b)
			}
		}
		for name, set := range map[string][]box{"cards": cards, "machines": chips} {
			for n, a := range set {
				for _, b := range set[n+1:] {
					if a.overlaps(b) {
						t.Errorf("%s overlap: %+v and %+v", name, a, b)
					}
				}
			}
		}
		for _, chip := range chips {
			homes := 0
			for _, c := range cards {
				if chip.inside(c) {
					homes++
				}
			}
			if homes != 1 {
				t.Errorf("machine %+v is in %d cards", chip, homes)
			}
		}
		for _, text := range texts {
			name := machine(text).Name
			if len(name) < 30 && !strings.Contains(strings.Join(said, "\n")+"\n", name+"\n") {
				t.Errorf("%s is not named", name)
			}
		}
		if again := draw("m-0", shuffled(rng, texts)...); again.SVG() != plain.SVG() || again.DOT() != plain.DOT() || again.Mermaid() != plain.Mermaid() {
			t.Error("the same machines in another order give another picture")
		}
		if t.Failed() {
			t.Fatalf("world %d: %q", i, texts)
		}
	}
}

func someMachines(rng *rand.Rand, n int) (texts []string) {
	locations := 1 + rng.IntN(6)
	gateways, spokes, nat := rng.IntN(40), rng.IntN(50), rng.IntN(50)
	for i := range n {
		text := fmt.Sprintf("m-%d", i)
		if rng.IntN(10) == 0 {
			text += strings.Repeat("-long", rng.IntN(8))
		}
		if i > 0 && rng.IntN(8) == 0 {
			texts = append(texts, fmt.Sprintf("%s via=m-0", text))
			continue
		}
		if l := rng.IntN(locations); l > 0 && i > 0 {
			text += fmt.Sprintf("@location-%d", l)
		}
		switch p := rng.IntN(100); {
		case p < gateways:
			text += " gateway"
		case p < gateways+spokes:
			text += " spoke"
		}
		if rng.IntN(100) < nat {
			text += " nat"
		}
		if rng.IntN(5) == 0 {
			text += " seg=red,blue"
		}
		texts = append(texts, text)
	}
	return texts
}

func someTunnels(rng *rand.Rand, texts []string) map[string]graph.Tunnel {
	out := map[string]graph.Tunnel{}
	for _, text := range texts {
		if rng.IntN(3) > 0 {
			out[machine(text).Name] = tunnel(time.Duration(rng.IntN(400)-50)*time.Second, rng.Int64N(1<<40), rng.Int64N(1<<20))
		}
	}
	delete(out, "m-0")
	return out
}

// The tunnels stand at both their edge and their machine, and nowhere else.
func TestTunnels(t *testing.T) {
	plain, g := clouds(), liveClouds()
	if slices.ContainsFunc(plain.Edges, func(e graph.Edge) bool { return e.Tunnel != nil }) {
		t.Error("WithTunnels changes the graph that it is made from")
	}
	states := map[string]string{}
	for _, l := range g.Locations {
		for _, m := range l.Machines {
			if m.Tunnel != nil {
				states[m.Name] = m.Tunnel.State
			}
		}
	}
	want := map[string]string{
		"aws-gw2": graph.TunnelFresh, "aws-1": graph.TunnelFresh, "hub": graph.TunnelIdle, "lone": graph.TunnelNever, "gcp-gw": graph.TunnelMissing,
	}
	if diff := cmp.Diff(want, states); diff != "" {
		t.Error(diff)
	}
	for _, e := range g.Edges {
		far := map[string]string{e.From: e.To, e.To: e.From}["aws-gw1"]
		if (far != "") != (e.Tunnel != nil) || e.Tunnel != nil && e.Tunnel.State != states[far] {
			t.Errorf("%s - %s: %+v", e.From, e.To, e.Tunnel)
		}
	}
	svg := g.SVG()
	for _, w := range []string{`class="own fresh"`, `class="own idle"`, `class="own never"`, `class="own missing"`, "↓ 1.0 MiB ↑ 3.0 GiB", "2 of its 5 tunnels connected", "no such peer"} {
		if !strings.Contains(svg, w) {
			t.Errorf("no %s in the picture", w)
		}
	}
	parse(t, svg)
}

// What is part of a page leaves the rest of the page alone.
func TestStyleIsTheOwn(t *testing.T) {
	svg := clouds().SVG()
	from, to := strings.Index(svg, "<style>"), strings.Index(svg, "</style>")
	for line := range strings.Lines(svg[from+len("<style>") : to]) {
		line = strings.TrimSpace(line)
		selectors, _, rule := strings.Cut(line, "{")
		if !rule || strings.HasPrefix(line, "@media") {
			continue
		}
		for selector := range strings.SplitSeq(selectors, ",") {
			if !strings.HasPrefix(strings.TrimSpace(selector), ".mesh ") {
				t.Errorf("%s holds for the whole page", line)
			}
		}
	}
	if strings.Contains(svg, "style=") {
		t.Error("an attribute with a style, which a content security policy would refuse")
	}
}

func shuffled(rng *rand.Rand, in []string) []string {
	out := append([]string(nil), in...)
	rng.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// All tunnels are there, whether they have a line or are in a mesh.
func TestEveryTunnelIsDrawn(t *testing.T) {
	for i := range uint64(100) {
		rng := rand.New(rand.NewPCG(7, i))
		texts := someMachines(rng, 3+rng.IntN(30))
		g := draw("m-0", texts...)
		drawn := map[graph.Edge]bool{}
		for _, e := range g.Edges {
			if drawn[e] {
				t.Errorf("%v is drawn twice", e)
			}
			drawn[e] = true
		}
		for _, m := range g.Meshes {
			for n, a := range m.Machines {
				for _, b := range m.Machines[n+1:] {
					drawn[graph.Edge{From: a, To: b}] = true
				}
			}
		}
		var nodes []mesh.Node
		carrier := map[string]string{}
		for _, text := range texts {
			n := machine(text)
			if n.Plain() {
				carrier[n.Name] = n.Via[0]
			}
			nodes = append(nodes, n)
		}
		top := mesh.NewTopology(nodes, carrier)
		want := map[graph.Edge]bool{}
		for _, n := range nodes {
			for _, p := range top.Peers(n.Name) {
				want[graph.Edge{From: min(n.Name, p), To: max(n.Name, p)}] = true
			}
		}
		if diff := cmp.Diff(want, drawn); diff != "" || g.Tunnels != len(want) {
			t.Fatalf("world %d, %d tunnels (-want +got):\n%s", i, g.Tunnels, diff)
		}
		apart, alone := map[graph.Edge]string{}, map[string]bool{}
		for _, a := range g.Apart {
			apart[a.Edge] = a.Why
		}
		for _, l := range g.Locations {
			for _, m := range l.Machines {
				alone[m.Name] = m.Alone != ""
			}
		}
		for _, a := range nodes {
			for _, b := range nodes {
				e := graph.Edge{From: min(a.Name, b.Name), To: max(a.Name, b.Name)}
				if why := top.WhyNot(e.From, e.To); apart[e] != why && !alone[a.Name] && !alone[b.Name] {
					t.Fatalf("world %d: %v cannot talk since %q, want %q", i, e, apart[e], why)
				}
			}
		}
	}
}
