package kerneltest_test

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
)

var (
	keyA, keyB = wgtypes.Key{1}, wgtypes.Key{2}
	podsA      = netip.MustParsePrefix("10.244.1.0/24")
	source     = netip.MustParsePrefix("10.244.9.0/32")
	source6    = netip.MustParsePrefix("fd00:9::/128")
	where      = netip.MustParseAddrPort("192.0.2.1:51820")
	link       = mesh.Link{Name: "wg0", MTU: 1420, PublicKey: wgtypes.Key{9}, ListenPort: 51820, FwMark: 1 << 24}
	via        = mesh.Route{Prefix: podsA, Source: source.Addr(), Table: 77}
	guard      = mesh.Route{Prefix: netip.MustParsePrefix("10.244.0.0/16"), Type: mesh.Unreachable, Table: 77, Metric: 99}
	rule       = mesh.Rule{Priority: 500, FwMark: 1 << 24, Table: 77}
	filter     = mesh.Filter{Interface: "wg0", Cluster: []netip.Prefix{guard.Prefix}, Guarded: []netip.Prefix{guard.Prefix}}
)

// linkOps make the interface ready for peers and routes.
func linkOps() []mesh.Op {
	return []mesh.Op{
		mesh.AddLink{Name: "wg0", MTU: 1420},
		mesh.ConfigureLink{Link: link},
		mesh.SetLink{Name: "wg0", MTU: 1420},
		mesh.AddAddress{Link: "wg0", Prefix: source},
	}
}

func peer(k wgtypes.Key, add ...netip.Prefix) mesh.SetPeer {
	return mesh.SetPeer{Link: "wg0", PublicKey: k, Endpoint: where, Add: add}
}

func name(k wgtypes.Key) string {
	return map[wgtypes.Key]string{keyA: "a", keyB: "b", link.PublicKey: "self"}[k]
}

func apply(t *testing.T, k *kerneltest.Kernel, ops ...mesh.Op) {
	t.Helper()
	if err := k.Apply(ops); err != nil {
		t.Fatal(err)
	}
}

