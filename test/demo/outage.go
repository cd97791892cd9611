package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

const (
	streamRate = 200 // datagrams per second
	// attemptTimeout is how long each exchange may try while the tunnel is down.
	attemptTimeout = 500 * time.Millisecond
)

// startStream lets the first pod of the first node send to the second node.
func (d *demo) startStream(ctx context.Context) (err error) {
	to := netip.AddrPortFrom(d.pods[podsPerNode].IPv4(), echoPort)
	if d.stream, err = cluster.StartStream(d.pods[0], to, cluster.StreamOptions{Rate: streamRate}); err != nil {
		return err
	}
	return d.awaitReceived(ctx, streamRate/4)
}

// awaitReceived waits for so many more answers to come.
func (d *demo) awaitReceived(ctx context.Context, more int) error {
	want := d.stream.Report().Received + more
	return cluster.Poll(ctx, fmt.Sprintf("%d more datagrams of the stream", more), func() error {
		if r := d.stream.Report(); r.Received < want {
			return errors.New(r.String())
		}
		return nil
	})
}

// awaitSent waits for so many more datagrams to be sent.
func (d *demo) awaitSent(ctx context.Context, more int) error {
	want := d.stream.Report().Sent + more
	return cluster.Poll(ctx, fmt.Sprintf("%d more datagrams to be sent", more), func() error {
		if r := d.stream.Report(); r.Sent < want {
			return errors.New(r.String())
		}
		return nil
	})
}

// awaitNoneLost waits until all that was sent so far has come back.
func (d *demo) awaitNoneLost(ctx context.Context) (cluster.StreamReport, error) {
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	var r cluster.StreamReport
	err := cluster.Poll(ctx, "the last datagrams of the stream", func() error {
		if r = d.stream.Report(); r.Lost > 0 {
			return fmt.Errorf("lost or under way: %s", r)
		}
		return nil
	})
	return r, err
}

// stopHelper ends the node's helper, as systemd does.
func (d *demo) stopHelper(ctx context.Context, n *cluster.Node) error {
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	if err := d.helpers[n].Stop(ctx); err != nil {
		return fmt.Errorf("stop wgcnid on %s: %w", n.Name, err)
	}
	return nil
}

func stopHelper(ctx context.Context, d *demo) (string, error) {
	n := d.cluster.Nodes[0]
	var err error
	if d.tunnel, err = n.Tunnel(); err != nil {
		return "", err
	}
	if err := d.startStream(ctx); err != nil {
		return "", err
	}
	if err := d.stopHelper(ctx, n); err != nil {
		return "", err
	}
	if err := d.awaitSent(ctx, streamRate); err != nil {
		return "", err
	}
	r, err := d.awaitNoneLost(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("traffic goes on, %d sent, %d lost", r.Sent, r.Lost), nil
}

func restartHelper(ctx context.Context, d *demo) (string, error) {
	n := d.cluster.Nodes[0]
	if err := d.startHelper(n); err != nil {
		return "", err
	}
	if err := d.cluster.AwaitConverged(ctx); err != nil {
		return "", err
	}
	if err := d.awaitSent(ctx, streamRate/2); err != nil {
		return "", err
	}
	r := d.stream.Stop()
	d.stream = nil
	if r.Lost > 0 || r.Duplicates > 0 {
		return "", fmt.Errorf("the stream: %s", r)
	}
	now, err := n.Tunnel()
	if err != nil {
		return "", err
	}
	if now != d.tunnel {
		return "", fmt.Errorf("it was %s, and is %s now", d.tunnel, now)
	}
	return fmt.Sprintf("same %s, %d sent, %d lost, longest gap %d ms", now, r.Sent, r.Lost, r.LongestGap.Milliseconds()), nil
}

func breakTunnel(ctx context.Context, d *demo) (string, error) {
	n := d.cluster.Nodes[0]
	if err := d.startStream(ctx); err != nil {
		return "", err
	}
	if err := d.stopHelper(ctx, n); err != nil {
		return "", err
	}
	seen, err := d.look(ctx)
	if err != nil {
		return "", err
	}
	how, err := n.LoseTunnel(ctx)
	if err != nil {
		return "", err
	}
	if err := d.capture.Sync(ctx); err != nil { // what was under way has arrived
		return "", err
	}
	before := d.stream.Report()
	through, tried, err := d.attempt(ctx, n)
	if err != nil {
		return "", err
	}
	after := d.stream.Report()
	now, err := d.look(ctx)
	if got := after.Received - before.Received; through > 0 || got > 0 {
		err = errors.Join(err, fmt.Errorf("%d exchanges and %d datagrams of the stream came through without a tunnel", through, got))
	}
	if err != nil {
		return "", err
	}
	fact := fmt.Sprintf("%s; 0 of %d sent came through, 0 of %d packets in plaintext",
		how, after.Sent-before.Sent+tried, now.Packets-seen.Packets)
	dropped, err := d.dropped(ctx)
	if dropped > 0 {
		fact += fmt.Sprintf(", %d dropped by the guard", dropped)
	}
	return fact, err
}

// attempt tries all exchanges between the pods of a node and those of the
// others, both ways, and counts those that are answered.
func (d *demo) attempt(ctx context.Context, n *cluster.Node) (through, tried int, err error) {
	var all []exchange
	for _, from := range d.pods {
		for _, to := range d.pods {
			if from.Node != to.Node && (from.Node == n || to.Node == n) {
				all = append(all, exchanges(from, to)...)
			}
		}
	}
	succeeded := make(chan struct{}, len(all))
	_ = parallel(all, func(e exchange) error { // that they fail is what is wanted
		err := e.do(ctx, attemptTimeout)
		if err == nil || errors.Is(err, errSource) {
			succeeded <- struct{}{}
		}
		return err
	})
	return len(succeeded), len(all), ctx.Err()
}

// dropped is how many plaintext packets the filters of all nodes have refused.
func (d *demo) dropped(ctx context.Context) (uint64, error) {
	var sum uint64
	for _, n := range d.cluster.Nodes {
		s, err := n.Status(ctx)
		if err != nil {
			return sum, err
		}
		sum += s.Dropped.Out.Packets + s.Dropped.In.Packets
	}
	return sum, nil
}

func mendTunnel(ctx context.Context, d *demo) (string, error) {
	start := time.Now()
	if err := d.startHelper(d.cluster.Nodes[0]); err != nil {
		return "", err
	}
	if err := d.awaitReceived(ctx, 1); err != nil {
		return "", err
	}
	back := time.Since(start)
	d.showMore("the stream, outage included: " + d.stream.Stop().String())
	d.stream = nil
	if err := d.cluster.AwaitConverged(ctx); err != nil {
		return "", err
	}
	ok, all, err := d.talk(ctx)
	if err != nil {
		return "", fmt.Errorf("%d of %d exchanges: %w", ok, all, err)
	}
	if _, err := d.look(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("the stream is back after %d ms, %d of %d exchanges succeed", back.Milliseconds(), ok, all), nil
}
