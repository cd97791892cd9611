package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/pkg/mesh"
)

func settings() mesh.Settings {
	return mesh.Settings{
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")},
		Interface:    link, ListenPort: 51820, SparePort: 51821, MTU: 1420, FwMark: 0x4, Table: 30567, RulePriority: 110,
	}
}

func peerKey(n int) (k wgtypes.Key) {
	k[0], k[1] = byte(n), 1
	return k
}

func node(n int, prefixes ...string) mesh.Node {
	out := mesh.Node{
		Name: fmt.Sprintf("node-%d", n), PublicKey: peerKey(n),
		Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 51820),
		Spare:    spareEnd(n),
	}
	for _, p := range prefixes {
		out.Prefixes = append(out.Prefixes, mesh.Claim{Prefix: netip.MustParsePrefix(p)})
	}
	return out
}

func self() mesh.Node {
	n := node(200, "10.244.200.0/24", "fd00:244:200::/64")
	n.PublicKey, n.Spare.PublicKey = key.PublicKey(), spareKey.PublicKey()
	return n
}

func plan(f mesh.Facts) mesh.State {
	external := f.ExternalCIDRs
	f.Settings, f.Self = settings(), self()
	f.ExternalCIDRs = external
	return mesh.NewPlan(f).State
}

// randomFacts covers what changes in a cluster's life.
func randomFacts(r *rand.Rand) mesh.Facts {
	f := mesh.Facts{Crossing: map[string]mesh.Plane{}}
	prefixes := r.Perm(12)
	for n := range r.IntN(6) {
		if r.IntN(4) == 0 {
			continue
		}
		f.Nodes = append(f.Nodes, node(n+1, fmt.Sprintf("10.244.%d.0/24", prefixes[n]), fmt.Sprintf("fd00:244:%d::/64", prefixes[n+6])))
		last := &f.Nodes[len(f.Nodes)-1]
		last.PresharedKey = fingerprint(r.IntN(3))
		if crossing := r.IntN(6); crossing < 3 {
			f.Crossing[last.Name] = mesh.Plane(crossing > 0)
			last.Spare.PresharedKey = fingerprint(r.IntN(3))
		}
		if r.IntN(2) == 0 {
			last.Pods = []mesh.Claim{{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, 99, byte(r.IntN(4))}), 32)}}
			last.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 250, byte(n)})}
		}
	}
	if r.IntN(2) == 0 { // a machine, and what is behind it
		f.ExternalCIDRs = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/16"), netip.MustParsePrefix("2001:db8:77::/48")}
		vm := node(50, fmt.Sprintf("198.18.%d.0/24", r.IntN(3)))
		for _, host := range []string{"198.18.200.1/32", "2001:db8:77::1/128"}[:r.IntN(3)] {
			vm.Hosts = append(vm.Hosts, mesh.Claim{Prefix: netip.MustParsePrefix(host)})
		}
		f.Nodes = append(f.Nodes, vm)
	}
	for n := range r.IntN(3) { // sites that only this node knows
		site := node(100+n, fmt.Sprintf("192.168.%d.0/24", r.IntN(3)), fmt.Sprintf("fd00:168:%d::/64", r.IntN(3)))
		site.Via, site.Masqueraded = []string{self().Name}, true
		f.Nodes = append(f.Nodes, site)
	}
	for range r.IntN(4) {
		f.LocalPods = append(f.LocalPods,
			netip.AddrFrom4([4]byte{10, 244, 99, byte(10 + r.IntN(5))}),
			netip.MustParseAddr(fmt.Sprintf("fd00:244:99::%d", r.IntN(5))))
	}
	return f
}

