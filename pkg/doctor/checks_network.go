package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/wgcni/wgcni/pkg/mesh"
)

func checkUnderlay(f Facts) Check {
	t := topic{"underlay", "Underlay", "the default routes, and the MTU below the tunnel"}
	n := f.Network
	switch {
	case n.Error != nil:
		return t.fail(n.Error.Error(), "see whether `ip route` and `ip rule` answer")
	case n.Fragments != "":
		note, mend, _ := strings.Cut(n.Fragments, ": ")
		return t.warn(note, mend)
	case len(n.Addresses) == 0 && f.Config.Endpoint == "":
		return t.warn("there is no default route, so that this node has no address to publish", `give the machine a default route, or set "endpoint"`)
	case len(n.Addresses) == 0:
		return t.ok("no default route; the endpoint is configured")
	}
	return t.ok(fmt.Sprintf("%s, addresses %s, MTU %d", strings.Join(n.Uplinks, ", "), texts(n.Addresses), n.UnderlayMTU))
}

// families are those that the cluster has.
func (f Facts) families() (out []bool) {
	for _, v6 := range []bool{false, true} {
		if slices.ContainsFunc(f.Config.Bounds().All(), func(p netip.Prefix) bool { return p.Addr().Is6() == v6 }) {
			out = append(out, v6)
		}
	}
	return out
}

// checkFirewall sends a peer's first message through the machine's filters, in mind.
// Where this node calls the others it needs their answers only.
func checkFirewall(f Facts) Check {
	port := f.Config.ListenPort
	t := topic{"firewall", "Firewall", fmt.Sprintf("what nftables and iptables do with UDP to port %d", port)}
	if f.RulesError != nil {
		return t.note("the filters cannot be read: "+f.RulesError.Error(), "")
	}
	state := uint32(stateNew)
	if f.Config.CallsOnly {
		state = stateEstablished
	}
	var doubt string
	for _, v6 := range f.outerFamilies() {
		for _, in := range f.uplinks() {
			p := wireGuardPacket(v6, in, port, state)
			if fate := f.Rules.Judge(p, HookPrerouting); fate.Dropped == Yes {
				return t.fail(fmt.Sprintf("dropped by %s", fate), fate.letIn(port))
			}
			switch fate := f.Rules.Judge(p, HookInput); fate.Dropped {
			case Yes:
				return f.shutOut(t, p, fate)
			case Maybe:
				doubt = fate.String()
			}
			out := p
			mark := f.Config.FwMark
			out.In, out.Out, out.Mark, out.SrcPort, out.DstPort = "", in, &mark, uint16(port), 0
			if fate := f.Rules.Judge(out, HookOutput, HookPostrouting); fate.Dropped == Yes {
				return t.fail(fmt.Sprintf("what WireGuard sends is dropped by %s", fate), fate.letOut(port))
			}
		}
	}
	if f.Rules.Unread != "" {
		return t.note("not all rules could be read: "+f.Rules.Unread, "")
	}
	if doubt != "" {
		return t.note(fmt.Sprintf("may be dropped, depending on what cannot be told from here, by %s", doubt), "see the handshakes below: if there are some, it is not")
	}
	return t.ok(fmt.Sprintf("nothing drops it (%d chains)", len(f.Rules.Chains)))
}

// shutOut tells a firewall that lets answers in from one that lets in nothing: behind
// the former all is well for as long as this node has called, and not for longer.
func (f Facts) shutOut(t topic, p Packet, fate Fate) Check {
	answer := p
	answer.State = stateEstablished
	switch answersPass := f.Rules.Judge(answer, HookInput).Dropped == No; {
	case !answersPass:
		return t.fail(fmt.Sprintf("dropped by %s", fate), fate.letIn(f.Config.ListenPort))
	case f.Config.Keepalive > 0:
		return t.warn(fmt.Sprintf("answers get in, and a peer that calls first is dropped by %s; the keepalive of %s hides it mostly", fate, f.Config.Keepalive), fate.letIn(f.Config.ListenPort))
	}
	return t.fail(fmt.Sprintf("answers get in, and a peer that calls first is dropped by %s: what works now stops when nothing was sent for a while", fate), fate.letIn(f.Config.ListenPort))
}

