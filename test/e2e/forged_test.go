package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// A machine on the nodes' network gives its packets the address of one of the very
// node's pods as source. They reach neither another pod there nor, through that
// node's tunnel, one elsewhere, although no reverse path filter looks at them; and
// each is counted. The pods themselves are not in the way of that.
func TestForgedSourceOfOwnPod(t *testing.T) {
	outside := []string{"10.244.200.0/24", "fd00:244:200::/64"}
	for name, o := range map[string]cluster.NetworkOptions{
		"bridge":             {},
		"ptp":                {Primary: map[string]any{"type": "ptp"}},
		"outside the prefix": {Stanza: map[string]any{"podCIDRs": outside}},
	} {
		t.Run(name, func(t *testing.T) {
			c := cluster.NewT(t, 2)
			var pods []*cluster.Pod
			for i, n := range c.Nodes {
				run(t, n, "sh", "-c", "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done")
				if o.Stanza != nil {
					o.Stanza = map[string]any{"podCIDRs": []string{fmt.Sprintf("10.244.20%d.0/24", i), fmt.Sprintf("fd00:244:20%d::/64", i)}}
				}
				if err := n.Configure(o); err != nil {
					t.Fatal(err)
				}
				startHelper(t, n)
			}
			if err := c.AwaitConverged(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, at := range []struct {
				node int
				name string
			}{{0, "one"}, {0, "two"}, {1, "far"}} {
				p, err := c.Nodes[at.node].AddPod(t.Context(), cluster.NetworkName, at.name, cluster.PodOptions{})
				if err != nil {
					t.Fatal(err)
				}
				pods = append(pods, p)
			}
			one, two, far := pods[0], pods[1], pods[2]
			servers := map[*cluster.Pod]*cluster.Server{}
			for _, p := range pods {
				s, err := cluster.StartServer(p, echoPort)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = s.Close() })
				servers[p] = s
			}
			all := func() {
				t.Helper()
				for _, way := range [][2]*cluster.Pod{{one, two}, {two, one}, {one, far}, {far, two}} {
					if err := cluster.Poll(t.Context(), "pods to reach each other", func() error {
						return talk(t.Context(), way[0], way[1], []byte("x"))
					}); err != nil {
						t.Fatal(err)
					}
				}
			}
			all()
			before := map[*cluster.Pod]map[netip.Addr]int{two: servers[two].Sources(), far: servers[far].Sources()}
			attacked := c.Nodes[0]
			counted := droppedIn(t, attacked)
			const each = 50
			for _, to := range []*cluster.Pod{two, far} {
				for _, v6 := range []bool{false, true} {
					source, target, via := one.IPv4(), to.IPv4(), attacked.IPv4
					if v6 {
						source, target, via = one.IPv6(), to.IPv6(), attacked.IPv6
					}
					setUp(t, c.Underlay, fmt.Sprintf("ip route replace %s via %s", target, via))
					if err := forge(t.Context(), c.Underlay, source, netip.AddrPortFrom(target, echoPort), each); err != nil {
						t.Fatal(err)
					}
				}
			}
			err := cluster.Poll(t.Context(), "all forged packets to be counted", func() error {
				if n := droppedIn(t, attacked) - counted; n < 4*each {
					return fmt.Errorf("%d of %d are counted", n, 4*each)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			for p, had := range before {
				for source, n := range servers[p].Sources() {
					if n != had[source] {
						t.Errorf("%s has %d packets from %s, and had %d", p, n, source, had[source])
					}
				}
			}
			all()
		})
	}
}

// forge sends datagrams with a source that the machine does not have.
func forge(ctx context.Context, at cluster.Endpointer, source netip.Addr, to netip.AddrPort, count int) error {
	return at.Do(func() error {
		dialer := net.Dialer{
			LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(source, 4711)),
			Control: func(_, _ string, c syscall.RawConn) (err error) {
				level, option := unix.SOL_IP, unix.IP_TRANSPARENT
				if source.Is6() {
					level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
				}
				return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, 1) }), err)
			},
		}
		conn, err := dialer.DialContext(ctx, "udp", to.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		for range count {
			if _, err := conn.Write([]byte("forged")); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
}
