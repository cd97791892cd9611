package operate

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/graph"
	"github.com/wgcni/wgcni/test/cluster"
)

// drawn is `wgcnid graph --format json`.
func drawn(ctx context.Context, n *cluster.Node) (g graph.Graph, err error) {
	text, err := n.Wgcnid(ctx, "graph", "--format", "json")
	if err != nil {
		return g, err
	}
	return g, json.Unmarshal([]byte(text), &g)
}

// tunnelTo is what a graph says of the tunnel to a node, at the edge and at the machine.
func tunnelTo(g graph.Graph, name string) (t graph.Tunnel, err error) {
	var at, edge *graph.Tunnel
	for _, e := range g.Edges {
		if e.Tunnel != nil && (e.From == name || e.To == name) {
			edge = e.Tunnel
		}
	}
	for _, l := range g.Locations {
		for _, m := range l.Machines {
			if m.Name == name {
				at = m.Tunnel
			}
		}
	}
	if at == nil || edge == nil || *at != *edge {
		return t, fmt.Errorf("tunnel to %s: %+v at the machine, %+v at the edge", name, at, edge)
	}
	return *edge, nil
}

// The graph has this node's own tunnels as its kernel has them: one with traffic, one
// to a node that has joined and cannot be reached, and none where there is no kernel's.
func TestGraphShowsTheTunnels(t *testing.T) {
	c, helpers, pods := cluster.NewMeshT(t, 3, 1, cluster.NetworkOptions{})
	a, ctx := c.Nodes[0], t.Context()
	cluster.ServeT(t, pods[1])
	payload := []byte(strings.Repeat("x", 100_000))
	if _, err := cluster.TCP(ctx, pods[0], netip.AddrPortFrom(pods[1].IPv4(), cluster.EchoPort), payload); err != nil {
		t.Fatal(err)
	}
	d, err := c.AddNode(ctx, "node-d")
	if err != nil {
		t.Fatal(err)
	}
	// It has heard of all, and all of it; no packet gets through.
	if err := d.SetLoss(ctx, 1000); err != nil {
		t.Fatal(err)
	}
	if err := d.Configure(cluster.NetworkOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.StartHelper(); err != nil {
		t.Fatal(err)
	}
	var g graph.Graph
	err = cluster.Poll(ctx, "node-d to be a peer", func() error {
		if g, err = drawn(ctx, a); err != nil {
			return err
		}
		// Nobody answers: it has WireGuard ask for a handshake.
		if conn, err := cluster.Dial(ctx, pods[0], "udp", netip.AddrPortFrom(d.PodCIDRs()[0].Addr().Next(), cluster.EchoPort)); err == nil {
			_, _ = conn.Write([]byte("x"))
			_ = conn.Close()
		}
		got, err := tunnelTo(g, "node-d")
		if err == nil && got.State != graph.TunnelNever {
			err = fmt.Errorf("%+v", got)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := tunnelTo(g, "node-b")
	if err != nil || got.State != graph.TunnelFresh || time.Since(got.LastHandshake).Abs() > time.Minute ||
		got.ReceiveBytes < int64(len(payload)) || got.TransmitBytes < int64(len(payload)) {
		t.Errorf("100 kB there and back: %v, %+v", err, got)
	}
	// No pod has sent anything to node-c; the nodes themselves may have.
	if got, err := tunnelTo(g, "node-c"); err != nil || got.State != graph.TunnelUnused && got.State != graph.TunnelFresh {
		t.Errorf("node-c: %v, %+v", err, got)
	}
	for _, e := range g.Edges {
		if e.From != a.Name && e.To != a.Name && e.Tunnel != nil {
			t.Errorf("%s cannot know of the tunnel between %s and %s: %+v", a, e.From, e.To, e.Tunnel)
		}
	}
	for format, wants := range map[string][]string{
		"svg":     {`class="own fresh"`, `class="own never"`, "no handshake", "wider with more traffic"},
		"dot":     {`color="#0a8a56"`, `color="#c62f3b"`, "no handshake, "},
		"mermaid": {"linkStyle ", "stroke:#0a8a56", "stroke:#c62f3b"},
	} {
		text, err := a.Wgcnid(ctx, "graph", "--format", format)
		for _, want := range wants {
			if err != nil || !strings.Contains(text, want) {
				t.Errorf("%s: no %s (%v) in\n%s", format, want, err, text)
			}
		}
		if dir := os.Getenv("WGCNI_PICTURES"); dir != "" {
			if err := os.WriteFile(filepath.Join(dir, "mesh."+format), []byte(text), 0o644); err != nil {
				t.Error(err)
			}
		}
	}
	// Without a tunnel of its own the node draws what it knows.
	if err := helpers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.LoseTunnel(ctx); err != nil {
		t.Fatal(err)
	}
	err = cluster.Poll(ctx, "the graph to have no tunnel's state", func() error {
		g, err := drawn(ctx, a)
		if err != nil {
			return err
		}
		if _, err := tunnelTo(g, "node-b"); err == nil || len(g.Edges) != 6 {
			return fmt.Errorf("%+v", g.Edges)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
