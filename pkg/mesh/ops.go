package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Op is one small, idempotent change to a kernel. Its text reads like the
// command that would do the same, and never holds a secret.
type Op interface {
	fmt.Stringer
	op()
}

// The operations, in the order in which Diff uses them to add.
type (
	// ReplaceFilter makes the nftables table anew, in one transaction.
	ReplaceFilter struct{ Filter Filter }
	// SetFilter refills all sets of the table but Pods, in one transaction.
	SetFilter struct{ Filter Filter }
	// SetFilterPods adds and removes elements of the table's sets of pods.
	SetFilterPods struct{ Add, Remove []netip.Addr }
	// AddLink makes the WireGuard interface.
	AddLink struct {
		Name string
		MTU  int
	}
	// ConfigureLink sets key, port and mark of the WireGuard interface.
	ConfigureLink struct{ Link Link }
	// SetLink sets the MTU and takes the interface up.
	SetLink struct {
		Name string
		MTU  int
	}
	// AddAddress gives the interface an address.
	AddAddress struct {
		Link   string
		Prefix netip.Prefix
	}
	// SetRoute adds a route, or puts it in the place of one with the same key.
	SetRoute struct {
		Link  string
		Route Route
	}
	// SetPeer adds a peer or changes it. Remove lists allowed IPs that no other
	// peer takes; one that moves is only ever added, to its new peer.
	SetPeer struct {
		Link         string
		PublicKey    wgtypes.Key
		Name         string
		PresharedKey *Fingerprint   // nil: leave; zero: remove the key
		Endpoint     netip.AddrPort // zero: leave
		Keepalive    *time.Duration // nil: leave
		Add          []netip.Prefix
		Remove       []netip.Prefix
	}
	// AddRule adds a policy rule.
	AddRule struct{ Rule Rule }
	// Greet starts a handshake with peers. A peer that had a session with an
	// interface that is gone would go on using it, and lose what it sends, until
	// its timers end the session after 15 s.
	Greet struct {
		Link  string
		Peers []wgtypes.Key
	}

	// RemoveRule removes a policy rule.
	RemoveRule struct{ Rule Rule }
	// RemoveRoute removes a route.
	RemoveRoute struct{ Route Route }
	// RemovePeer removes a peer with all that is allowed to it.
	RemovePeer struct {
		Link      string
		PublicKey wgtypes.Key
	}
	// RemoveAddress takes an address from the interface.
	RemoveAddress struct {
		Link   string
		Prefix netip.Prefix
	}
	// RemoveLink removes the WireGuard interface.
	RemoveLink struct{ Name string }
	// RemoveFilter removes the nftables table.
	RemoveFilter struct{}
	// SetFilterNodes refills the sets of the table that NodeFilter names, in one
	// transaction. Its mark is the one that the table has.
	SetFilterNodes struct{ Nodes NodeFilter }
	// SetSrcValidMark switches the sysctl on, or puts back what it was before.
	SetSrcValidMark struct{ On bool }
)

func (ReplaceFilter) op() {}
func (SetFilter) op()     {}
func (SetFilterPods) op() {}
func (AddLink) op()       {}
func (ConfigureLink) op() {}
func (SetLink) op()       {}
func (AddAddress) op()    {}
func (SetRoute) op()      {}
func (SetPeer) op()       {}
func (AddRule) op()       {}
func (Greet) op()         {}
func (RemoveRule) op()    {}
func (RemoveRoute) op()   {}
func (RemovePeer) op()    {}
func (RemoveAddress) op() {}
func (RemoveLink) op()    {}
func (RemoveFilter) op()  {}

func (SetFilterNodes) op()  {}
func (SetSrcValidMark) op() {}

func (o ReplaceFilter) String() string { return "nft replace table: " + o.Filter.sets() }
func (o SetFilter) String() string     { return "nft set: " + o.Filter.sets() }
func (o SetFilterPods) String() string {
	s := "nft set pods:"
	for _, a := range o.Add {
		s += " +" + a.String()
	}
	for _, a := range o.Remove {
		s += " -" + a.String()
	}
	return s
}

func (o AddLink) String() string {
	return fmt.Sprintf("ip link add %s mtu %d type wireguard", o.Name, o.MTU)
}

func (o ConfigureLink) String() string {
	return fmt.Sprintf("wg set %s private-key (hidden) listen-port %d fwmark %#x", o.Link.Name, o.Link.ListenPort, o.Link.FwMark)
}

func (o SetLink) String() string { return fmt.Sprintf("ip link set %s mtu %d up", o.Name, o.MTU) }

func (o AddAddress) String() string { return fmt.Sprintf("ip address add %s dev %s", o.Prefix, o.Link) }

func (o SetRoute) String() string {
	if o.Route.Type != ViaLink {
		return "ip route replace " + o.Route.String()
	}
	prefix, rest, _ := strings.Cut(o.Route.String(), " ")
	return fmt.Sprintf("ip route replace %s dev %s %s", prefix, o.Link, rest)
}

