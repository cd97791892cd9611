package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// growthSizes are the meshes, by their nodes, that the plot has.
var growthSizes = []int{10, 30, 100, 300, 1000, 2000, budgetNodes}

// grown is what a mesh of some size costs one of its nodes.
type grown struct {
	nodes     int
	cold      time.Duration // from the start of the process to the last route
	coldCPU   time.Duration
	change    float64 // median CPU time of one change, in seconds
	elapsed   float64 // the same, until it was reported
	resident  int64   // bytes
	ofTunnels int64   // the same of a userspace tunnel, 0 for none
}

// benchGrowth measures how cost grows with the mesh, by etcd, and draws it.
func benchGrowth(ctx context.Context, b *bench) ([]section, error) {
	c, err := cluster.New(ctx, cluster.Options{Nodes: 1})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	etcd, err := c.StartEtcd(ctx, cluster.EtcdOptions{})
	if err != nil {
		return nil, err
	}
	client, err := dialEtcd(c.Underlay, etcd)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	var all []grown
	for _, n := range growthSizes {
		b.progress("growth: %d nodes", n)
		h := &holder{name: fmt.Sprint(n), nodes: n, node: c.Nodes[0], shelf: inEtcd{etcd, client, fmt.Sprintf("/%d/", n)}}
		g, err := h.grow(ctx, b.rounds(20, 5))
		if err != nil {
			return nil, fmt.Errorf("%d nodes: %w", n, err)
		}
		all = append(all, g)
	}
	if b.plot != "" {
		if err := os.WriteFile(b.plot, []byte(plot(all)), 0o644); err != nil { //nolint:gosec // a picture for all to see
			return nil, fmt.Errorf("write the plot: %w", err)
		}
	}
	return []section{growthSection(all)}, nil
}

// grow starts wgcnid on a node that knows nothing, changes single nodes of its
// mesh, and ends it again.
func (h *holder) grow(ctx context.Context, changes int) (g grown, err error) {
	if err := errors.Join(h.node.Reboot(ctx, stateFolder), h.makeMesh(ctx)); err != nil {
		return g, err
	}
	if h.cold, err = h.start(ctx); err != nil {
		return g, err
	}
	for range changes {
		if err := h.changeOne(ctx); err != nil {
			return g, err
		}
	}
	g = grown{nodes: h.nodes, cold: h.cold.took, coldCPU: h.cold.cpu, change: h.change.cpu.median(), elapsed: h.change.elapsed.median()}
	if g.resident, err = memory(h.helper.helper[0], "VmRSS"); err == nil && h.tunnel != 0 {
		g.ofTunnels, err = memory(h.tunnel, "VmRSS")
	}
	return g, errors.Join(err, h.process.Stop(ctx))
}

func growthSection(all []grown) section {
	s := section{title: "How cost grows with the mesh", figures: [3]string{"time", "memory", "cpu"}}
	for _, g := range all {
		var bound budget
		if g.nodes == budgetNodes {
			bound = atLeast(100)
		}
		s.rows = append(s.rows, row{
			what: fmt.Sprintf("%d nodes: full apply", g.nodes), time: milliseconds(g.cold.Seconds()), memory: mebibytes(g.resident), cpu: milliseconds(g.coldCPU.Seconds()),
			ratio: g.coldCPU.Seconds() / g.change, to: "one node changed, cpu", budget: bound,
		}, row{
			what: fmt.Sprintf("%d nodes: one node changed", g.nodes), time: milliseconds(g.elapsed), cpu: milliseconds(g.change),
		})
	}
	s.notes = append(s.notes, "by etcd; of wgcnid alone; memory is resident, after the changes; a full apply is a start that knows nothing, until all peers and their routes are in the kernel")
	return s
}
