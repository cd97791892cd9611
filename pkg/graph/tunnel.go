package graph

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// The states of a tunnel.
const (
	TunnelFresh   = "fresh"   // a handshake within the last three minutes
	TunnelIdle    = "idle"    // none lately; the next packet starts one
	TunnelUnused  = "unused"  // never one, and nothing was sent that would need one
	TunnelNever   = "never"   // never one, though this machine asks for it
	TunnelMissing = "missing" // the kernel has no such peer
)

// A Tunnel is what the kernel of the machine that draws says of one of its own.
type Tunnel struct {
	State         string    `json:"state"`
	LastHandshake time.Time `json:"lastHandshake,omitzero"`
	ReceiveBytes  int64     `json:"receiveBytes"`
	TransmitBytes int64     `json:"transmitBytes"`
	age           time.Duration
}

// NewTunnel judges a tunnel by its last handshake; zero if there was none.
func NewTunnel(handshake time.Time, received, sent int64, now time.Time) Tunnel {
	t := Tunnel{State: TunnelNever, LastHandshake: handshake, ReceiveBytes: received, TransmitBytes: sent}
	if !handshake.IsZero() {
		t.age = max(now.Sub(handshake), 0)
	}
	switch {
	case handshake.IsZero() && sent == 0:
		t.State = TunnelUnused
	case handshake.IsZero():
	case t.age < mesh.HandshakeFresh:
		t.State = TunnelFresh
	default:
		t.State = TunnelIdle
	}
	return t
}

// WithTunnels is the graph with this machine's own tunnels as they are, by the name
// of the far end. Those that it should have and are not among them are missing. The
// graph that it is made from stays as it was. Nil says that they are not known.
func (g Graph) WithTunnels(tunnels map[string]Tunnel) Graph {
	if tunnels == nil {
		return g
	}
	tunnels = maps.Clone(tunnels)
	missing := func(name string) {
		if _, there := tunnels[name]; !there && name != g.Self {
			tunnels[name] = Tunnel{State: TunnelMissing}
		}
	}
	g.Edges = slices.Clone(g.Edges)
	for i := range g.Edges {
		e := &g.Edges[i]
		if far := e.far(g.Self); far != "" {
			missing(far)
			t := tunnels[far]
			e.Tunnel = &t
		}
	}
	for _, m := range g.Meshes {
		if slices.Contains(m.Machines, g.Self) {
			for _, name := range m.Machines {
				missing(name)
			}
		}
	}
	g.Locations = slices.Clone(g.Locations)
	for i := range g.Locations {
		l := &g.Locations[i]
		l.Machines = slices.Clone(l.Machines)
		for j := range l.Machines {
			if t, there := tunnels[l.Machines[j].Name]; there {
				l.Machines[j].Tunnel = &t
			}
		}
	}
	return g
}

// far is the other end of an edge of self; "" if it is none.
func (e Edge) far(self string) string {
	switch self {
	case e.From:
		return e.To
	case e.To:
		return e.From
	}
	return ""
}

// own are this machine's tunnels by the names of the far ends; empty where nothing
// is known of them.
func (g Graph) own() map[string]*Tunnel {
	out := map[string]*Tunnel{}
	for _, l := range g.Locations {
		for _, m := range l.Machines {
			if m.Tunnel != nil {
				out[m.Name] = m.Tunnel
			}
		}
	}
	return out
}

// spokes are the tunnels of this machine that are part of a mesh, by the names of
// the far ends; and its own spoke to the midst, which is as good as the best of them.
func (g Graph) spokes(m Mesh) map[string]*Tunnel {
	out := map[string]*Tunnel{}
	if !slices.Contains(m.Machines, g.Self) {
		return out
	}
	states := []string{TunnelMissing, TunnelNever, TunnelUnused, TunnelIdle, TunnelFresh}
	all, own := Tunnel{State: TunnelMissing}, g.own()
	for _, name := range m.Machines {
		t := own[name]
		if t == nil {
			continue
		}
		out[name] = t
		all.ReceiveBytes += t.ReceiveBytes
		all.TransmitBytes += t.TransmitBytes
		if slices.Index(states, t.State) > slices.Index(states, all.State) {
			all.State = t.State
		}
	}
	if len(out) > 0 {
		out[g.Self] = &all
	}
	return out
}

// width is that of the tunnel's line, in pixels: by the order of magnitude of its traffic.
func (t Tunnel) width() float64 {
	return 1.8 + 1.3*math.Log1p(float64(t.ReceiveBytes+t.TransmitBytes))/math.Log(1024)
}

// note is what there is to say of a tunnel in a few words.
func (t Tunnel) note() string {
	traffic := fmt.Sprintf("↓ %s ↑ %s", Bytes(t.ReceiveBytes, 1), Bytes(t.TransmitBytes, 1))
	switch t.State {
	case TunnelFresh:
		return traffic
	case TunnelIdle:
		return "idle for " + ageText(t.age) + " · " + traffic
	case TunnelUnused:
		return "not used yet"
	case TunnelNever:
		return "no handshake"
	}
	return "no such peer"
}

// label is what there is to say of a tunnel, in full.
func (t Tunnel) label() string {
	traffic := fmt.Sprintf("%s received, %s sent", Bytes(t.ReceiveBytes, 1), Bytes(t.TransmitBytes, 1))
	switch t.State {
	case TunnelFresh, TunnelIdle:
		return "handshake " + ageText(t.age) + " ago, " + traffic
	case TunnelUnused:
		return "not used yet"
	case TunnelNever:
		return "no handshake, " + traffic
	}
	return "the kernel has no such peer"
}

func ageText(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// Bytes prints a size in the units of `wg show`, with so many digits behind the point.
func Bytes(n int64, digits int) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, exp := float64(n)/unit, 0
	for value >= unit && exp < 4 {
		value, exp = value/unit, exp+1
	}
	return fmt.Sprintf("%.*f %ciB", digits, value, "KMGTP"[exp])
}

// colours of DOT and Mermaid, which have no dark ones.
var tunnelColours = map[string]string{TunnelFresh: "#0a8a56", TunnelIdle: "#b7791f", TunnelUnused: "#5b6b7f", TunnelNever: "#c62f3b", TunnelMissing: "#c62f3b"}

// tunnelsTitle counts those that are connected; "" where nothing is known of them.
func (g Graph) tunnelsTitle() string {
	own := g.own()
	if len(own) == 0 {
		return ""
	}
	fresh := 0
	for _, t := range own {
		if t.State == TunnelFresh {
			fresh++
		}
	}
	return fmt.Sprintf("; %d of its %s connected", fresh, count(len(own), "tunnel"))
}