// uplinks may be unknown: then rules for a certain interface may match or not.
func (f Facts) uplinks() []string {
	if len(f.Network.Uplinks) == 0 {
		return []string{""}
	}
	return f.Network.Uplinks
}

// outerFamilies are those by which the peers are reached.
func (f Facts) outerFamilies() (out []bool) {
	for _, v6 := range []bool{false, true} {
		if slices.ContainsFunc(f.Plan.State.Peers, func(p mesh.Peer) bool { return p.Endpoint.IsValid() && p.Endpoint.Addr().Is6() == v6 }) {
			out = append(out, v6)
		}
	}
	if len(out) == 0 {
		out = []bool{false}
	}
	return out
}

// letIn is the very command that lets WireGuard in ahead of the rule that drops it.
func (f Fate) letIn(port int) string {
	return f.insert(fmt.Sprintf("udp dport %d accept", port), fmt.Sprintf("-p udp --dport %d", port)) +
		", and keep that in the firewall's own configuration"
}

func (f Fate) letOut(port int) string {
	return f.insert(fmt.Sprintf("udp sport %d accept", port), fmt.Sprintf("-p udp --sport %d", port)) +
		", and keep that in the firewall's own configuration"
}

func (f Fate) insert(nft, ipt string) string {
	c := f.By
	program := map[string]string{"ip": "iptables", "ip6": "ip6tables"}[c.Family]
	switch {
	case c.Backend == backendLegacy:
		return fmt.Sprintf("`%s-legacy -t %s -I %s %s -j ACCEPT`", program, c.Table, c.Name, ipt)
	case program != "" && strings.ToUpper(c.Name) == c.Name && slices.Contains([]string{"filter", "mangle", "raw", "nat", "security"}, c.Table):
		return fmt.Sprintf("`%s -t %s -I %s %s -j ACCEPT`", program, c.Table, c.Name, ipt)
	}
	return fmt.Sprintf("`nft insert rule %s %s %s %s`", c.Family, c.Table, c.Name, nft)
}

// checkForward sends a pod's packet through the filters, in mind: out into the
// tunnel, and in from there.
func checkForward(f Facts) Check {
	t := topic{"forward", "Forwarding filters", fmt.Sprintf("what nftables and iptables do with packets between pods and %s", f.Config.Interface)}
	if f.RulesError != nil {
		return t.note("the filters cannot be read: "+f.RulesError.Error(), "")
	}
	if f.Config.Bare && len(f.Config.Subnets) == 0 {
		return t.ok("this machine has no pods")
	}
	for _, link := range []string{f.Config.Interface, mesh.SpareInterface(f.Config.Interface)} {
		if c, dropped := f.forwardBy(t, link); dropped {
			return c
		}
	}
	return t.ok("nothing drops them for certain")
}

// forwardBy is checkForward, of one of the two interfaces. The spare one is needed
// while keys are rotated.
func (f Facts) forwardBy(t topic, link string) (c Check, dropped bool) {
	spare := link != f.Config.Interface
	for _, v6 := range f.families() {
		pod, far := f.localAddress(v6), f.remoteAddress(v6)
		if !pod.IsValid() {
			continue
		}
		out := Packet{IPv6: v6, Src: pod, Dst: far, Out: link, State: stateNew}
		in := Packet{IPv6: v6, Src: far, Dst: pod, In: link, State: stateNew}
		for _, way := range []struct {
			name   string
			packet Packet
			rule   string
			ipt    string
		}{
			{"from pods into the tunnel", out, fmt.Sprintf("oifname %q accept", link), "-o " + link},
			{"from the tunnel to pods", in, fmt.Sprintf("iifname %q accept", link), "-i " + link},
		} {
			fate := f.Rules.Judge(way.packet, HookForward)
			mend := fate.insert(way.rule, way.ipt) + ", and keep that in the firewall's own configuration"
			switch {
			case fate.Dropped != Yes:
			case spare && f.Plan.Observed.Spare.Link.Name == "":
				return t.note(fmt.Sprintf("what goes %s by %s, as it does while keys are rotated, will be dropped by %s", way.name, link, fate), mend), true
			default:
				return t.fail(fmt.Sprintf("what goes %s is dropped by %s", way.name, fate), mend), true
			}
		}
	}
	return Check{}, false
}

