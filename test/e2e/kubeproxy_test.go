package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

// A service is a Kubernetes Service with one port, by TCP and UDP, in one family.
type service struct {
	name      string // namespace/name
	clusterIP netip.Addr
	port      uint16
	nodePort  uint16
	local     bool // externalTrafficPolicy: Local
	backend   backend
}

// A backend is the pod behind a service, and its node.
type backend struct {
	address netip.Addr
	node    *cluster.Node
}

// kubeProxy writes the rules of one node in one family, in the layout of
// kube-proxy 1.33.
type kubeProxy struct {
	node     *cluster.Node
	v6       bool
	cidr     bool // it was started with --cluster-cidr, and so tells pods from others
	services []service
}

const (
	masqueradeMark = "0x4000"
	backendPort    = echoPort
)

var serviceProtocols = []string{"tcp", "udp"}

func (k kubeProxy) family(v4, v6 string) string {
	if k.v6 {
		return v6
	}
	return v4
}

func (k kubeProxy) clusterCIDR() string {
	return k.family(podRanges[0].String(), podRanges[1].String())
}

// hash names chains as kube-proxy does (portProtoHash in pkg/proxy/iptables).
func hash(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "")))
	return base32.StdEncoding.EncodeToString(sum[:])[:16]
}

// iptables is what kube-proxy gives to iptables-restore, in iptables mode.
func (k kubeProxy) iptables() string {
	var chains, rules strings.Builder
	chain := func(name string) { fmt.Fprintf(&chains, ":%s - [0:0]\n", name) }
	rule := func(format string, args ...any) { fmt.Fprintf(&rules, "-A "+format+"\n", args...) }
	for _, name := range []string{"KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ"} {
		chain(name)
	}
	rule(`KUBE-POSTROUTING -m mark ! --mark %[1]s/%[1]s -j RETURN`, masqueradeMark)
	rule(`KUBE-POSTROUTING -j MARK --xor-mark %s`, masqueradeMark)
	rule(`KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully`)
	rule(`KUBE-MARK-MASQ -j MARK --or-mark %s`, masqueradeMark)
	for _, s := range k.services {
		for _, proto := range serviceProtocols {
			k.iptablesService(s, proto, chain, rule)
		}
	}
	rule(`KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS`)
	return "*filter\n:KUBE-FORWARD - [0:0]\n-I " + forwardHook + `
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark ` + masqueradeMark + "/" + masqueradeMark + ` -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
` + chains.String() + "-I " + strings.Join(natHooks, "\n-I ") + "\n" + rules.String() + "COMMIT\n"
}

// The jumps from the built-in chains. They come first there, ahead of what other
// plugins have put: bridge's ipMasq accepts what a pod sends to its own range.
const forwardHook = `FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD`

var natHooks = []string{
	`PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`,
	`OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`,
	`POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING`,
}

func (k kubeProxy) iptablesService(s service, proto string, chain func(string), rule func(string, ...any)) {
	id := hash(s.name, proto)
	svc, ext, svl := "KUBE-SVC-"+id, "KUBE-EXT-"+id, "KUBE-SVL-"+id
	chain(svc)
	chain(ext)
	to := fmt.Sprintf("-m %[1]s -p %[1]s -d %[2]s --dport %[3]d", proto, s.clusterIP, s.port)
	rule(`KUBE-SERVICES -m comment --comment "%s cluster IP" %s -j %s`, s.name, to, svc)
	rule(`KUBE-NODEPORTS -m comment --comment %s -m %[2]s -p %[2]s --dport %d -j %s`, s.name, proto, s.nodePort, ext)
	if k.cidr {
		rule(`%s ! -s %s %s -j KUBE-MARK-MASQ`, svc, k.clusterCIDR(), to)
	}
	sep := "KUBE-SEP-" + hash(s.name, proto, s.backend.address.String())
	chain(sep)
	if s.local {
		chain(svl)
		if k.cidr {
			rule(`%s -m comment --comment "pod traffic" -s %s -j %s`, ext, k.clusterCIDR(), svc)
		}
		rule(`%s -m comment --comment "masquerade LOCAL traffic" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ`, ext)
		rule(`%s -m comment --comment "route LOCAL traffic" -m addrtype --src-type LOCAL -j %s`, ext, svc)
		rule(`%s -j %s`, ext, svl)
		if s.backend.node == k.node {
			rule(`%s -j %s`, svl, sep)
		}
	} else {
		rule(`%s -m comment --comment "masquerade traffic for external destinations" -j KUBE-MARK-MASQ`, ext)
		rule(`%s -j %s`, ext, svc)
	}
	rule(`%s -j %s`, svc, sep)
	rule(`%s -s %s -j KUBE-MARK-MASQ`, sep, s.backend.address)
	rule(`%s -m %[2]s -p %[2]s -j DNAT --to-destination %s`, sep, proto, netip.AddrPortFrom(s.backend.address, backendPort))
}

