package main

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

// The mesh of a full apply.
const (
	applyPeers    = 1000
	applyPrefixes = 30 // of each peer
	applyBits     = 28 // of each prefix
)

// stateFolder is what a node keeps over a boot.
const stateFolder = config.DefaultStateDir

// benchApply sets up the same peers, allowed IPs and routes by `wgcnid sync`, and by
// `wg syncconf` and `ip -batch`, in turns, each time on a node that has just booted.
func benchApply(ctx context.Context, b *bench) ([]section, error) {
	c, err := cluster.New(ctx, cluster.Options{Nodes: 2})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	records, err := applyRecords()
	if err != nil {
		return nil, err
	}
	shelf := inFile(filepath.Join(c.Shared, "apply.json"))
	if err := shelf.fill(ctx, records); err != nil {
		return nil, err
	}
	ours, theirs := c.Nodes[0], c.Nodes[1]
	if err := ours.Configure(cluster.NetworkOptions{
		Stanza: map[string]any{"clusterCIDRs": []string{clusterCIDR, "fd00:244::/32"}, "registry": shelf.registry()},
	}); err != nil {
		return nil, err
	}
	conf, batch, err := byHandOf(records)
	if err != nil {
		return nil, err
	}
	var sync, byHand, syncSpan, byHandSpan samples
	rounds := b.rounds(7, 2)
	for i := range rounds {
		b.progress("full apply: round %d of %d", i+1, rounds)
		whole, span, err := timeApply(ctx, ours, config.DefaultInterface, func() error {
			_, err := ours.Wgcnid(ctx, "sync")
			return err
		})
		if err != nil {
			return nil, err
		}
		sync, syncSpan = append(sync, whole.Seconds()), append(syncSpan, span.Seconds())
		whole, span, err = timeApply(ctx, theirs, handTunnel, func() error { return applyByHand(ctx, c, theirs, conf, batch) })
		if err != nil {
			return nil, err
		}
		byHand, byHandSpan = append(byHand, whole.Seconds()), append(byHandSpan, span.Seconds())
	}
	what := fmt.Sprintf("%d peers, %d prefixes each: ", applyPeers, applyPrefixes)
	return []section{{
		title: "A full apply",
		rows: []row{
			{what: what + "link to last route, wgcnid sync", median: milliseconds(syncSpan.median()), p90: milliseconds(syncSpan.quantile(.9)), ratio: syncSpan.paired(byHandSpan), to: "by hand", budget: atMost(1)},
			{what: what + "link to last route, wg syncconf, ip -batch", median: milliseconds(byHandSpan.median()), p90: milliseconds(byHandSpan.quantile(.9))},
			{what: what + "whole, wgcnid sync", median: milliseconds(sync.median()), p90: milliseconds(sync.quantile(.9)), ratio: sync.paired(byHand), to: "by hand"},
			{what: what + "whole, wg syncconf, ip -batch", median: milliseconds(byHand.median()), p90: milliseconds(byHand.quantile(.9))},
		},
		notes: []string{
			"on a node that has just booted; from the kernel's word of the interface to that of its last route both ways do the same: key, peers, allowed IPs, routes",
			"whole processes have no budget: wgcnid sync also reads the registry's file and checks it, plans, sets up filter and rules, greets every peer, writes what it knows to its disk, publishes its record, and prints what it did",
		},
	}}, nil
}

// applyRecords have prefixes of which no two can be joined: every second /28.
func applyRecords() ([]registry.Record, error) {
	records, err := makeRecords(applyPeers, registry.Trust{})
	if err != nil {
		return nil, err
	}
	for i := range records {
		r := &records[i]
		since := r.Since
		r.Prefixes = nil
		for j := range applyPrefixes {
			n := uint32(i)<<10 | uint32(j)<<5 // a /22 for each
			a := netip.AddrFrom4([4]byte{10, byte(64 + n>>16), byte(n >> 8), byte(n)})
			r.Prefixes = append(r.Prefixes, mesh.Claim{Prefix: netip.PrefixFrom(a, applyBits), Since: since})
		}
		if err := r.Validate(); err != nil {
			return nil, fmt.Errorf("make peer %d: %w", i, err)
		}
	}
	return records, nil
}

// byHandOf are the inputs of wg and ip with the same content.
func byHandOf(records []registry.Record) (conf, batch string, err error) {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return "", "", fmt.Errorf("make a key: %w", err)
	}
	var wg, ip strings.Builder
	fmt.Fprintf(&wg, "[Interface]\nPrivateKey = %s\nListenPort = 51820\nFwMark = 0x1000000\n", key)
	fmt.Fprintf(&ip, "link set %s mtu 1420 up\n", handTunnel)
	for _, r := range records {
		var allowed []string
		for _, c := range r.Prefixes {
			allowed = append(allowed, c.Prefix.String())
			fmt.Fprintf(&ip, "route add %s dev %s table 5182\n", c.Prefix, handTunnel)
		}
		fmt.Fprintf(&wg, "[Peer]\nPublicKey = %s\nEndpoint = %s\nAllowedIPs = %s\n", r.PublicKey, r.Endpoints[0], strings.Join(allowed, ", "))
	}
	ip.WriteString("rule add not fwmark 0x1000000/0x1000000 lookup 5182 priority 5182\n")
	return wg.String(), ip.String(), nil
}

// timeApply times what sets up a node's tunnel, on a node that has just booted: all of
// it, and from the interface to the last route.
func timeApply(ctx context.Context, n *cluster.Node, tunnel string, apply func() error) (whole, span time.Duration, err error) {
	if err := n.Reboot(ctx, stateFolder); err != nil {
		return 0, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel() // ends the watch, whatever has become of it
	watch, err := watchSpan(ctx, n, tunnel, applyBits, applyPeers*applyPrefixes)
	if err != nil {
		return 0, 0, err
	}
	begun := monotonic()
	if err := apply(); err != nil {
		return 0, 0, err
	}
	whole = monotonic() - begun
	if span, err = watch.await(); err != nil {
		return 0, 0, err
	}
	return whole, span, checkApplied(ctx, n, tunnel)
}

func applyByHand(ctx context.Context, c *cluster.Cluster, n *cluster.Node, conf, batch string) error {
	if err := startWireGuard(ctx, c, n); err != nil {
		return err
	}
	if _, err := n.Batch(ctx, conf, "wg", "syncconf", handTunnel, "/dev/stdin"); err != nil {
		return err
	}
	_, err := n.Batch(ctx, batch, "ip", "-batch", "-")
	return err
}

// checkApplied counts what both ways must have come to.
func checkApplied(ctx context.Context, n *cluster.Node, tunnel string) error {
	routes, err := n.Run(ctx, "ip", "-4", "route", "show", "table", "all", "dev", tunnel, "type", "unicast")
	if err != nil {
		return err
	}
	allowed, err := n.Run(ctx, "wg", "show", tunnel, "allowed-ips")
	if err != nil {
		return err
	}
	const want = applyPeers * applyPrefixes
	if r, a := countPrefixes(routes), countPrefixes(allowed); r != want || a != want {
		return fmt.Errorf("%s of %s: %d routes and %d allowed IPs, want %d of each (WireGuard in the kernel: %v)", tunnel, n, r, a, want, kernel.HasWireGuard())
	}
	return nil
}

// countPrefixes counts words: a key may have "/28" in it.
func countPrefixes(text string) (n int) {
	for word := range strings.FieldsSeq(text) {
		if strings.HasSuffix(word, fmt.Sprintf("/%d", applyBits)) {
			n++
		}
	}
	return n
}
