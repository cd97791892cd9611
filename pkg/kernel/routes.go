package kernel

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// ip6DefaultMetric is what the kernel writes for an IPv6 route that names no
// metric (IP6_RT_PRIO_USER).
const ip6DefaultMetric = 1024

var routeTypes = map[mesh.RouteType]int{
	mesh.ViaLink:     unix.RTN_UNICAST,
	mesh.Throw:       unix.RTN_THROW,
	mesh.Unreachable: unix.RTN_UNREACHABLE,
}

// observeRoutes finds our routes by their protocol, in whatever table they are:
// a changed `table` setting leaves none behind.
func (k *Kernel) observeRoutes(s *mesh.State) error {
	planes := map[int]mesh.Plane{} // by the index of the interface
	for plane, name := range map[mesh.Plane]string{mesh.Primary: s.Link.Name, mesh.Spare: s.Spare.Link.Name} {
		if name == "" {
			continue
		}
		l, err := k.rt.LinkByName(name)
		if err != nil {
			return fmt.Errorf("look up interface %s: %w", name, err)
		}
		planes[l.Attrs().Index] = plane
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: RouteProtocol}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		err := retryInterrupted(func() error {
			var found []mesh.Route
			err := k.rt.RouteListFilteredIter(family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL, func(r netlink.Route) bool {
				if out, ok := decodeRoute(r, family, planes); ok {
					found = append(found, out)
				}
				return true
			})
			if err == nil {
				s.Routes = append(s.Routes, found...)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
	}
	return nil
}

// retryInterrupted repeats a dump that a concurrent change has cut in two.
func retryInterrupted(dump func() error) (err error) {
	for range 5 {
		if err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return err
}

// foreignLink marks a route of ours that leads to an interface that is not
// ours: it equals no planned route, so it is replaced or removed.
const foreignLink = mesh.RouteType(-1)

func decodeRoute(r netlink.Route, family int, planes map[int]mesh.Plane) (mesh.Route, bool) {
	out := mesh.Route{Table: r.Table, Metric: r.Priority}
	if family == netlink.FAMILY_V6 && out.Metric == ip6DefaultMetric {
		out.Metric = 0
	}
	if r.Dst == nil {
		return out, false // a default route is never ours
	}
	prefix, ok := netipx.FromStdIPNet(r.Dst)
	if !ok {
		return out, false
	}
	out.Prefix = prefix
	switch r.Type {
	case unix.RTN_THROW:
		out.Type = mesh.Throw
	case unix.RTN_UNREACHABLE:
		out.Type = mesh.Unreachable
	default:
		out.Type = mesh.ViaLink
		plane, ours := planes[r.LinkIndex]
		if !ours {
			out.Type = foreignLink
		}
		out.Plane = plane
		if a, ok := netipx.FromStdIP(r.Src); ok {
			out.Source = a
		}
	}
	return out, true
}

func (k *Kernel) route(o mesh.SetRoute) (*netlink.Route, error) {
	r := encodeRoute(o.Route)
	if o.Route.Type == mesh.ViaLink {
		index, err := k.indexOf(o.Link)
		if err != nil {
			return nil, err
		}
		r.LinkIndex = index
		r.Scope = netlink.SCOPE_LINK
		if o.Route.Source.IsValid() {
			r.Src = o.Route.Source.AsSlice()
		}
		k.staleRoutes6 = k.staleRoutes6 || o.Route.Prefix.IsSingleIP() && o.Route.Prefix.Addr().Is6()
	}
	return r, nil
}

// indexOf asks for an interface's index once for all the ops of an Apply.
func (k *Kernel) indexOf(link string) (int, error) {
	if _, known := k.linkIndex[link]; !known {
		l, err := k.rt.LinkByName(link)
		if err != nil {
			return 0, err
		}
		k.linkIndex[link] = l.Attrs().Index
	}
	return k.linkIndex[link], nil
}

// loopbackIndex is that of every network namespace (LOOPBACK_IFINDEX).
const loopbackIndex = 1

// forgetRoutes6 has sockets look for their IPv6 routes again. Unlike IPv4, a new
// route in one table does not disturb those who have found theirs in another
// (fib6_add bumps the sernum of its own table's nodes); a change of any address
// does (__ipv6_ifa_notify).
func (k *Kernel) forgetRoutes6() error {
	if !k.staleRoutes6 {
		return nil
	}
	k.staleRoutes6 = false
	l, err := k.link(k.Interface)
	if err != nil || l == nil {
		return err
	}
	a := &netlink.Addr{IPNet: netipx.PrefixIPNet(netip.MustParsePrefix("fe80::77/128")), Flags: unix.IFA_F_NODAD, Scope: unix.RT_SCOPE_LINK}
	if err := k.rt.AddrReplace(l, a); err != nil {
		return fmt.Errorf("touch the addresses of %s: %w", k.Interface, err)
	}
	return ignoring(k.rt.AddrDel(l, a), unix.EADDRNOTAVAIL, unix.ENODEV)
}

// removeRoute names type and metric, so that a route which has taken the place
// of this one meanwhile is not hit. IPv6 does not look at the type
// (ip6_route_del), but at the interface, and has all routes to nowhere at lo.
func (k *Kernel) removeRoute(r mesh.Route) error {
	out := encodeRoute(r)
	out.Scope = netlink.SCOPE_NOWHERE // in a deletion: of any scope
	switch {
	case r.Prefix.Addr().Is4(), r.Type == foreignLink:
	case r.Type == mesh.ViaLink:
		index, err := k.indexOf(k.interfaceOf(r.Plane))
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil // its routes went with it
		} else if err != nil {
			return err
		}
		out.LinkIndex = index
	default:
		out.LinkIndex = loopbackIndex
	}
	return ignoring(k.rt.RouteDel(out), unix.ESRCH, unix.ENOENT)
}

func encodeRoute(r mesh.Route) *netlink.Route {
	kind, known := routeTypes[r.Type]
	if !known {
		kind = unix.RTN_UNICAST
	}
	out := &netlink.Route{
		Dst: netipx.PrefixIPNet(r.Prefix), Table: r.Table, Protocol: RouteProtocol,
		Type: kind, Priority: r.Metric, Family: netlink.FAMILY_V4,
	}
	if r.Prefix.Addr().Is6() {
		out.Family = netlink.FAMILY_V6
		if out.Priority == 0 {
			out.Priority = ip6DefaultMetric
		}
	}
	return out
}

func (k *Kernel) observeRules(s *mesh.State) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		var rules []netlink.Rule
		err := retryInterrupted(func() (err error) {
			rules, err = k.rt.RuleList(family)
			return err
		})
		if err != nil {
			return fmt.Errorf("list rules: %w", err)
		}
		for _, r := range rules {
			if r.Protocol == RouteProtocol {
				s.Rules = append(s.Rules, mesh.Rule{
					IPv6: family == netlink.FAMILY_V6, Priority: r.Priority, FwMark: r.Mark, Table: r.Table,
				})
			}
		}
	}
	return nil
}

func rule(r mesh.Rule) *netlink.Rule {
	out := netlink.NewRule()
	out.Family = netlink.FAMILY_V4
	if r.IPv6 {
		out.Family = netlink.FAMILY_V6
	}
	mask := r.FwMark
	out.Invert, out.Mark, out.Mask = true, r.FwMark, &mask
	out.Priority, out.Table, out.Protocol = r.Priority, r.Table, RouteProtocol
	return out
}