// makeForeign puts other people's objects everywhere that we write to.
func makeForeign(t *testing.T) {
	t.Helper()
	sh(t, `
ip link add up0 type veth peer name up1 && ip link set up0 addrgenmode none up && ip link set up1 addrgenmode none up
ip addr add 192.0.2.200/24 dev up0; ip addr add 2001:db8::200/64 dev up0 nodad
ip route add 10.244.77.0/24 via 192.0.2.1; ip -6 route add fd00:244:77::/64 via 2001:db8::1
ip route add 203.0.113.0/24 dev up0 table 30567 proto static; ip route add unreachable 198.51.100.0/24 table 99
ip rule add priority 110 fwmark 0x10/0x10 lookup 99; ip -6 rule add priority 100 lookup 99
nft 'table ip wgcni { chain forward { type filter hook forward priority 0; ip saddr 203.0.113.7 counter drop comment "ours"; }; }'
nft 'table inet other { set s { type ipv4_addr; flags interval; elements = { 10.244.0.0/16 }; };
  chain c { type nat hook postrouting priority 100; ip saddr @s oifname "up0" masquerade; }; }'`)
	if err := userspaceOrKernel(t, "wg-other"); err != nil {
		t.Fatal(err)
	}
	other, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	file := t.TempDir() + "/other.key"
	if err := os.WriteFile(file, []byte(other.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	sh(t, "wg set wg-other private-key "+file+" listen-port 51999 peer "+peerKey(1).String()+" allowed-ips 10.244.5.0/24,10.9.0.0/16")
	sh(t, "ip link set wg-other addrgenmode none && ip link set wg-other up && ip addr add 10.9.0.1/24 dev wg-other")
	t.Cleanup(func() {
		sh(t, `ip link del wg-other; ip link del up0; ip rule del priority 110; ip -6 rule del priority 100
ip route del unreachable 198.51.100.0/24 table 99; nft delete table ip wgcni; nft delete table inet other`)
	})
}

// userspaceOrKernel makes a WireGuard interface that is not ours.
func userspaceOrKernel(t *testing.T, name string) error {
	if kernel.HasWireGuard() {
		sh(t, "ip link add "+name+" type wireguard")
		return nil
	}
	return userspace.Start(name, 1400, t.TempDir()+"/tunnel.log")
}

func TestRandomWalkLeavesForeignObjectsAlone(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("WGCNI_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("WGCNI_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	makeForeign(t)
	before := everything(t)
	k := open(t)
	for range 40 {
		apply(t, k, plan(randomFacts(r)))
	}
	apply(t, k, mesh.State{})
	if diff := cmp.Diff(before, everything(t)); diff != "" {
		t.Errorf("after the last removal the machine is not as before (-before +after):\n%s", diff)
	}
}

// Whatever somebody breaks is seen, and put right.
func TestRepairs(t *testing.T) {
	k := open(t)
	want := plan(mesh.Facts{
		Nodes:     []mesh.Node{sharing(1, node(1, "10.244.1.0/24", "fd00:244:1::/64")), node(2, "10.244.2.0/24")},
		LocalPods: []netip.Addr{netip.MustParseAddr("10.244.99.1")},
	})
	apply(t, k, want)
	if ops := apply(t, k, want); len(ops) > 0 {
		t.Fatalf("a plan that is in place is applied again:\n%s", mesh.Text(ops))
	}
	peer, file := peerKey(1).String(), t.TempDir()+"/preshared.key"
	if err := os.WriteFile(file, []byte(psk(2).String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, breakage := range []string{
		"nft delete table inet wgcni",
		"nft flush ruleset",
		"nft flush chain inet wgcni forward",
		"nft flush chain inet wgcni plain-in",
		"nft delete element inet wgcni pods4 { 10.244.99.1 }",
		"nft delete element inet wgcni guarded6 { fd00:244::/32 }",
		"nft add element inet wgcni local4 { 10.244.7.0/24 }",
		"nft add element inet wgcni exempt4 { 10.244.7.1 }",
		"nft 'add table inet wgcni { flags dormant; }'",
		"ip rule del priority 110",
		"ip -6 rule del priority 110",
		"ip rule add priority 111 not fwmark 0x4/0x4 lookup 30567 proto 119",
		"ip route del 10.244.1.0/24 table 30567",
		"ip route flush table 30567",
		"ip -6 route flush table 30567",
		"ip route replace throw 10.244.2.0/24 table 30567 proto 119",
		"ip route add 10.244.9.0/24 dev lo table 30567 proto 119",
		"ip route add unreachable 10.99.0.0/16 table 77 proto 119",
		"ip addr del 10.244.200.0/32 dev wgcni0",
		"ip addr add 10.1.1.1/32 dev wgcni0",
		"echo 1 >/proc/sys/net/ipv6/conf/wgcni0/disable_ipv6",
		"ip link set wgcni0 mtu 1300",
		"ip link set wgcni0 down",
		"ip link del wgcni0",
		"wg set wgcni0 peer " + peer + " remove",
		"wg set wgcni0 peer " + peer + " allowed-ips 10.244.1.0/24",
		"wg set wgcni0 peer " + peer + " endpoint 192.0.2.99:1",
		"wg set wgcni0 peer " + peer + " persistent-keepalive 9",
		"wg set wgcni0 peer " + peer + " preshared-key " + file,
		"wg set wgcni0 peer " + peer + " preshared-key /dev/null", // removes it
		"wg set wgcni0 peer " + peerKey(2).String() + " preshared-key " + file,
		"wg set wgcni0 peer " + peerKey(77).String() + " allowed-ips 10.244.2.0/24",
		"wg set wgcni0 listen-port 51999",
		"wg set wgcni0 fwmark 0x8",
	} {
		sh(t, breakage)
		if ops := apply(t, k, want); len(ops) == 0 {
			t.Errorf("not seen: %s", breakage)
		}
	}
}

// An interface of our name that somebody else made keeps its peers.
func TestForeignInterfaceIsRefused(t *testing.T) {
	k := open(t)
	for name, make := range map[string]func(){
		"bridge": func() { sh(t, "ip link add wgcni0 type bridge") },
		"WireGuard with peers": func() {
			if err := userspaceOrKernel(t, link); err != nil {
				t.Fatal(err)
			}
			sh(t, "wg set wgcni0 peer "+peerKey(5).String()+" allowed-ips 10.0.0.0/8")
		},
	} {
		make()
		_, err := k.Observe()
		if err == nil || !strings.Contains(err.Error(), "not made by wgcni") {
			t.Errorf("%s named wgcni0: error %v, want one that says it was not made by wgcni", name, err)
		}
		sh(t, "ip link del wgcni0")
	}
}

// A tun device of our name without a process: at a start it is there first.
func TestSilentInterface(t *testing.T) {
	const name = "silent0" // of other tests' tunnels a socket may be left for a moment
	k, err := kernel.Open(kernel.Config{Interface: name})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	sh(t, "ip tuntap add "+name+" mode tun")
	defer sh(t, "ip link del "+name)
	if _, err := k.Observe(); !errors.Is(err, kernel.ErrSilent) || !strings.Contains(err.Error(), "ip link delete "+name) {
		t.Errorf("%v, want one that is ErrSilent and says how to mend it", err)
	}
}

// Removing one allowed IP leaves the others in place at every moment (cilium PR 34612).
func TestRemoveAllowedIP(t *testing.T) {
	k := open(t)
	var prefixes []string
	for i := range 200 {
		prefixes = append(prefixes, fmt.Sprintf("10.244.%d.0/24", i))
	}
	apply(t, k, plan(mesh.Facts{Nodes: []mesh.Node{sharing(1, node(1, prefixes...)), node(2, "fd00:244:2::/64")}}))
	ops := apply(t, k, plan(mesh.Facts{Nodes: []mesh.Node{sharing(1, node(1, prefixes[:100]...)), sharing(2, node(2, append([]string{"fd00:244:2::/64"}, prefixes[100:150]...)...))}}))
	for _, op := range ops {
		if _, ok := op.(mesh.RemovePeer); ok {
			t.Errorf("a peer was removed: %s", op)
		}
	}
}

func TestPortTaken(t *testing.T) {
	taken, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 51820})
	for give := time.Now().Add(10 * time.Second); err != nil && time.Now().Before(give); { // the test before has it yet
		time.Sleep(10 * time.Millisecond)
		taken, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 51820})
	}
	if err != nil {
		t.Fatal(err)
	}
	k := open(t)
	want := plan(mesh.Facts{})
	err = k.Apply(mesh.Diff(mesh.State{}, want, mesh.Context{}))
	if err == nil || !strings.Contains(err.Error(), "51820") || !strings.Contains(err.Error(), "listenPort") {
		t.Errorf("error %v, want one that names port 51820 and listenPort", err)
	}
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	apply(t, k, want)
}

func TestNoUserspaceToStart(t *testing.T) {
	k, err := kernel.Open(kernel.Config{Interface: link, PrivateKey: privateKeys(key)})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	defer apply(t, k, mesh.State{})
	want := plan(mesh.Facts{Nodes: []mesh.Node{node(1, "10.244.1.0/24")}})
	if kernel.HasWireGuard() {
		apply(t, k, want) // none is needed
		return
	}
	err = k.Apply(mesh.Diff(mesh.State{}, want, mesh.Context{}))
	if !errors.Is(err, kernel.ErrNoWireGuard) || strings.Contains(err.Error(), "peer") {
		t.Errorf("error %v, want ErrNoWireGuard alone", err)
	}
	observed, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	if observed.Filter.Interface == "" || len(observed.Rules) != 2 || observed.Link.Name != "" {
		t.Errorf("without a tunnel there must be filter and rules, and no link; got %+v", observed)
	}
}

func TestWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	k := open(t)
	apply(t, k, plan(mesh.Facts{Nodes: []mesh.Node{node(1, "10.244.1.0/24")}}))
	events, err := k.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	expect := func(what string, line string, wanted func(kernel.Event) bool) {
		t.Helper()
		sh(t, line)
		timeout := time.After(10 * time.Second)
		for {
			select {
			case e := <-events:
				if wanted(e) {
					return
				}
			case <-timeout:
				t.Fatalf("%s: no event after %s", what, line)
			}
		}
	}
	ours := func(e kernel.Event) bool { return e.Ours }
	expect("route in the place of ours", "ip route replace 10.244.1.0/24 dev lo table 30567", ours)
	sh(t, "ip route replace 10.244.1.0/24 dev wgcni0 table 30567 proto 119")
	expect("rule added", "ip rule add priority 111 lookup 30567 proto 119", ours)
	expect("rule of the table", "nft insert rule inet wgcni forward accept", ours)
	expect("chain of the table", "nft add chain inet wgcni other", ours)
	expect("table", "nft delete table inet wgcni", ours)
	expect("rule", "ip rule del priority 110", ours)
	expect("route", "ip route del 10.244.1.0/24 table 30567", ours)
	expect("route", "ip -6 route flush table 30567", ours)
	expect("address", "ip addr del 10.244.200.0/32 dev wgcni0", ours)
	expect("link", "ip link set wgcni0 down", ours)
	expect("underlay", "ip link add up0 type veth peer name up1; ip addr add 192.0.2.1/24 dev up0", func(e kernel.Event) bool { return e.Underlay })
	sh(t, "ip link del up0")
	expect("link", "ip link del wgcni0", ours)
	cancel()
	for range events { // until it is closed
		continue
	}
}

