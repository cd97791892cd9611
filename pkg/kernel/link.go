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

// spare is the name of the second interface.
func (k *Kernel) spare() string { return mesh.SpareInterface(k.Interface) }

// interfaceOf is the name of a plane's interface.
func (k *Kernel) interfaceOf(p mesh.Plane) string {
	if p == mesh.Spare {
		return k.spare()
	}
	return k.Interface
}

// observeLinks reads the interfaces, their addresses and their peers. One of the
// primary's name that somebody else made is an error: its peers are not ours to
// remove. Whatever is wrong with the spare, the primary is kept as planned: an error
// comes when the spare is to be made.
func (k *Kernel) observeLinks(s *mesh.State) error {
	l, d, err := k.ours(k.Interface)
	if err != nil {
		return err
	}
	if l != nil {
		s.Link, s.Peers = decodeLink(l, d), decodePeers(d.Peers)
		if err := k.observeAddresses(l, s); err != nil {
			return err
		}
	}
	if l, err = k.link(k.spare()); err != nil || l == nil || !marked(l) {
		return err
	}
	if d, err = k.wg.device(k.spare()); err == nil {
		s.Spare = mesh.SpareLink{Link: decodeLink(l, d), Peers: decodePeers(d.Peers)}
	}
	return nil
}

func decodeLink(l netlink.Link, d *wgtypes.Device) mesh.Link {
	return mesh.Link{
		Name: l.Attrs().Name, MTU: l.Attrs().MTU, Up: l.Attrs().Flags&net.FlagUp != 0,
		PublicKey: d.PublicKey, ListenPort: d.ListenPort, FwMark: uint32(d.FirewallMark),
	}
}

// ours returns the interface of that name, or nil. One that somebody else made is
// an error; one that nobody has configured becomes ours.
func (k *Kernel) ours(name string) (netlink.Link, *wgtypes.Device, error) {
	l, err := k.link(name)
	if err != nil || l == nil {
		return nil, nil, err
	}
	foreign := fmt.Errorf("interface %s exists and was not made by wgcni: remove it, or set \"interface\" to another name", name)
	if kind := l.Type(); kind != "wireguard" && kind != "tuntap" {
		return nil, nil, foreign
	}
	d, err := k.wg.device(name)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil, fmt.Errorf("interface %s exists, but %w: remove it with `ip link delete %s`", name, ErrSilent, name)
		}
		return nil, nil, fmt.Errorf("read WireGuard interface %s: %w", name, err)
	}
	configured := (d.PublicKey != wgtypes.Key{}) && d.PrivateKey != (wgtypes.Key{}) || len(d.Peers) > 0
	if configured && !marked(l) {
		// The helper may have made it while we look: it marks first and configures
		// then, so that what is configured and ours bears the mark by now.
		if l, err = k.link(name); err != nil || l == nil {
			return nil, nil, err
		}
		if !marked(l) {
			return nil, nil, foreign
		}
	}
	if !marked(l) {
		// Fresh from a pass that was cut off between making it and marking it.
		if err := k.markLink(l); err != nil {
			return nil, nil, err
		}
	}
	return l, d, nil
}

func marked(l netlink.Link) bool { return strings.HasPrefix(l.Attrs().Alias, LinkAlias) }

func (k *Kernel) observeAddresses(l netlink.Link, s *mesh.State) error {
	addrs, err := k.rt.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", k.Interface, err)
	}
	for _, a := range addrs {
		p, ok := netipx.FromStdIPNet(a.IPNet)
		if ok && !p.Addr().IsLinkLocalUnicast() && p != looseAddress { // the kernel's own
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
	case err == nil:
	case errors.Is(err, unix.EEXIST):
		_, _, err := k.ours(o.Name)
		return err
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
	if l.Type() != "wireguard" {
		if err := k.rt.LinkSetTxQLen(l, userspaceQueue); err != nil {
			return fmt.Errorf("set the queue of %s: %w", o.Name, err)
		}
	}
	return k.markLink(l)
}

// userspaceQueue is how many packets wait for a tunnel process that gets no CPU for a
// moment: as many as for the kernel's WireGuard (MAX_QUEUED_PACKETS in
// drivers/net/wireguard/messages.h), instead of a tun device's 500.
const userspaceQueue = 1024

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
	return k.setMark(l, mark)
}

func (k *Kernel) setMark(l netlink.Link, mark string) error {
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
	if o.Name == k.spare() {
		if err := k.loosenReversePath(); err != nil {
			return err
		}
	}
	err = k.rt.LinkSetUp(l)
	if portTaken(err) { // the kernel's WireGuard opens its port here
		if d, derr := k.wg.device(o.Name); derr == nil {
			return k.portError(o.Name, d.ListenPort, err)
		}
	}
	return err
}

// looseAddress is of no use but to be there.
var looseAddress = netip.MustParsePrefix("127.119.0.1/32")

// loosenReversePath lets packets in by one of our interfaces that are answered by
// the other, as they are while a pair of nodes changes planes; WireGuard itself has
// checked their source. Of the value of rp_filter for all and the interface's own
// the greater counts, so that 2 holds whatever is written to all later. But even a
// loose one drops what comes by an interface that has no IPv4 address, and is not
// answered by the same (no_addr in __fib_validate_source, net/ipv4/fib_frontend.c).
func (k *Kernel) loosenReversePath() error {
	for _, name := range []string{k.Interface, k.spare()} {
		l, err := k.link(name)
		if err != nil || l == nil {
			return err
		}
		_ = writeSysctl("net/ipv4/conf/"+name+"/rp_filter", "2") // if not, it is as strict as the machine's others
		addrs, err := k.rt.AddrList(l, netlink.FAMILY_V4)
		if err != nil || len(addrs) > 0 {
			continue
		}
		if err := k.changeAddress(name, looseAddress, k.rt.AddrReplace); err != nil {
			return fmt.Errorf("add address %s to %s: %w", looseAddress, name, err)
		}
	}
	return nil
}

// removeLooseAddress takes back the address that the primary interface had for the spare one.
func (k *Kernel) removeLooseAddress() error {
	if l, err := k.link(k.Interface); err != nil || l == nil {
		return err
	}
	return ignoring(k.changeAddress(k.Interface, looseAddress, k.rt.AddrDel), unix.EADDRNOTAVAIL, unix.ENODEV)
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
	if name == k.spare() {
		if err := k.removeLooseAddress(); err != nil {
			return err
		}
	}
	if !strings.HasSuffix(l.Attrs().Alias, sendRedirectsMark) || readSysctl(sendRedirects) != "0" {
		return nil
	}
	// The last of the two puts it back: each wants it cleared while it is there.
	other := k.spare()
	if name == other {
		other = k.Interface
	}
	if o, err := k.link(other); err == nil && o != nil && o.Type() == "wireguard" && marked(o) {
		return k.setMark(o, LinkAlias+sendRedirectsMark)
	}
	return writeSysctl(sendRedirects, "1")
}

func (k *Kernel) changeAddress(link string, p netip.Prefix, change func(netlink.Link, *netlink.Addr) error) error {
	l, err := k.rt.LinkByName(link)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: netipx.PrefixIPNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD // nobody else is on this link
		// Somebody may have switched it off since the interface was set up.
		_ = writeSysctl("net/ipv6/conf/"+link+"/disable_ipv6", "0")
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
