package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// shapedRate is the rate of the nodes' links in the second half.
const shapedRate = "1gbit"

// wire is a way for two pods to reach each other: a cluster of its own.
type wire struct {
	name           string
	cluster        *cluster.Cluster
	client, server *cluster.Pod
	tunnel         string // WireGuard's interface, whose counters must move; none for plain

	unshaped, shaped samples // bits per second
}

// benchThroughput measures TCP between pods in three ways, round about, first on
// links as fast as the machine and then on shaped ones.
func benchThroughput(ctx context.Context, b *bench) ([]section, error) {
	plain, ours, byHand := &wire{name: "plain"}, &wire{name: "wgcni"}, &wire{name: "WireGuard by hand"}
	wires := []*wire{plain, ours, byHand}
	for _, w := range wires {
		b.progress("throughput: two nodes, %s", w.name)
		c, err := cluster.New(ctx, cluster.Options{Nodes: 2})
		if err != nil {
			return nil, err
		}
		defer b.remove(c)
		w.cluster = c
	}
	if err := plain.routePlainly(ctx); err != nil {
		return nil, err
	}
	if err := ours.join(ctx); err != nil {
		return nil, err
	}
	if err := byHand.setUpByHand(ctx, ours); err != nil {
		return nil, err
	}
	rounds := b.rounds(4, 2)
	if err := measureRounds(ctx, b, wires, rounds, "unshaped", func(w *wire) *samples { return &w.unshaped }); err != nil {
		return nil, err
	}
	for _, w := range wires {
		for _, n := range w.cluster.Nodes {
			if err := n.Shape(ctx, shapedRate); err != nil {
				return nil, err
			}
		}
	}
	if err := measureRounds(ctx, b, wires, rounds, shapedRate, func(w *wire) *samples { return &w.shaped }); err != nil {
		return nil, err
	}
	return []section{throughputSection(plain, ours, byHand, rounds)}, nil
}

func measureRounds(ctx context.Context, b *bench, wires []*wire, rounds int, link string, into func(*wire) *samples) error {
	for i := range rounds {
		for at := range wires {
			w := wires[(at+i)%len(wires)] // another one first each time
			b.progress("throughput, %s: round %d of %d, %s", link, i+1, rounds, w.name)
			rate, err := w.measure(ctx, b)
			if err != nil {
				return fmt.Errorf("%s, %s link: %w", w.name, link, err)
			}
			*into(w) = append(*into(w), rate)
		}
	}
	return nil
}

// measure returns bits per second, and an error if not all of it went through
// the tunnel.
func (w *wire) measure(ctx context.Context, b *bench) (float64, error) {
	o := cluster.ThroughputOptions{Duration: b.span(4*time.Second, time.Second)}
	if !b.short {
		o.Warmup = time.Second
	}
	before, err := w.received(ctx)
	if err != nil {
		return 0, err
	}
	r, err := cluster.Throughput(ctx, w.client, w.server, w.server.IPv4(), o)
	if err != nil {
		return 0, err
	}
	after, err := w.received(ctx)
	if err != nil {
		return 0, err
	}
	carried := r.BytesPerSecond * o.Duration.Seconds()
	if w.tunnel != "" && float64(after-before) < carried {
		return 0, fmt.Errorf("the tunnel carried %d bytes of %.0f: the rest was not encrypted", after-before, carried)
	}
	return r.BytesPerSecond * 8, nil
}

// received is the server's node's counter, in bytes, summed over its peers.
func (w *wire) received(ctx context.Context) (int64, error) {
	if w.tunnel == "" {
		return 0, nil
	}
	return tunnelReceived(ctx, w.server.Node, w.tunnel)
}

func tunnelReceived(ctx context.Context, at *cluster.Node, tunnel string) (int64, error) {
	out, err := at.Run(ctx, "wg", "show", tunnel, "transfer")
	if err != nil {
		return 0, err
	}
	var sum int64
	for line := range strings.Lines(out) { // key, received, sent
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return 0, fmt.Errorf("read the transfer counters of %s: %q is not one", tunnel, line)
		}
		n, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the transfer counters of %s: %w", tunnel, err)
		}
		sum += n
	}
	return sum, nil
}

