package kernel_test

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/mesh"
)

const (
	rpFilter     = "/proc/sys/net/ipv4/conf/all/rp_filter"
	srcValidMark = "/proc/sys/net/ipv4/conf/all/src_valid_mark"
)

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// nodesPlan is a plan with two machines that are reached through the tunnel.
func nodesPlan(on bool) mesh.State {
	s := settings()
	s.EncryptNodes, s.DirectPorts = on, []uint16{22, 2379}
	me, one, two := self(), node(1, "10.244.1.0/24"), node(2, "10.244.2.0/24")
	for n, hosts := range map[*mesh.Node][]string{
		&me: {"192.0.2.200/32", "2001:db8::200/128"}, &one: {"192.0.2.1/32", "2001:db8::1/128"}, &two: {"192.0.2.2/32"},
	} {
		for _, h := range hosts {
			n.Hosts = append(n.Hosts, mesh.Claim{Prefix: netip.MustParsePrefix(h)})
		}
	}
	return mesh.NewPlan(mesh.Facts{Settings: s, Self: me, Nodes: []mesh.Node{one, two}}).State
}

// The nodes' own chains, sets, routes and sysctl come, are mended, and go.
func TestNodesRoundTrip(t *testing.T) {
	makeForeign(t)
	before := everything(t)
	k := open(t)
	want := nodesPlan(true)
	apply(t, k, nodesPlan(false))
	for _, strict := range []string{"0", "1"} {
		writeFile(t, rpFilter, strict)
		apply(t, k, want)
		if ops := apply(t, k, want); len(ops) > 0 {
			t.Fatalf("rp_filter %s: a plan that is in place is applied again:\n%s", strict, mesh.Text(ops))
		}
		for _, breakage := range []string{
			"nft delete table inet wgcni",
			"nft flush chain inet wgcni node-plain",
			"nft flush chain inet wgcni node-send",
			"nft delete element inet wgcni nodes4 { 192.0.2.1 }",
			"nft delete element inet wgcni held6 { 2001:db8::1 }",
			"nft add element inet wgcni own4 { 192.0.2.9 }",
			"nft delete element inet wgcni direct { 22 }",
			"ip route del 192.0.2.1 table 30567",
			"ip link del wgcni0",
		} {
			sh(t, breakage)
			if ops := apply(t, k, want); len(ops) == 0 {
				t.Errorf("rp_filter %s: not seen: %s", strict, breakage)
			}
		}
	}
	for _, breakage := range []string{"echo 0 >" + srcValidMark, "nft flush chain arp wgcni input", "nft delete table arp wgcni"} {
		sh(t, breakage)
		if ops := apply(t, k, want); len(ops) == 0 {
			t.Errorf("not seen: %s", breakage)
		}
	}
	writeFile(t, rpFilter, "0")
	apply(t, k, mesh.State{})
	writeFile(t, srcValidMark, "0") // a flushed ruleset has no memory
	if diff := cmp.Diff(before, everything(t)); diff != "" {
		t.Errorf("not as before (-before +after):\n%s", diff)
	}
}

// What the sysctl was before is remembered, while the table and the interface are made anew.
func TestSrcValidMarkIsPutBack(t *testing.T) {
	sh(t, "ip link add up0 type veth peer name up1 && ip link set up0 up && ip addr add 192.0.2.200/24 dev up0; ip addr add 2001:db8::200/64 dev up0 nodad")
	defer func() {
		sh(t, "ip link del up0")
		writeFile(t, srcValidMark, "0")
	}()
	for _, was := range []string{"0", "1"} {
		writeFile(t, srcValidMark, was)
		k := open(t)
		apply(t, k, nodesPlan(true))
		sh(t, "ip link del wgcni0; nft flush chain inet wgcni forward")
		apply(t, k, nodesPlan(true))
		if text, _ := os.ReadFile(srcValidMark); strings.TrimSpace(string(text)) != "1" {
			t.Errorf("it is %s", text)
		}
		apply(t, k, nodesPlan(false))
		if text, _ := os.ReadFile(srcValidMark); strings.TrimSpace(string(text)) != was {
			t.Errorf("it was %s and is %s", was, text)
		}
		apply(t, k, nodesPlan(true))
		apply(t, k, mesh.State{})
		if text, _ := os.ReadFile(srcValidMark); strings.TrimSpace(string(text)) != was {
			t.Errorf("after all was removed: it was %s and is %s", was, text)
		}
	}
}

// Where there is no tunnel, or no address to send from, nothing is held that is
// not routed: a node would be cut off that could send in the clear until then.
func TestNothingIsHeldThatIsNotRouted(t *testing.T) {
	held := func() string { return sh(t, "nft list set inet wgcni held4 && nft list set inet wgcni nodes4") }
	k := open(t)
	k.StartTunnel = nil
	want := nodesPlan(true)
	observed, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	err = k.Apply(mesh.Diff(observed, want, mesh.Context{})) // no address 192.0.2.200 here
	if err == nil || strings.Count(held(), "192.0.2.1") != 1 {
		t.Errorf("error %v, sets\n%s", err, held())
	}
	sh(t, "ip link add up0 type veth peer name up1 && ip link set up0 up && ip addr add 192.0.2.200/24 dev up0; ip addr add 2001:db8::200/64 dev up0 nodad")
	defer sh(t, "ip link del up0")
	k = open(t)
	apply(t, k, want)
	if strings.Count(held(), "192.0.2.1") != 2 {
		t.Errorf("with a tunnel:\n%s", held())
	}
	sh(t, "ip link del wgcni0")
	k.StartTunnel = nil
	if observed, err = k.Observe(); err != nil {
		t.Fatal(err)
	}
	_ = k.Apply(mesh.Diff(observed, want, mesh.Context{})) // the kernel's own WireGuard may make it again
	if strings.Count(held(), "192.0.2.1") != 2 {
		t.Errorf("the tunnel is gone, and what was held no more:\n%s", held())
	}
	apply(t, open(t), mesh.State{})
}
