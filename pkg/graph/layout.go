package graph

import (
	"math"
	"slices"
	"unicode/utf8"
)

// The layout is made for what meshes look like: locations, whose gateways all have
// tunnels to each other. Each location is a card, the cards lie around the middle,
// and gateways stand on the side of the middle, so that the lines between them pass
// over nothing else. (Layouts for any graph, by layers or by springs, make a ball of
// wool of machines that all talk to each other.)

// All lengths are in pixels at a scale of 1.
const (
	chipHeight  = 32.0
	noteHeight  = 13.0 // more, for a chip with notes
	chipGap     = 14.0
	cardPadding = 22.0
	cardTitle   = 24.0
	cardGap     = 64.0
	captionSize = 24.0
	maxRing     = 8  // machines of a card that stand in a ring; more stand in rows
	maxName     = 30 // letters
)

// Widths of a letter of the sans-serif fonts that browsers have, rounded up.
const (
	titleLetter = 9.0 // at 15 px, semi-bold
	nameLetter  = 7.6 // at 13 px
	noteLetter  = 5.8 // at 10 px
)

type point struct{ x, y float64 }

// chip is one machine; at is its middle.
type chip struct {
	Machine
	at   point
	w, h float64
	note string
}

// panel is a group of rows in a card; at is its upper left corner.
type panel struct {
	at      point
	w, h    float64
	caption string
}

// card is one location; at is its middle.
type card struct {
	title  string
	at     point
	w, h   float64
	chips  []*chip
	panels []panel
	rows   bool // else a ring
}

// picture has everything in its place.
type picture struct {
	cards []*card
	chips map[string]*chip
	where map[string]*card
}

func (g Graph) layout() picture {
	p := picture{chips: map[string]*chip{}, where: map[string]*card{}}
	for i, l := range g.Locations {
		c := &card{title: l.Name}
		for _, m := range l.Machines {
			c.chips = append(c.chips, newChip(m))
		}
		angle := cardAngle(i, len(g.Locations))
		switch c.rows = len(c.chips) > maxRing; {
		case c.rows:
			c.layRows(g, angle, len(g.Locations) == 1)
		default:
			c.layRing(angle, len(g.Locations) == 1)
		}
		for _, chip := range c.chips {
			p.chips[chip.Name], p.where[chip.Name] = chip, c
		}
		p.cards = append(p.cards, c)
	}
	p.spread()
	return p
}

func newChip(m Machine) *chip {
	c := &chip{Machine: m, h: chipHeight, note: shortNote(m)}
	letters := min(utf8.RuneCountInString(m.Name), maxName)
	c.w = 38 + nameLetter*float64(letters)
	if c.note != "" {
		c.h += noteHeight
		c.w = max(c.w, 38+noteLetter*float64(utf8.RuneCountInString(c.note)))
	}
	return c
}

// cardAngle is where a card lies, seen from the middle.
func cardAngle(i, n int) float64 {
	start := -math.Pi / 2
	switch {
	case n == 2:
		start = math.Pi
	case n%2 == 0:
		start -= math.Pi / float64(n)
	}
	return start + 2*math.Pi*float64(i)/float64(n)
}

// layRing puts the machines on an ellipse, each plain peer beside its carrier. A
// hub, of which there is one location only, is in the middle of its spokes.
func (c *card) layRing(angle float64, alone bool) {
	ring := c.ringOrder()
	if alone && len(ring) > 3 && ring[0].Active && !slices.ContainsFunc(ring[1:], func(m *chip) bool { return m.Kind != KindSpoke }) {
		ring = ring[1:] // the zero point is the middle
	}
	widest, highest := 0.0, 0.0
	for _, m := range ring {
		widest, highest = max(widest, m.w), max(highest, m.h)
	}
	start := angle + math.Pi // towards the middle
	switch {
	case alone:
		start = -math.Pi / 2
	case !ring[0].Active: // all have lines to the middle: nobody is to stand in another's
		start += math.Pi / float64(len(ring))
	}
	rx, ry := 0.0, 0.0
	for len(c.chips) > 1 {
		for i, m := range ring {
			a := start + 2*math.Pi*float64(i)/float64(len(ring))
			m.at = point{rx * math.Cos(a), ry * math.Sin(a)}
		}
		small := len(ring) <= few && len(ring) == len(c.chips) // of more, all lines lead to the middle
		if rx > 0 && apart(c.chips, 2*chipGap) && (!small || clearOfLines(ring)) {
			break
		}
		rx, ry = rx+8, ry+6
	}
	c.fit()
}

