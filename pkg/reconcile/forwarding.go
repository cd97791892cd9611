package reconcile

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/store"
)

// ForwardingNote says that packets which this machine should carry for others are
// lost, since its kernel does not forward, and how to mend that; "" if all is
// well. wgcni does not switch it on by itself: it opens the machine's other
// interfaces as well, and takes the router advertisements from an IPv6 host
// (accept_ra in Documentation/networking/ip-sysctl.rst).
func ForwardingNote(c config.Config, known store.Known, forwards func(ipv6 bool) bool) string {
	enters := func() bool {
		for _, r := range known.Records.Nodes {
			if r.Enters(c.NodeName) {
				return true
			}
		}
		return false
	}
	return forwardingNote(c, enters, forwards)
}

// forwardingNote is ForwardingNote, where it is known whether a plain machine enters
// by this one.
func forwardingNote(c config.Config, enters func() bool, forwards func(ipv6 bool) bool) string {
	carries := c.Role == mesh.RoleGateway || slices.ContainsFunc(c.Subnets, func(p netip.Prefix) bool { return !p.IsSingleIP() })
	if !carries && !enters() {
		return ""
	}
	var off []string
	for _, f := range []struct {
		ipv6   bool
		sysctl string
	}{{false, "net.ipv4.ip_forward=1"}, {true, "net.ipv6.conf.all.forwarding=1"}} {
		all := slices.Concat(c.ClusterCIDRs, c.ExternalCIDRs, c.PeerCIDRs)
		needed := slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Addr().Is6() == f.ipv6 })
		if needed && !forwards(f.ipv6) {
			off = append(off, f.sysctl)
		}
	}
	if len(off) == 0 {
		return ""
	}
	return fmt.Sprintf("packets that this machine should carry for others are lost, since it does not forward: run `sysctl -w %s`, and keep that in /etc/sysctl.d",
		strings.Join(off, " "))
}

// warnOfForwarding says it once.
func (l *Loop) warnOfForwarding() {
	note := forwardingNote(l.config, func() bool { return l.planner.members.enters }, kernel.Forwards)
	if note != "" && note != l.forwarding {
		l.Log.Warn(note)
	}
	l.forwarding = note
}
