package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

const (
	nodeCount   = 3
	podsPerNode = 2
	echoPort    = 7777
	// payload is what the pods tell each other, and what no one else may read.
	payload = "a secret of the pods, 0123456789"
	// exchangeTimeout leaves time for handshakes of both ends that collide, several
	// times in a row on a busy machine: each costs REKEY_TIMEOUT, 5 s.
	exchangeTimeout = 40 * time.Second
)

// clusterCIDRs are those of conflist/.
var clusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}

var steps = []step{
	{"Start three nodes on one network", startNodes},
	{"Send between pods, without wgcni", talkPlain},
	{"Add one entry to each conflist", addEntry},
	{"Start wgcnid on each node", startHelpers},
	{"Add two pods per node with cnitool", addPods},
	{"Let all pods talk to all", talkAll},
	{"Capture between the nodes", lookAtUnderlay},
	{"Ask `wgcnid status` on node-a", showStatus},
	{"Stop wgcnid on node-a under a UDP stream", stopHelper},
	{"Start it again", restartHelper},
	{"Stop it, and destroy the tunnel", breakTunnel},
	{"Start it again", mendTunnel},
	{"Delete pods and entry, `wgcnid leave --purge`", leave},
}

// parallel calls f for all items at once and returns all errors.
func parallel[T any](items []T, f func(T) error) error {
	errs := make([]error, len(items))
	var running sync.WaitGroup
	for i, item := range items {
		running.Go(func() { errs[i] = f(item) })
	}
	running.Wait()
	return errors.Join(errs...)
}

func startNodes(ctx context.Context, d *demo) (string, error) {
	var err error
	if d.cluster, err = cluster.New(ctx, cluster.Options{Nodes: nodeCount}); err != nil {
		return "", err
	}
	var names []string
	for _, n := range d.cluster.Nodes {
		names = append(names, fmt.Sprintf("%s %s", n.Name, n.IPv4))
		// Plain routes from node to node, as any cluster has them. They stay: what
		// wgcni should fail to encrypt would be delivered all the same.
		for _, other := range d.cluster.Nodes {
			if other == n {
				continue
			}
			pods := other.PodCIDRs()
			if _, err := n.Batch(ctx, fmt.Sprintf("route add %s via %s\nroute add %s via %s\n",
				pods[0], other.IPv4, pods[1], other.IPv6), "ip", "-batch", "-"); err != nil {
				return "", fmt.Errorf("add plain routes to %s: %w", other.Name, err)
			}
		}
	}
	return strings.Join(names, ", "), nil
}

func startCapture(d *demo) (*cluster.Capture, error) {
	return cluster.StartCapture(d.cluster.Underlay, cluster.Bridge, cluster.CaptureOptions{
		Markers: [][]byte{[]byte(payload)}, Prefixes: clusterCIDRs,
	})
}

// talkPlain shows that the capture finds plaintext where there is some.
func talkPlain(ctx context.Context, d *demo) (string, error) {
	err := parallel(d.cluster.Nodes, func(n *cluster.Node) error {
		return n.Configure(cluster.NetworkOptions{Plain: true})
	})
	if err != nil {
		return "", err
	}
	if err := d.addPods(ctx, 1); err != nil {
		return "", err
	}
	capture, err := startCapture(d)
	if err != nil {
		return "", err
	}
	sent := 0
	for i, from := range d.pods {
		to := d.pods[(i+1)%len(d.pods)]
		for _, ip := range []netip.Addr{to.IPv4(), to.IPv6()} {
			if _, err := cluster.UDP(ctx, from, netip.AddrPortFrom(ip, echoPort), []byte(payload)); err != nil {
				return "", err
			}
			sent += 2 // the server sends it back
		}
	}
	seen, err := capture.Stop(ctx)
	if err != nil {
		return "", err
	}
	if seen.WithMarker != sent {
		return "", fmt.Errorf("the capture has found the payload in %d of %d packets: %s", seen.WithMarker, sent, seen)
	}
	d.show(seen.Findings[0].Why)
	d.showMore(seen.String())
	if err := d.deletePods(ctx); err != nil {
		return "", err
	}
	if d.before, err = d.readStates(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("a capture between the nodes reads %d of %d packets", seen.WithMarker, sent), nil
}

func addEntry(_ context.Context, d *demo) (string, error) {
	for _, n := range d.cluster.Nodes {
		if err := n.Configure(cluster.NetworkOptions{}); err != nil {
			return "", err
		}
	}
	first := d.cluster.Nodes[0]
	text, err := first.Conflist(cluster.NetworkOptions{})
	if err != nil {
		return "", err
	}
	lines, err := entryLines(text)
	if err != nil {
		return "", fmt.Errorf("conflist of %s: %w", first.Name, err)
	}
	for _, line := range lines {
		d.show(d.paint("32", line))
	}
	d.showMore(text)
	return "bridge, host-local and ipMasq stay as they are", nil
}

// entryLines is the conflist's last entry, a line a key.
func entryLines(conflist string) ([]string, error) {
	var list struct {
		Plugins []map[string]json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal([]byte(conflist), &list); err != nil {
		return nil, err
	}
	entry := list.Plugins[len(list.Plugins)-1]
	lines := []string{`+ { "type": ` + string(entry["type"])}
	for _, key := range slices.Sorted(maps.Keys(entry)) {
		if key == "type" {
			continue
		}
		var value any
		if err := json.Unmarshal(entry[key], &value); err != nil {
			return nil, err
		}
		compact, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		lines[len(lines)-1] += ","
		lines = append(lines, fmt.Sprintf("+   %q: %s", key, compact))
	}
	lines[len(lines)-1] += " }"
	return lines, nil
}

func startHelpers(ctx context.Context, d *demo) (string, error) {
	var err error
	if d.capture, err = startCapture(d); err != nil {
		return "", err
	}
	start := time.Now()
	for _, n := range d.cluster.Nodes {
		if err := d.startHelper(n); err != nil {
			return "", err
		}
	}
	if err := d.cluster.AwaitConverged(ctx); err != nil {
		return "", err
	}
	took := time.Since(start)
	met, err := d.cluster.Nodes[0].Tunnel()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("all have met and hold their plan after %d ms (%s)", took.Milliseconds(), met.Kind()), nil
}

func (d *demo) startHelper(n *cluster.Node) error {
	h, err := n.StartHelper()
	if err != nil {
		return err
	}
	if d.helpers == nil {
		d.helpers = map[*cluster.Node]*cluster.Process{}
	}
	d.helpers[n] = h
	d.logs = append(d.logs, helperLog{n, h.Log})
	return nil
}