// ringOrder begins with the active gateway.
func (c *card) ringOrder() (out []*chip) {
	peers := map[string][]*chip{}
	var first, rest, stray []*chip
	for _, m := range c.chips {
		carried := slices.ContainsFunc(c.chips, func(by *chip) bool { return by.Name == m.Via && by.Kind != KindPeer })
		switch {
		case m.Kind == KindPeer && carried:
			peers[m.Via] = append(peers[m.Via], m)
		case m.Kind == KindPeer:
			stray = append(stray, m)
		case m.Active:
			first = append(first, m)
		default:
			rest = append(rest, m)
		}
	}
	for _, m := range slices.Concat(first, rest) {
		out = append(append(out, m), peers[m.Name]...)
	}
	return append(out, stray...)
}

// apart reports whether no two chips are nearer than gap.
func apart(chips []*chip, gap float64) bool {
	for i, a := range chips {
		for _, b := range chips[i+1:] {
			if math.Abs(a.at.x-b.at.x) < (a.w+b.w)/2+gap && math.Abs(a.at.y-b.at.y) < (a.h+b.h)/2+gap/2 {
				return false
			}
		}
	}
	return true
}

// clearOfLines reports whether a line between any two chips of a ring passes by the others.
func clearOfLines(ring []*chip) bool {
	for i, a := range ring {
		for j, b := range ring[:i] {
			for k, c := range ring {
				if k != i && k != j && crosses(a.at, b.at, c) {
					return false
				}
			}
		}
	}
	return true
}

// crosses reports whether a line comes near a chip: all of its corners are on one
// side of those that it does not.
func crosses(a, b point, c *chip) bool {
	const gap = chipGap / 2
	left, right := false, false
	for _, corner := range []point{{-1, -1}, {-1, 1}, {1, -1}, {1, 1}} {
		x, y := c.at.x+corner.x*(c.w/2+gap), c.at.y+corner.y*(c.h/2+gap)
		if side := (b.x-a.x)*(y-a.y) - (b.y-a.y)*(x-a.x); side > 0 {
			left = true
		} else {
			right = true
		}
	}
	return left && right
}

// fit sizes the card, and moves its chips to be around its middle.
func (c *card) fit() {
	low, high := point{math.Inf(1), math.Inf(1)}, point{math.Inf(-1), math.Inf(-1)}
	for _, m := range c.chips {
		low = point{min(low.x, m.at.x-m.w/2), min(low.y, m.at.y-m.h/2)}
		high = point{max(high.x, m.at.x+m.w/2), max(high.y, m.at.y+m.h/2)}
	}
	c.w, c.h = high.x-low.x+2*cardPadding, high.y-low.y+2*cardPadding
	c.w = max(c.w, 2*cardPadding+8*float64(utf8.RuneCountInString(c.title)))
	shift := point{-(low.x + high.x) / 2, -(low.y + high.y) / 2}
	if c.title != "" {
		c.h += cardTitle
		shift.y += cardTitle / 2
	}
	for _, m := range c.chips {
		m.at = point{m.at.x + shift.x, m.at.y + shift.y}
	}
}

