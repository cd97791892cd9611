package graph

import (
	"fmt"
	"strings"
)

// DOT writes the graph in the language of Graphviz (graphviz.org/doc/info/lang.html).
// `dot`, `fdp` and `neato` lay it out.
func (g Graph) DOT() string {
	var b strings.Builder
	b.WriteString("graph mesh {\n" +
		"  graph [layout=fdp overlap=false splines=line fontname=\"sans-serif\"];\n" +
		"  node [shape=ellipse style=filled fillcolor=\"#eef2f7\" color=\"#5b6b7f\" fontname=\"sans-serif\"];\n" +
		"  edge [color=\"#5b6b7f\"];\n")
	for i, l := range g.Locations {
		indent := "  "
		if l.Name != "" {
			fmt.Fprintf(&b, "  subgraph cluster_%d {\n    label=%s; style=rounded; color=\"#9aa7b5\";\n", i, dotQuote(l.Name))
			indent = "    "
		}
		for _, m := range l.Machines {
			fmt.Fprintf(&b, "%s%s [%s];\n", indent, dotQuote(m.Name), strings.Join(g.dotAttributes(m), " "))
		}
		if l.Name != "" {
			b.WriteString("  }\n")
		}
	}
	for i, m := range g.Meshes {
		fmt.Fprintf(&b, "  mesh_%d [shape=point width=0.15 xlabel=%s];\n", i, dotQuote(m.label()))
		own := g.spokes(m)
		for _, name := range m.Machines {
			fmt.Fprintf(&b, "  mesh_%d -- %s%s;\n", i, dotQuote(name), own[name].dotAttributes(""))
		}
	}
	for _, e := range g.Edges {
		label := ""
		if e.Tunnel != nil {
			label = e.Tunnel.label()
		}
		fmt.Fprintf(&b, "  %s -- %s%s;\n", dotQuote(e.From), dotQuote(e.To), e.Tunnel.dotAttributes(label))
	}
	for _, a := range g.Apart {
		fmt.Fprintf(&b, "  %s -- %s [style=dashed color=\"#c62f3b\" tooltip=%s];\n", dotQuote(a.From), dotQuote(a.To), dotQuote("they cannot talk: "+a.Why))
	}
	b.WriteString("}\n")
	return b.String()
}

// dotAttributes are those of the line of a tunnel; none for one that nothing is known of.
func (t *Tunnel) dotAttributes(label string) string {
	if t == nil {
		return ""
	}
	text := fmt.Sprintf(" [color=%q penwidth=%.1f", tunnelColours[t.State], t.width())
	if t.State != TunnelFresh && t.State != TunnelUnused {
		text += " style=dashed"
	}
	if label != "" {
		text += " label=" + dotQuote(strings.ReplaceAll(label, ", ", "\n")) + " fontsize=9"
	}
	return text + "]"
}

func (m Mesh) label() string {
	return fmt.Sprintf("%d machines, each has a tunnel to each", len(m.Machines))
}

func (g Graph) dotAttributes(m Machine) (out []string) {
	out = append(out, "label="+dotQuote(strings.Join(append([]string{m.Name}, m.notes()...), "\n")))
	switch m.Kind {
	case KindGateway:
		out = append(out, "shape=hexagon")
	case KindSpoke:
		out = append(out, "shape=egg")
	case KindPeer:
		out = append(out, "shape=note")
	}
	if m.Active {
		out = append(out, `fillcolor="#cfe3ff"`)
	}
	if m.Silent || m.Alone != "" {
		out = append(out, `style="filled,dashed"`)
	}
	if m.Name == g.Self {
		out = append(out, `penwidth=3 color="#1f6feb"`)
	}
	return out
}

// notes are what there is to say of a machine besides its name.
func (m Machine) notes() (out []string) {
	switch {
	case m.Silent:
		out = append(out, "gateway, not heard")
	case m.Kind == KindGateway && !m.Active:
		out = append(out, "gateway, standing by")
	case m.Kind == KindPeer && m.Via == "":
		out = append(out, "peer, never seen")
	case m.Kind == KindPeer:
		out = append(out, "peer by "+m.Via)
	case m.Kind != KindNode:
		out = append(out, m.Kind)
	}
	if m.CallsOnly && m.Kind != KindPeer {
		out = append(out, "behind NAT")
	}
	if m.Alone != "" {
		out = append(out, "talks to nobody")
	}
	if len(m.Segments) > 0 {
		out = append(out, "in "+strings.Join(m.Segments, ", "))
	}
	if m.Tunnel != nil {
		out = append(out, m.Tunnel.label())
	}
	return out
}

// dotQuote makes a quoted string; Graphviz knows \n in labels as the end of a line.
func dotQuote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}

// Mermaid writes the graph as a flowchart (mermaid.js.org/syntax/flowchart.html),
// which many viewers of Markdown draw.
func (g Graph) Mermaid() string {
	var b strings.Builder
	b.WriteString("flowchart LR\n")
	id := map[string]string{}
	for i, l := range g.Locations {
		if l.Name != "" {
			fmt.Fprintf(&b, "  subgraph location%d[%s]\n", i, mermaidQuote(l.Name))
		}
		for _, m := range l.Machines {
			id[m.Name] = fmt.Sprintf("m%d", len(id))
			shape := map[string][2]string{KindGateway: {"{{", "}}"}, KindSpoke: {"([", "])"}, KindPeer: {">", "]"}}[m.Kind]
			if shape[0] == "" {
				shape = [2]string{"[", "]"}
			}
			fmt.Fprintf(&b, "    %s%s%s%s\n", id[m.Name], shape[0], mermaidQuote(strings.Join(append([]string{m.Name}, m.notes()...), "<br>")), shape[1])
		}
		if l.Name != "" {
			b.WriteString("  end\n")
		}
	}
	var links []*Tunnel // in the order in which Mermaid counts them
	for i, m := range g.Meshes {
		fmt.Fprintf(&b, "  mesh%d((%s))\n", i, mermaidQuote(m.label()))
		own := g.spokes(m)
		for _, name := range m.Machines {
			fmt.Fprintf(&b, "  mesh%d --- %s\n", i, id[name])
			links = append(links, own[name])
		}
	}
	for _, e := range g.Edges {
		fmt.Fprintf(&b, "  %s --- %s\n", id[e.From], id[e.To])
		links = append(links, e.Tunnel)
	}
	for _, a := range g.Apart {
		fmt.Fprintf(&b, "  %s -. cannot talk .- %s\n", id[a.From], id[a.To])
	}
	for i, t := range links {
		if t != nil {
			fmt.Fprintf(&b, "  linkStyle %d stroke:%s,stroke-width:%.1fpx\n", i, tunnelColours[t.State], t.width())
		}
	}
	g.mermaidClasses(&b, id)
	return b.String()
}

func (g Graph) mermaidClasses(b *strings.Builder, id map[string]string) {
	b.WriteString("  classDef self stroke:#1f6feb,stroke-width:3px\n  classDef fault stroke-dasharray:4 3\n")
	if at := id[g.Self]; at != "" {
		fmt.Fprintf(b, "  class %s self\n", at)
	}
	for _, l := range g.Locations {
		for _, m := range l.Machines {
			if m.Silent || m.Alone != "" {
				fmt.Fprintf(b, "  class %s fault\n", id[m.Name])
			}
		}
	}
}

// mermaidQuote makes a quoted text. What has a meaning in it is written as an entity.
func mermaidQuote(s string) string {
	return `"` + strings.NewReplacer(`"`, "#quot;", "#", "#35;", "<br>", "<br>", "<", "#lt;", ">", "#gt;").Replace(s) + `"`
}
