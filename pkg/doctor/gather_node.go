package doctor

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

func gatherTunnel(c config.Config, p Plan) Tunnel {
	t := Tunnel{KernelHasIt: kernel.HasWireGuard()}
	if l, err := netlink.LinkByName(c.Interface); err == nil {
		t.Kind = l.Type()
	}
	if t.Kind == "tuntap" {
		t.PID = findProcess([]string{"tunnel", c.Interface})
	}
	if l := p.Observed.Link; l.ListenPort != c.ListenPort || !l.Up { // the kernel opens it when the interface goes up
		t.Holders = holders(c.ListenPort, t.PID)
	}
	if l := p.Observed.Spare.Link; c.SparePort != 0 && (l.ListenPort != c.SparePort || !l.Up) {
		t.SpareHolders = holders(c.SparePort, findProcess([]string{"tunnel", mesh.SpareInterface(c.Interface)}))
	}
	return t
}

// findProcess finds one of which these words follow each other in its command line.
func findProcess(words []string) int {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		args := strings.Split(string(text), "\x00")
		for i := range args {
			if i+len(words) <= len(args) && slices.Equal(args[i:i+len(words)], words) {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
				return pid
			}
		}
	}
	return 0
}

// holders are the programs with a socket of that UDP port, but for one.
func holders(port, but int) (out []Holder) {
	inodes := map[string]bool{}
	for _, table := range []string{"/proc/self/net/udp", "/proc/self/net/udp6"} {
		text, _ := os.ReadFile(table) // without IPv6 there is no second one
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) < 10 {
				continue
			}
			_, hex, _ := strings.Cut(fields[1], ":")
			if n, err := strconv.ParseUint(hex, 16, 16); err == nil && int(n) == port {
				inodes["socket:["+fields[9]+"]"] = true
			}
		}
	}
	if len(inodes) == 0 {
		return nil
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	seen := map[int]bool{}
	for _, l := range links {
		to, err := os.Readlink(l)
		if _, is := inodes[to]; err != nil || !is {
			continue
		}
		inodes[to] = false // it has a process
		folder := filepath.Dir(filepath.Dir(l))
		pid, _ := strconv.Atoi(filepath.Base(folder))
		if pid == but || seen[pid] {
			continue
		}
		seen[pid] = true
		name, _ := os.ReadFile(filepath.Join(folder, "comm"))
		out = append(out, Holder{pid, strings.TrimSpace(string(name))})
	}
	for _, unclaimed := range inodes {
		if unclaimed {
			return append(out, Holder{})
		}
	}
	return out
}

func sysctl(path string) string {
	text, _ := os.ReadFile("/proc/sys/net/" + path) // "" if there is none
	return strings.TrimSpace(string(text))
}

func gatherNetwork(s Sources, f Facts) Network {
	n := Network{
		ForwardsV4: kernel.Forwards(false), ForwardsV6: kernel.Forwards(true),
		LinkForwards: sysctl("ipv4/conf/"+s.Config.Interface+"/forwarding") != "0",
		SrcValidMark: sysctl("ipv4/conf/all/src_valid_mark") == "1",
		ReversePath:  map[string]int{},
		Managers:     managers(s.Config.Interface),
		Forwarding:   reconcile.ForwardingNote(s.Config, f.Mesh.Known, kernel.Forwards),
	}
	u, err := reconcile.Underlay(s.Kernel, s.Config)
	if err != nil {
		n.Error = err
		return n
	}
	n.Addresses, n.UnderlayMTU, n.Fragments = u.All, u.MTU, reconcile.FragmentsNote(s.Config, u, f.Mesh.Known)
	n.Uplinks = interfacesOf(u.All)
	for _, name := range append([]string{"all", s.Config.Interface}, n.Uplinks...) {
		if v, err := strconv.Atoi(sysctl("ipv4/conf/" + name + "/rp_filter")); err == nil {
			n.ReversePath[name] = v
		}
	}
	n.Rules, n.ForeignRoutes, n.Error = foreign(s.Config)
	return n
}

