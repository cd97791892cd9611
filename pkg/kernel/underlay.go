package kernel

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
)

// Underlay is the network below the tunnel, as the default routes show it.
type Underlay struct {
	// Addresses that a default route uses as source, IPv4 first; at most one a family.
	Addresses []netip.Addr
	// MTU is the least of those routes and their interfaces, in bytes; 0 if there is none.
	MTU int
	// All are the machine's global addresses on those interfaces, sorted.
	All []netip.Addr
}

// Underlay looks at the main table's default routes. Our own interfaces are never
// taken for the underlay, whatever routes lead to them.
func (k *Kernel) Underlay() (Underlay, error) {
	var u Underlay
	ours, err := k.ownIndices()
	if err != nil {
		return Underlay{}, err
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		route, err := k.defaultRoute(family, ours)
		if err != nil {
			return Underlay{}, err
		}
		if route == nil {
			continue
		}
		link, err := k.rt.LinkByIndex(route.LinkIndex)
		if err != nil {
			return Underlay{}, fmt.Errorf("look up the default route's interface: %w", err)
		}
		addrs, err := k.globalAddresses(link, family)
		if err != nil {
			return Underlay{}, err
		}
		u.All = append(u.All, addrs...)
		mtu := link.Attrs().MTU
		if route.MTU != 0 {
			mtu = min(mtu, route.MTU) // by hand, or by a router's advertisement (RFC 4861, section 4.6.4)
		}
		if u.MTU == 0 || mtu < u.MTU {
			u.MTU = mtu
		}
		if src, ok := netipx.FromStdIP(route.Src); ok {
			u.Addresses = append(u.Addresses, src)
		} else if len(addrs) > 0 {
			u.Addresses = append(u.Addresses, addrs[0])
		}
	}
	slices.SortFunc(u.All, netip.Addr.Compare)
	u.All = slices.Compact(u.All)
	return u, nil
}

// ownIndices are those of our interfaces that are there.
func (k *Kernel) ownIndices() (out []int, err error) {
	for _, name := range []string{k.Interface, k.spare()} {
		l, err := k.link(name)
		if err != nil {
			return nil, err
		}
		if l != nil {
			out = append(out, l.Attrs().Index)
		}
	}
	return out, nil
}

// defaultRoute is the family's default route of the least metric that does not
// lead to an interface of those indices, or nil.
func (k *Kernel) defaultRoute(family int, not []int) (*netlink.Route, error) {
	var best *netlink.Route
	err := retryInterrupted(func() error {
		best = nil
		filter := &netlink.Route{Table: unix.RT_TABLE_MAIN}
		return k.rt.RouteListFilteredIter(family, filter, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			isDefault := r.Dst == nil || func() bool { ones, _ := r.Dst.Mask.Size(); return ones == 0 }()
			if !isDefault || r.Type != unix.RTN_UNICAST {
				return true
			}
			if r.LinkIndex == 0 && len(r.MultiPath) > 0 {
				r.LinkIndex = r.MultiPath[0].LinkIndex
			}
			if r.LinkIndex != 0 && !slices.Contains(not, r.LinkIndex) && (best == nil || r.Priority < best.Priority) {
				best = &r
			}
			return true
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list default routes: %w", err)
	}
	return best, nil
}

func (k *Kernel) globalAddresses(l netlink.Link, family int) ([]netip.Addr, error) {
	addrs, err := k.rt.AddrList(l, family)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
	}
	var out []netip.Addr
	for _, a := range addrs {
		// Temporary and deprecated IPv6 addresses go away; others must not learn them.
		passing := unix.IFA_F_TEMPORARY | unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE
		if family == netlink.FAMILY_V6 && a.Flags&passing != 0 {
			continue
		}
		if addr, ok := netipx.FromStdIP(a.IP); ok && addr.IsGlobalUnicast() && !addr.IsLinkLocalUnicast() {
			out = append(out, addr)
		}
	}
	return out, nil
}

// MTUOf is the MTU of the interface that holds an address, 0 if none does.
func (k *Kernel) MTUOf(addr netip.Addr) (int, error) {
	addrs, err := k.rt.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return 0, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if have, ok := netipx.FromStdIP(a.IP); ok && have == addr {
			l, err := k.rt.LinkByIndex(a.LinkIndex)
			if err != nil {
				return 0, fmt.Errorf("look up the interface of %s: %w", addr, err)
			}
			return l.Attrs().MTU, nil
		}
	}
	return 0, nil
}