// bridgeOnly is the network of a wire without wgcni. Nothing masquerades, for
// none of the three.
func bridgeOnly(mtu int) cluster.NetworkOptions {
	primary := map[string]any{"ipMasq": false}
	if mtu != 0 {
		primary["mtu"] = mtu
	}
	return cluster.NetworkOptions{Plain: true, Primary: primary}
}

// routePlainly sets up what a cluster without wgcni has: a route to each node's pods.
func (w *wire) routePlainly(ctx context.Context) error {
	for _, n := range w.cluster.Nodes {
		if err := n.Configure(bridgeOnly(0)); err != nil {
			return err
		}
	}
	if err := w.eachWay(func(from, to *cluster.Node) error {
		return routes(ctx, from, to, func(p netip.Prefix) []string {
			via := to.IPv4
			if p.Addr().Is6() {
				via = to.IPv6
			}
			return []string{"via", via.String()}
		})
	}); err != nil {
		return err
	}
	return w.addPods(ctx)
}

// routes adds a route from a node to another one's pods, in the main table.
func routes(ctx context.Context, from, to *cluster.Node, way func(netip.Prefix) []string) error {
	for _, p := range to.PodCIDRs() {
		if _, err := from.Run(ctx, "ip", append([]string{"route", "add", p.String()}, way(p)...)...); err != nil {
			return err
		}
	}
	return nil
}

// join sets up wgcni as it is meant to be.
func (w *wire) join(ctx context.Context) error { return w.joinWith(ctx, nil) }

func (w *wire) joinWith(ctx context.Context, stanza map[string]any) error {
	w.tunnel = "wgcni0"
	if _, err := w.cluster.JoinAll(ctx, cluster.NetworkOptions{Primary: map[string]any{"ipMasq": false}, Stanza: stanza}); err != nil {
		return err
	}
	return w.addPods(ctx)
}

func (w *wire) eachWay(f func(from, to *cluster.Node) error) error {
	a, b := w.cluster.Nodes[0], w.cluster.Nodes[1]
	return errors.Join(f(a, b), f(b, a))
}

// addPods makes a pod on each node and sees that they reach each other.
func (w *wire) addPods(ctx context.Context) (err error) {
	nodes := w.cluster.Nodes
	if w.client, err = nodes[0].AddPod(ctx, cluster.NetworkName, "client", cluster.PodOptions{}); err != nil {
		return err
	}
	if w.server, err = nodes[1].AddPod(ctx, cluster.NetworkName, "server", cluster.PodOptions{}); err != nil {
		return err
	}
	return cluster.Poll(ctx, w.name+": the pods to reach each other", func() error {
		_, err := cluster.Ping(ctx, w.client, w.server.IPv4(), nil)
		return err
	})
}

func throughputSection(plain, ours, byHand *wire, rounds int) section {
	s := section{title: fmt.Sprintf("Pod to pod, one TCP stream, %d rounds", rounds)}
	for _, link := range []struct {
		name           string
		of             func(*wire) samples
		plain, against budget
	}{
		{"unshaped", func(w *wire) samples { return w.unshaped }, budget{}, atLeast(0.98)},
		{shapedRate + " link", func(w *wire) samples { return w.shaped }, atLeast(0.95), budget{}},
	} {
		for _, w := range []*wire{plain, ours, byHand} {
			r := row{what: link.name + ": " + w.name, median: megabits(link.of(w).median())}
			switch w {
			case ours:
				r.ratio, r.to, r.budget = link.of(w).paired(link.of(plain)), plain.name, link.plain
			case byHand:
				r.ratio, r.to = link.of(w).paired(link.of(plain)), plain.name
			}
			s.rows = append(s.rows, r)
		}
		s.rows = append(s.rows, row{
			what: link.name + ": wgcni", ratio: link.of(ours).paired(link.of(byHand)), to: byHand.name, budget: link.against,
		})
	}
	s.notes = append(s.notes, "client, server and both nodes' tunnels share this machine's CPUs; the tunnels' own counters agree that all was encrypted")
	return s
}

func megabits(bitsPerSecond float64) string { return fmt.Sprintf("%.0f Mbit/s", bitsPerSecond/1e6) }