func (o SetPeer) String() string {
	s := fmt.Sprintf("wg set %s peer %s", o.Link, o.PublicKey)
	if o.Name != "" {
		s += " (" + o.Name + ")"
	}
	switch {
	case o.PresharedKey == nil:
	case *o.PresharedKey == Fingerprint{}:
		s += " preshared-key (none)"
	default:
		s += " preshared-key (hidden)"
	}
	if o.Endpoint.IsValid() {
		s += " endpoint " + o.Endpoint.String()
	}
	if o.Keepalive != nil {
		s += " persistent-keepalive " + o.Keepalive.String()
	}
	var ips []string
	for _, p := range o.Add {
		ips = append(ips, "+"+p.String())
	}
	for _, p := range o.Remove {
		ips = append(ips, "-"+p.String())
	}
	if len(ips) > 0 {
		s += " allowed-ips " + strings.Join(ips, ",")
	}
	return s
}
func (o AddRule) String() string     { return "ip rule add " + o.Rule.String() }
func (o Greet) String() string       { return fmt.Sprintf("greet %d peers of %s", len(o.Peers), o.Link) }
func (o RemoveRule) String() string  { return "ip rule delete " + o.Rule.String() }
func (o RemoveRoute) String() string { return "ip route delete " + o.Route.String() }
func (o RemovePeer) String() string {
	return fmt.Sprintf("wg set %s peer %s remove", o.Link, o.PublicKey)
}

func (o RemoveAddress) String() string {
	return fmt.Sprintf("ip address delete %s dev %s", o.Prefix, o.Link)
}
func (o RemoveLink) String() string { return "ip link delete " + o.Name }
func (RemoveFilter) String() string { return "nft delete table" }

func (o SetFilterNodes) String() string { return "nft set: " + o.Nodes.sets() }

func (o SetSrcValidMark) String() string {
	if o.On {
		return "sysctl net.ipv4.conf.all.src_valid_mark=1"
	}
	return "sysctl net.ipv4.conf.all.src_valid_mark: as it was before"
}

// sets prints the sets that SetFilter refills.
func (f Filter) sets() string {
	s := fmt.Sprintf("cluster %v guarded %v", f.Cluster, f.Guarded)
	if !slices.Equal(f.Withheld, f.Guarded) { // where there are no machines but nodes they are equal
		s += fmt.Sprintf(" withheld %v", f.Withheld)
	}
	s += fmt.Sprintf(" local %v exempt %v", f.Local, f.Exempt)
	if len(f.Behind) > 0 {
		s += fmt.Sprintf(" behind %v", f.Behind)
	}
	if len(f.Masqueraded) > 0 {
		s += fmt.Sprintf(" masqueraded %v", f.Masqueraded)
	}
	if f.Nodes.Mark != 0 {
		s += " " + f.Nodes.sets()
	}
	return s
}

// Local reports whether the op touches what ADD and DEL change: single pods of
// this node. Those ops are cheap, and are applied while the store is locked, so
// that they agree with it at every moment; the others may take long and never
// hold up an ADD.
func Local(o Op) bool {
	switch o := o.(type) {
	case SetFilterPods, ReplaceFilter:
		return true
	case SetRoute:
		return o.Route.singlePod()
	case RemoveRoute:
		return o.Route.singlePod()
	}
	return false
}

func (r Route) singlePod() bool { return r.Type == Throw && r.Prefix.IsSingleIP() }

// Text prints ops, one a line.
func Text(ops []Op) string {
	var b strings.Builder
	for _, o := range ops {
		b.WriteString(o.String() + "\n")
	}
	return b.String()
}

// Split parts ops into the local ones and the others, each in order.
func Split(ops []Op) (local, others []Op) {
	for _, o := range ops {
		if Local(o) {
			local = append(local, o)
		} else {
			others = append(others, o)
		}
	}
	return local, others
}

// NeedsLink reports whether the op works on the WireGuard interface, which may
// be missing where the kernel has none and the helper has not started one.
func NeedsLink(o Op) bool {
	switch o := o.(type) {
	case AddLink, ConfigureLink, SetLink, AddAddress, SetPeer, Greet:
		return true
	case SetRoute:
		return o.Route.Type == ViaLink
	}
	return false
}

// difference returns the elements of a that are not in b, in a's order.
func difference[T comparable](a, b []T) []T {
	a, b = trim(a, b)
	if len(a) == 0 {
		return nil // nearly always, for each of thousands of peers
	}
	in := make(map[T]bool, len(b))
	for _, x := range b {
		in[x] = true
	}
	return slices.DeleteFunc(slices.Clone(a), func(x T) bool { return in[x] })
}

// trim drops what both lists begin with, and what they end with: of two sorted
// lists with one change between them, next to everything.
func trim[T comparable](a, b []T) ([]T, []T) {
	return trimFunc(a, b, func(x, y *T) bool { return *x == *y })
}

func trimFunc[T any](a, b []T, equal func(x, y *T) bool) ([]T, []T) {
	if shared(a, b) {
		return nil, nil
	}
	for len(a) > 0 && len(b) > 0 && equal(&a[0], &b[0]) {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && equal(&a[len(a)-1], &b[len(b)-1]) {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return a, b
}

// shared reports whether both are one and the same list: plans share what stays,
// see Planner.
func shared[T any](a, b []T) bool { return len(a) == len(b) && len(a) > 0 && &a[0] == &b[0] }