// interfacesOf are those that hold the addresses, sorted.
func interfacesOf(addrs []netip.Addr) (out []string) {
	links, _ := net.Interfaces()
	for _, l := range links {
		have, _ := l.Addrs()
		for _, a := range have {
			ipnet, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			if addr, ok := netipx.FromStdIP(ipnet.IP); ok && slices.Contains(addrs, addr) && !slices.Contains(out, l.Name) {
				out = append(out, l.Name)
			}
		}
	}
	slices.Sort(out)
	return out
}

// foreign are the rules and routes of others that could take our traffic.
func foreign(c config.Config) (rules []PolicyRule, routes []string, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		found, err := netlink.RuleList(family)
		if err != nil {
			return rules, routes, fmt.Errorf("list rules: %w", err)
		}
		for _, r := range found {
			if r.Protocol == kernel.RouteProtocol || r.Table == unix.RT_TABLE_LOCAL && r.Priority == 0 {
				continue
			}
			p := PolicyRule{Text: strings.TrimSpace(r.String()), Family: "ipv4", Priority: r.Priority, Table: r.Table, Mark: r.Mark}
			if family == netlink.FAMILY_V6 {
				p.Family = "ipv6"
			}
			if r.Mask != nil {
				p.Mask = *r.Mask
			} else if r.Mark != 0 {
				p.Mask = ^uint32(0)
			}
			if r.Priority <= c.RulePriority && r.Mark == 0 && !r.Invert && r.Table != c.Table {
				p.Takes, p.Via = taken(r, family, c)
			}
			rules = append(rules, p)
		}
		filter := &netlink.Route{Table: c.Table}
		inTable, err := netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
		if err != nil {
			return rules, routes, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range inTable {
			if r.Protocol != kernel.RouteProtocol {
				routes = append(routes, routeText(r))
			}
		}
	}
	return rules, routes, nil
}

func routeText(r netlink.Route) string {
	to := "default"
	if r.Dst != nil {
		to = r.Dst.String()
	}
	if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
		to += " dev " + l.Attrs().Name
	}
	return fmt.Sprintf("%s proto %d table %d", to, r.Protocol, r.Table)
}

// taken is the cluster prefix that a rule ahead of ours leads elsewhere.
func taken(r netlink.Rule, family int, c config.Config) (netip.Prefix, string) {
	overlaps := func(n *net.IPNet, p netip.Prefix) bool {
		if n == nil {
			return true
		}
		q, ok := netipx.FromStdIPNet(n)
		return ok && q.Overlaps(p)
	}
	routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: r.Table}, netlink.RT_FILTER_TABLE)
	if err != nil || r.Table == 0 {
		return netip.Prefix{}, ""
	}
	for _, p := range c.Bounds().All() {
		if p.Addr().Is4() != (family == netlink.FAMILY_V4) || !overlaps(r.Dst, p) {
			continue
		}
		for _, route := range routes {
			ones := 0
			if route.Dst != nil {
				ones, _ = route.Dst.Mask.Size()
			}
			if route.Type != unix.RTN_THROW && overlaps(route.Dst, p) && (r.SuppressPrefixlen < 0 || ones > r.SuppressPrefixlen) {
				return p, routeText(route)
			}
		}
	}
	return netip.Prefix{}, ""
}

// managers are the programs that take every interface for theirs, unless they are
// told otherwise.
func managers(link string) (out []string) {
	if _, err := os.Stat("/run/NetworkManager"); err == nil && !mentioned("/etc/NetworkManager/conf.d/*.conf", "unmanaged-devices", link) &&
		!mentioned("/etc/NetworkManager/NetworkManager.conf", "unmanaged-devices", link) {
		out = append(out, "NetworkManager")
	}
	if _, err := os.Stat("/run/systemd/netif/links"); err == nil {
		const key = "ManageForeignRoutingPolicyRules=no"
		if !mentioned("/etc/systemd/networkd.conf", key, "") && !mentioned("/etc/systemd/networkd.conf.d/*.conf", key, "") {
			out = append(out, "systemd-networkd")
		}
	}
	return out
}

// mentioned reports whether a file has a line with both.
func mentioned(pattern, key, value string) bool {
	files, _ := filepath.Glob(pattern)
	for _, f := range files {
		text, _ := os.ReadFile(f)
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			if !strings.HasPrefix(line, "#") && strings.Contains(line, key) && strings.Contains(line, value) {
				return true
			}
		}
	}
	return false
}
