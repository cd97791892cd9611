package main

import (
	"fmt"
	"math"
	"strings"
)

// panel is a diagram with logarithmic axes, in a picture of several.
type panel struct {
	title            string
	left             float64 // of its area, in pixels
	xMin, xMax       float64
	yMin, yMax       float64
	xTicks, yTicks   []float64
	yLabel           func(float64) string
	lines            []line
	width, top, tall float64
}

type line struct {
	class string // of the style sheet
	label string
	at    [][2]float64
	below bool // the label stands below the line's end, else above
}

func (p panel) x(v float64) float64 {
	return p.left + p.width*(math.Log(v)-math.Log(p.xMin))/(math.Log(p.xMax)-math.Log(p.xMin))
}

func (p panel) y(v float64) float64 {
	return p.top + p.tall*(1-(math.Log(v)-math.Log(p.yMin))/(math.Log(p.yMax)-math.Log(p.yMin)))
}

// plotStyle is readable on white and on black: a viewer's preference reaches into
// a picture that a page shows (CSS Media Queries 5, section 12.5).
const plotStyle = `<style>
text { font: 13px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600; font-size: 14px } .tick { fill: #57606a; font-size: 12px }
.grid { stroke: #d0d7de; stroke-width: 1 } .line { fill: none; stroke-width: 2.5 } .dash { stroke-dasharray: 6 4; stroke-width: 1.5 }
.a { stroke: #0969da; fill: #0969da } .b { stroke: #bc4c00; fill: #bc4c00 } .c { stroke: #6e7781; fill: #6e7781 } text.a, text.b, text.c { stroke: none }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .tick { fill: #9198a1 } .grid { stroke: #3d444d }
.a { stroke: #58a6ff; fill: #58a6ff } .b { stroke: #f0883e; fill: #f0883e } .c { stroke: #9198a1; fill: #9198a1 } }
</style>
`

// plot draws the growth as SVG: CPU time on the left, memory on the right.
func plot(all []grown) string {
	first, last := float64(all[0].nodes), float64(all[len(all)-1].nodes)
	of := func(value func(grown) float64) (at [][2]float64) {
		for _, g := range all {
			at = append(at, [2]float64{float64(g.nodes), value(g)})
		}
		return at
	}
	cold := func(g grown) float64 { return g.coldCPU.Seconds() * 1e3 }
	var ticks []float64
	for _, g := range all {
		ticks = append(ticks, float64(g.nodes))
	}
	times := panel{
		title: "CPU time of wgcnid", left: 70, width: 350, top: 50, tall: 250,
		xMin: first, xMax: last, yMin: .5, yMax: 5000, xTicks: ticks, yTicks: []float64{1, 10, 100, 1000},
		yLabel: func(ms float64) string {
			if ms >= 1000 {
				return fmt.Sprintf("%g s", ms/1e3)
			}
			return fmt.Sprintf("%g ms", ms)
		},
		lines: []line{
			{class: "a", label: "full apply", at: of(cold)},
			{class: "b", label: "one node changed", at: of(func(g grown) float64 { return g.change * 1e3 }), below: true},
			{class: "c dash", label: "budget: 1/100 of a full apply", at: [][2]float64{{first, cold(all[len(all)-1]) / 100}, {last, cold(all[len(all)-1]) / 100}}},
		},
	}
	memories := panel{
		title: "Resident memory of wgcnid", left: 530, width: 290, top: 50, tall: 250,
		xMin: first, xMax: last, yMin: 16, yMax: 128, xTicks: ticks, yTicks: []float64{16, 32, 64, 128},
		yLabel: func(mib float64) string { return fmt.Sprintf("%g MiB", mib) },
		lines: []line{
			{class: "a", label: "", at: of(func(g grown) float64 { return float64(g.resident) / (1 << 20) })},
			{class: "c dash", label: "budget", at: [][2]float64{{first, residentBudget >> 20}, {last, residentBudget >> 20}}},
		},
	}
	var b strings.Builder
	b.WriteString(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 850 360" width="850" height="360" role="img" aria-label="CPU time and memory of wgcnid by the number of nodes">` + "\n" + plotStyle)
	times.draw(&b)
	memories.draw(&b)
	b.WriteString("</svg>\n")
	return b.String()
}

func (p panel) draw(b *strings.Builder) {
	bottom, right := p.top+p.tall, p.left+p.width
	fmt.Fprintf(b, `<text class="title" x="%.0f" y="%.0f">%s</text>`+"\n", p.left, p.top-22, p.title)
	for _, v := range p.yTicks {
		fmt.Fprintf(b, `<line class="grid" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/><text class="tick" text-anchor="end" x="%.1f" y="%.1f">%s</text>`+"\n",
			p.left, p.y(v), right, p.y(v), p.left-8, p.y(v)+4, p.yLabel(v))
	}
	drawn := math.Inf(-1)
	for _, v := range p.xTicks {
		fmt.Fprintf(b, `<line class="grid" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`, p.x(v), p.top, p.x(v), bottom)
		if p.x(v)-drawn > 42 {
			drawn = p.x(v)
			fmt.Fprintf(b, `<text class="tick" text-anchor="middle" x="%.1f" y="%.1f">%s</text>`, drawn, bottom+18, thousands(int(v)))
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(b, `<text class="tick" text-anchor="middle" x="%.1f" y="%.1f">nodes in the mesh</text>`+"\n", p.left+p.width/2, bottom+40)
	for _, l := range p.lines {
		var points []string
		for _, at := range l.at {
			points = append(points, fmt.Sprintf("%.1f,%.1f", p.x(at[0]), p.y(at[1])))
		}
		fmt.Fprintf(b, `<polyline class="line %s" style="fill:none" points="%s"/>`+"\n", l.class, strings.Join(points, " "))
		if !strings.Contains(l.class, "dash") {
			for _, at := range l.at {
				fmt.Fprintf(b, `<circle class="%s" cx="%.1f" cy="%.1f" r="3.5"/>`, l.class, p.x(at[0]), p.y(at[1]))
			}
			b.WriteByte('\n')
		}
		// At the left end, where the lines are apart.
		start, away := l.at[0], -10.0
		if l.below {
			away = 22
		}
		fmt.Fprintf(b, `<text class="%s" x="%.1f" y="%.1f">%s</text>`+"\n", strings.Fields(l.class)[0], p.x(start[0])+4, p.y(start[1])+away, l.label)
	}
}

// thousands prints 5000 as "5,000".
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}
