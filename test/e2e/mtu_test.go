package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// An mtuMesh is a mesh whose endpoints and pods are of certain families.
type mtuMesh struct {
	*mesh
	endpoint6 []bool // by node: its endpoint is IPv6
	pods6     bool   // pods have an IPv6 address too, and clusterCIDRs hold both
	overhead  int    // of WireGuard and all below it, in bytes

	wide *cluster.Pod // somebody widens its link after every change
}

// wideMTU is more than any tunnel's.
const wideMTU = 9100

// newMTUMesh makes a mesh with one pod on each node, whose links are as wide as
// the primary plugin makes them for jumbo frames.
func newMTUMesh(t *testing.T, mtu int, endpoint6 []bool, pods6 bool) *mtuMesh {
	t.Helper()
	m := &mtuMesh{mesh: &mesh{Cluster: cluster.NewWithT(t, cluster.Options{Nodes: len(endpoint6), MTU: mtu})}, endpoint6: endpoint6, pods6: pods6, overhead: 60}
	for i, n := range m.Nodes {
		endpoint := n.IPv4
		if endpoint6[i] {
			endpoint, m.overhead = n.IPv6, 80
		}
		o := cluster.NetworkOptions{
			Stanza:  map[string]any{"endpoint": netip.AddrPortFrom(endpoint, 51820).String()},
			Primary: map[string]any{"mtu": 9001},
		}
		if !pods6 {
			o.Stanza["clusterCIDRs"] = []string{"10.244.0.0/16"}
			o.Primary["ipam"] = map[string]any{
				"type": "host-local", "ranges": []any{[]any{map[string]any{"subnet": n.PodCIDRs()[0].String()}}},
				"routes": []any{map[string]any{"dst": "0.0.0.0/0"}},
			}
		}
		if err := n.Configure(o); err != nil {
			t.Fatal(err)
		}
		m.helpers = append(m.helpers, startHelper(t, n))
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range m.Nodes {
		p := addPod(t, n, cluster.NetworkName, "pod", cluster.PodOptions{})
		serve(t, p)
		m.pods = append(m.pods, p)
	}
	m.wide = addPod(t, m.Nodes[0], cluster.NetworkName, "wide", cluster.PodOptions{})
	return m
}

func runIn(t *testing.T, p *cluster.Pod, name string, args ...string) string {
	t.Helper()
	out, err := p.Run(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func podMTU(t *testing.T, p *cluster.Pod) int {
	t.Helper()
	return linkMTU(t, func(name string, args ...string) string { return runIn(t, p, name, args...) }, p.IfName)
}

// setUnderlay changes the MTU of all links of the underlay, while everything runs.
func setUnderlay(t *testing.T, c *cluster.Cluster, mtu int) {
	t.Helper()
	for _, n := range c.Nodes {
		setMTU(t, c.Underlay, n.Name, mtu)
		setMTU(t, n.Machine, cluster.Uplink, mtu)
	}
	setMTU(t, c.Underlay, cluster.Bridge, mtu)
}

func setMTU(t *testing.T, at *cluster.Machine, link string, mtu int) {
	t.Helper()
	if _, err := at.Run(t.Context(), "ip", "link", "set", link, "mtu", strconv.Itoa(mtu)); err != nil {
		t.Fatal(err)
	}
}

// tunnel is the MTU that the tunnel must have over an underlay, and what fits.
func (m *mtuMesh) tunnel(underlay int) (mtu, room int) {
	room = underlay - m.overhead
	if m.pods6 {
		return max(room, 1280), room
	}
	return room, room
}

// follows waits until the tunnel and the links of the pods have the MTU.
func (m *mtuMesh) follows(t *testing.T, mtu int) {
	t.Helper()
	for _, p := range append([]*cluster.Pod{m.wide}, m.pods...) {
		awaitMTU(t, p, mtu)
	}
	for _, n := range m.Nodes {
		if got := linkMTU(t, func(name string, args ...string) string { return run(t, n, name, args...) }, "wgcni0"); got != mtu {
			t.Errorf("%s: the tunnel has MTU %d, want %d", n, got, mtu)
		}
	}
}

// awaitMTU waits for a pod's link to have the MTU. CHECK agrees then, though the
// helper may be at it still.
func awaitMTU(t *testing.T, p *cluster.Pod, want int) {
	t.Helper()
	err := cluster.Poll(t.Context(), fmt.Sprintf("the link of %s to have MTU %d", p, want), func() error {
		if got := podMTU(t, p); got != want {
			return fmt.Errorf("it has %d", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.CNI(t.Context(), "check"); err != nil {
		t.Error(err)
	}
}

// headersTo are the addresses of a pod, and the bytes of IP and ICMP (or UDP) header in front of a payload.
func headersTo(p *cluster.Pod) map[netip.Addr]int {
	all := map[netip.Addr]int{p.IPv4(): 28}
	if p.IPv6().IsValid() {
		all[p.IPv6()] = 48
	}
	return all
}

// carries checks that whole packets of exactly the MTU pass, in both directions
// and from the node itself, and that one byte more is refused where it is sent.
func (m *mtuMesh) carries(t *testing.T, mtu int) {
	t.Helper()
	a, b := m.pods[0], m.pods[1]
	for _, way := range []struct {
		from cluster.Endpointer
		to   *cluster.Pod
	}{{a, b}, {b, a}, {m.Nodes[0], b}} {
		for to, header := range headersTo(way.to) {
			if _, err := cluster.PingWhole(t.Context(), way.from, to, make([]byte, mtu-header)); err != nil {
				t.Errorf("a packet of %d bytes: %v", mtu, err)
			}
			if _, err := cluster.PingWhole(t.Context(), way.from, to, make([]byte, mtu+1-header)); !errors.Is(err, unix.EMSGSIZE) {
				t.Errorf("a packet of %d bytes from %s to %s: error %v, want EMSGSIZE", mtu+1, way.from, to, err)
			}
		}
	}
}

// tells checks that a pod whose own link lets more pass is told by ICMP what the tunnel carries.
func (m *mtuMesh) tells(t *testing.T, mtu int) {
	t.Helper()
	size := strconv.Itoa(wideMTU)
	for _, i := range m.wide.Result.Interfaces {
		if strings.HasPrefix(i.Name, "veth") {
			run(t, m.Nodes[0], "ip", "link", "set", i.Name, "mtu", size)
		}
	}
	runIn(t, m.wide, "ip", "link", "set", "eth0", "mtu", size)
	runIn(t, m.wide, "ip", "route", "flush", "cache") // what was learnt from an earlier MTU
	runIn(t, m.wide, "ip", "-6", "route", "flush", "cache")
	for to, header := range headersTo(m.pods[1]) {
		if got, err := learntMTU(t.Context(), m.wide, to, mtu+1-header); err != nil || got != mtu {
			t.Errorf("a packet of %d bytes from %s to %s, of which its link lets pass: told %d, %v; want %d", mtu+1, m.wide, to, got, err, mtu)
		}
		if _, err := cluster.PingWhole(t.Context(), m.wide, to, make([]byte, mtu-header)); err != nil {
			t.Errorf("a packet of %d bytes: %v", mtu, err)
		}
	}
}

// learntMTU sends a datagram that may not be fragmented, and returns the MTU that
// an ICMP message (or the own link) gave back.
func learntMTU(ctx context.Context, from cluster.Endpointer, to netip.Addr, payload int) (mtu int, err error) {
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(3*time.Second))
	defer cancel()
	conn, err := cluster.Dial(ctx, from, "udp", netip.AddrPortFrom(to, echoPort))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	level, discover, whole, known := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO, unix.IP_MTU
	if to.Is6() {
		level, discover, whole, known = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO, unix.IPV6_MTU
	}
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var failure error
	if err := raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), level, discover, whole) }); err != nil || failure != nil {
		return 0, errors.Join(err, failure)
	}
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline) // cannot fail on an open connection
	_, err = conn.Write(make([]byte, payload))
	if err == nil {
		_, err = conn.Read(make([]byte, 1<<16))
	}
	if !errors.Is(err, unix.EMSGSIZE) {
		return 0, fmt.Errorf("error %w, want EMSGSIZE", err)
	}
	if err := raw.Control(func(fd uintptr) { mtu, failure = unix.GetsockoptInt(int(fd), level, known) }); err != nil || failure != nil {
		return 0, errors.Join(err, failure)
	}
	return mtu, nil
}

// A packet of the pods' MTU fits into one of the underlay's, whatever the underlay
// and the families, and so does what is in flight while the underlay changes. An
// IPv6 underlay needs 20 bytes more (cilium#23917); WireGuard pads to 16 bytes, but
// not beyond the MTU (cilium PR 30329); a VXLAN below has 1450 (talos#13457).
func TestMTU(t *testing.T) {
	for _, tt := range []struct {
		name      string
		endpoint6 []bool // by node
		pods6     bool
		underlays []int
	}{
		{"IPv4 endpoints, IPv4 pods", []bool{false, false}, false, []int{1500, 9001, 1280, 1450}},
		{"IPv6 endpoints, IPv4 pods", []bool{true, true}, false, []int{1280, 1500}},
		{"IPv6 endpoints, pods of both", []bool{true, true}, true, []int{9001, 1450, 1500}},
		{"mixed endpoints, pods of both", []bool{false, true}, true, []int{1450, 1280, 9001}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMTUMesh(t, tt.underlays[0], tt.endpoint6, tt.pods6)
			s := stream(t, m.pods[0], m.pods[1].IPv4(), 200)
			flowing(t, s)
			for i, underlay := range tt.underlays {
				mtu, room := m.tunnel(underlay)
				if i > 0 {
					setUnderlay(t, m.Cluster, underlay)
				}
				m.follows(t, mtu)
				capture, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{Prefixes: podRanges})
				if err != nil {
					t.Fatal(err)
				}
				m.carries(t, mtu)
				if room == mtu {
					m.tells(t, mtu)
				}
				if err := bulk(t.Context(), m.pods[0], m.pods[1]); err != nil {
					t.Errorf("underlay %d: %v", underlay, err)
				}
				r, err := capture.Stop(t.Context())
				if err := errors.Join(err, r.Clean()); err != nil {
					t.Error(err)
				}
				switch fragmented := r.Fragments > 0; {
				case room == mtu && fragmented:
					t.Errorf("underlay %d: %d fragments: %s", underlay, r.Fragments, r)
				case room < mtu && !fragmented:
					t.Errorf("underlay %d: no fragment of packets that do not fit", underlay)
				}
				m.saysOfFragments(t, underlay, room < mtu)
				flowing(t, s)
				t.Logf("underlay %d: tunnel %d, %d WireGuard packets, %d fragments", underlay, mtu, r.WireGuard, r.Fragments)
			}
			t.Log(s.Stop())
		})
	}
}

