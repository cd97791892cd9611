package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// BarePod is a pod whose primary plugin is the harness itself: a network namespace
// on one end of a pair of links, and a prevResult. So a call of wgcni costs no more
// than wgcni, and an address is whichever the test wants, another pod's too.
type BarePod struct {
	Name  string
	Node  *Node
	Netns string // path inside the node

	addresses []netip.Addr
	entry     map[string]any // of wgcni in the conflist
}

const barePodLink = "eth0"

// The two ends of each pair have the same hardware addresses on all nodes, and
// the pods' gateways are the same: nobody but the other end sees either.
var (
	barePodMAC     = net.HardwareAddr{0x02, 0, 0, 0, 1, 2}
	barePodHostMAC = net.HardwareAddr{0x02, 0, 0, 0, 1, 1}
	barePodGateway = []netip.Addr{netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("fe80::1")}
)

// AddBarePod makes a bare pod without addresses, that no plugin knows of yet. The
// options are those that the node was configured with. Its name is at most 14
// characters long.
func (n *Node) AddBarePod(ctx context.Context, name string, o NetworkOptions) (*BarePod, error) {
	p := &BarePod{Name: name, Node: n, Netns: NetnsPath(name)}
	text, err := n.Conflist(o)
	if err != nil {
		return nil, err
	}
	var list struct {
		Plugins []map[string]any `json:"plugins"`
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, err
	}
	p.entry = list.Plugins[len(list.Plugins)-1-len(o.Chain)]
	p.entry["name"], p.entry["cniVersion"] = NetworkName, "1.0.0"
	if _, err := n.Run(ctx, "ip", "netns", "add", name); err != nil {
		return nil, fmt.Errorf("add bare pod %s: %w", name, err)
	}
	if err := p.plug(); err != nil {
		_, derr := n.Run(ctx, "ip", "netns", "delete", name)
		return nil, errors.Join(fmt.Errorf("add bare pod %s: %w", name, err), derr)
	}
	return p, nil
}

func (p *BarePod) hostLink() string { return "v" + p.Name }

// plug makes the pair of links, and the node a router.
func (p *BarePod) plug() error {
	ns, err := os.Open(p.Node.Path(p.Netns))
	if err != nil {
		return err
	}
	defer ns.Close()
	err = p.Node.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = p.hostLink(), barePodHostMAC
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace, veth.PeerHardwareAddr = barePodLink, netlink.NsFd(ns.Fd()), barePodMAC
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth %s: %w", p.hostLink(), err)
		}
		return errors.Join(sysctl("ipv4/ip_forward", "1"), sysctl("ipv6/conf/all/forwarding", "1"), netlink.LinkSetUp(veth))
	})
	if err != nil {
		return err
	}
	return p.Do(func() error {
		if err := loopbackUp(); err != nil {
			return err
		}
		link, err := netlink.LinkByName(barePodLink)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for _, gw := range barePodGateway {
			route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
			if err := errors.Join(neighbour(link, gw, barePodHostMAC), netlink.RouteAdd(route)); err != nil {
				return fmt.Errorf("add default route via %s: %w", gw, err)
			}
		}
		return nil
	})
}

func neighbour(link netlink.Link, a netip.Addr, mac net.HardwareAddr) error {
	return netlink.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac,
	})
}

// Addresses are those that the pod has.
func (p *BarePod) Addresses() []netip.Addr { return p.addresses }

// SetAddresses gives the pod these addresses in the place of those that it
// has, and leads the node's packets for them to it: away from another bare pod
// of the node that may have had the same.
func (p *BarePod) SetAddresses(addresses ...netip.Addr) error {
	err := p.Do(func() error {
		link, err := netlink.LinkByName(barePodLink)
		if err != nil {
			return err
		}
		// The new ones first: with its last address an interface loses its routes.
		for _, a := range addresses {
			if slices.Contains(p.addresses, a) {
				continue
			}
			addr := &netlink.Addr{IPNet: ipNet(single(a))}
			if a.Is6() {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("add %s: %w", a, err)
			}
		}
		for _, a := range p.addresses {
			if slices.Contains(addresses, a) {
				continue
			}
			if err := netlink.AddrDel(link, &netlink.Addr{IPNet: ipNet(single(a))}); err != nil {
				return fmt.Errorf("delete %s: %w", a, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set the addresses of %s: %w", p, err)
	}
	err = p.Node.Do(func() error {
		link, err := netlink.LinkByName(p.hostLink())
		if err != nil {
			return err
		}
		for _, a := range p.addresses { // by now it may be another's
			if slices.Contains(addresses, a) {
				continue
			}
			err := netlink.RouteDel(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(single(a)), Scope: netlink.SCOPE_LINK})
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("delete the route to %s: %w", a, err)
			}
		}
		for _, a := range addresses {
			route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(single(a)), Scope: netlink.SCOPE_LINK}
			if err := errors.Join(neighbour(link, a, barePodMAC), netlink.RouteReplace(route)); err != nil {
				return fmt.Errorf("route %s: %w", a, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set the addresses of %s: %w", p, err)
	}
	p.addresses = addresses
	return nil
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// Call runs the plugin with a verb. The end of ctx is a SIGKILL, and no error.
func (p *BarePod) Call(ctx context.Context, verb string) error {
	stdin, err := json.Marshal(p.config())
	if err != nil {
		return err
	}
	dir := p.Node.cluster.BinDir
	cmd := p.Node.Command(ctx, filepath.Join(dir, "wgcni"))
	cmd.Env = append(cmd.Env, "CNI_COMMAND="+verb, "CNI_CONTAINERID="+p.Name, "CNI_NETNS="+p.Netns, "CNI_IFNAME="+barePodLink, "CNI_PATH="+dir)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("%s %s: %w: %s", verb, p, err, out)
	}
	return nil
}

// config is what the runtime gives the plugin.
func (p *BarePod) config() map[string]any {
	config := maps.Clone(p.entry)
	ips := []any{}
	for _, a := range p.addresses {
		ips = append(ips, map[string]any{"address": single(a).String(), "interface": 0})
	}
	config["prevResult"] = map[string]any{
		"cniVersion": config["cniVersion"], "ips": ips,
		"interfaces": []any{map[string]any{"name": barePodLink, "sandbox": p.Netns}},
	}
	return config
}

// String returns node and name of the pod.
func (p *BarePod) String() string { return p.Node.Name + "/" + p.Name }

// Do calls f on an operating system thread in the pod's network namespace; see
// [Endpointer].
func (p *BarePod) Do(f func() error) error { return doIn(p.Node.Path(p.Netns), f) }

var _ Endpointer = (*BarePod)(nil)
