package main

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/test/cluster"
)

// handTunnel is the interface that is set up with wg and ip.
const handTunnel = "wg0"

// setUpByHand sets up what wgcni sets up, as a person does: same WireGuard, same
// MTU, same allowed IPs, with the routes in the main table.
func (w *wire) setUpByHand(ctx context.Context, like *wire) error {
	mtu, err := mtuOf(like.cluster.Nodes[0], like.tunnel)
	if err != nil {
		return err
	}
	w.tunnel = handTunnel
	keys := map[*cluster.Node]wgtypes.Key{}
	for _, n := range w.cluster.Nodes {
		if err := n.Configure(bridgeOnly(mtu)); err != nil {
			return err
		}
		if keys[n], err = wgtypes.GeneratePrivateKey(); err != nil {
			return fmt.Errorf("make a key: %w", err)
		}
		if err := startWireGuard(ctx, w.cluster, n); err != nil {
			return err
		}
	}
	if err := w.eachWay(func(from, to *cluster.Node) error {
		if err := configureByHand(ctx, from, to, keys, mtu); err != nil {
			return err
		}
		return routes(ctx, from, to, func(netip.Prefix) []string { return []string{"dev", handTunnel} })
	}); err != nil {
		return err
	}
	return w.addPods(ctx)
}

// startWireGuard makes the interface: the kernel's, or wireguard-go's own where
// wgcni would use userspace as well.
func startWireGuard(ctx context.Context, c *cluster.Cluster, n *cluster.Node) error {
	if kernel.HasWireGuard() {
		_, err := n.Run(ctx, "ip", "link", "add", handTunnel, "type", "wireguard")
		return err
	}
	p, err := n.Start(filepath.Join(c.BinDir, "wireguard"), "-f", handTunnel)
	if err != nil {
		return err
	}
	if err := cluster.Poll(ctx, "wireguard-go to be ready", func() error {
		_, err := n.Run(ctx, "wg", "show", handTunnel)
		return err
	}); err != nil {
		return fmt.Errorf("%w; its log:\n%s", err, p.Log)
	}
	return nil
}

func configureByHand(ctx context.Context, n, peer *cluster.Node, keys map[*cluster.Node]wgtypes.Key, mtu int) error {
	var allowed []string
	for _, p := range peer.PodCIDRs() {
		allowed = append(allowed, p.String())
	}
	conf := fmt.Sprintf("[Interface]\nPrivateKey = %s\nListenPort = 51820\n[Peer]\nPublicKey = %s\nEndpoint = %s\nAllowedIPs = %s\n",
		keys[n], keys[peer].PublicKey(), netip.AddrPortFrom(peer.IPv4, 51820), strings.Join(allowed, ", "))
	if _, err := n.Batch(ctx, conf, "wg", "setconf", handTunnel, "/dev/stdin"); err != nil {
		return err
	}
	_, err := n.Run(ctx, "ip", "link", "set", handTunnel, "mtu", strconv.Itoa(mtu), "up")
	return err
}

func mtuOf(at cluster.Endpointer, name string) (mtu int, err error) {
	err = at.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("look up %s: %w", name, err)
		}
		mtu = link.Attrs().MTU
		return nil
	})
	return mtu, err
}
