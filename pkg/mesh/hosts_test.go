package mesh_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// hosting is a member whose machine has had these addresses since at(since).
func hosting(n mesh.Node, since int, hosts ...string) mesh.Node {
	n.Hosts = claims(since, hosts...)
	return n
}

func TestOwnersOfHosts(t *testing.T) {
	a, b, c := holder("a", 1, 1, "10.244.1.0/24"), holder("b", 2, 2, "10.244.2.0/24"), podHolder("c", 3, 3, "10.244.200.1/32")
	shared := b
	shared.PublicKey = a.PublicKey
	for _, tt := range []struct {
		name  string
		nodes []mesh.Node
		want  []string
	}{
		{"outside and inside of clusterCIDRs", []mesh.Node{hosting(a, 1, "192.0.2.1/32", "2001:db8::1/128"), hosting(b, 2, "10.244.99.2/32")}, []string{
			"a: 192.0.2.1/32 2001:db8::1/128", "b: 10.244.99.2/32",
		}},
		{"its own endpoint", []mesh.Node{hosting(listening("a", 1, 1, "192.0.2.1:51820"), 1, "192.0.2.1/32")}, []string{"a: 192.0.2.1/32"}},
		// A machine is replaced by another of its address.
		{"two, the newer claim", []mesh.Node{hosting(a, 1, "192.0.2.1/32"), hosting(b, 5, "192.0.2.1/32")}, []string{
			"b: 192.0.2.1/32", "a: host 192.0.2.1/32 refused: b has the newer claim",
		}},
		{"two of one time, the lesser name", []mesh.Node{hosting(b, 5, "192.0.2.1/32"), hosting(a, 5, "192.0.2.1/32")}, []string{
			"a: 192.0.2.1/32", "b: host 192.0.2.1/32 refused: a has the newer claim",
		}},
		{"twice of one", []mesh.Node{hosting(a, 5, "192.0.2.1/32", "192.0.2.1/32")}, []string{"a: 192.0.2.1/32"}},
		{"in another's prefix", []mesh.Node{hosting(a, 1, "10.244.2.7/32", "192.0.2.1/32"), b}, []string{
			"a: 192.0.2.1/32", "a: host 10.244.2.7/32 refused: it lies inside 10.244.2.0/24 of b",
		}},
		{"another's pod", []mesh.Node{hosting(a, 1, "10.244.200.1/32"), c}, []string{"a: host 10.244.200.1/32 refused: it lies inside 10.244.200.1/32 of c"}},
		{"in its own prefix", []mesh.Node{hosting(a, 1, "10.244.1.1/32")}, []string{"a: 10.244.1.1/32"}},
		{"its own pod", []mesh.Node{hosting(c, 1, "10.244.200.1/32")}, nil},
		{"two with one key", []mesh.Node{hosting(a, 1, "192.0.2.1/32"), hosting(shared, 2, "192.0.2.2/32")}, nil},
		{
			"not one machine",
			[]mesh.Node{hosting(a, 1, "192.0.2.0/24", "0.0.0.0/0", "0.0.0.0/32", "127.0.0.1/32", "224.0.0.1/32", "169.254.1.1/32", "255.255.255.255/32",
				"::/0", "::/128", "::1/128", "fe80::1/128", "ff02::1/128")},
			func() (want []string) {
				for _, p := range []string{
					"0.0.0.0/0", "0.0.0.0/32", "127.0.0.1/32", "169.254.1.1/32", "192.0.2.0/24", "224.0.0.1/32",
					"255.255.255.255/32", "::/0", "::/128", "::1/128", "fe80::1/128", "ff02::1/128",
				} {
					want = append(want, "a: host "+p+" refused: not the address of one machine")
				}
				return want
			}(),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := mesh.Owners(tt.nodes, mesh.Bounds{Cluster: prefixes("10.244.0.0/16")}, nil)
			var got []string
			for _, n := range []string{"a", "b", "c"} {
				var held []string
				for _, h := range o.Hosts[n] {
					held = append(held, h.Prefix.String())
				}
				if len(held) > 0 {
					got = append(got, n+": "+strings.Join(held, " "))
				}
			}
			for _, c := range o.Conflicts {
				if strings.HasPrefix(c.What, "host ") {
					got = append(got, c.String())
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

const (
	hostsBoth = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.2:51820 persistent-keepalive 25s allowed-ips 10.244.2.0/24,192.0.2.2/32,2001:db8::2/128
wg wgcni0 peer k3 endpoint 192.0.2.3:51820 allowed-ips 10.244.3.0/24
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip route 10.244.3.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip route 192.0.2.2/32 dev wgcni0 src 192.0.2.1 table 5182
ip route 2001:db8::2/128 dev wgcni0 src 2001:db8::1 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
ip rule ipv6 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
nft nodes mark 0x1000000 direct [22]
nft set own 192.0.2.1 2001:db8::1
nft set nodes 192.0.2.2 2001:db8::2
nft set held 192.0.2.2 2001:db8::2
sysctl src_valid_mark=1
`
	// The machine may use the tunnel, and is not sent to by it.
	hostsAllowed = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.2:51820 persistent-keepalive 25s allowed-ips 10.244.2.0/24,192.0.2.2/32
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
nft nodes mark 0x1000000 direct [22]
sysctl src_valid_mark=1
`
	hostsPreferred = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.2:51820 persistent-keepalive 9s allowed-ips 10.244.2.0/24,192.0.2.2/32
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip route 192.0.2.2/32 dev wgcni0 src 192.0.2.1 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.2.0/24
nft set local 10.244.1.0/24
nft nodes mark 0x1000000 direct [22]
nft set own 192.0.2.1
nft set nodes 192.0.2.2
sysctl src_valid_mark=1
`
	// Behind the route by the tunnel there is the one without it: the filter lets
	// some pass, which must have a way.
	hostsFlat = `
ip link wgcni0 mtu 1420 up
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 10.0.0.2:51820 persistent-keepalive 25s allowed-ips 10.0.0.2/32
ip route unreachable 10.0.0.0/16 metric 1048576 table 5182
ip route throw 10.0.0.1/32 table 5182
ip route 10.0.0.2/32 dev wgcni0 src 10.0.0.1 table 5182
ip route throw 10.0.0.2/32 metric 1048576 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.0.0.0/16
nft set guarded 10.0.0.0/16
nft set exempt 10.0.0.1 10.0.0.2
nft nodes mark 0x1000000 direct [22]
nft set own 10.0.0.1
nft set nodes 10.0.0.2
nft set held 10.0.0.2
sysctl src_valid_mark=1
`
)

func TestPlanOfHosts(t *testing.T) {
	a, b, c := node("a", 1, "10.244.1.0/24"), node("b", 2, "10.244.2.0/24"), node("c", 3, "10.244.3.0/24")
	a1, b1 := hosting(a, 1, "192.0.2.1/32"), hosting(b, 2, "192.0.2.2/32")
	on := settings("10.244.0.0/16")
	on.EncryptNodes, on.DirectPorts = true, []uint16{22}
	preferred := on
	preferred.Encryption, preferred.Keepalive = mesh.Preferred, 9*time.Second
	flat, flatter := hosting(node("a", 1), 1, "10.0.0.1/32"), hosting(node("b", 2), 1, "10.0.0.2/32")
	flat.Endpoint, flatter.Endpoint = endpoint("10.0.0.1:51820"), endpoint("10.0.0.2:51820")
	onFlat := on
	onFlat.ClusterCIDRs = prefixes("10.0.0.0/16")
	thief := hosting(b, 9, "192.0.2.1/32", "192.0.2.2/32", "192.0.2.77/32")
	self := a1
	self.Addresses = addrs("192.0.2.1", "192.0.2.77")
	soon := at(2).Add(mesh.HostsSettle - time.Millisecond)
	for _, tt := range []struct {
		name      string
		facts     mesh.Facts
		want      string
		conflicts []string
	}{
		{"both families, and one node without", mesh.Facts{
			Settings: on, Self: hosting(a, 1, "192.0.2.1/32", "2001:db8::1/128"),
			Nodes: []mesh.Node{hosting(b, 2, "192.0.2.2/32", "2001:db8::2/128"), c},
		}, hostsBoth, nil},
		{"off", mesh.Facts{Settings: settings("10.244.0.0/16"), Self: a, Nodes: []mesh.Node{b1}}, required4, nil},
		{"own address not known to others", mesh.Facts{Settings: on, Self: a, Nodes: []mesh.Node{b1}}, hostsAllowed, nil},
		{"no address of one family", mesh.Facts{Settings: on, Self: hosting(a, 1, "2001:db8::1/128"), Nodes: []mesh.Node{b1}}, strings.Replace(hostsAllowed, "direct [22]\n", "direct [22]\nnft set own 2001:db8::1\n", 1), nil},
		{"another's not settled", mesh.Facts{Settings: on, Self: a1, Nodes: []mesh.Node{b1}, Now: soon}, strings.Replace(hostsAllowed, "direct [22]\n", "direct [22]\nnft set own 192.0.2.1\n", 1), nil},
		{"own not settled", mesh.Facts{Settings: on, Self: hosting(a, 2, "192.0.2.1/32"), Nodes: []mesh.Node{hosting(b, 1, "192.0.2.2/32")}, Now: soon}, hostsAllowed, nil},
		{"preferred", mesh.Facts{Settings: preferred, Self: a1, Nodes: []mesh.Node{b1}, Now: soon.Add(time.Millisecond)}, hostsPreferred, nil},
		{"inside clusterCIDRs", mesh.Facts{Settings: onFlat, Self: flat, Nodes: []mesh.Node{flatter}}, hostsFlat, nil},
		{
			"this node's own, claimed by another",
			mesh.Facts{Settings: preferred, Self: self, Nodes: []mesh.Node{thief}},
			strings.NewReplacer("ip route 192.0.2.2/32 dev wgcni0 src 192.0.2.1 table 5182\n", "", "nft set own 192.0.2.1\nnft set nodes 192.0.2.2\n", "").Replace(hostsPreferred),
			[]string{
				"a: host 192.0.2.1/32 refused: b has the newer claim",
				"b: host 192.0.2.1/32 refused: the address is in use on this node",
				"b: host 192.0.2.77/32 refused: the address is in use on this node",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := mesh.NewPlan(tt.facts)
			k := kerneltest.Kernel{Name: keyName, Own: addrs("192.0.2.1", "2001:db8::1", "10.0.0.1")}
			if err := k.Apply(mesh.Diff(mesh.State{}, p.State, mesh.Context{Now: at(100)})); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want[1:], k.String()); diff != "" {
				t.Errorf("kernel (-want +got):\n%s", diff)
			}
			var conflicts []string
			for _, c := range p.Conflicts {
				conflicts = append(conflicts, c.String())
			}
			if diff := cmp.Diff(tt.conflicts, conflicts); diff != "" {
				t.Errorf("conflicts (-want +got):\n%s", diff)
			}
		})
	}
}

// What is inside externalCIDRs is reached by the tunnel without encryptNodes, by
// nodes and by machines that have no pods.
func TestPlanOfExternalHosts(t *testing.T) {
	on := settings("10.244.0.0/16")
	on.ExternalCIDRs, on.DirectPorts = prefixes("192.0.2.192/26"), []uint16{22}
	a, vm := node("a", 1, "10.244.1.0/24"), hosting(node("vm", 2), 2, "192.0.2.200/32")
	vm.Addresses, vm.Endpoint = addrs("192.0.2.200"), endpoint("192.0.2.200:51820")
	second := hosting(node("wm", 3), 2, "192.0.2.201/32")
	soon := at(2).Add(mesh.HostsSettle - time.Millisecond)
	vmOn := on
	vmOn.EncryptNodes = true
	const filter = `ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16 192.0.2.192/26
nft set guarded 10.244.0.0/16 192.0.2.192/26
nft set withheld 10.244.0.0/16
`
	const atNode = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.200:51820 persistent-keepalive 25s allowed-ips 192.0.2.200/32
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route 192.0.2.200/32 dev wgcni0 src 10.244.1.0 table 5182
` + filter + `nft set local 10.244.1.0/24
nft nodes mark 0x1000000 direct [22]
nft set nodes 192.0.2.200
nft set held 192.0.2.200
sysctl src_valid_mark=1
`
	const unsettled = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.200:51820 persistent-keepalive 25s allowed-ips 192.0.2.200/32
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
` + filter + `nft set local 10.244.1.0/24
nft nodes mark 0x1000000 direct [22]
sysctl src_valid_mark=1
`
	const atVM = `
ip link wgcni0 mtu 1420 up
wg wgcni0 public-key k2 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k1 endpoint 192.0.2.1:51820 allowed-ips 10.244.1.0/24
wg wgcni0 peer k3 endpoint 192.0.2.3:51820 persistent-keepalive 25s allowed-ips 192.0.2.201/32
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route 10.244.1.0/24 dev wgcni0 src 192.0.2.200 table 5182
ip route 192.0.2.201/32 dev wgcni0 src 192.0.2.200 table 5182
` + filter + `nft nodes mark 0x1000000 direct [22]
nft set own 192.0.2.200
nft set nodes 192.0.2.201
nft set held 192.0.2.201
sysctl src_valid_mark=1
`
	atVMSoon := strings.NewReplacer("ip route 192.0.2.201/32 dev wgcni0 src 192.0.2.200 table 5182\n", "", " src 192.0.2.200", "",
		"nft set own 192.0.2.200\nnft set nodes 192.0.2.201\nnft set held 192.0.2.201\n", "").Replace(atVM)
	outside := hosting(node("vm", 2), 2, "203.0.113.9/32")
	docker := node("vm", 2, "192.0.2.240/28")
	for _, tt := range []struct {
		name  string
		facts mesh.Facts
		want  string
	}{
		{"at a node", mesh.Facts{Settings: on, Self: a, Nodes: []mesh.Node{vm}}, atNode},
		{"at a node, not settled", mesh.Facts{Settings: on, Self: a, Nodes: []mesh.Node{vm}, Now: soon}, unsettled},
		{
			"at a node, outside of externalCIDRs",
			mesh.Facts{Settings: on, Self: a, Nodes: []mesh.Node{outside}},
			strings.Replace(unsettled, "192.0.2.200:51820 persistent-keepalive 25s allowed-ips 192.0.2.200/32", "192.0.2.2:51820", 1),
		},
		{"at a machine without pods", mesh.Facts{Settings: vmOn, Self: vm, Nodes: []mesh.Node{a, second}}, atVM},
		{"at a machine without pods, its own not settled", mesh.Facts{Settings: vmOn, Self: vm, Nodes: []mesh.Node{a, hosting(second, 1, "192.0.2.201/32")}, Now: soon}, atVMSoon},
		{"a subnet behind a machine", mesh.Facts{Settings: on, Self: a, Nodes: []mesh.Node{docker}}, strings.NewReplacer(
			"192.0.2.200:51820 persistent-keepalive 25s allowed-ips 192.0.2.200/32", "192.0.2.2:51820 allowed-ips 192.0.2.240/28", "192.0.2.200/32 dev", "192.0.2.240/28 dev",
			"nft set withheld 10.244.0.0/16", "nft set withheld 10.244.0.0/16 192.0.2.240/28").Replace(strings.ReplaceAll(atNode, "nft set nodes 192.0.2.200\nnft set held 192.0.2.200\n", ""))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := mesh.NewPlan(tt.facts)
			k := kerneltest.Kernel{Name: keyName, Own: addrs("192.0.2.1", "192.0.2.200")}
			if err := k.Apply(mesh.Diff(mesh.State{}, p.State, mesh.Context{Now: at(100)})); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want[1:], k.String()); diff != "" {
				t.Errorf("kernel (-want +got):\n%s", diff)
			}
			if len(p.Conflicts) > 0 {
				t.Error(p.Conflicts)
			}
		})
	}
}

// Another location's machine is reached by the gateway, at its own address too
// where that is inside externalCIDRs.
func TestExternalHostsByGateway(t *testing.T) {
	on := settings("10.244.0.0/16")
	on.ExternalCIDRs, on.EncryptNodes = prefixes("192.0.2.192/26"), true
	a, gateway := node("a", 1, "10.244.1.0/24"), hosting(node("g", 2, "10.244.2.0/24"), 1, "192.0.2.2/32")
	gateway.Role = mesh.RoleGateway
	vm := hosting(node("vm", 3), 1, "192.0.2.200/32", "203.0.113.9/32")
	vm.Location = "elsewhere"
	p := mesh.NewPlan(mesh.Facts{Settings: on, Self: a, Nodes: []mesh.Node{gateway, vm}})
	if len(p.Peers) != 1 {
		t.Fatalf("peers: %v", p.Peers)
	}
	// Outside of externalCIDRs it is for those who are its peers.
	if diff := cmp.Diff(prefixes("10.244.2.0/24", "192.0.2.2/32", "192.0.2.200/32"), p.Peers[0].AllowedIPs, byEqual); diff != "" {
		t.Errorf("the gateway's allowed IPs (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(addrs("192.0.2.200"), p.Filter.Nodes.Held, byEqual); diff != "" {
		t.Errorf("held (-want +got):\n%s", diff)
	}
}

func TestAnnounceHosts(t *testing.T) {
	got := mesh.AnnounceHosts(addrs("192.0.2.1", "::ffff:192.0.2.9", "127.0.0.1", "2001:db8::1"), claims(1, "192.0.2.1/32", "192.0.2.5/32"), at(9))
	want := append(claims(1, "192.0.2.1/32"), claims(9, "192.0.2.9/32", "2001:db8::1/128")...)
	if diff := cmp.Diff(want, got, byEqual); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
