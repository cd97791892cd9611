package graph

import (
	"fmt"
	"math"
	"unicode/utf8"
)

// item is a line of the legend.
type item struct {
	text, line string // line: its class
	machine    Machine
	self       bool
	tunnel     string // the state of one
}

func (i item) width() float64 { return 50 + 6.7*float64(utf8.RuneCountInString(i.text)) }

func (i item) draw(s *svg, at point) {
	mark := point{at.x + 12, at.y - 4}
	switch {
	case i.tunnel != "":
		s.tunnel(point{at.x, mark.y}, point{at.x + 24, mark.y}, Tunnel{State: i.tunnel, TransmitBytes: 1024})
		s.state(mark, i.tunnel)
	case i.line == "hub":
		s.add(`<circle class="hub" cx="%.1f" cy="%.1f" r="6"/>`, mark.x, mark.y)
	case i.line != "":
		s.line(point{at.x, mark.y}, point{at.x + 24, mark.y}, i.line)
	case i.self:
		s.add(`<rect class="chip node self" x="%.1f" y="%.1f" width="22" height="14" rx="5"/>`, at.x+1, mark.y-7)
	default:
		drawMark(s, mark, i.machine)
	}
	s.text(point{at.x + 30, at.y}, "plain", "start", i.text)
}

// legend explains what the picture has.
func (g Graph) legend(p picture) (out []item) {
	has := map[string]bool{}
	for _, l := range g.Locations {
		for _, m := range l.Machines {
			has[m.Kind] = true
			has["active"] = has["active"] || m.Active
			has["standby"] = has["standby"] || m.Kind == KindGateway && !m.Active
			has["self"] = has["self"] || m.Name == g.Self
		}
	}
	add := func(when bool, i item) {
		if when {
			out = append(out, i)
		}
	}
	for _, t := range g.own() {
		has[t.State] = true
	}
	for _, e := range g.Edges {
		if e.Tunnel != nil {
			continue
		}
		a, b := p.where[e.From], p.where[e.To]
		has["core"] = has["core"] || a != b
		has["line"] = has["line"] || a == b && !a.rows
	}
	for _, m := range g.Meshes {
		has["hub"] = has["hub"] || p.hasHub(m)
	}
	add(has["self"], item{text: "this node", self: true})
	add(has["active"], item{text: "active gateway", machine: Machine{Kind: KindGateway, Active: true}})
	add(has["standby"], item{text: "other gateway", machine: Machine{Kind: KindGateway}})
	add(has[KindNode], item{text: "node", machine: Machine{Kind: KindNode}})
	add(has[KindSpoke], item{text: "spoke", machine: Machine{Kind: KindSpoke}})
	add(has[KindPeer], item{text: "plain WireGuard peer", machine: Machine{Kind: KindPeer}})
	add(has["line"], item{text: "tunnel", line: "line"})
	add(has["core"], item{text: "tunnel between locations", line: "core"})
	add(has["hub"], item{text: "each with a tunnel to each", line: "hub"})
	add(has[TunnelFresh], item{text: "own tunnel, wider with more traffic", tunnel: TunnelFresh})
	add(has[TunnelIdle], item{text: "idle: no handshake lately", tunnel: TunnelIdle})
	add(has[TunnelUnused], item{text: "not used yet", tunnel: TunnelUnused})
	add(has[TunnelNever] || has[TunnelMissing], item{text: "no handshake, though asked for", tunnel: TunnelNever})
	add(len(g.Apart) > 0 && len(g.Apart) <= maxLines, item{text: "cannot talk", line: "apart"})
	return out
}

// legendRows breaks the legend into lines of a width.
func legendRows(items []item, width float64) (rows [][]item) {
	x := math.Inf(1)
	for _, i := range items {
		if x+i.width() > width {
			rows, x = append(rows, nil), 0
		}
		rows[len(rows)-1] = append(rows[len(rows)-1], i)
		x += i.width()
	}
	return rows
}

// faults names who cannot talk, and why.
func (g Graph) faults() (out []string) {
	for _, l := range g.Locations {
		for _, m := range l.Machines {
			if m.Alone != "" && len(out) < maxLines {
				out = append(out, fmt.Sprintf("%s can talk to nobody: %s", shorten(m.Name), m.Alone))
			}
		}
	}
	for i, a := range g.Apart {
		if i == maxLines {
			return append(out, fmt.Sprintf("and %d pairs more that cannot talk", len(g.Apart)-i))
		}
		out = append(out, fmt.Sprintf("%s cannot talk to %s: %s", shorten(a.From), shorten(a.To), a.Why))
	}
	return out
}
