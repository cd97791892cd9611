package graph

import (
	"encoding/xml"
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode/utf8"
)

// style is that of a light background, and of a dark one where the reader has that.
// Its selectors hold for the picture only, which may be part of a page.
const style = `
  .mesh text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1c2733 }
  .mesh .background { fill: #ffffff }
  .mesh .title { font-size: 15px; font-weight: 600 }
  .mesh .location { font-size: 14px; font-weight: 600 }
  .mesh .name { font-size: 13px }
  .mesh .small { font-size: 10px; fill: #5d6b7a }
  .mesh .plain { font-size: 12px; fill: #5d6b7a }
  .mesh .fault { font-size: 12px; fill: #c62f3b }
  .mesh .card { fill: #f5f7fa; stroke: #d5dce4 }
  .mesh .panel { fill: #ffffff; stroke: #e3e8ee }
  .mesh .chip { stroke-width: 1.4 }
  .mesh .node { fill: #ffffff; stroke: #9aa8b6 }
  .mesh .gateway { fill: #dbe9ff; stroke: #3b6fb5 }
  .mesh .spoke { fill: #fff6df; stroke: #c79a3a }
  .mesh .peer { fill: #f3edfc; stroke: #8b6cc1 }
  .mesh .self { stroke: #0a8a56; stroke-width: 3.2 }
  .mesh .silent { stroke: #c62f3b; stroke-dasharray: 5 3 }
  .mesh .mark { stroke-width: 1.6 }
  .mesh .standby { fill: none }
  .mesh .active { fill: #3b6fb5 }
  .mesh .line { stroke: #9aa8b6; stroke-width: 1.5; fill: none }
  .mesh .core { stroke: #3b6fb5; stroke-width: 2.4; fill: none }
  .mesh .apart { stroke: #c62f3b; stroke-width: 1.6; stroke-dasharray: 6 5; fill: none }
  .mesh .hub { fill: #5d6b7a }
  .mesh .own { fill: none; stroke-linecap: round }
  .mesh .fresh { stroke: #0a8a56 }
  .mesh .idle { stroke: #b7791f; stroke-dasharray: 11 7 }
  .mesh .unused { stroke: #5d6b7a; stroke-dasharray: 4 5 }
  .mesh .never, .mesh .missing { stroke: #c62f3b; stroke-dasharray: 1 8 }
  .mesh .state { stroke-width: 2.2; stroke-dasharray: none; fill: #ffffff }
  .mesh .state.fresh { fill: #0a8a56 }
  @media (prefers-color-scheme: dark) {
    .mesh text { fill: #e3eaf1 }
    .mesh .background { fill: #0f151c }
    .mesh .small, .mesh .plain { fill: #9fb0c0 }
    .mesh .fault { fill: #ff7b84 }
    .mesh .card { fill: #17202a; stroke: #2b3947 }
    .mesh .panel { fill: #121a22; stroke: #263340 }
    .mesh .node { fill: #1e2935; stroke: #5c6f82 }
    .mesh .gateway { fill: #17304f; stroke: #6ea8ff }
    .mesh .spoke { fill: #33290f; stroke: #d2a94f }
    .mesh .peer { fill: #2a2140; stroke: #a98be0 }
    .mesh .self { stroke: #37c98b }
    .mesh .silent { stroke: #ff6b74 }
    .mesh .standby { fill: none }
    .mesh .active { fill: #6ea8ff }
    .mesh .line { stroke: #62768a }
    .mesh .core { stroke: #6ea8ff }
    .mesh .apart { stroke: #ff6b74 }
    .mesh .hub { fill: #9fb0c0 }
    .mesh .fresh { stroke: #37c98b }
    .mesh .idle { stroke: #e0a84a }
    .mesh .unused { stroke: #9fb0c0 }
    .mesh .never, .mesh .missing { stroke: #ff6b74 }
    .mesh .state { fill: #0f151c }
    .mesh .state.fresh { fill: #37c98b }
  }
`

// maxLines is how many pairs that cannot talk have a line, and are named.
const maxLines = 12

// svg writes elements.
type svg struct{ strings.Builder }

func (s *svg) add(format string, args ...any) { fmt.Fprintf(s, format+"\n", args...) }

func (s *svg) text(at point, class, anchor, text string) {
	s.add(`<text class="%s" x="%.1f" y="%.1f" text-anchor="%s">%s</text>`, class, at.x, at.y, anchor, escape(text))
}

func (s *svg) line(a, b point, class string) {
	s.add(`<line class="%s" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`, class, a.x, a.y, b.x, b.y)
}

// tunnel is a line that shows the tunnel's state and traffic.
func (s *svg) tunnel(a, b point, t Tunnel) {
	s.add(`<line class="own %s" stroke-width="%.1f" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`, t.State, t.width(), a.x, a.y, b.x, b.y)
}