// nftables is what kube-proxy gives to nft, in nftables mode.
func (k kubeProxy) nftables() string {
	var b strings.Builder
	add := func(format string, args ...any) { fmt.Fprintf(&b, "add "+format+"\n", args...) }
	t := k.family("ip", "ip6") + " kube-proxy"
	addr := k.family("ipv4_addr", "ipv6_addr")
	ip := k.family("ip", "ip6")
	add("table %s", t)
	add("set %s cluster-ips { type %s ; }", t, addr)
	add("set %s nodeport-ips { type %s ; }", t, addr)
	add("map %s service-ips { type %s . inet_proto . inet_service : verdict ; }", t, addr)
	add("map %s service-nodeports { type inet_proto . inet_service : verdict ; }", t)
	add("chain %s services", t)
	add("chain %s mark-for-masquerade", t)
	add("chain %s masquerading", t)
	add("chain %s cluster-ips-check", t)
	for _, c := range []struct{ name, kind, hook, priority string }{
		{"filter-forward", "filter", "forward", "0"},
		{"filter-output", "filter", "output", "0"},
		{"nat-output", "nat", "output", "-100"},
		{"nat-postrouting", "nat", "postrouting", "100"},
		{"nat-prerouting", "nat", "prerouting", "-100"},
	} {
		add("chain %s %s { type %s hook %s priority %s ; }", t, c.name, c.kind, c.hook, c.priority)
	}
	add("rule %s cluster-ips-check %s daddr @cluster-ips reject", t, ip)
	add("rule %s filter-forward ct state new jump cluster-ips-check", t)
	add("rule %s filter-output ct state new jump cluster-ips-check", t)
	add("rule %s mark-for-masquerade mark set mark or %s", t, masqueradeMark)
	add("rule %s masquerading mark and %s == 0 return", t, masqueradeMark)
	add("rule %s masquerading mark set mark xor %s", t, masqueradeMark)
	add("rule %s masquerading masquerade fully-random", t)
	add("rule %s nat-output jump services", t)
	add("rule %s nat-postrouting jump masquerading", t)
	add("rule %s nat-prerouting jump services", t)
	add("rule %s services %s daddr . meta l4proto . th dport vmap @service-ips", t, ip)
	add("rule %s services %s daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports", t, ip)
	own := k.node.IPv4
	if k.v6 {
		own = k.node.IPv6
	}
	add("element %s nodeport-ips { %s }", t, own)
	for _, s := range k.services {
		add("element %s cluster-ips { %s }", t, s.clusterIP)
		for _, proto := range serviceProtocols {
			k.nftablesService(s, proto, t, ip, add)
		}
	}
	return b.String()
}

func (k kubeProxy) nftablesService(s service, proto, t, ip string, add func(string, ...any)) {
	id := hash(s.name, proto)[:8] + "-" + s.name + "/" + proto
	svc, ext := "service-"+id, "external-"+id
	endpoint := "endpoint-" + hash(s.name, proto, s.backend.address.String())[:8] + "-" + s.name + "/" + proto + "__" + strings.ReplaceAll(s.backend.address.String(), ":", ".")
	add("chain %s %s", t, endpoint)
	add("rule %s %s %s saddr %s jump mark-for-masquerade", t, endpoint, ip, s.backend.address)
	add("rule %s %s meta l4proto %s dnat to %s", t, endpoint, proto, netip.AddrPortFrom(s.backend.address, backendPort))
	use := func(from string) { add("rule %s %s numgen random mod 1 vmap { 0 : goto %s }", t, from, endpoint) }
	add("chain %s %s", t, svc)
	if k.cidr {
		add("rule %s %s %[3]s daddr %[4]s %[3]s saddr != %[5]s jump mark-for-masquerade", t, svc, ip, s.clusterIP, k.clusterCIDR())
	}
	use(svc)
	add("chain %s %s", t, ext)
	if s.local {
		if k.cidr {
			add("rule %s %s %s saddr %s goto %s", t, ext, ip, k.clusterCIDR(), svc)
		}
		add("rule %s %s fib saddr type local jump mark-for-masquerade", t, ext)
		add("rule %s %s fib saddr type local goto %s", t, ext, svc)
		if s.backend.node == k.node {
			use(ext)
		}
	} else {
		add("rule %s %s jump mark-for-masquerade", t, ext)
		add("rule %s %s goto %s", t, ext, svc)
	}
	add("element %s service-ips { %s . %s . %d : goto %s }", t, s.clusterIP, proto, s.port, svc)
	add("element %s service-nodeports { %s . %d : goto %s }", t, proto, s.nodePort, ext)
}

// proxyModes are kube-proxy's, each with what applies its rules and takes them away.
var proxyModes = map[string]struct {
	apply  func(*testing.T, kubeProxy)
	remove func(*testing.T, kubeProxy)
}{
	"iptables": {
		apply: func(t *testing.T, k kubeProxy) {
			batch(t, k.node, k.iptables(), k.family("iptables-restore", "ip6tables-restore"), "-w", "5", "--noflush")
		},
		remove: func(t *testing.T, k kubeProxy) {
			// Chains that nothing leads to do nothing.
			batch(t, k.node, "*filter\n-D "+forwardHook+"\nCOMMIT\n*nat\n-D "+strings.Join(natHooks, "\n-D ")+"\nCOMMIT\n",
				k.family("iptables-restore", "ip6tables-restore"), "-w", "5", "--noflush")
		},
	},
	"nftables": {
		apply: func(t *testing.T, k kubeProxy) { batch(t, k.node, k.nftables(), "nft", "-f", "-") },
		remove: func(t *testing.T, k kubeProxy) {
			batch(t, k.node, "delete table "+k.family("ip", "ip6")+" kube-proxy\n", "nft", "-f", "-")
		},
	},
}

func batch(t *testing.T, n *cluster.Node, input, name string, args ...string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // rules are taken away in a Cleanup
	if out, err := n.Batch(ctx, input, name, args...); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, input)
	}
}
