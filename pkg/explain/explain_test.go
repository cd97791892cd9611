package explain_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/explain"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/store"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func claim(s string) []mesh.Claim { return []mesh.Claim{{Prefix: prefix(s)}} }

// three is the mesh of node a: b has joined, c too if its key is set, d announces
// nothing. Outside of podCIDRs there is the pod 10.244.77.1.
func three() mesh.Facts {
	return mesh.Facts{
		Settings: mesh.Settings{
			ClusterCIDRs: []netip.Prefix{prefix("10.244.0.0/16")}, Interface: "wgcni0", ListenPort: 51820, MTU: 1440,
			FwMark: 4, Table: 30567, RulePriority: 110,
		},
		Self: mesh.Node{
			Name: "a", PublicKey: wgtypes.Key{1}, Prefixes: claim("10.244.1.0/24"), Addresses: []netip.Addr{addr("192.0.2.1")},
			Endpoint: netip.MustParseAddrPort("192.0.2.1:51820"),
		},
		Nodes: []mesh.Node{
			{
				Name: "b", PublicKey: wgtypes.Key{2}, Prefixes: claim("10.244.2.0/24"), Pods: claim("10.244.88.1/32"),
				Endpoint: netip.MustParseAddrPort("192.0.2.2:51820"), Addresses: []netip.Addr{addr("192.0.2.2")},
			},
			{
				Name: "c", PublicKey: wgtypes.Key{3}, Prefixes: claim("10.244.3.0/24"),
				Endpoint: netip.MustParseAddrPort("192.0.2.3:51820"), Addresses: []netip.Addr{addr("192.0.2.3"), addr("10.244.4.4")},
			},
		},
		LocalPods: []netip.Addr{addr("10.244.1.2"), addr("10.244.77.1")},
	}
}

// machine is node a's kernel, as kerneltest has it, which answers questions about routes.
type machine struct {
	kerneltest.Kernel
	facts    mesh.Facts
	own      map[netip.Addr]string
	unrouted bool // the primary plugin's routes to this machine's pods are gone
}

func newMachine(t *testing.T, f mesh.Facts) *machine {
	t.Helper()
	m := &machine{facts: f, own: map[netip.Addr]string{addr("192.0.2.1"): kerneltest.Uplink}}
	m.Own = []netip.Addr{addr("192.0.2.1"), addr("10.244.1.0")}
	plan := mesh.NewPlan(f)
	if err := m.Apply(mesh.Diff(mesh.State{}, plan.State, mesh.Context{Now: now})); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"10.244.1.0/24", "10.244.77.1/32"} {
		m.AddForeignRoute(mesh.Route{Prefix: prefix(p), Table: kerneltest.MainTable}, "cni0")
	}
	m.own[addr("10.244.1.0")] = "wgcni0"
	return m
}

func (m *machine) state() mesh.State {
	s, _ := m.Observe()
	return s
}

// Route goes through the rules and tables once more, in a way of its own.
func (m *machine) Route(q kernel.RouteQuery) (kernel.RouteAnswer, error) {
	if link, own := m.own[q.Destination]; own && (link != "wgcni0" || m.state().Link.Name != "") {
		return kernel.RouteAnswer{Kind: kernel.RouteLocal, Table: 255, Prefix: netip.PrefixFrom(q.Destination, q.Destination.BitLen()), Interface: "lo"}, nil
	}
	best := mesh.Route{Type: mesh.Throw}
	for _, r := range m.state().Routes {
		longer := !best.Prefix.IsValid() || r.Prefix.Bits() > best.Prefix.Bits() || r.Prefix.Bits() == best.Prefix.Bits() && r.Metric < best.Metric
		if q.Mark == 0 && r.Prefix.Contains(q.Destination) && longer {
			best = r
		}
	}
	switch best.Type {
	case mesh.Unreachable:
		return kernel.RouteAnswer{Refused: "no route to host"}, nil
	case mesh.ViaLink:
		link := map[mesh.Plane]string{mesh.Primary: "wgcni0", mesh.Spare: "wgcni0x"}[best.Plane]
		return kernel.RouteAnswer{Kind: kernel.RouteUnicast, Table: best.Table, Prefix: best.Prefix, Interface: link, Source: best.Source}, nil
	}
	if !m.unrouted && (prefix("10.244.1.0/24").Contains(q.Destination) || q.Destination == addr("10.244.77.1")) {
		return kernel.RouteAnswer{Kind: kernel.RouteUnicast, Table: 254, Prefix: prefix("10.244.1.0/24"), Interface: "cni0"}, nil
	}
	return kernel.RouteAnswer{Kind: kernel.RouteUnicast, Table: 254, Prefix: prefix("0.0.0.0/0"), Interface: kerneltest.Uplink, Gateway: addr("192.0.2.254"), Source: addr("192.0.2.1")}, nil
}