func TestUnderlay(t *testing.T) {
	k := open(t)
	u, err := k.Underlay()
	if err != nil || u.MTU != 0 || len(u.Addresses) != 0 {
		t.Errorf("without a default route: %+v, %v; want nothing", u, err)
	}
	sh(t, `ip link add up0 type veth peer name up1; ip link set up0 mtu 1450 up; ip link set up1 up
ip addr add 192.0.2.7/24 dev up0; ip addr add 2001:db8::7/64 dev up0 nodad
ip route add default via 192.0.2.1 metric 100; ip -6 route add default via 2001:db8::1`)
	defer sh(t, "ip link del up0")
	apply(t, k, plan(mesh.Facts{}))
	// NetworkManager and others take a WireGuard device for the underlay (calico): we do not.
	sh(t, "ip route add default dev wgcni0 metric 50")
	u, err = k.Underlay()
	if err != nil {
		t.Fatal(err)
	}
	want := kernel.Underlay{
		MTU:       1450,
		Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")},
		All:       []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")},
	}
	if diff := cmp.Diff(want, u, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("underlay (-want +got):\n%s", diff)
	}
	for a, want := range map[string]int{"192.0.2.7": 1450, "2001:db8::7": 1450, "192.0.2.8": 0} {
		if got, err := k.MTUOf(netip.MustParseAddr(a)); got != want || err != nil {
			t.Errorf("MTU of %s: %d, %v; want %d", a, got, err, want)
		}
	}
	sh(t, "ip route replace default via 192.0.2.1 metric 100 mtu 1400")
	if u, err = k.Underlay(); u.MTU != 1400 || err != nil {
		t.Errorf("a route with an MTU of 1400: %d, %v", u.MTU, err)
	}
}