// state is a dot that does without colours: full, empty, or crossed out.
func (s *svg) state(at point, state string) {
	s.add(`<circle class="state %s" cx="%.1f" cy="%.1f" r="4.5"/>`, state, at.x, at.y)
	if state == TunnelNever || state == TunnelMissing {
		s.line(point{at.x - 3, at.y + 3}, point{at.x + 3, at.y - 3}, "state "+state)
	}
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder does not fail
	return b.String()
}

func shorten(s string) string {
	if utf8.RuneCountInString(s) <= maxName {
		return s
	}
	return string([]rune(s)[:maxName-1]) + "…"
}

// SVG writes the picture, for light and dark backgrounds.
func (g Graph) SVG() string {
	p := g.layout()
	legend, faults := g.legend(p), g.faults()
	const margin, header = 24.0, 44.0
	low, high := p.bounds()
	width := max(high.x-low.x, 460) + 2*margin
	width = max(width, 2*margin+titleLetter*float64(utf8.RuneCountInString(g.title())))
	rows := legendRows(legend, width-2*margin)
	for _, f := range faults {
		width = max(width, 2*margin+6.8*float64(utf8.RuneCountInString(f)))
	}
	footer := 8 + 26*float64(len(rows)) + 18*float64(len(faults))
	height := header + high.y - low.y + footer + margin
	var s svg
	s.add(`<svg class="mesh" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" width="%.0f" height="%.0f">`, width, height, width, height)
	s.add("<title>%s</title>\n<style>%s</style>", escape(g.title()), style)
	s.add(`<rect class="background" width="%.0f" height="%.0f"/>`, width, height)
	s.text(point{margin, 28}, "title", "start", g.title())
	s.add(`<g transform="translate(%.1f %.1f)">`, width/2-(low.x+high.x)/2, header-low.y)
	for _, c := range p.cards {
		c.draw(&s)
	}
	g.drawLines(&s, p)
	for _, c := range p.cards {
		for _, m := range c.chips {
			m.draw(&s, g.Self)
		}
	}
	s.add("</g>")
	y := header + high.y - low.y + 30
	for _, row := range rows {
		x := margin
		for _, item := range row {
			item.draw(&s, point{x, y})
			x += item.width()
		}
		y += 26
	}
	for _, f := range faults {
		s.text(point{margin, y}, "fault", "start", f)
		y += 18
	}
	s.add("</svg>")
	return s.String()
}

