package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/wgcni/wgcni/test/cluster"
)

// flannelPrimary is the entry of flannel's own manifest.
func flannelPrimary(*cluster.Node, family) map[string]any {
	return map[string]any{"type": "flannel", "delegate": map[string]any{"hairpinMode": true, "isDefaultGateway": true}}
}

// flannelLayouts have the real flanneld, on a real etcd, and flannel's plugin.
func flannelLayouts() (out []layout) {
	for _, backend := range []string{"vxlan", "host-gw"} {
		out = append(out, layout{
			row: "flannel, " + backend, ipam: "host-local, by flannel",
			// Without IPv4 flannel's etcd mode gives all nodes the same range: it tells them
			// apart by their IPv4 addresses (flannel v0.28.4, pkg/subnet/etcd, findLeaseByIP).
			families: []family{ipv4, dual},
			network:  network{version: "0.4.0", primary: flannelPrimary}, // the newest that its plugin speaks
			prepare: func(ctx context.Context, b *bed, f family) (func() error, error) {
				return b.startFlannel(ctx, backend, f)
			},
			more: flannelTraffic,
		})
	}
	return out
}

// flannelTraffic: pods have the tunnel's MTU and not flannel's, and flannel's own
// routes to the other node are there, unused.
func flannelTraffic(ctx context.Context, b *bed, pods []*cluster.Pod) error {
	for _, p := range pods {
		tunnel, err := p.Node.Run(ctx, "cat", "/sys/class/net/wgcni0/mtu")
		if err != nil {
			return err
		}
		pod, err := p.Run(ctx, "ip", "-o", "link", "show", "eth0")
		if err != nil {
			return err
		}
		if want := " mtu " + strings.TrimSpace(tunnel) + " "; !strings.Contains(pod, want) {
			return fmt.Errorf("%s: %s, want%s", p, strings.TrimSpace(pod), want)
		}
	}
	for _, ip := range pods[2].Result.IPs {
		flag := "-4"
		if ip.Address.Addr().Is6() {
			flag = "-6"
		}
		out, err := b.Nodes[0].Run(ctx, "ip", flag, "route", "show", "match", ip.Address.Addr().String(), "scope", "global")
		if err != nil {
			return err
		}
		if !strings.Contains(out, ip.Address.Masked().String()) {
			return fmt.Errorf("flannel has no route to %s on %s: %s", ip.Address, b.Nodes[0], out)
		}
	}
	return nil
}

// startFlannel starts flanneld on both nodes; what it returns takes all of it away.
func (b *bed) startFlannel(ctx context.Context, backend string, f family) (func() error, error) {
	flannel, err := b.newFlannel(ctx, backend, f)
	if err != nil {
		return nil, err
	}
	daemons := make([]*cluster.Process, len(b.Nodes))
	remove := func() error {
		return together([]int{0, 1}, func(i int) error {
			if daemons[i] != nil {
				_ = daemons[i].Kill() // what it would take away itself, RemoveFlannel does
			}
			return b.Nodes[i].RemoveFlannel(context.Background())
		})
	}
	err = together([]int{0, 1}, func(i int) (err error) {
		daemons[i], err = flannel.Start(ctx, b.Nodes[i])
		return err
	})
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	return remove, nil
}

func (b *bed) newFlannel(ctx context.Context, backend string, f family) (_ *cluster.Flannel, err error) {
	if b.etcd == nil {
		if b.etcd, err = b.StartEtcd(ctx, cluster.EtcdOptions{}); err != nil {
			return nil, err
		}
	}
	o := cluster.FlannelOptions{Backend: backend}
	if f != ipv6 {
		o.IPv4 = netip.MustParsePrefix("10.244.0.0/16")
	}
	if f != ipv4 {
		o.IPv6 = netip.MustParsePrefix("fd00:244::/48")
	}
	return cluster.NewFlannel(ctx, b.etcd, o)
}
