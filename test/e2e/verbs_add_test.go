package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// static is a second network, whose pods get the address that CNI_ARGS name:
// one outside of the node's own ranges.
const static = "static"

func configureStatic(t *testing.T, n *cluster.Node) {
	t.Helper()
	text, err := n.Conflist(cluster.NetworkOptions{Primary: map[string]any{
		"bridge": "cni1", "ipam": map[string]any{"type": "static", "routes": []any{map[string]any{"dst": "0.0.0.0/0"}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	text = strings.Replace(text, `"name": "pods"`, `"name": "`+static+`"`, 1)
	if err := n.WriteConflist("20-static.conflist", text); err != nil {
		t.Fatal(err)
	}
}

func outside(address string) cluster.PodOptions {
	return cluster.PodOptions{Args: map[string]string{"IgnoreUnknown": "1", "IP": address + "/24", "GATEWAY": "10.244.99.1"}}
}

// guards reports whether the kernel holds what an address outside of the node's
// ranges needs: an element of the filter's set and a throw route.
func guards(t *testing.T, n *cluster.Node, address string) (set, throw bool) {
	t.Helper()
	set = strings.Contains(mustRun(t, n, "nft", "list", "set", "inet", "wgcni", "pods4"), address)
	throw = strings.Contains(mustRun(t, n, "ip", "route", "show", "table", "all", "type", "throw"), "throw "+address+" ")
	return set, throw
}

func linkMTU(t *testing.T, run func(name string, args ...string) string, link string) int {
	t.Helper()
	var links []struct {
		MTU int `json:"mtu"`
	}
	if err := json.Unmarshal([]byte(run("ip", "-json", "link", "show", link)), &links); err != nil || len(links) != 1 {
		t.Fatal(err)
	}
	return links[0].MTU
}

func TestADD(t *testing.T) {
	c := configured(t, 2, cluster.NetworkOptions{})
	a, b := c.Nodes[0], c.Nodes[1]
	configureStatic(t, a)
	h := helperUp(t, a)
	helperUp(t, b)
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	far := addPod(t, b, cluster.NetworkName, "far", cluster.PodOptions{})
	serve(t, far)

	t.Run("MTU", func(t *testing.T) {
		p := addPod(t, a, cluster.NetworkName, "mtu", cluster.PodOptions{})
		defer deletePod(t, p)
		tunnel := linkMTU(t, func(s string, args ...string) string { return mustRun(t, a, s, args...) }, "wgcni0")
		pod := linkMTU(t, func(s string, args ...string) string {
			out, err := p.Run(t.Context(), s, args...)
			if err != nil {
				t.Fatal(err)
			}
			return out
		}, "eth0")
		host := 0
		result := 0
		for _, i := range p.Result.Interfaces {
			switch {
			case i.Sandbox != "":
				result = i.MTU
			case strings.HasPrefix(i.Name, "veth"):
				host = linkMTU(t, func(s string, args ...string) string { return mustRun(t, a, s, args...) }, i.Name)
			}
		}
		// An IPv6 underlay takes 80 bytes of 1500 (cilium#23917).
		if tunnel != 1420 || pod != tunnel || host != tunnel {
			t.Errorf("MTU of the tunnel %d, the pod's end %d, the node's end %d", tunnel, pod, host)
		}
		if result != 0 && result != tunnel { // the field came with CNI 1.1.0
			t.Errorf("the result says MTU %d", result)
		}
	})

	t.Run("twice, and all else of prevResult unchanged", func(t *testing.T) {
		p := addPod(t, a, cluster.NetworkName, "twice", cluster.PodOptions{})
		defer deletePod(t, p)
		prev := prevResult(p.Netns, "eth0", p.IPv4().String()+"/24", p.IPv6().String()+"/64")
		prev["routes"] = []any{map[string]any{"dst": "0.0.0.0/0", "gw": "10.244.1.1", "mtu": 1300, "table": 5}}
		prev["dns"] = map[string]any{"nameservers": []any{"10.96.0.10"}, "search": []any{"cluster.local"}, "options": []any{"ndots:5"}}
		prev["interfaces"] = append(prev["interfaces"].([]any), map[string]any{"name": "vhost", "socketPath": "/run/vhost.sock", "pciID": "0000:00:1f.6", "mtu": 9000.})
		before := attachments(t, a)
		c := call{
			verb: "ADD", container: p.ContainerID(), netns: p.Netns, ifname: "eth0",
			args: "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;IgnoreUnknown=1", stdin: stanza(t, a, map[string]any{"prevResult": prev}),
		}
		first, second := plugin(t, a, c), plugin(t, a, c)
		if first.code != 0 || first.stdout != second.stdout || first.stderr != "" {
			t.Fatalf("first %+v\nsecond %+v", first, second)
		}
		prev["interfaces"].([]any)[0].(map[string]any)["mtu"] = 1420.
		text, err := json.Marshal(prev)
		if err != nil {
			t.Fatal(err)
		}
		var want, got map[string]any
		if err := json.Unmarshal(text, &want); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(first.stdout), &got); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(want, got) {
			t.Errorf("got %v, want %v", got, want)
		}
		after := attachments(t, a)
		if len(after) != len(before) || after[p.ContainerID()].Pod != "default/web" {
			t.Errorf("%d attachments, before %d: %v", len(after), len(before), after)
		}
		agrees(t, a)
	})

	t.Run("the late DEL of an address's old owner", func(t *testing.T) {
		p := addPod(t, a, cluster.NetworkName, "owner", cluster.PodOptions{})
		defer deletePod(t, p)
		for _, address := range []string{"10.244.1.77", "10.244.99.77"} {
			in := stanza(t, a, map[string]any{"prevResult": prevResult(p.Netns, "eth0", address+"/24")})
			for _, x := range []call{{verb: "ADD", container: "old"}, {verb: "ADD", container: "new"}, {verb: "DEL", container: "old"}} {
				x.netns, x.ifname, x.stdin = p.Netns, "eth0", in
				if r := plugin(t, a, x); r.code != 0 {
					t.Fatalf("%s %s: %s", x.verb, x.container, r.stdout)
				}
			}
			all := attachments(t, a)
			if _, ok := all["old"]; ok || !slices.Contains(all["new"].Addresses, netip.MustParseAddr(address)) {
				t.Errorf("%s: %v", address, all)
			}
			outside := strings.HasPrefix(address, "10.244.99.")
			if set, throw := guards(t, a, address); set != outside || throw != outside {
				t.Errorf("%s: in the set of pods %v, a throw route %v; want both %v", address, set, throw, outside)
			}
			agrees(t, a)
			del(t, a, call{container: "new", netns: p.Netns, stdin: in})
			if set, throw := guards(t, a, address); set || throw {
				t.Errorf("%s is gone: in the set of pods %v, a throw route %v", address, set, throw)
			}
		}
	})

	t.Run("a pod outside of the node's ranges", func(t *testing.T) {
		p := addPod(t, a, static, "cloud", outside("10.244.99.7"))
		defer deletePod(t, p)
		if set, throw := guards(t, a, "10.244.99.7"); !set || !throw {
			t.Errorf("in the set of pods %v, a throw route %v", set, throw)
		}
		if err := cluster.Poll(t.Context(), "the pod to be announced", func() error { return talk(t.Context(), p, far, []byte("hello")) }); err != nil {
			t.Error(err)
		}
	})

	t.Run("failing, nothing is left", func(t *testing.T) {
		p := addPod(t, a, cluster.NetworkName, "fails", cluster.PodOptions{})
		defer deletePod(t, p)
		before := containers(t, a)
		own := "/proc/self/ns/net"
		mtu := mustRun(t, a, "cat", "/sys/class/net/eth0/mtu")
		for name, x := range map[string]struct {
			call
			says string
		}{
			"a netns that is none":   {call{netns: "/run/netns/none", ifname: "eth0"}, "/run/netns/none"},
			"a file":                 {call{netns: "/etc/hostname", ifname: "eth0"}, "/etc/hostname"},
			"the node's own netns":   {call{netns: own, ifname: "eth0"}, "netns"},
			"an unknown interface":   {call{netns: p.Netns, ifname: "net7"}, "net7"},
			"loopback":               {call{netns: p.Netns, ifname: "lo"}, "lo"},
			"no prevResult":          {call{netns: p.Netns, ifname: "eth0", stdin: stanza(t, a, nil)}, "prevResult"},
			"outside clusterCIDRs":   {call{netns: p.Netns, ifname: "eth0", stdin: stanza(t, a, map[string]any{"prevResult": prevResult(p.Netns, "eth0", "172.16.0.5/24")})}, "172.16.0.5"},
			"no address":             {call{netns: p.Netns, ifname: "eth0", stdin: stanza(t, a, map[string]any{"prevResult": prevResult(p.Netns, "eth0")})}, "no address"},
			"a prevResult of rubble": {call{netns: p.Netns, ifname: "eth0", stdin: stanza(t, a, map[string]any{"prevResult": map[string]any{"ips": 5}})}, "prevResult"},
		} {
			x.verb, x.container = "ADD", "failing"
			if x.stdin == "" {
				x.stdin = stanza(t, a, map[string]any{"prevResult": prevResult(x.netns, x.ifname, "10.244.99.50/24")})
			}
			r := plugin(t, a, x.call)
			if r.code == 0 || r.err.Code == 0 || !strings.Contains(r.err.Error(), x.says) {
				t.Errorf("%s: exit status %d, %+v, want one that says %q", name, r.code, r.err, x.says)
			}
			if got := containers(t, a); !slices.Equal(got, before) {
				t.Errorf("%s: attachments %v, before %v", name, got, before)
			}
		}
		if now := mustRun(t, a, "cat", "/sys/class/net/eth0/mtu"); now != mtu {
			t.Errorf("the node's own eth0 had MTU %s, now %s", mtu, now)
		}
		agrees(t, a)
	})

	for _, down := range []bool{false, true} {
		t.Run("with a damaged store, helper down "+strconv.FormatBool(down), func(t *testing.T) {
			if down {
				helperDown(t, h)
			}
			old := addPod(t, a, cluster.NetworkName, "before", cluster.PodOptions{})
			defer deletePod(t, old)
			if _, err := damaged(func(b []byte) []byte { clear(b[8192:]); return b })(a); err != nil {
				t.Fatal(err)
			}
			p := addPod(t, a, cluster.NetworkName, "damaged", cluster.PodOptions{})
			defer deletePod(t, p)
			if _, ok := attachments(t, a)[p.ContainerID()]; !ok {
				t.Error("the pod is not recorded")
			}
			for _, from := range []*cluster.Pod{p, old} {
				if err := cluster.Poll(t.Context(), "traffic", func() error { return talk(t.Context(), from, far, []byte("hello")) }); err != nil {
					t.Error(err)
				}
			}
			synced(t, a)
		})
	}

	t.Run("with the registry's folder gone, helper down", func(t *testing.T) {
		if err := a.Configure(cluster.NetworkOptions{Stanza: map[string]any{"registry": map[string]any{"type": "file", "path": "/nonexistent/mesh.json"}}}); err != nil {
			t.Fatal(err)
		}
		p := addPod(t, a, cluster.NetworkName, "alone", cluster.PodOptions{})
		defer deletePod(t, p)
		if err := talk(t.Context(), p, far, []byte("hello")); err != nil {
			t.Error(err)
		}
	})
}

// TestADDBeforeTheFirstRun: a node without a key starts pods, and none of their
// packets reach another node's pods in the clear, although the main table
// has routes to them ("mandatory WireGuard" was asked for and closed stale, calico#3760).
func TestADDBeforeTheFirstRun(t *testing.T) {
	c := configured(t, 2, cluster.NetworkOptions{Plain: true})
	routeAroundTunnel(t, c)
	a, b := c.Nodes[0], c.Nodes[1]
	// Masqueraded, far's packets would be its node's, which are not encrypted without encryptNodes.
	if err := b.Configure(cluster.NetworkOptions{Plain: true, Primary: map[string]any{"ipMasq": false}}); err != nil {
		t.Fatal(err)
	}
	plain, far := addPod(t, a, cluster.NetworkName, "plain", cluster.PodOptions{}), addPod(t, b, cluster.NetworkName, "far", cluster.PodOptions{})
	reach := func(from, to *cluster.Pod) error {
		for _, dst := range []netip.Addr{to.IPv4(), to.IPv6()} {
			if _, err := cluster.Ping(t.Context(), from, dst, []byte("marker-of-a-plain-packet")); err != nil {
				return err
			}
		}
		return nil
	}
	if err := cluster.Poll(t.Context(), "the routes to work while nothing guards", func() error { return reach(plain, far) }); err != nil {
		t.Fatal(err)
	}
	if err := a.Configure(cluster.NetworkOptions{}); err != nil {
		t.Fatal(err)
	}
	capture, err := cluster.StartCapture(c.Underlay, cluster.Bridge, cluster.CaptureOptions{Prefixes: podRanges, Markers: [][]byte{[]byte("marker-of-a-plain-packet")}})
	if err != nil {
		t.Fatal(err)
	}
	p := addPod(t, a, cluster.NetworkName, "guarded", cluster.PodOptions{})
	if out := mustRun(t, a, "nft", "list", "table", "inet", "wgcni"); !strings.Contains(out, "10.244.0.0/16") || !strings.Contains(out, "fd00:244::/32") {
		t.Errorf("the table does not guard the cluster's ranges:\n%s", out)
	}
	for _, from := range []*cluster.Pod{p, plain} {
		for _, dst := range []netip.Addr{far.IPv4(), far.IPv6()} {
			ctx, cancel := withTimeout(t)
			if _, err := cluster.Ping(ctx, from, dst, []byte("marker-of-a-plain-packet")); err == nil {
				t.Errorf("%s reaches %s", from, dst)
			}
			cancel()
		}
	}
	// Nor does anything come in.
	for _, dst := range []netip.Addr{p.IPv4(), p.IPv6()} {
		ctx, cancel := withTimeout(t)
		if _, err := cluster.Ping(ctx, far, dst, []byte("from outside")); err == nil {
			t.Errorf("%s is reached in the clear", dst)
		}
		cancel()
	}
	report, err := capture.Stop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if report.WithMarker != 0 || report.Dropped != 0 {
		t.Error(report)
	}
	if s, err := a.Status(t.Context()); err != nil || s.OK || s.Pods != 1 || !strings.Contains(s.Verdict, "has not joined yet") {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := os.Stat(a.Path("/var/lib/wgcni/private.key")); !os.IsNotExist(err) {
		t.Errorf("the plugin made a key: %v", err)
	}
	deletePod(t, p)
	if got := leases(t, a); len(got) != 2 {
		t.Errorf("leases %v", got)
	}
}

// TestADDBesideAnotherPlan: while an ADD applies the whole plan, the helper applies one
// that it knows more for, as after flannel gave the node another range: an address that
// the ADD's routes need goes as soon as it is there.
func TestADDBesideAnotherPlan(t *testing.T) {
	c := configured(t, 2, cluster.NetworkOptions{})
	a := c.Nodes[0]
	h := helperUp(t, a)
	helperUp(t, c.Nodes[1])
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	helperDown(t, h)
	for i, unapplied := range []string{"10.245.0.0/16", "10.246.0.0/16", "10.247.0.0/16"} {
		if err := a.Configure(cluster.NetworkOptions{Stanza: map[string]any{"clusterCIDRs": []string{"10.244.0.0/16", "fd00:244::/32", unapplied}}}); err != nil {
			t.Fatal(err)
		}
		taken := takeFirstAddress(t, a)
		p := addPod(t, a, cluster.NetworkName, fmt.Sprintf("beside%d", i), cluster.PodOptions{})
		if err := <-taken; err != nil {
			t.Error(err)
		}
		defer deletePod(t, p)
	}
	helperUp(t, a) // mends what went after the last route was set
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Error(err)
	}
}

// takeFirstAddress removes the IPv4 addresses of the node's tunnel, and the first that
// comes. It then says that it did, or why not.
func takeFirstAddress(t *testing.T, n *cluster.Node) <-chan error {
	t.Helper()
	updates, done, taken := make(chan netlink.AddrUpdate), make(chan struct{}), make(chan error, 1)
	var rt *netlink.Handle
	var link netlink.Link
	err := n.Do(func() (err error) {
		if rt, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return err
		}
		if link, err = rt.LinkByName(cluster.Interface); err != nil {
			return err
		}
		old, err := rt.AddrList(link, netlink.FAMILY_V4)
		for _, a := range old {
			err = errors.Join(err, rt.AddrDel(link, &a))
		}
		return errors.Join(err, netlink.AddrSubscribe(updates, done))
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer rt.Close()
		for u := range updates {
			if u.NewAddr && u.LinkIndex == link.Attrs().Index && u.LinkAddress.IP.To4() != nil {
				close(done)
				taken <- rt.AddrDel(link, &netlink.Addr{IPNet: &u.LinkAddress})
				return
			}
		}
		taken <- errors.New("no address came")
	}()
	return taken
}