func (m *machine) PolicyRules(bool) ([]kernel.PolicyRule, error) {
	return []kernel.PolicyRule{
		{Priority: 0, Table: 255, SuppressedLength: -1},
		{Priority: 110, Table: 30567, Invert: true, Mark: 4, Mask: 4, Marked: true, RoutingProtocol: kernel.RouteProtocol, SuppressedLength: -1},
		{Priority: 32766, Table: 254, SuppressedLength: -1},
	}, nil
}

func (m *machine) directory() explain.Directory {
	nodes := append(slices.Clone(m.facts.Nodes), m.facts.Self)
	return explain.Directory{
		Self: m.facts.Self, Nodes: m.facts.Nodes, Bounds: m.facts.Bounds(), Owners: mesh.Owners(nodes, m.facts.Bounds(), nil), Addresses: m.own,
		Pods: []store.Attachment{
			{Pod: "default/web-0", ContainerID: "0123456789abcdef", Addresses: []netip.Addr{addr("10.244.1.2")}},
			{ContainerID: "0123ffff", Addresses: []netip.Addr{addr("10.244.77.1"), addr("fd00::1")}},
			{Pod: "default/bare", ContainerID: "none"},
		},
	}
}

func (m *machine) explain(t *testing.T, src, dst string) explain.Explanation {
	t.Helper()
	f := explain.Facts{
		Node: "a", Settings: m.facts.Settings, State: m.state(), Names: map[wgtypes.Key]string{}, Segments: map[string][]string{},
		Why: map[string]string{}, EncryptNodes: map[string]bool{}, Now: now,
	}
	for _, n := range append(slices.Clone(m.facts.Nodes), m.facts.Self) {
		f.Names[n.PublicKey], f.Names[n.Spare.PublicKey], f.Segments[n.Name] = n.Name, n.Name, n.Segments
	}
	var err error
	if f.Source, f.Destination, err = m.directory().Find(src, dst); err != nil {
		t.Fatal(err)
	}
	if err := f.Observe(m); err != nil {
		t.Fatal(err)
	}
	return explain.Explain(f)
}

// text is an explanation as people read it.
func text(e explain.Explanation) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n", e.Verdict, e.Why)
	if e.Fault {
		fmt.Fprintln(&b, "fault")
	}
	for _, s := range e.Steps {
		fmt.Fprintf(&b, "%s | %s | %s\n", s.Stage, s.Object, s.Text)
	}
	return b.String()
}

const (
	fromWeb  = "from | 10.244.1.2 | pod default/web-0 of this node, a, at cni0\n"
	toB      = "to | 10.244.2.7 | in 10.244.2.0/24 of b\n"
	held     = "chain forward, plain-out: oifname != \"wgcni0\" saddr @cluster4 daddr @guarded4, counter dropped-out: dropped"
	astray   = ourRule + ": throw 10.244.1.0/24 table 30567, so the next rule is asked\nrule | 32766 | 32766: from all lookup main\nroute | eth0 | default via 192.0.2.254 dev eth0 table main\n"
	ourRule  = "rule | 110 | 110: not from all fwmark 0x4/0x4 lookup 30567"
	keyOfB   = "AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	keyOfC   = "AwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	spareOfB = "XAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
)