// What Linux refuses, and what it lets pass although there is nothing to do.
func TestApplyRefuses(t *testing.T) {
	keepalive := time.Second
	for _, tt := range []struct {
		name string
		ops  []mesh.Op
		want string // the end of the error's text; "" for none
	}{
		{"absent things may be removed", []mesh.Op{
			mesh.RemoveRule{Rule: rule},
			mesh.RemoveRoute{Route: via},
			mesh.RemovePeer{Link: "wg0", PublicKey: keyA},
			mesh.RemoveAddress{Link: "wg0", Prefix: source},
			mesh.RemoveLink{Name: "wg0"},
			mesh.RemoveFilter{},
		}, ""},
		{"twice is once", append(linkOps(), append(linkOps(), mesh.AddRule{Rule: rule}, mesh.AddRule{Rule: rule})...), ""},
		{"configure", []mesh.Op{mesh.ConfigureLink{Link: link}}, "no such device"},
		{"up", []mesh.Op{mesh.SetLink{Name: "wg0"}}, "no such device"},
		{"address", []mesh.Op{mesh.AddAddress{Link: "wg0", Prefix: source}}, "no such device"},
		{"peer", []mesh.Op{mesh.SetPeer{Link: "wg0", PublicKey: keyA, Keepalive: &keepalive}}, "no such device"},
		{"route", []mesh.Op{mesh.SetRoute{Link: "wg0", Route: via}}, "no such device"},
		{"route, link down", []mesh.Op{mesh.AddLink{Name: "wg0"}, mesh.SetRoute{Link: "wg0", Route: via}}, "device for nexthop is not up"},
		{"route before its source", append(linkOps()[:3], mesh.SetRoute{Link: "wg0", Route: via}), "invalid prefsrc address"},
		{"route after its source", append(linkOps(), mesh.SetRoute{Link: "wg0", Route: via}), ""},
		{"a second interface", append(linkOps(), mesh.AddLink{Name: "wg1"}), "address already in use"},
		{"filter's sets", []mesh.Op{mesh.SetFilter{Filter: filter}}, "no such table"},
		{"filter's pods", []mesh.Op{mesh.SetFilterPods{}}, "no such table"},
		{"unmasked allowed IP", append(linkOps(), peer(keyA, netip.MustParsePrefix("10.244.1.1/24"))), "invalid prefix for given prefix length"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var k kerneltest.Kernel
			err := k.Apply(tt.ops)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.HasSuffix(err.Error(), ": "+tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestAllowedIPsHaveOneOwner(t *testing.T) {
	k := kerneltest.Kernel{Name: name}
	apply(t, &k, append(linkOps(), peer(keyA, podsA), peer(keyB, podsA), mesh.SetPeer{Link: "wg0", PublicKey: keyA, Remove: []netip.Prefix{podsA}})...)
	const want = "wg wg0 peer b endpoint 192.0.2.1:51820 allowed-ips 10.244.1.0/24\n"
	if !strings.Contains(k.String(), want) {
		t.Errorf("the move, or a late removal, lost it:\n%s", k.String())
	}
	apply(t, &k, mesh.RemovePeer{Link: "wg0", PublicKey: keyB}, peer(link.PublicKey, podsA))
	if strings.Contains(k.String(), "10.244.1.0") {
		t.Errorf("not removed with its peer, or given to the own key:\n%s", k.String())
	}
	relinked := link
	relinked.PublicKey = keyA
	apply(t, &k, mesh.ConfigureLink{Link: relinked})
	if s, _ := k.Observe(); len(s.Peers) != 0 {
		t.Errorf("peer with the link's own key: %v", s.Peers)
	}
}

// A preshared key stays until an op says otherwise, and is never printed.
func TestPresharedKeys(t *testing.T) {
	first, second, none := mesh.Fingerprint{1}, mesh.Fingerprint{2}, mesh.Fingerprint{}
	k := kerneltest.Kernel{Name: name}
	apply(t, &k, linkOps()...)
	for _, tt := range []struct {
		name      string
		set       *mesh.Fingerprint
		want      mesh.Fingerprint
		wantPrint string
	}{
		{"none at first", nil, none, "a endpoint"},
		{"set", &first, first, "a preshared key: (hidden) endpoint"},
		{"left", nil, first, "a preshared key: (hidden) endpoint"},
		{"changed", &second, second, "a preshared key: (hidden) endpoint"},
		{"removed", &none, none, "a endpoint"},
	} {
		o := peer(keyA)
		o.PresharedKey = tt.set
		apply(t, &k, o)
		s, err := k.Observe()
		if err != nil || len(s.Peers) != 1 || s.Peers[0].PresharedKey != tt.want {
			t.Errorf("%s: peers %v, error %v; want %s", tt.name, s.Peers, err, tt.want)
		}
		if want := "wg wg0 peer " + tt.wantPrint + " 192.0.2.1:51820\n"; !strings.Contains(k.String(), want) {
			t.Errorf("%s: want %q in\n%s", tt.name, want, k.String())
		}
	}
}

func TestVerdictAndHooks(t *testing.T) {
	src, dst := netip.MustParseAddr("10.244.9.5"), netip.MustParseAddr("10.244.1.7")
	k := kerneltest.Kernel{Name: name}
	expect := func(want, when string) {
		t.Helper()
		if got := k.Verdict(src, dst); got != want {
			t.Errorf("%s: %s, want %s", when, got, want)
		}
	}
	expect("plaintext", "empty")
	apply(t, &k, mesh.ReplaceFilter{Filter: filter})
	expect("dropped", "filter alone")
	k.BreakFilter()
	expect("plaintext", "broken filter")
	apply(t, &k, append(linkOps(), mesh.ReplaceFilter{Filter: filter}, mesh.AddRule{Rule: rule}, mesh.SetRoute{Route: guard})...)
	expect("unreachable", "guard route")
	apply(t, &k, mesh.SetRoute{Link: "wg0", Route: via})
	expect("unreachable", "no peer")
	apply(t, &k, peer(keyA, guard.Prefix), peer(keyB, podsA))
	expect("encrypted:b", "the longest prefix")
	roamed := netip.MustParseAddrPort("198.51.100.1:9")
	k.Roam(keyB, roamed, time.Unix(1, 0))
	s, err := k.Observe()
	if err != nil || s.Peers[1].Endpoint != roamed || !s.Peers[1].LastHandshake.Equal(time.Unix(1, 0)) {
		t.Errorf("roamed: %v, %v", s.Peers, err)
	}
	k.KillTunnel()
	expect("unreachable", "tunnel killed")
	apply(t, &k, mesh.SetRoute{Route: mesh.Route{Prefix: podsA, Type: mesh.Throw, Table: 77}})
	expect("dropped", "thrown to the uplink")
	k.AddForeignRoute(mesh.Route{Prefix: podsA, Table: kerneltest.MainTable}, "cni0")
	apply(t, &k, mesh.SetFilterPods{Add: []netip.Addr{dst}})
	expect("local", "thrown to the bridge")
}

// Linux takes a route with its source address, or the source from an IPv6 one.
func TestRemoveAddressTakesItsRoutes(t *testing.T) {
	k := kerneltest.Kernel{Name: name}
	via6 := mesh.Route{Prefix: netip.MustParsePrefix("fd00:1::/64"), Source: source6.Addr(), Table: 77}
	apply(t, &k, append(linkOps(), mesh.AddAddress{Link: "wg0", Prefix: source6},
		mesh.SetRoute{Link: "wg0", Route: via}, mesh.SetRoute{Link: "wg0", Route: via6},
		mesh.RemoveAddress{Link: "wg0", Prefix: source}, mesh.RemoveAddress{Link: "wg0", Prefix: source6})...)
	const want = "ip link wg0 mtu 1420 up\nwg wg0 public-key self listen-port 51820 fwmark 0x1000000\nip route fd00:1::/64 dev wg0 table 77\n"
	if diff := cmp.Diff(want, k.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// nothing foreign is touched, nor observed as ours.
func TestForeign(t *testing.T) {
	k := kerneltest.Kernel{}
	k.AddForeignRoute(via, "eth9")
	k.AddForeignRule(rule)
	apply(t, &k, mesh.RemoveRoute{Route: via}, mesh.RemoveRule{Rule: rule}, mesh.AddRule{Rule: rule})
	if err := k.Apply([]mesh.Op{mesh.SetRoute{Route: mesh.Route{Prefix: podsA, Type: mesh.Throw, Table: 77}}}); err == nil {
		t.Error("a foreign route was replaced")
	}
	const want = "ip route 10.244.1.0/24 dev eth9 src 10.244.9.0 table 77 (foreign)\n" +
		"ip rule ipv4 priority 500 not fwmark 0x1000000/0x1000000 lookup 77 (foreign)\n"
	if diff := cmp.Diff(want, k.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if s, _ := k.Observe(); len(s.Routes)+len(s.Rules) != 0 {
		t.Errorf("observed: %v", s)
	}
}

func TestFailAt(t *testing.T) {
	boom := errors.New("boom")
	k := kerneltest.Kernel{FailAt: func(o mesh.Op) error {
		if _, ok := o.(mesh.SetLink); ok {
			return boom
		}
		return nil
	}}
	err := k.Apply(linkOps())
	if !errors.Is(err, boom) || !strings.HasPrefix(err.Error(), "ip link set wg0 mtu 1420 up: ") {
		t.Errorf("got %v", err)
	}
	if s, _ := k.Observe(); s.Link.Up || s.Link.ListenPort == 0 || len(s.Addresses) != 0 {
		t.Errorf("not stopped there: %+v", s)
	}
}

// An observation is the caller's own, and all methods may be called at once.
func TestConcurrent(t *testing.T) {
	var k kerneltest.Kernel
	apply(t, &k, mesh.ReplaceFilter{Filter: filter})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			pod := netip.AddrFrom4([4]byte{10, 244, 0, byte(i)})
			if err := k.Apply([]mesh.Op{mesh.SetFilterPods{Add: []netip.Addr{pod}}}); err != nil {
				t.Error(err)
			}
			s, _ := k.Observe()
			clear(s.Filter.Pods)
			_ = k.Verdict(pod, pod)
			_ = k.String()
			k.KillTunnel()
		})
	}
	all.Wait()
	s, _ := k.Observe()
	if len(s.Filter.Pods) != 8 || slices.Contains(s.Filter.Pods, netip.Addr{}) {
		t.Errorf("pods: %v", s.Filter.Pods)
	}
}
