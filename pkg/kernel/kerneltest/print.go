package kerneltest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// String prints everything in the kernel, one object a line and sorted, for
// cmp.Diff against the text that a test expects. An empty kernel prints "".
func (k *Kernel) String() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	s := k.state()
	k.printLink(line, s.Link, s.Addresses, s.Peers)
	k.printLink(line, s.Spare.Link, nil, s.Spare.Peers)
	all := mesh.State{}
	for _, r := range k.routes {
		all.Routes = append(all.Routes, r.Route)
	}
	for r := range k.rules {
		all.Rules = append(all.Rules, r)
	}
	all.Sort()
	for _, r := range all.Routes {
		line("ip route %s", k.route(k.routes[keyOf(r)]))
	}
	for _, r := range all.Rules {
		line("ip rule %s%s", r, foreign(k.rules[r]))
	}
	k.printFilter(line)
	if k.srcValidMark {
		line("sysctl src_valid_mark=1")
	}
	return b.String()
}

func (k *Kernel) printLink(line func(string, ...any), l mesh.Link, addresses []netip.Prefix, peers []mesh.Peer) {
	if l.Name == "" {
		return
	}
	line("ip link %s mtu %d %s", l.Name, l.MTU, map[bool]string{true: "up", false: "down"}[l.Up])
	for _, p := range addresses {
		line("ip address %s dev %s", p, l.Name)
	}
	line("wg %s public-key %s listen-port %d fwmark %#x", l.Name, k.name(l.PublicKey), l.ListenPort, l.FwMark)
	for _, p := range peers {
		line("wg %s peer %s", l.Name, k.peer(p))
	}
}

func (k *Kernel) printFilter(line func(string, ...any)) {
	f := k.filter
	if f.Interface == "" {
		return
	}
	state := ""
	if f.Broken {
		state = " broken"
	}
	line("nft table for %s%s", f.Interface, state)
	set(line, "cluster", f.Cluster)
	set(line, "guarded", f.Guarded)
	if !slices.Equal(f.Withheld, f.Guarded) {
		set(line, "withheld", f.Withheld)
	}
	set(line, "local", f.Local)
	set(line, "pods", f.Pods)
	set(line, "exempt", f.Exempt)
	set(line, "behind", f.Behind)
	set(line, "masqueraded", f.Masqueraded)
	if f.Nodes.Mark != 0 {
		line("nft nodes mark %#x direct %v", f.Nodes.Mark, f.Nodes.DirectPorts)
		set(line, "own", f.Nodes.Own)
		set(line, "nodes", f.Nodes.Peers)
		set(line, "held", f.Nodes.Held)
	}
}

// set prints a set of the filter; an empty one prints nothing.
func set[T fmt.Stringer](line func(string, ...any), name string, elements []T) {
	if len(elements) > 0 {
		line("nft set %s %s", name, join(elements, " "))
	}
}

func (k *Kernel) peer(p mesh.Peer) string {
	s := k.name(p.PublicKey)
	if p.PresharedKey != (mesh.Fingerprint{}) {
		s += " preshared key: (hidden)" // as `wg show` has it
	}
	if p.Endpoint.IsValid() {
		s += " endpoint " + p.Endpoint.String()
	}
	if p.Keepalive != 0 {
		s += " persistent-keepalive " + p.Keepalive.String()
	}
	if len(p.AllowedIPs) > 0 {
		s += " allowed-ips " + join(p.AllowedIPs, ",")
	}
	return s
}

// route prints as ip(8) does, with the device behind the prefix.
func (k *Kernel) route(r route) string {
	s := r.String()
	if r.dev != "" {
		prefix, rest, _ := strings.Cut(s, " ")
		s = prefix + " dev " + r.dev + " " + rest
	}
	return s + foreign(r.foreign)
}

func foreign(yes bool) string {
	if yes {
		return " (foreign)"
	}
	return ""
}

func (k *Kernel) name(key wgtypes.Key) string {
	if k.Name != nil {
		if s := k.Name(key); s != "" {
			return s
		}
	}
	return key.String()
}

func join[T fmt.Stringer](in []T, sep string) string {
	out := make([]string, 0, len(in))
	for _, x := range in {
		out = append(out, x.String())
	}
	return strings.Join(out, sep)
}
