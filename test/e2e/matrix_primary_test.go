package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/wgcni/wgcni/test/cluster"
	"github.com/wgcni/wgcni/test/matrix"
)

// A layout is a row of the table: a primary plugin and its IPAM.
type layout struct {
	row, ipam string
	network
	families []family // all by default
	// prepare makes what the primary needs besides its plugin, and returns how to remove it.
	prepare func(context.Context, *bed, family) (remove func() error, err error)
	// more is checked while the pods are there.
	more func(context.Context, *bed, []*cluster.Pod) error
}

func (b *bed) primaryCells() (cells []cell) {
	for _, l := range slices.Concat(bridgeLayouts(), flannelLayouts(), cloudLayouts()) {
		for _, f := range families {
			if l.families != nil && !slices.Contains(l.families, f) {
				continue
			}
			cells = append(cells, cell{
				matrix.Cell{Table: matrix.Primaries, Row: l.row, Detail: l.ipam, Column: string(f), Outcome: matrix.Works},
				func(ctx context.Context) error { return b.runPrimary(ctx, l, f) },
			})
		}
	}
	return append(cells, b.refusedCells()...)
}

func (b *bed) runPrimary(ctx context.Context, l layout, f family) (err error) {
	prepare := l.prepare
	if prepare == nil {
		prepare = routed
	}
	remove, err := prepare(ctx, b, f)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove(), b.clean()) }()
	if err := b.configure(ctx, l.network, f); err != nil {
		return err
	}
	return b.exchange(ctx, l.network, f, func(ctx context.Context, pods []*cluster.Pod) error {
		if l.more == nil {
			return nil
		}
		return l.more(ctx, b, pods)
	})
}

// routed lets the ordinary routes of the underlay lead to all pods, so that what
// is not encrypted would arrive, and be seen.
func routed(ctx context.Context, b *bed, _ family) (func() error, error) {
	return func() error { return b.routeAround(context.Background(), "delete") }, b.routeAround(ctx, "replace")
}

// bridgeLayouts are the reference plugins with veths.
func bridgeLayouts() []layout {
	bridge, ptp := map[string]any{"type": "bridge", "bridge": "cni0", "isGateway": true}, map[string]any{"type": "ptp"}
	masq := func(backend string) map[string]any { return map[string]any{"ipMasq": true, "ipMasqBackend": backend} }
	entry := func(ipam func(*cluster.Node, family) map[string]any, keys ...map[string]any) network {
		return network{primary: func(n *cluster.Node, f family) map[string]any {
			p := map[string]any{"ipam": ipam(n, f)}
			for _, k := range keys {
				maps.Copy(p, k)
			}
			return p
		}}
	}
	static := layout{row: "bridge", ipam: "static, addresses from the runtime", network: entry(
		func(_ *cluster.Node, f family) map[string]any {
			return map[string]any{"type": "static", "routes": defaultRoutes(f)}
		},
		bridge, map[string]any{"capabilities": map[string]any{"ips": true}})}
	static.options = func(n *cluster.Node, i int, f family) cluster.PodOptions {
		own := n.PodCIDRs()
		ips := of(f, fmt.Sprintf(`"%s/24"`, nth(own[0], 20+i)), fmt.Sprintf(`"%s/64"`, nth(own[1], 20+i)))
		return cluster.PodOptions{CapabilityArgs: `{"ips":[` + strings.Join(ips, ",") + `]}`}
	}
	return []layout{
		{row: "bridge", ipam: "host-local", network: entry(hostLocal, bridge)},
		{row: "bridge, `ipMasq` by iptables", ipam: "host-local", network: entry(hostLocal, bridge, masq("iptables"))},
		{row: "bridge, `ipMasq` by nftables", ipam: "host-local", network: entry(hostLocal, bridge, masq("nftables"))},
		{row: "ptp", ipam: "host-local", network: entry(hostLocal, ptp)},
		{row: "ptp, `ipMasq` by iptables", ipam: "host-local", network: entry(hostLocal, ptp, masq("iptables"))},
		{row: "ptp, `ipMasq` by nftables", ipam: "host-local", network: entry(hostLocal, ptp, masq("nftables"))},
		{row: "ptp", ipam: "host-local, several ranges", network: entry(severalRanges, ptp)},
		static,
	}
}

func hostLocal(n *cluster.Node, f family) map[string]any {
	own := n.PodCIDRs()
	var ranges []any
	for _, p := range of(f, own[0], own[1]) {
		ranges = append(ranges, []any{map[string]any{"subnet": p.String()}})
	}
	return map[string]any{"type": "host-local", "ranges": ranges, "routes": defaultRoutes(f)}
}

// severalRanges has two ranges a family, in one range set: an address is taken
// from whichever has one, and the first has room for a single pod.
func severalRanges(n *cluster.Node, f family) map[string]any {
	own := n.PodCIDRs()
	var ranges []any
	for _, p := range of(f, own[0], own[1]) {
		bits := p.Addr().BitLen()
		small := netip.PrefixFrom(p.Addr(), bits-4)
		large := netip.PrefixFrom(nth(p, 128), bits-5)
		ranges = append(ranges, []any{
			map[string]any{"subnet": small.String(), "rangeStart": nth(p, 2).String(), "rangeEnd": nth(p, 2).String()},
			map[string]any{"subnet": large.String()},
		})
	}
	return map[string]any{"type": "host-local", "ranges": ranges, "routes": defaultRoutes(f)}
}

func defaultRoutes(f family) []any {
	return of[any](f, map[string]any{"dst": "0.0.0.0/0"}, map[string]any{"dst": "::/0"})
}

// nth is the prefix's n-th address, of at most 255.
func nth(p netip.Prefix, n int) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	b[len(b)-1] += byte(n)
	a, _ := netip.AddrFromSlice(b)
	return a
}