func TestExplain(t *testing.T) {
	for _, tt := range []struct {
		name, src, dst string
		change         func(*mesh.Facts)
		kernel         func(*machine)
		want           string
	}{
		{name: "pod to a pod of another node", src: "default/web-0", dst: "10.244.2.7", want: "encrypted: it leaves through the tunnel to b, by 192.0.2.2:51820\n" +
			fromWeb + toB + ourRule + "\n" +
			"route | wgcni0 | 10.244.2.0/24 dev wgcni0 table 30567\n" +
			"filter | inet wgcni | chain forward: oifname \"wgcni0\": passes\n" +
			"source | inet wgcni | stays 10.244.1.2 (chain kept: saddr @local4 snat to ip saddr)\n" +
			"peer | " + keyOfB + " | b, key " + keyOfB + ", allowed IPs 10.244.2.0/24; no preshared key; last handshake 12s ago\n" +
			"endpoint | 192.0.2.2:51820 | where b is called\n" +
			"outer | eth0 | default via 192.0.2.254 dev eth0 src 192.0.2.1 table main\n"},
		{
			name: "by the second interface, while keys are rotated", src: "default/web-0", dst: "10.244.2.7",
			change: func(f *mesh.Facts) {
				f.SparePort, f.Crossing = 51821, map[string]mesh.Plane{"b": mesh.Spare}
				f.Self.Spare, f.Nodes[0].Spare = mesh.SpareEnd{PublicKey: wgtypes.Key{91}, Port: 51821}, mesh.SpareEnd{PublicKey: wgtypes.Key{92}, Port: 51822}
			},
			want: "encrypted: it leaves through the tunnel to b, by 192.0.2.2:51822; there has been no handshake yet, and it waits for one\n" +
				fromWeb + toB + ourRule + "\n" +
				"route | wgcni0x | 10.244.2.0/24 dev wgcni0x table 30567\n" +
				"filter | inet wgcni | chain forward: oifname \"wgcni0x\": passes\n" +
				"source | inet wgcni | stays 10.244.1.2 (chain kept: saddr @local4 snat to ip saddr)\n" +
				"peer | " + spareOfB + " | b, key " + spareOfB + ", allowed IPs 10.244.2.0/24; no preshared key; no handshake yet\n" +
				"endpoint | 192.0.2.2:51822 | where b is called\n" +
				"outer | eth0 | default via 192.0.2.254 dev eth0 src 192.0.2.1 table main\n",
		},
		{name: "the way in", src: "10.244.2.7", dst: "default/web-0", want: "encrypted: it comes through the tunnel\n" +
			"from | 10.244.2.7 | in 10.244.2.0/24 of b\nto | 10.244.1.2 | pod default/web-0 of this node, a, at cni0\n" +
			"cryptokey | wgcni0 | taken from b only, whose allowed IPs have 10.244.2.0/24\n" +
			"peer | " + keyOfB + " | b, key " + keyOfB + ", allowed IPs 10.244.2.0/24; no preshared key; last handshake 12s ago\n" +
			"in the clear | eth0 | the same packet by eth0 would be dropped (chain forward, plain-in: iifname != \"wgcni0\" saddr @guarded4 daddr @cluster4, counter dropped-in: dropped)\n" +
			ourRule + ": throw 10.244.1.0/24 table 30567, so the next rule is asked\n" +
			"rule | 32766 | 32766: from all lookup main\n" +
			"route | cni0 | 10.244.1.0/24 dev cni0 table main\n" +
			"filter | inet wgcni | chain forward: iifname \"wgcni0\" nexthop @local4 return: passes\n" +
			"delivery | cni0 | to the pod, by cni0\n"},
		{name: "past this machine, as a gateway carries it", src: "10.244.2.7", dst: "10.244.3.7", want: "encrypted: it leaves through the tunnel to c, by 192.0.2.3:51820; there has been no handshake yet, and it waits for one\n" +
			"from | 10.244.2.7 | in 10.244.2.0/24 of b\nto | 10.244.3.7 | in 10.244.3.0/24 of c\n" +
			"cryptokey | wgcni0 | taken from b only, whose allowed IPs have 10.244.2.0/24\n" +
			"peer | " + keyOfB + " | b, key " + keyOfB + ", allowed IPs 10.244.2.0/24; no preshared key; last handshake 12s ago\n" +
			"delivery |  | neither end is on this machine: this is what would become of such a packet here\n" +
			"in the clear | eth0 | the same packet by eth0 would be taken (chain forward: oifname \"wgcni0\": passes)\n" +
			ourRule + "\n" +
			"route | wgcni0 | 10.244.3.0/24 dev wgcni0 table 30567\n" +
			"filter | inet wgcni | chain forward: oifname \"wgcni0\": passes\n" +
			"source | inet wgcni | stays 10.244.2.7 (no rule of ours changes it)\n" +
			"peer | " + keyOfC + " | c, key " + keyOfC + ", allowed IPs 10.244.3.0/24; no preshared key; no handshake yet\n" +
			"endpoint | 192.0.2.3:51820 | where c is called\n" +
			"outer | eth0 | default via 192.0.2.254 dev eth0 src 192.0.2.1 table main\n"},
		{
			name: "the way in, to a pod whose route is gone", src: "10.244.2.7", dst: "default/web-0", kernel: func(m *machine) { m.unrouted = true },
			want: "dropped: the route to the pod is gone, and another leads by eth0 in the clear\nfault\n" +
				"from | 10.244.2.7 | in 10.244.2.0/24 of b\nto | 10.244.1.2 | pod default/web-0 of this node, a, at eth0\n" +
				"cryptokey | wgcni0 | taken from b only, whose allowed IPs have 10.244.2.0/24\n" +
				"peer | " + keyOfB + " | b, key " + keyOfB + ", allowed IPs 10.244.2.0/24; no preshared key; last handshake 12s ago\n" +
				"in the clear | eth0 | the same packet by eth0 would be dropped (" + held + ")\n" +
				astray + "filter | inet wgcni | " + held + "\n",
		},
		{
			name: "to a pod next door that is gone", src: "default/web-0", dst: "10.244.1.9", kernel: func(m *machine) { m.unrouted = true },
			want: "dropped: no pod of this machine has it, and its route leads to a router, by eth0 in the clear\n" +
				strings.Replace(fromWeb, "cni0", "eth0", 1) + "to | 10.244.1.9 | in 10.244.1.0/24 of this node, a, where no pod has it\n" +
				astray + "filter | inet wgcni | " + held + "\n",
		},
		{name: "nobody has announced it", src: "default/web-0", dst: "10.244.99.1", want: "dropped: nobody has announced 10.244.99.1, and encryption is required\n" +
			fromWeb + "to | 10.244.99.1 | in the ranges of the mesh; nobody has announced it\n" + ourRule + "\n" +
			"route |  | unreachable 10.244.0.0/16 metric 1048576 table 30567: the kernel says no route to host\n"},
		{name: "the tunnel is gone", src: "default/web-0", dst: "10.244.2.7", kernel: func(m *machine) { m.KillTunnel() }, want: "dropped: interface wgcni0 is missing; encryption is required\nfault\n" +
			fromWeb + toB + ourRule + "\n" +
			"route |  | unreachable 10.244.0.0/16 metric 1048576 table 30567: the kernel says no route to host\n"},
		{
			name: "the tunnel is gone, preferred", src: "default/web-0", dst: "10.244.2.7",
			change: func(f *mesh.Facts) { f.Encryption = mesh.Preferred }, kernel: func(m *machine) { m.KillTunnel() },
			want: "dropped: interface wgcni0 is missing, and it would leave by eth0 in the clear\nfault\n" +
				fromWeb + toB + ourRule + ": no route for it there, so the next rule is asked\n" +
				"rule | 32766 | 32766: from all lookup main\n" +
				"route | eth0 | default via 192.0.2.254 dev eth0 table main\n" +
				"filter | inet wgcni | chain forward, plain-out: oifname != \"wgcni0\" saddr @cluster4 daddr @guarded4, counter dropped-out: dropped\n",
		},
		{name: "the internet", src: "default/web-0", dst: "198.51.100.7", want: "plaintext: it leaves by eth0 as it is: 198.51.100.7 is not in the ranges that the mesh is for\n" +
			fromWeb + "to | 198.51.100.7 | outside of the ranges of the mesh\n" + ourRule + ": no route for it there, so the next rule is asked\n" +
			"rule | 32766 | 32766: from all lookup main\n" +
			"route | eth0 | default via 192.0.2.254 dev eth0 table main\n" +
			"filter | inet wgcni | chain forward: no rule holds it: passes\n" +
			"delivery | eth0 | leaves by eth0, by the gateway 192.0.2.254; what other programs do to it is not looked at\n"},
		{
			name: "a peer without an endpoint", src: "a", dst: "10.244.2.7", change: func(f *mesh.Facts) { f.Nodes[0].CallsOnly, f.Nodes[0].Endpoint = true, netip.AddrPort{} },
			want: "dropped: b has no endpoint: it has to call first, and has not yet\nfault\n" +
				"from | 10.244.1.0 | this machine, a, with the address that the route gives\n" + toB + ourRule + "\n" +
				"route | wgcni0 | 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 30567\n" +
				"filter | inet wgcni | chain output: leaves by wgcni0: passes\n" +
				"source | inet wgcni | stays 10.244.1.0 (chain kept: saddr @local4 snat to ip saddr)\n" +
				"peer | " + keyOfB + " | b, key " + keyOfB + ", allowed IPs 10.244.2.0/24; no preshared key; no handshake yet\n",
		},
		{
			name: "no segment in common", src: "default/web-0", dst: "10.244.2.7", change: func(f *mesh.Facts) { f.Nodes[0].Segments = []string{"blue"} },
			want: "dropped: b has announced it, and shares no segment with this machine\n" +
				fromWeb + toB + ourRule + "\n" +
				"route |  | unreachable 10.244.0.0/16 metric 1048576 table 30567: the kernel says no route to host\n",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := three()
			if tt.change != nil {
				tt.change(&f)
			}
			m := newMachine(t, f)
			if f.Nodes[0].Endpoint.IsValid() {
				m.Roam(wgtypes.Key{2}, f.Nodes[0].Endpoint, now.Add(-12*time.Second))
			}
			if tt.kernel != nil {
				tt.kernel(m)
			}
			if diff := cmp.Diff(tt.want, text(m.explain(t, tt.src, tt.dst))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Whatever the mesh is like, the explanation agrees with another opinion.
func TestExplainAgreesWithTheKernel(t *testing.T) {
	const seed = 6061
	t.Logf("seed %d", seed)
	count := map[explain.Verdict]int{}
	for i := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, i))
		f := three()
		if rng.IntN(3) == 0 {
			f.Encryption = mesh.Preferred
		}
		for n := range f.Nodes {
			switch rng.IntN(6) {
			case 0:
				f.Nodes[n].Prefixes = claim(fmt.Sprintf("10.244.%d.0/24", rng.IntN(5)))
			case 1:
				f.Nodes[n].CallsOnly, f.Nodes[n].Endpoint = true, netip.AddrPort{}
			case 2:
				f.Nodes[n].Segments = []string{"blue"}
			case 3:
				f.Nodes[n].Pods = claim(fmt.Sprintf("10.244.%d.1/32", rng.IntN(5)))
			}
		}
		if rng.IntN(8) == 0 {
			f.Self.PublicKey = wgtypes.Key{}
		}
		if rng.IntN(4) == 0 {
			f.Nodes = f.Nodes[:1]
		}
		m := newMachine(t, f)
		if rng.IntN(5) == 0 {
			m.KillTunnel()
		}
		if rng.IntN(6) == 0 {
			m.BreakFilter()
		}
		for range 20 {
			src := []string{"10.244.1.2", "10.244.77.1"}[rng.IntN(2)]
			dst := fmt.Sprintf("10.244.%d.%d", rng.IntN(6), 1+rng.IntN(5))
			if rng.IntN(4) == 0 {
				dst = []string{"198.51.100.1", "192.0.2.2", "10.244.77.1", "10.244.88.1", "10.244.4.4", "192.0.2.1"}[rng.IntN(6)]
			}
			got := m.explain(t, src, dst)
			count[got.Verdict]++
			want := m.Verdict(addr(src), addr(dst))
			name := ""
			if strings.HasPrefix(want, "encrypted:") {
				name, want = strings.TrimPrefix(want, "encrypted:"), "encrypted"
			}
			if want == kerneltest.Unreachable {
				want = "dropped"
			}
			if string(got.Verdict) != want {
				t.Fatalf("round %d: %s -> %s: want %s, and %s", i, src, dst, want, text(got))
			}
			if name != "" && !slices.ContainsFunc(got.Steps, func(s explain.Step) bool { return s.Stage == explain.Peer && s.Object == name }) {
				t.Fatalf("round %d: %s -> %s: the peer is %s, and %s", i, src, dst, name, text(got))
			}
		}
	}
	for _, v := range []explain.Verdict{explain.Encrypted, explain.Plaintext, explain.Dropped, explain.Local} {
		if count[v] < 50 {
			t.Errorf("%d packets are %s: too few to prove anything", count[v], v)
		}
	}
}

func TestFind(t *testing.T) {
	d := newMachine(t, three()).directory()
	for _, tt := range []struct{ src, dst, want string }{
		{"default/web-0", "b", "10.244.1.2 pod a, 192.0.2.2 machine b"},
		{"012345", "c", "10.244.1.2 pod a, 192.0.2.3 machine c"},
		{"0123f", "fd00::2", "fd00::1 pod a, fd00::2 outside "},
		{"a", "b", "invalid IP node a, 192.0.2.2 machine b"},
		{"192.0.2.1", "b", "192.0.2.1 node a, 192.0.2.2 machine b"},
		{"b", "a", "192.0.2.2 machine b, 192.0.2.1 node a"},
		{"::ffff:10.244.1.2", "10.244.88.1", "10.244.1.2 pod a, 10.244.88.1 remote b"},
		{"10.244.1.9", "10.244.5.5", "10.244.1.9 free a, 10.244.5.5 unannounced "},
		{"0123", "b", `"0123" is the beginning of more than one container ID: give more of it`},
		{"012", "b", `"012" is no address, no pod of this node and no machine of the mesh that has an address: give a pod of another node by its address`},
		{"", "b", `"" is no address, no pod of this node and no machine of the mesh that has an address: give a pod of another node by its address`},
		{"default/bare", "b", "pod default/bare has no address"},
		{"b", "fd00::2", "b and fd00::2 have no addresses of the same family"},
		{"b", "fe80::1%eth0", "fe80::1%eth0 does not pass between machines: want the address of one"},
		{"b", "224.0.0.1", "224.0.0.1 does not pass between machines: want the address of one"},
	} {
		src, dst, err := d.Find(tt.src, tt.dst)
		got := fmt.Sprintf("%s %s %s, %s %s %s", src.Address, src.Kind, src.Node, dst.Address, dst.Kind, dst.Node)
		if err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s -> %s:\n%s\nwant\n%s", tt.src, tt.dst, got, tt.want)
		}
	}
}
