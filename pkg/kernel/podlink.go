package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrBypassesHost says that a pod's packets never reach this node's routing,
// so that nothing here can encrypt them.
var ErrBypassesHost = errors.New("its packets bypass this node's routing")

// PodLink is one pod's interface: a pair of which the node holds the other end.
type PodLink struct {
	pod, node *netlink.Handle
	link      netlink.Link // the pod's end
	peer      netlink.Link // the node's end
}

// pairedKinds are the links whose other end lies in the node.
var pairedKinds = map[string]bool{"veth": true, "netkit": true}

// OpenPodLink finds an interface in the namespace at sandbox, and its other end.
// It returns an error that Is ErrBypassesHost where it has none in this node.
func OpenPodLink(sandbox, ifname string) (*PodLink, error) {
	ns, err := netns.GetFromPath(sandbox)
	if err != nil {
		return nil, fmt.Errorf("open the pod's network namespace %s: %w", sandbox, err)
	}
	defer ns.Close()
	pod, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("enter the pod's network namespace %s: %w", sandbox, err)
	}
	node, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		pod.Close()
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	p := &PodLink{pod: pod, node: node}
	if err := p.find(ns, sandbox, ifname); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// find looks up both ends. The pod's end tells the index of the other, but not
// in which namespace: an interface of this node that happens to have the same
// index is told apart by its own other end.
func (p *PodLink) find(ns netns.NsHandle, sandbox, ifname string) (err error) {
	if p.link, err = p.pod.LinkByName(ifname); err != nil {
		return fmt.Errorf("find interface %s in %s: %w", ifname, sandbox, err)
	}
	if !pairedKinds[p.link.Type()] {
		return fmt.Errorf("interface %s is of kind %q: %w", ifname, p.link.Type(), ErrBypassesHost)
	}
	elsewhere := fmt.Errorf("the other end of interface %s is not in this node: %w", ifname, ErrBypassesHost)
	p.peer, err = p.node.LinkByIndex(p.link.Attrs().ParentIndex)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return elsewhere
	}
	if err != nil {
		return fmt.Errorf("find this node's end of interface %s: %w", ifname, err)
	}
	nsid, err := p.node.GetNetNsIdByFd(int(ns)) // looking at the peer has given it one
	if err != nil {
		return fmt.Errorf("identify the pod's network namespace %s: %w", sandbox, err)
	}
	if p.peer.Type() != p.link.Type() || p.peer.Attrs().ParentIndex != p.link.Attrs().Index || p.peer.Attrs().NetNsID != nsid {
		return elsewhere
	}
	return nil
}

// Close releases the sockets.
func (p *PodLink) Close() {
	p.pod.Close()
	p.node.Close()
}

// MTU is that of the pod's end, in bytes.
func (p *PodLink) MTU() int { return p.link.Attrs().MTU }

// Fit is the MTU, in bytes, that the link may have over a tunnel of that MTU. It is
// the tunnel's, but where the pod has an IPv6 address no less than IPv6 needs: Linux
// would take the address off (addrconf_notify in net/ipv6/addrconf.c). What the
// tunnel cannot carry is then refused by this node, with the size that it can.
func (p *PodLink) Fit(tunnel int) (int, error) {
	if tunnel >= ipv6MinMTU {
		return tunnel, nil
	}
	addrs, err := p.pod.AddrList(p.link, netlink.FAMILY_V6)
	if err != nil {
		return 0, fmt.Errorf("list the addresses of the pod's %s: %w", p.link.Attrs().Name, err)
	}
	if slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return !a.IP.IsLinkLocalUnicast() }) {
		return ipv6MinMTU, nil
	}
	return tunnel, nil
}

// ipv6MinMTU is IPV6_MIN_MTU of <linux/ipv6.h>, in bytes.
const ipv6MinMTU = 1280

// SetMTU sets the MTU of the pod's end, in bytes. The node's end gets no less, not
// for a moment, since it would drop what the pod sends without a word; and no more
// than most. In between it stays: a bridge has the least MTU of all its ports.
func (p *PodLink) SetMTU(mtu, most int) error {
	peer := min(max(p.peer.Attrs().MTU, mtu), most)
	if p.peer.Attrs().MTU < peer {
		if err := setMTU(p.node, p.peer, peer); err != nil {
			return err
		}
	}
	if err := setMTU(p.pod, p.link, mtu); err != nil {
		return err
	}
	return setMTU(p.node, p.peer, peer)
}

func setMTU(h *netlink.Handle, l netlink.Link, mtu int) error {
	if l.Attrs().MTU == mtu {
		return nil
	}
	if err := h.LinkSetMTU(l, mtu); err != nil {
		return fmt.Errorf("set the MTU of %s to %d: %w", l.Attrs().Name, mtu, err)
	}
	l.Attrs().MTU = mtu
	return nil
}

// nsfsMagic is the file system of namespace files, NSFS_MAGIC of <linux/magic.h>.
const nsfsMagic = 0x6e736673

// SandboxID names the namespace behind a path: the inode of its namespace
// file. Zero if the path is no namespace file.
func SandboxID(path string) uint64 {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Statfs(path, &fs) != nil || fs.Type != nsfsMagic || unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

// SandboxGone reports whether the namespace that a path led to certainly does
// not lie there any more. It says no in doubt: where the folder is missing or
// is a mount that this process does not see, nothing can be known.
func SandboxGone(path string, id uint64) bool {
	if path == "" {
		return false
	}
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		_, err := os.Stat(filepath.Dir(path))
		return err == nil
	}
	now := SandboxID(path)
	return id != 0 && now != 0 && now != id
}