// localAddress is one of a pod here, or could be.
func (f Facts) localAddress(v6 bool) netip.Addr {
	for _, at := range f.Plan.Pods {
		for _, a := range at.Addresses {
			if a.Is6() == v6 {
				return a
			}
		}
	}
	for _, c := range f.Mesh.Known.Self.Prefixes {
		if c.Prefix.Addr().Is6() == v6 {
			return c.Prefix.Masked().Addr().Next().Next()
		}
	}
	return netip.Addr{}
}

// tunnel reports whether an interface is one of the two that encrypt.
func (f Facts) tunnel(link string) bool {
	return link == f.Config.Interface || link == mesh.SpareInterface(f.Config.Interface)
}

// remoteAddress is one behind some peer; invalid where there is none.
func (f Facts) remoteAddress(v6 bool) netip.Addr {
	for _, p := range f.Plan.State.Peers {
		for _, prefix := range p.AllowedIPs {
			if prefix.Addr().Is6() == v6 && !prefix.IsSingleIP() {
				return prefix.Addr().Next().Next()
			}
		}
	}
	return netip.Addr{}
}

func checkForwarding(f Facts) Check {
	t := topic{"forwarding", "IP forwarding", "sysctls net.ipv4.ip_forward, net.ipv6.conf.all.forwarding and net.ipv4.conf." + f.Config.Interface + ".forwarding"}
	n := f.Network
	if n.Forwarding != "" {
		note, mend, _ := strings.Cut(n.Forwarding, ": ")
		return t.fail(note, mend)
	}
	off := map[bool]string{}
	if !n.ForwardsV4 {
		off[false] = "net.ipv4.ip_forward=1"
	}
	if !n.ForwardsV6 {
		off[true] = "net.ipv6.conf.all.forwarding=1"
	}
	for _, at := range f.Plan.Pods {
		for _, a := range at.Addresses {
			if s, is := off[a.Is6()]; is {
				return t.fail(fmt.Sprintf("this machine does not forward, so that pods such as %s reach nobody outside of it", a), fmt.Sprintf("`sysctl -w %s`, and keep that in /etc/sysctl.d", s))
			}
		}
	}
	if len(f.Plan.Pods) > 0 && n.ForwardsV4 && !n.LinkForwards {
		return t.fail(f.Config.Interface+" does not forward, so that nothing comes through the tunnel to pods", fmt.Sprintf("`sysctl -w net.ipv4.conf.%s.forwarding=1`", f.Config.Interface))
	}
	if len(f.Plan.Pods) == 0 {
		return t.ok("there are no pods here that would need it")
	}
	return t.ok("on, where pods need it")
}

// checkReversePath knows the one case in which a strict filter drops WireGuard's own
// packets: those of machines whose addresses are reached through the tunnel.
func checkReversePath(f Facts) Check {
	t := topic{"rp_filter", "Reverse path filter", "sysctls rp_filter and src_valid_mark"}
	strict := ""
	for _, name := range append([]string{f.Config.Interface}, f.Network.Uplinks...) {
		// The greater of all and the interface's own counts (IN_DEV_RPFILTER).
		if max(f.Network.ReversePath["all"], f.Network.ReversePath[name]) == 1 {
			strict = name
		}
	}
	switch {
	case strict == "":
		return t.ok("not strict on any interface that matters")
	case f.Config.ReachesHosts() && !f.Network.SrcValidMark && len(f.Plan.State.Filter.Nodes.Own) > 0:
		return t.fail(fmt.Sprintf("strict on %s, and it does not heed marks: it drops WireGuard's packets from machines that are reached through the tunnel", strict),
			"`sysctl -w net.ipv4.conf.all.src_valid_mark=1`; wgcnid does so within seconds, if it runs and may write there")
	}
	return t.ok(fmt.Sprintf("strict on %s, which lets the tunnel's packets pass", strict))
}