// bulk is a TCP connection that fills its segments. They go by the link's MTU: a
// clamp of the MSS once forgot the 12 bytes of TCP's timestamps (talos#12311).
func bulk(ctx context.Context, from, to *cluster.Pod) error {
	for dst := range headersTo(to) {
		if _, err := cluster.TCP(ctx, from, netip.AddrPortFrom(dst, echoPort), make([]byte, 200_000)); err != nil {
			return err
		}
	}
	return nil
}

// saysOfFragments checks that status and log say so where full-size packets do
// not fit, and only there.
func (m *mtuMesh) saysOfFragments(t *testing.T, underlay int, fragmented bool) {
	t.Helper()
	text := fmt.Sprintf("packets of more than %d bytes leave in fragments", underlay-m.overhead)
	for i, n := range m.Nodes {
		status, err := n.Wgcnid(t.Context(), "status")
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(status, text); got != fragmented {
			t.Errorf("%s: want %v of %q in the status:\n%s", n, fragmented, text, status)
		}
		if got := strings.Contains(m.helpers[i].Log.String(), text); got != fragmented {
			t.Errorf("%s: want %v of %q in the log:\n%s", n, fragmented, text, m.helpers[i].Log)
		}
	}
}

// A pod's link follows the tunnel, but is not raised beyond what its primary plugin
// gave it, nor beyond what somebody has asked for since; and a pod that was there
// before wgcni gets the tunnel's MTU when it is adopted.
func TestLinksFollowTheTunnel(t *testing.T) {
	c := cluster.NewWithT(t, cluster.Options{Nodes: 1, MTU: 9001})
	n := c.Nodes[0]
	ptp := cluster.NetworkOptions{Example: "ptp.conflist", Plain: true} // links of 1500, and no bridge that has the least of all
	if err := n.Configure(ptp); err != nil {
		t.Fatal(err)
	}
	adopted := addPod(t, n, cluster.NetworkName, "adopted", cluster.PodOptions{})
	ptp.Plain = false
	if err := n.Configure(ptp); err != nil {
		t.Fatal(err)
	}
	h := helperUp(t, n)
	normal := addPod(t, n, cluster.NetworkName, "normal", cluster.PodOptions{})
	asked := addPod(t, n, cluster.NetworkName, "asked", cluster.PodOptions{})
	runIn(t, asked, "ip", "link", "set", "eth0", "mtu", "1380")
	ptp.Chain = []any{map[string]any{"type": "tuning", "mtu": 1390}}
	if err := n.Configure(ptp); err != nil {
		t.Fatal(err)
	}
	tuned := addPod(t, n, cluster.NetworkName, "tuned", cluster.PodOptions{})
	ptp.Chain = nil // tuning's own CHECK wants its MTU of every pod
	if err := n.Configure(ptp); err != nil {
		t.Fatal(err)
	}
	for i, step := range []struct{ underlay, normal, tuned, asked int }{
		{9001, 1500, 1390, 1380},
		{1500, 1420, 1390, 1380},
		{1450, 1370, 1370, 1370},
		{1465, 1385, 1385, 1380},
		{9001, 1500, 1390, 1380},
	} {
		if i > 0 {
			setUnderlay(t, c, step.underlay)
		}
		for p, want := range map[*cluster.Pod]int{adopted: step.normal, normal: step.normal, tuned: step.tuned, asked: step.asked} {
			awaitMTU(t, p, want)
		}
	}
	// While the helper is away nothing follows; it makes up for it when it is back.
	helperDown(t, h)
	setUnderlay(t, c, 1450)
	helperUp(t, n)
	for _, p := range []*cluster.Pod{adopted, normal, tuned, asked} {
		awaitMTU(t, p, 1370)
	}
}

