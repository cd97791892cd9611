package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// direction is one that throughput is measured in.
type direction struct {
	name           string
	client, server cluster.Executor
	to             netip.Addr
	at             *cluster.Node // where the server is: its tunnel's counters must move

	rates samples // bits per second
}

// benchVM measures TCP between a pod and a machine that is no node, beside that
// between two pods of the same mesh.
func benchVM(ctx context.Context, b *bench) ([]section, error) {
	b.progress("vm: two nodes and a virtual machine")
	c, err := cluster.New(ctx, cluster.Options{Nodes: 2})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	w := &wire{name: "wgcni", cluster: c}
	external := map[string]any{"externalCIDRs": cluster.MachineCIDRs()}
	if err := w.joinWith(ctx, external); err != nil {
		return nil, err
	}
	vm, err := c.AddMachine(ctx, "vm")
	if err != nil {
		return nil, err
	}
	external["encryptNodes"] = true
	if err := vm.Configure(cluster.NetworkOptions{Stanza: external}); err != nil {
		return nil, err
	}
	if _, err := vm.StartHelper(); err != nil {
		return nil, err
	}
	for _, to := range []netip.Addr{w.client.IPv4(), w.server.IPv4()} {
		err := cluster.Poll(ctx, "the virtual machine to reach the pods", func() error {
			_, err := cluster.Ping(ctx, vm, to, nil)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	nodes := c.Nodes
	directions := []*direction{
		{name: "pod to pod", client: w.client, server: w.server, to: w.server.IPv4(), at: nodes[1]},
		{name: "virtual machine to pod", client: vm, server: w.server, to: w.server.IPv4(), at: nodes[1]},
		{name: "pod to virtual machine", client: w.client, server: vm, to: vm.IPv4, at: vm},
	}
	rounds := b.rounds(4, 2)
	for i := range rounds {
		for at := range directions {
			x := directions[(at+i)%len(directions)] // another one first each time
			b.progress("vm: round %d of %d, %s", i+1, rounds, x.name)
			if err := x.measure(ctx, b); err != nil {
				return nil, fmt.Errorf("%s: %w", x.name, err)
			}
		}
	}
	s := section{title: fmt.Sprintf("A virtual machine and a pod, one TCP stream, %d rounds", rounds)}
	for i, x := range directions {
		r := row{what: x.name, median: megabits(x.rates.median())}
		if i > 0 {
			r.ratio, r.to, r.budget = x.rates.paired(directions[0].rates), directions[0].name, atLeast(0.95)
		}
		s.rows = append(s.rows, r)
	}
	return []section{s}, nil
}

// measure adds a rate, and returns an error if not all of it went through the tunnel.
func (x *direction) measure(ctx context.Context, b *bench) error {
	o := cluster.ThroughputOptions{Duration: b.span(4*time.Second, time.Second)}
	if !b.short {
		o.Warmup = time.Second
	}
	before, err := tunnelReceived(ctx, x.at, "wgcni0")
	if err != nil {
		return err
	}
	r, err := cluster.Throughput(ctx, x.client, x.server, x.to, o)
	if err != nil {
		return err
	}
	after, err := tunnelReceived(ctx, x.at, "wgcni0")
	if err != nil {
		return err
	}
	if carried := r.BytesPerSecond * o.Duration.Seconds(); float64(after-before) < carried {
		return fmt.Errorf("the tunnel carried %d bytes of %.0f: the rest was not encrypted", after-before, carried)
	}
	x.rates = append(x.rates, r.BytesPerSecond*8)
	return nil
}