func (g Graph) title() string {
	machines := 0
	for _, l := range g.Locations {
		machines += len(l.Machines)
	}
	text := count(machines, "machine") + ", " + count(g.Tunnels, "tunnel")
	if len(g.Locations) > 1 {
		text += ", " + count(len(g.Locations), "location")
	}
	if g.Self != "" {
		text += ", as " + shorten(g.Self) + " knows them"
	}
	return text + g.tunnelsTitle()
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func (c *card) draw(s *svg) {
	s.add(`<rect class="card" x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="14"/>`, c.at.x-c.w/2, c.at.y-c.h/2, c.w, c.h)
	// The title is in the corner that no line to the middle passes.
	title, anchor := point{c.at.x - c.w/2 + cardPadding, c.at.y - c.h/2 + 26}, "start"
	if c.at.x > 1 {
		title.x, anchor = c.at.x+c.w/2-cardPadding, "end"
	}
	if c.title != "" {
		s.text(title, "location", anchor, shorten(c.title))
	}
	for _, p := range c.panels {
		s.add(`<rect class="panel" x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="10"/>`, p.at.x, p.at.y, p.w, p.h)
		s.text(point{p.at.x + cardPadding/2, p.at.y + 14}, "small", "start", p.caption)
	}
}

// drawLines leaves out those inside of a card of rows, whose captions say them.
func (g Graph) drawLines(s *svg, p picture) {
	line := func(from, to, class string) {
		a, b := p.where[from], p.where[to]
		if a == b && a.rows {
			return
		}
		if class == "" {
			class = "line"
			if a != b {
				class = "core"
			}
		}
		s.line(p.anchor(from), p.anchor(to), class)
	}
	for _, m := range g.Meshes {
		p.drawMesh(s, m, g.spokes(m))
	}
	for _, own := range []bool{false, true} { // on top of the others
		for _, e := range g.Edges {
			switch {
			case own != (e.Tunnel != nil):
			case !own:
				line(e.From, e.To, "")
			case p.where[e.From] != p.where[e.To] || !p.where[e.From].rows:
				s.tunnel(p.anchor(e.From), p.anchor(e.To), *e.Tunnel)
			}
		}
	}
	if len(g.Apart) <= maxLines {
		for _, a := range g.Apart {
			line(a.From, a.To, "apart")
		}
	}
}

// across reports whether a mesh is of several cards.
func (p picture) across(m Mesh) bool {
	return slices.ContainsFunc(m.Machines, func(name string) bool { return p.where[name] != p.where[m.Machines[0]] })
}

func (p picture) hasHub(m Mesh) bool { return p.across(m) || !p.where[m.Machines[0]].rows }

// anchor is where a line from a machine begins: in a card of rows on the side of
// the middle, so that it leaves the card before it comes to the rows beside.
func (p picture) anchor(name string) point {
	at, c := p.chips[name].at, p.where[name]
	switch {
	case !c.rows || math.Abs(c.at.x) < 1:
	case c.at.x > 0:
		at.x -= p.chips[name].w / 2
	default:
		at.x += p.chips[name].w / 2
	}
	return at
}

// drawMesh joins all to a point in their midst. The spokes of tunnels that something
// is known of are drawn as these.
func (p picture) drawMesh(s *svg, m Mesh, own map[string]*Tunnel) {
	if !p.hasHub(m) {
		return
	}
	at, class := point{}, "core"
	if first := p.where[m.Machines[0]]; !p.across(m) {
		at, class = first.at, "line"
		if first.title != "" {
			at.y += cardTitle / 2
		}
	}
	for _, name := range m.Machines {
		if t := own[name]; t != nil {
			s.tunnel(at, p.anchor(name), *t)
		} else {
			s.line(at, p.anchor(name), class)
		}
	}
	s.add(`<circle class="hub" cx="%.1f" cy="%.1f" r="6"/>`, at.x, at.y)
}

func (m *chip) draw(s *svg, self string) {
	class := "chip " + m.Kind
	if m.Silent || m.Alone != "" {
		class += " silent"
	}
	if m.Name == self {
		class += " self"
	}
	s.add("<g><title>%s</title>", escape(strings.Join(append([]string{m.Name}, m.notes()...), "\n")))
	s.add(`<rect class="%s" x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="8"/>`, class, m.at.x-m.w/2, m.at.y-m.h/2, m.w, m.h)
	left := m.at.x - m.w/2
	drawMark(s, point{left + 16, m.at.y}, m.Machine)
	name := point{left + 29, m.at.y + 4.5}
	if m.note != "" {
		name.y -= noteHeight / 2
		s.text(point{name.x, name.y + noteHeight + 1}, "small", "start", m.note)
	}
	s.text(name, "name", "start", shorten(m.Name))
	if m.Tunnel != nil {
		s.state(point{m.at.x + m.w/2 - 3, m.at.y - m.h/2 + 3}, m.Tunnel.State)
	}
	s.add("</g>")
}

// drawMark tells the kinds apart without colours.
func drawMark(s *svg, at point, m Machine) {
	class := "mark " + m.Kind
	switch m.Kind {
	case KindGateway:
		if m.Active {
			class += " active"
		} else {
			class += " standby"
		}
		s.add(`<path class="%s" d="M%.1f %.1fl6 -6l6 6l-6 6z"/>`, class, at.x-6, at.y)
	case KindSpoke:
		s.add(`<circle class="%s" cx="%.1f" cy="%.1f" r="5"/>`, class, at.x, at.y)
		s.line(at, point{at.x - 9, at.y}, class)
	case KindPeer:
		s.add(`<rect class="%s" x="%.1f" y="%.1f" width="11" height="8" rx="1"/>`, class, at.x-5.5, at.y-5)
		s.line(point{at.x - 8, at.y + 5}, point{at.x + 8, at.y + 5}, class)
	default:
		s.add(`<circle class="%s" cx="%.1f" cy="%.1f" r="5"/>`, class, at.x, at.y)
	}
}

// shortNote is what the mark does not say.
func shortNote(m Machine) string {
	var out []string
	switch {
	case m.Silent:
		out = append(out, "not heard")
	case m.Kind == KindGateway && !m.Active:
		out = append(out, "standing by")
	case m.Kind == KindPeer && m.Via == "":
		out = append(out, "never seen")
	case m.Kind == KindPeer:
		out = append(out, "by "+shorten(m.Via))
	}
	if m.CallsOnly && m.Kind != KindPeer {
		out = append(out, "NAT")
	}
	if m.Alone != "" {
		out = append(out, "talks to nobody")
	}
	switch n := len(m.Segments); {
	case n > 3:
		out = append(out, fmt.Sprintf("in %s and %d more", strings.Join(m.Segments[:2], ", "), n-2))
	case n > 0:
		out = append(out, "in "+strings.Join(m.Segments, ", "))
	}
	if m.Tunnel != nil {
		out = append(out, m.Tunnel.note())
	}
	return strings.Join(out, " · ")
}
