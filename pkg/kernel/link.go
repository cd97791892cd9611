package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/mdlayher/genetlink"
	"github.com/vishvananda/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// ErrSilent says that nobody answers for an interface of our name: a userspace
// tunnel's is there a moment before its process can be asked.
var ErrSilent = errors.New("no WireGuard answers for it")

// link returns the interface of that name, or nil.
func (k *Kernel) link(name string) (netlink.Link, error) {
	l, err := k.rt.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up interface %s: %w", name, err)
	}
	return l, nil
}

// observeLink reads the interface, its addresses and its peers. An interface of
// our name that somebody else made is an error: its peers are not ours to remove.
func (k *Kernel) observeLink(s *mesh.State) error {
	l, err := k.link(k.Interface)
	if err != nil || l == nil {
		return err
	}
	foreign := fmt.Errorf("interface %s exists and was not made by wgcni: remove it, or set \"interface\" to another name", k.Interface)
	if kind := l.Type(); kind != "wireguard" && kind != "tuntap" {
		return foreign
	}
	d, err := k.wg.device(k.Interface)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("interface %s exists, but %w: remove it with `ip link delete %s`", k.Interface, ErrSilent, k.Interface)
		}
		return fmt.Errorf("read WireGuard interface %s: %w", k.Interface, err)
	}
	configured := (d.PublicKey != wgtypes.Key{}) && d.PrivateKey != (wgtypes.Key{}) || len(d.Peers) > 0
	if configured && !marked(l) {
		// The helper may have made it while we look: it marks first and configures
		// then, so that what is configured and ours bears the mark by now.
		if l, err = k.link(k.Interface); err != nil || l == nil {
			return err
		}
		if !marked(l) {
			return foreign
		}
	}
	if !marked(l) {
		// Fresh from a pass that was cut off between making it and marking it.
		if err := k.markLink(l); err != nil {
			return err
		}
	}
	s.Link = mesh.Link{
		Name: k.Interface, MTU: l.Attrs().MTU, Up: l.Attrs().Flags&net.FlagUp != 0,
		PublicKey: d.PublicKey, ListenPort: d.ListenPort, FwMark: uint32(d.FirewallMark),
	}
	s.Peers = decodePeers(d.Peers)
	return k.observeAddresses(l, s)
}

func marked(l netlink.Link) bool { return strings.HasPrefix(l.Attrs().Alias, LinkAlias) }

func (k *Kernel) observeAddresses(l netlink.Link, s *mesh.State) error {
	addrs, err := k.rt.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", k.Interface, err)
	}
	for _, a := range addrs {
		p, ok := netipx.FromStdIPNet(a.IPNet)
		if ok && !p.Addr().IsLinkLocalUnicast() { // the kernel's own
			s.Addresses = append(s.Addresses, p)
		}
	}
	return nil
}

// addLink makes the kernel's WireGuard interface, else starts a userspace one.
func (k *Kernel) addLink(o mesh.AddLink) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = o.Name, o.MTU
	err := k.rt.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	switch {
	case err == nil, errors.Is(err, unix.EEXIST):
	case !errors.Is(err, unix.EOPNOTSUPP):
		return err
	case k.StartTunnel == nil:
		return ErrNoWireGuard
	default:
		if err := k.StartTunnel(o.Name, o.MTU); err != nil {
			return fmt.Errorf("start userspace WireGuard: %w", err)
		}
	}
	l, err := k.rt.LinkByName(o.Name)
	if err != nil {
		return err
	}
	return k.markLink(l)
}

// The kernel's WireGuard clears this when an interface goes up, and never sets it
// again (wg_open in drivers/net/wireguard/device.c). The mark remembers it.
const (
	sendRedirects     = "net/ipv4/conf/all/send_redirects"
	sendRedirectsMark = " send_redirects=1"
)

// markLink makes an interface ours, before it goes up for the first time.
func (k *Kernel) markLink(l netlink.Link) error {
	mark := LinkAlias
	if l.Type() == "wireguard" && readSysctl(sendRedirects) == "1" {
		mark += sendRedirectsMark
	}
	if err := k.rt.LinkSetAlias(l, mark); err != nil {
		return fmt.Errorf("mark interface %s: %w", l.Attrs().Name, err)
	}
	return nil
}

func readSysctl(path string) string {
	value, _ := os.ReadFile("/proc/sys/" + path) // "" if there is none
	return strings.TrimSpace(string(value))
}

func (k *Kernel) setLink(o mesh.SetLink) error {
	l, err := k.rt.LinkByName(o.Name)
	if err != nil {
		return err
	}
	if l.Attrs().MTU != o.MTU {
		if err := k.rt.LinkSetMTU(l, o.MTU); err != nil {
			return err
		}
	}
	// Some distributions switch IPv6 off for new interfaces; the tunnel's own
	// addresses would then be refused. Ours alone, so there is nothing to restore.
	_ = writeSysctl("net/ipv6/conf/"+o.Name+"/disable_ipv6", "0")
	_ = writeSysctl("net/ipv6/conf/"+o.Name+"/addr_gen_mode", "1") // no link-local address, as the kernel's own WireGuard
	err = k.rt.LinkSetUp(l)
	if portTaken(err) { // the kernel's WireGuard opens its port here
		if d, derr := k.wg.device(o.Name); derr == nil {
			return portError(d.ListenPort, err)
		}
	}
	return err
}

// hostSysctls is where a container, whose own /proc/sys is read-only, has the
// node's. It cannot be mounted where it belongs: container runtimes let nobody
// mount below /proc.
const hostSysctls = "/host/proc/sys/"

func writeSysctl(path, value string) error {
	err := os.WriteFile("/proc/sys/"+path, []byte(value), 0)
	if errors.Is(err, unix.EROFS) {
		if _, there := os.Stat(hostSysctls + path); there == nil {
			return os.WriteFile(hostSysctls+path, []byte(value), 0)
		}
	}
	return err
}

func (k *Kernel) removeLink(name string) error {
	l, err := k.link(name)
	if err != nil || l == nil {
		return err
	}
	if err := ignoring(k.rt.LinkDel(l), unix.ENODEV); err != nil {
		return err
	}
	if strings.HasSuffix(l.Attrs().Alias, sendRedirectsMark) && readSysctl(sendRedirects) == "0" {
		return writeSysctl(sendRedirects, "1")
	}
	return nil
}

func (k *Kernel) changeAddress(link string, p netip.Prefix, change func(netlink.Link, *netlink.Addr) error) error {
	l, err := k.rt.LinkByName(link)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: netipx.PrefixIPNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD // nobody else is on this link
	}
	return change(l, a)
}

// LinkUp reports whether the WireGuard interface is there and up.
func (k *Kernel) LinkUp() (bool, error) {
	l, err := k.link(k.Interface)
	if err != nil || l == nil {
		return false, err
	}
	return l.Attrs().Flags&net.FlagUp != 0, nil
}

// HasWireGuard reports whether this kernel has WireGuard. The question makes it load the module.
func HasWireGuard() bool {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return false
	}
	defer c.Close()
	_, err = c.GetFamily(unix.WG_GENL_NAME)
	return err == nil
}
