package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Uplink is a node's interface on the underlay.
const Uplink = "eth0"

// Node is a machine on the underlay.
type Node struct {
	*Machine

	// IPv4 and IPv6 are the node's addresses on the underlay.
	IPv4, IPv6 netip.Addr

	cluster *Cluster
	index   int
}

func nodeIPv4(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + i)})
}

// nodeIPv6 writes the number in decimal digits, as people do: node 0 is ::10.
func nodeIPv6(i int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("2001:db8:1::%d", 10+i))
}

// hardwareAddr is fixed, as a network card's is, so that a reboot leaves no
// stale neighbour entries behind.
func hardwareAddr(host byte) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0, 0, 0, 0, host}
}

// makeBridge acts in the calling thread's network namespace.
func makeBridge(mtu int) error {
	// The kernel may hand bridged packets to iptables' hooks. The underlay is a wire.
	for _, key := range []string{"arptables", "iptables", "ip6tables"} {
		err := sysctl("bridge/bridge-nf-call-"+key, "0")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = Bridge, mtu, hardwareAddr(1)
	// Without a querier, snooping may lose neighbour discovery's multicast.
	noSnooping := false
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &noSnooping}); err != nil {
		return fmt.Errorf("add %s: %w", Bridge, err)
	}
	return configure(Bridge, Gateway4, Gateway6)
}

// configure gives an interface its addresses and sets it up, in the calling
// thread's network namespace.
func configure(name string, ip4, ip6 netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	// Also the link-local address shall be of use at once.
	if err := sysctl("ipv6/conf/"+name+"/accept_dad", "0"); err != nil {
		return err
	}
	for _, p := range []netip.Prefix{netip.PrefixFrom(ip4, 24), netip.PrefixFrom(ip6, 64)} {
		addr := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// sysctl sets a key below net, of the calling thread's network namespace.
func sysctl(key, value string) error {
	if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0); err != nil {
		return fmt.Errorf("set sysctl net/%s to %s: %w", key, value, err)
	}
	return nil
}

// connect links the node to the underlay and waits until it reaches its gateways.
func (n *Node) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := n.plug(); err != nil {
		return fmt.Errorf("link %s to the underlay: %w", n.Name, err)
	}
	if rate := n.cluster.opts.Rate; rate != "" {
		if err := n.Shape(ctx, rate); err != nil {
			return err
		}
	}
	for _, gw := range []netip.Addr{Gateway4, Gateway6} {
		err := Poll(ctx, fmt.Sprintf("%s to reach %s", n.Name, gw), func() error {
			_, err := Ping(ctx, n, gw, nil)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) plug() error {
	ns, err := os.Open(n.netns())
	if err != nil {
		return err
	}
	defer ns.Close()
	err = n.cluster.Underlay.Do(func() error {
		bridge, err := netlink.LinkByName(Bridge)
		if err != nil {
			return fmt.Errorf("find %s: %w", Bridge, err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.MasterIndex = n.Name, n.cluster.opts.MTU, bridge.Attrs().Index
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = Uplink, netlink.NsFd(ns.Fd())
		veth.PeerHardwareAddr, veth.PeerMTU = hardwareAddr(byte(10+n.index)), uint32(n.cluster.opts.MTU)
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth %s: %w", n.Name, err)
		}
		return netlink.LinkSetUp(veth)
	})
	if err != nil {
		return err
	}
	return n.Do(func() error {
		if err := configure(Uplink, n.IPv4, n.IPv6); err != nil {
			return err
		}
		for _, gw := range []netip.Addr{Gateway4, Gateway6} {
			if err := netlink.RouteAdd(&netlink.Route{Gw: gw.AsSlice()}); err != nil {
				return fmt.Errorf("add default route via %s: %w", gw, err)
			}
		}
		return nil
	})
}

// unplug removes the node's link. Deleting the underlay's end also takes the
// other, even in a namespace that sockets of the harness still hold.
func (n *Node) unplug() error {
	return n.cluster.Underlay.Do(func() error {
		link, err := netlink.LinkByName(n.Name)
		if err != nil {
			return fmt.Errorf("find port %s of the underlay: %w", n.Name, err)
		}
		if err := netlink.LinkDel(link); err != nil {
			return fmt.Errorf("remove port %s of the underlay: %w", n.Name, err)
		}
		return nil
	})
}

// Reboot cuts the node's power and starts it again, with the same underlay
// addresses; see [Machine.Reboot]. Pods of the node are gone.
func (n *Node) Reboot(ctx context.Context, wipe ...string) error {
	if err := n.unplug(); err != nil {
		return fmt.Errorf("reboot %s: %w", n.Name, err)
	}
	if err := n.Machine.Reboot(ctx, wipe...); err != nil {
		return err
	}
	return n.connect(ctx)
}

// Shape limits the node's link in both directions to a rate as tc writes it,
// such as "1gbit".
func (n *Node) Shape(ctx context.Context, rate string) error {
	ends := []struct {
		m     *Machine
		iface string
	}{{n.Machine, Uplink}, {n.cluster.Underlay, n.Name}}
	for _, end := range ends {
		// A quantum of one large frame: htb's own guess for such rates is out
		// of the range that it accepts, and it warns.
		_, err := end.m.Batch(ctx, fmt.Sprintf("qdisc replace dev %[1]s root handle 1: htb default 1\n"+
			"class replace dev %[1]s parent 1: classid 1:1 htb rate %[2]s burst 1mb quantum 60000\n",
			end.iface, rate), "tc", "-batch", "-")
		if err != nil {
			return fmt.Errorf("shape the link of %s: %w", n.Name, err)
		}
	}
	return nil
}

// SetLoss drops this many of 1,000 packets on the node's link, in each
// direction. 0 ends it, 1,000 cuts the link while its carrier stays.
func (n *Node) SetLoss(ctx context.Context, perMille int) error {
	if perMille < 0 || perMille > 1000 {
		return fmt.Errorf("set loss of %s: %d is not between 0 and 1000", n.Name, perMille)
	}
	n.cluster.loss[n.Name] = perMille
	if _, err := n.cluster.Underlay.Batch(ctx, lossRules(n.cluster.loss), "nft", "-f", "-"); err != nil {
		return fmt.Errorf("set loss of %s: %w", n.Name, err)
	}
	return nil
}

// lossRules is one transaction that replaces our whole table. Prerouting and
// postrouting also see what the underlay itself receives and sends.
func lossRules(loss map[string]int) string {
	var in, out strings.Builder
	var names []string
	for name := range loss {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if loss[name] == 0 {
			continue
		}
		fmt.Fprintf(&in, "    iifname %q numgen random mod 1000 <= %d drop\n", name, loss[name]-1)
		fmt.Fprintf(&out, "    oifname %q numgen random mod 1000 <= %d drop\n", name, loss[name]-1)
	}
	return "table bridge loss\ndelete table bridge loss\ntable bridge loss {\n" +
		"  chain in {\n    type filter hook prerouting priority 0\n" + in.String() + "  }\n" +
		"  chain out {\n    type filter hook postrouting priority 0\n" + out.String() + "  }\n}\n"
}