// layRows puts the machines in rows, each kind in a panel of its own. Which of them
// have tunnels is said and not drawn.
func (c *card) layRows(g Graph, angle float64, alone bool) {
	groups := map[string][]*chip{}
	cell := point{}
	for _, m := range c.chips {
		groups[m.Kind] = append(groups[m.Kind], m)
		cell = point{max(cell.x, m.w), max(cell.y, m.h)}
	}
	for _, m := range c.chips {
		m.w, m.h = cell.x, cell.y
	}
	cell = point{cell.x + chipGap, cell.y + chipGap}
	shape := 1.6 // width to height
	if alone {
		shape = 2.4
	}
	columns := max(2, int(math.Round(math.Sqrt(float64(len(c.chips))*shape*cell.y/cell.x))))
	c.w = float64(columns)*cell.x - chipGap + 4*cardPadding
	order := []string{KindGateway, KindNode, KindSpoke, KindPeer}
	right, down := math.Cos(angle) < -0.1, math.Sin(angle) < -0.1
	if down {
		slices.Reverse(order)
	}
	y := cardPadding
	if c.title != "" {
		y += cardTitle
	}
	for _, kind := range order {
		if len(groups[kind]) == 0 {
			continue
		}
		p := panel{at: point{cardPadding, y}, w: c.w - 2*cardPadding, caption: g.caption(kind, c.chips)}
		rows := (len(groups[kind]) + columns - 1) / columns
		p.h = captionSize + float64(rows)*cell.y + chipGap/2
		members := groups[kind]
		slices.SortStableFunc(members, func(a, b *chip) int {
			switch a.Active {
			case b.Active:
				return 0
			case right:
				return 1
			}
			return -1
		})
		for i, m := range members {
			column := i % columns
			if kind == KindGateway && right && rows == 1 {
				column += columns - len(members)
			}
			m.at = point{p.at.x + cardPadding + float64(column)*cell.x + m.w/2, y + captionSize + float64(i/columns)*cell.y + m.h/2}
		}
		c.panels = append(c.panels, p)
		y += p.h + chipGap
	}
	c.h = y - chipGap + cardPadding
	for _, m := range c.chips {
		m.at = point{m.at.x - c.w/2, m.at.y - c.h/2}
	}
	for i := range c.panels {
		c.panels[i].at.x -= c.w / 2
		c.panels[i].at.y -= c.h / 2
	}
}

// caption says which tunnels the machines of one kind have inside of a card of rows.
func (g Graph) caption(kind string, chips []*chip) string {
	gateway := ""
	inside := map[string]bool{}
	for _, m := range chips {
		if m.Active {
			gateway = m.Name
		}
		if m.Kind == KindGateway || m.Kind == KindNode {
			inside[m.Name] = true
		}
	}
	whole := slices.ContainsFunc(g.Meshes, func(m Mesh) bool {
		n := 0
		for _, name := range m.Machines {
			if inside[name] {
				n++
			}
		}
		return n == len(inside)
	})
	switch {
	case kind == KindGateway:
		return "gateways"
	case kind == KindNode && whole && gateway != "":
		return "nodes: each has a tunnel to each other and to the gateways"
	case kind == KindNode && whole:
		return "nodes: each has a tunnel to each other"
	case kind == KindNode && gateway != "":
		return "nodes: a tunnel to " + gateway + ", and to some of the others"
	case kind == KindNode:
		return "nodes: tunnels to some of the others"
	case kind == KindSpoke && gateway != "":
		return "spokes: a tunnel to " + gateway + " only"
	case kind == KindSpoke:
		return "spokes: no gateway to talk to"
	}
	return "plain WireGuard peers"
}

// spread lays the cards around the middle, as near as they fit, and moves all
// chips and panels to their places.
func (p *picture) spread() {
	for r := 0.0; ; r += 10 {
		for i, c := range p.cards {
			if a := cardAngle(i, len(p.cards)); len(p.cards) > 1 {
				c.at = point{1.35 * r * math.Cos(a), r * math.Sin(a)}
			}
		}
		if p.cardsApart() {
			break
		}
	}
	for _, c := range p.cards {
		for _, m := range c.chips {
			m.at = point{m.at.x + c.at.x, m.at.y + c.at.y}
		}
		for i := range c.panels {
			c.panels[i].at.x += c.at.x
			c.panels[i].at.y += c.at.y
		}
	}
}

func (p *picture) cardsApart() bool {
	for i, a := range p.cards {
		for _, b := range p.cards[i+1:] {
			if math.Abs(a.at.x-b.at.x) < (a.w+b.w)/2+cardGap && math.Abs(a.at.y-b.at.y) < (a.h+b.h)/2+cardGap {
				return false
			}
		}
	}
	return true
}

// bounds are the corners of what the cards cover.
func (p *picture) bounds() (low, high point) {
	for i, c := range p.cards {
		a, b := point{c.at.x - c.w/2, c.at.y - c.h/2}, point{c.at.x + c.w/2, c.at.y + c.h/2}
		if i == 0 {
			low, high = a, b
		}
		low, high = point{min(low.x, a.x), min(low.y, a.y)}, point{max(high.x, b.x), max(high.y, b.y)}
	}
	return low, high
}
