package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
)

// A RouteQuery asks what the kernel does with a packet.
type RouteQuery struct {
	// Source is the packet's; the zero value has the kernel choose it, which it
	// does for packets that are made here only.
	Source      netip.Addr
	Destination netip.Addr
	// From is the interface by which the packet comes in; "" if it is made here.
	From string
	Mark uint32
}

// The kinds of routes, as ip-route(8) names them, which an answer may be of.
const (
	RouteUnicast = "unicast"
	RouteLocal   = "local" // for this machine itself
	RouteAnycast = "anycast"
)

// A RouteAnswer is what the kernel says to a RouteQuery. The zero value is no answer.
type RouteAnswer struct {
	// Refused is why the kernel does not route it, in its own words; "" if it does.
	Refused string `json:"refused,omitempty"`
	Kind    string `json:"kind,omitempty"`
	// Table and Prefix are those of the route that was taken.
	Table     int          `json:"table,omitempty"`
	Prefix    netip.Prefix `json:"prefix,omitzero"`
	Interface string       `json:"interface,omitempty"` // by which it leaves
	Gateway   netip.Addr   `json:"gateway,omitzero"`
	// Source is the one that a packet which is made here gets.
	Source netip.Addr `json:"source,omitzero"`
}

var routeKinds = map[int]string{
	unix.RTN_UNICAST: RouteUnicast, unix.RTN_LOCAL: RouteLocal, unix.RTN_BROADCAST: "broadcast", unix.RTN_ANYCAST: RouteAnycast,
	unix.RTN_MULTICAST: "multicast", unix.RTN_BLACKHOLE: "blackhole", unix.RTN_UNREACHABLE: "unreachable", unix.RTN_PROHIBIT: "prohibit",
}

// Route asks the kernel (RTM_GETROUTE), twice: where the packet goes, and by which
// route. It fails where the kernel could not be asked; that it refuses the packet
// is an answer.
func (k *Kernel) Route(q RouteQuery) (RouteAnswer, error) {
	o := netlink.RouteGetOptions{Iif: q.From, Mark: q.Mark}
	if q.Source.IsValid() {
		o.SrcAddr = q.Source.AsSlice()
	}
	dst := net.IP(q.Destination.AsSlice())
	routes, err := k.rt.RouteGetWithOptions(dst, &o)
	var errno unix.Errno
	switch {
	case errors.As(err, &errno) && errno != unix.ENODEV && errno != unix.EPERM:
		return RouteAnswer{Refused: errno.Error()}, nil
	case err == nil && len(routes) == 0:
		return RouteAnswer{Refused: "no answer"}, nil
	case err != nil:
		return RouteAnswer{}, fmt.Errorf("ask for the route to %s: %w", q.Destination, err)
	}
	a := RouteAnswer{Kind: routeKinds[routes[0].Type], Table: routes[0].Table}
	a.Gateway, _ = netipx.FromStdIP(routes[0].Gw)
	a.Source, _ = netipx.FromStdIP(routes[0].Src)
	if via, ok := routes[0].Via.(*netlink.Via); ok { // an IPv4 route by an IPv6 gateway
		a.Gateway, _ = netipx.FromStdIP(via.Addr)
	}
	if routes[0].LinkIndex != 0 {
		l, err := k.rt.LinkByIndex(routes[0].LinkIndex)
		if err != nil {
			return RouteAnswer{}, fmt.Errorf("look up the interface to %s: %w", q.Destination, err)
		}
		a.Interface = l.Attrs().Name
	}
	o.FIBMatch = true // the second question only adds to the answer: it may fail
	if routes, err = k.rt.RouteGetWithOptions(dst, &o); err == nil && len(routes) > 0 {
		a.Table = routes[0].Table
		a.Prefix = netip.PrefixFrom(q.Destination, 0).Masked()
		if routes[0].Dst != nil {
			if p, ok := netipx.FromStdIPNet(routes[0].Dst); ok {
				a.Prefix = p
			}
		}
	}
	return a, nil
}

// A PolicyRule is one rule of the machine's routing policy, whoever made it; see
// ip-rule(8). Selectors that are not set match everything.
type PolicyRule struct {
	Priority         int
	Table            int // 0: it leads to no table
	Source           netip.Prefix
	Destination      netip.Prefix
	From, To         string // the interfaces by which packets come in and leave
	Mark, Mask       uint32
	Marked           bool // Mark and Mask are set
	Invert           bool // it matches what it would not match otherwise
	OtherSelectors   bool // there are some that are not read here: protocol, port, user, TOS
	RoutingProtocol  uint8
	SuppressedLength int // routes with prefixes of this length or less do not count; -1 if all do
}

// PolicyRules lists a family's rules in the order in which they are asked.
func (k *Kernel) PolicyRules(ipv6 bool) ([]PolicyRule, error) {
	family := netlink.FAMILY_V4
	if ipv6 {
		family = netlink.FAMILY_V6
	}
	var rules []netlink.Rule
	err := retryInterrupted(func() (err error) {
		rules, err = k.rt.RuleList(family)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	out := make([]PolicyRule, 0, len(rules))
	for _, r := range rules {
		p := PolicyRule{
			Priority: r.Priority, Table: r.Table, From: r.IifName, To: r.OifName, Invert: r.Invert,
			Mark: r.Mark, Mask: ^uint32(0), Marked: r.Mark != 0 || r.Mask != nil,
			OtherSelectors:  r.IPProto != 0 || r.Sport != nil || r.Dport != nil || r.UIDRange != nil || r.Tos != 0 || r.TunID != 0,
			RoutingProtocol: r.Protocol, SuppressedLength: r.SuppressPrefixlen,
		}
		if r.Mask != nil {
			p.Mask = *r.Mask
		}
		if r.Src != nil {
			p.Source, _ = netipx.FromStdIPNet(r.Src)
		}
		if r.Dst != nil {
			p.Destination, _ = netipx.FromStdIPNet(r.Dst)
		}
		out = append(out, p)
	}
	return out, nil
}

// OwnAddresses are all of the machine's, each with its interface.
func (k *Kernel) OwnAddresses() (map[netip.Addr]string, error) {
	links, err := k.rt.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	addrs, err := k.rt.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := map[netip.Addr]string{}
	for _, a := range addrs {
		if addr, ok := netipx.FromStdIP(a.IP); ok {
			out[addr] = names[a.LinkIndex]
		}
	}
	return out, nil
}