// As many packets wait for a tunnel process as for the kernel's WireGuard.
func TestQueueOfAUserspaceTunnel(t *testing.T) {
	apply(t, open(t), plan(mesh.Facts{}))
	if out := sh(t, "ip -o link show "+link); !kernel.HasWireGuard() && !strings.Contains(out, "qlen 1024") {
		t.Error(out)
	}
}

// An interface whose other end lies in a third namespace has an index in common
// with one of this node's, which must not be touched.
func TestPodLink(t *testing.T) {
	sh(t, `mkdir -p /run/netns; ip netns add pod; ip netns add far
ip link add v0 type veth peer name eth0 netns pod; ip link set v0 up; ip -n pod link set eth0 up
ip link add spare type veth peer name other netns far; ip link set spare netns pod
ip -n pod link add eth9 type bridge`)
	defer sh(t, "ip netns del pod; ip netns del far")
	p, err := kernel.OpenPodLink("/run/netns/pod", "eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, tt := range []struct{ mtu, most, node int }{
		{1400, 1500, 1500}, {1400, 1420, 1420}, {1220, 1220, 1220}, {1440, 1440, 1440}, {1300, 1440, 1440}, {1500, 8921, 1500},
	} {
		if err := p.SetMTU(tt.mtu, tt.most); err != nil || p.MTU() != tt.mtu {
			t.Errorf("%+v: %d, %v", tt, p.MTU(), err)
		}
		for line, want := range map[string]int{"ip link show v0": tt.node, "ip -n pod link show eth0": tt.mtu} {
			if out := sh(t, line); !strings.Contains(out, fmt.Sprintf("mtu %d ", want)) {
				t.Errorf("%+v: %s: %s", tt, line, out)
			}
		}
	}
	if got, err := p.Fit(1220); got != 1220 || err != nil {
		t.Errorf("without an IPv6 address: %d, %v", got, err)
	}
	sh(t, "ip -n pod addr add 2001:db8::7/64 dev eth0 nodad")
	for tunnel, want := range map[int]int{1220: 1280, 1280: 1280, 1420: 1420} {
		if got, err := p.Fit(tunnel); got != want || err != nil {
			t.Errorf("with an IPv6 address over %d: %d, %v; want %d", tunnel, got, err, want)
		}
	}
	for _, name := range []string{"spare", "eth9"} {
		if _, err := kernel.OpenPodLink("/run/netns/pod", name); !errors.Is(err, kernel.ErrBypassesHost) {
			t.Errorf("%s: error %v, want ErrBypassesHost", name, err)
		}
	}
}