// Pods that come while the underlay changes have the right MTU in the end, whoever
// comes first: their ADD with the old one or the helper with the new.
func TestPodsComeWhileTheUnderlayChanges(t *testing.T) {
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	helperUp(t, n)
	const pods = 16
	added := make(chan *cluster.Pod, pods)
	var failed error
	go func() {
		defer close(added)
		for i := range pods {
			p, err := n.AddPod(t.Context(), cluster.NetworkName, fmt.Sprintf("pod%d", i), cluster.PodOptions{})
			if failed = errors.Join(failed, err); err == nil {
				added <- p
			}
		}
	}()
	var all []*cluster.Pod
	last := 0
	for p := range added {
		all = append(all, p)
		last = []int{1450, 1500}[len(all)%2]
		setUnderlay(t, c, last)
	}
	if failed != nil {
		t.Fatal(failed)
	}
	for _, p := range all {
		awaitMTU(t, p, last-80)
	}
}

// A configured MTU that does not fit is used, and said to be wrong, until it is mended.
func TestConfiguredMTU(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{Stanza: map[string]any{"mtu": 1430}})
	serve(t, m.pods[1])
	const says = `packets of more than 1420 bytes leave in fragments, since the tunnel's MTU of 1430 does not fit into the underlay's 1500: set "mtu" to 1420 at most`
	for _, p := range m.pods {
		awaitMTU(t, p, 1430)
	}
	status, err := m.Nodes[0].Wgcnid(t.Context(), "status")
	if err != nil {
		t.Fatal(err)
	}
	if log := m.helpers[0].Log.String(); !strings.Contains(status, says) || strings.Count(log, "leave in fragments") != 1 {
		t.Errorf("status:\n%s\nlog:\n%s", status, log)
	}
	if err := bulk(t.Context(), m.pods[0], m.pods[1]); err != nil { // it works all the same
		t.Error(err)
	}
	for i, n := range m.Nodes {
		if err := n.Configure(cluster.NetworkOptions{Stanza: map[string]any{"mtu": 1300}}); err != nil {
			t.Fatal(err)
		}
		stopHelper(t, m.helpers[i]) // else it reads it within ten seconds
		startHelper(t, n)
	}
	for _, p := range m.pods {
		awaitMTU(t, p, 1300)
	}
	if status, err = m.Nodes[0].Wgcnid(t.Context(), "status"); err != nil || strings.Contains(status, "fragments") {
		t.Errorf("%v\n%s", err, status)
	}
}

// Nodes on different underlays: with one "mtu" for all, that of the narrowest, no
// packet is too large for the far end.
func TestMixedUnderlays(t *testing.T) {
	const mtu = 1420
	m := &mtuMesh{mesh: newMesh(t, 2, 1, cluster.NetworkOptions{Stanza: map[string]any{"mtu": mtu}, Primary: map[string]any{"mtu": 9001}})}
	for _, p := range m.pods {
		serve(t, p)
	}
	wide := m.Nodes[0]
	setMTU(t, m.Underlay, wide.Name, 9001)
	setMTU(t, m.Underlay, cluster.Bridge, 9001)
	setMTU(t, wide.Machine, cluster.Uplink, 9001)
	capture := watchUnderlay(t, m.Cluster)
	m.carries(t, mtu)
	for _, way := range [][2]*cluster.Pod{{m.pods[0], m.pods[1]}, {m.pods[1], m.pods[0]}} {
		awaitMTU(t, way[0], mtu)
		if err := bulk(t.Context(), way[0], way[1]); err != nil {
			t.Error(err)
		}
	}
	if r, err := capture.Report(); err != nil || r.Fragments > 0 {
		t.Errorf("%d fragments, %v", r.Fragments, err)
	}
	mustBeClean(t, capture)
}