func checkRules(f Facts) Check {
	t := topic{"rules", "Policy rules", fmt.Sprintf("rules of others (`ip rule`) ahead of ours, of priority %d, and those that use our table %d or our mark %#x", f.Config.RulePriority, f.Config.Table, f.Config.FwMark)}
	for _, r := range f.Network.Rules {
		del := fmt.Sprintf("`ip %s rule del priority %d`", map[string]string{"ipv4": "-4", "ipv6": "-6"}[r.Family], r.Priority)
		switch {
		case r.Takes.IsValid():
			return t.fail(fmt.Sprintf("%q comes before ours and takes traffic to %s, by the route %s: it does not reach the tunnel", r.Text, r.Takes, r.Via),
				del+fmt.Sprintf(", or set \"rulePriority\" below %d", r.Priority))
		case r.Table == f.Config.Table:
			return t.warn(fmt.Sprintf("%q uses our table %d", r.Text, r.Table), del+`, or set "table" to another number`)
		case r.Mask&f.Config.FwMark != 0 && r.Mark&f.Config.FwMark != 0:
			return t.warn(fmt.Sprintf("%q goes by our mark %#x: WireGuard's own packets take it", r.Text, f.Config.FwMark), del+`, or set "fwmark" to another bit`)
		}
	}
	return t.ok("none takes traffic of the cluster")
}

func checkRoutes(f Facts) Check {
	t := topic{"routes", "Routes", fmt.Sprintf("table %d, and the way to each peer's address in the tunnel", f.Config.Table)}
	if len(f.Network.ForeignRoutes) > 0 {
		return t.fail(fmt.Sprintf("there are routes of others in our table: %s", some(f.Network.ForeignRoutes)), fmt.Sprintf("remove them (`ip route del …`), or set \"table\" to another number than %d", f.Config.Table))
	}
	checked := 0
	for _, p := range f.Peers {
		if !p.Address.IsValid() || !p.Present || p.Route == "" && p.RouteErr == nil {
			continue
		}
		checked++
		if p.RouteErr != nil {
			return t.fail(fmt.Sprintf("the kernel has no way to %s (%s): %v", p.Address, p.Name, p.RouteErr), "wgcnid sets the routes within seconds, if it runs; see \"Policy rules\"")
		}
		if !f.tunnel(p.Route) {
			return t.fail(fmt.Sprintf("the kernel sends to %s (%s) by %s, not by %s", p.Address, p.Name, p.Route, f.Config.Interface),
				fmt.Sprintf("find the rule or route with `ip route get %s` and `ip rule`, and remove it", p.Address))
		}
	}
	return t.ok(fmt.Sprintf("only ours; %d addresses of peers lead to %s", checked, f.Config.Interface))
}

func checkMark(f Facts) Check {
	t := topic{"mark", "Packet mark", fmt.Sprintf("filter rules of others that set our mark, %#x", f.Config.FwMark)}
	setters := f.Rules.SettersOf(f.Config.FwMark)
	if len(setters) == 0 {
		return t.ok("none")
	}
	var found []string
	for _, s := range setters {
		found = append(found, fmt.Sprintf("%s: %s", s.In, s.Rule))
	}
	return t.warn(some(found)+": such packets are taken for WireGuard's own and do not enter the tunnel", `set "fwmark" to a bit that nobody uses, on this node, and restart wgcnid`)
}

func checkManagers(f Facts) Check {
	t := topic{"managers", "Network managers", "NetworkManager and systemd-networkd, which take interfaces and rules for theirs"}
	switch {
	case slices.Contains(f.Network.Managers, "NetworkManager"):
		return t.note("NetworkManager runs, and is not told to leave "+f.Config.Interface+" alone",
			fmt.Sprintf("write \"[keyfile]\\nunmanaged-devices=interface-name:%s*\" to /etc/NetworkManager/conf.d/wgcni.conf, then `nmcli general reload`", f.Config.Interface))
	case slices.Contains(f.Network.Managers, "systemd-networkd"):
		return t.note("systemd-networkd removes rules and routes of others when it restarts; wgcnid puts them back within seconds",
			"write \"[Network]\\nManageForeignRoutingPolicyRules=no\\nManageForeignRoutes=no\" to /etc/systemd/networkd.conf.d/wgcni.conf")
	}
	return t.ok("none that would touch " + f.Config.Interface)
}
