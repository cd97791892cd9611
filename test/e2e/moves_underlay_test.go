package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// movesRate is that of the streams beside a move, in datagrams per second.
const movesRate = 1000

// both are streams between two pods, one each way.
func both(t *testing.T, a, b *cluster.Pod) []*cluster.Stream {
	t.Helper()
	return []*cluster.Stream{stream(t, a, b.IPv4(), movesRate), stream(t, b, a.IPv6(), movesRate)}
}

// lost is how many datagrams of the streams were lost so far, once no answer is under way.
func lost(all []*cluster.Stream) (n int) {
	for _, s := range all {
		n += s.Report().Lost
	}
	return n
}

func endAll(t *testing.T, all []*cluster.Stream) (reports []cluster.StreamReport) {
	t.Helper()
	allFlowing(t, all)
	for _, s := range all {
		r := s.Stop()
		t.Log(r)
		reports = append(reports, r)
	}
	return reports
}

// awaitEndpoint waits until a node calls its only peer there.
func awaitEndpoint(t *testing.T, n *cluster.Node, want netip.AddrPort) {
	t.Helper()
	awaitStatus(t, n, fmt.Sprintf("its peer to be at %s", want), func(s cluster.Status) bool {
		return s.OK && len(s.Peers) == 1 && s.Peers[0].Endpoint == want
	})
}

// handshake is when a node's only peer has shaken hands last, in seconds since 1970.
func handshake(t *testing.T, n *cluster.Node) string {
	t.Helper()
	words := strings.Fields(run(t, n, "wg", "show", cluster.Interface, "latest-handshakes"))
	if len(words) != 2 {
		t.Fatalf("%s: want one peer: %q", n, words)
	}
	return words[1]
}

// A node gets another address on the underlay, as by DHCP: its peer goes by what
// comes from there, and no new handshake is needed. The streams lose what was on
// its way to the old address.
func TestNodeGetsAnotherAddress(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	routeAroundTunnel(t, m.Cluster)
	serveAll(t, m.pods)
	a, b := m.Nodes[0], m.Nodes[1]
	capture := watchUnderlay(t, m.Cluster)
	flows := newFlows(t, func() []*cluster.Stream { return both(t, m.pods[0], m.pods[1]) })
	before, shaken := lost(flows.streams), handshake(t, b)
	moved := netip.MustParseAddr("192.0.2.99")
	begun := time.Now()
	run(t, a, "sh", "-c", fmt.Sprintf("printf '%%s\\n' 'address del %s/24 dev eth0' 'address add %s/24 dev eth0' 'route replace default via %s' | ip -batch -",
		a.IPv4, moved, cluster.Gateway4))
	took := time.Since(begun)
	awaitEndpoint(t, b, netip.AddrPortFrom(moved, 51820))
	awaitRecord(t, m, a.Name, func(endpoints []string) bool { return slices.Contains(endpoints, moved.String()+":51820") })
	allFlowing(t, flows.streams)
	if now := handshake(t, b); now != shaken {
		t.Errorf("a handshake of %s, after that of %s: the session should have gone on", now, shaken)
	}
	gap := time.Duration(0)
	after := 0
	for _, r := range endAll(t, flows.streams) {
		gap, after = max(gap, r.LongestGap), after+r.Lost
	}
	t.Logf("the address was another within %v: %d datagrams lost, longest gap %v", took, after-before, gap)
	if gap > cluster.Patience(time.Second) {
		t.Errorf("no traffic for %v, want at most 1 s", gap)
	}
	mustBeClean(t, capture)
}

// The same of a node that sends nothing, as one that takes in logs does: its peer
// learns of the address from the registry, and at once.
func TestSilentNodeGetsAnotherAddress(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	a, b := m.Nodes[0], m.Nodes[1]
	sink := server(t, m.pods[0])
	s := stream(t, m.pods[1], m.pods[0].IPv4(), movesRate)
	defer s.Stop()
	flowing(t, s)
	if _, err := a.Batch(t.Context(), "table inet silent { chain c { type filter hook forward priority 0; udp sport 7777 drop; }; }", "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	came := func() int { return sink.Sources()[m.pods[1].IPv4()] }
	moved := netip.MustParseAddr("192.0.2.99")
	run(t, a, "sh", "-c", fmt.Sprintf("printf '%%s\\n' 'address del %s/24 dev eth0' 'address add %s/24 dev eth0' 'route replace default via %s' | ip -batch -",
		a.IPv4, moved, cluster.Gateway4))
	begun, before := time.Now(), came()
	err := cluster.Poll(t.Context(), "datagrams to come", func() error {
		if n := came() - before; n < 20 {
			return fmt.Errorf("%d came", n)
		}
		return nil
	})
	if took := time.Since(begun); err != nil || took > cluster.Patience(2*time.Second) {
		t.Errorf("datagrams come again after %v, %v; want at most 2 s", took, err)
	} else {
		t.Logf("datagrams come again after %v", took)
	}
	awaitEndpoint(t, b, netip.AddrPortFrom(moved, 51820))
}

// awaitRecord waits until the registry has a node's endpoints as wanted.
func awaitRecord(t *testing.T, m *mesh, name string, wanted func(endpoints []string) bool) {
	t.Helper()
	err := cluster.Poll(t.Context(), "the record of "+name, func() error {
		s, err := openRegistry(m).Snapshot(t.Context())
		r, _ := s.Record(name)
		if err == nil && !wanted(r.Endpoints) {
			err = fmt.Errorf("it has the endpoints %v", r.Endpoints)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A node's link goes down and its routes with it, and all comes back: it is as if
// nothing had been. The session outlives it, the node goes on to be announced
// where it was, and what wgcni has put into the kernel stays.
func TestUnderlayGoesAndComesBack(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	routeAroundTunnel(t, m.Cluster)
	serveAll(t, m.pods)
	a, b := m.Nodes[0], m.Nodes[1]
	capture := watchUnderlay(t, m.Cluster)
	flows := newFlows(t, func() []*cluster.Stream { return both(t, m.pods[0], m.pods[1]) })
	shaken, held := handshake(t, b), ours(t, a)
	record := func() []string {
		s, err := openRegistry(m).Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r, _ := s.Record(a.Name)
		return r.Endpoints
	}
	announced := record()
	back := fmt.Sprintf("ip link set eth0 up; ip -6 address replace %s/64 dev eth0 nodad; ip route replace default via %s; ip -6 route replace default via %s", a.IPv6, cluster.Gateway4, cluster.Gateway6)
	for _, outage := range []struct {
		name, down, up string
	}{
		{"the default routes go", "ip route del default; ip -6 route del default", back},
		{"the link goes down", "ip link set eth0 down", back},
		{"addresses and all", "ip link set eth0 down; ip address flush dev eth0", fmt.Sprintf("ip address add %s/24 dev eth0; ", a.IPv4) + back},
	} {
		before := lost(flows.streams)
		run(t, a, "sh", "-c", outage.down)
		if outage.name != "the default routes go" { // the nodes share a segment
			losing(t, flows.streams...)
		}
		if got := record(); !slices.Equal(got, announced) {
			t.Errorf("%s: the record has the endpoints %v, and had %v", outage.name, got, announced)
		}
		if now := ours(t, a); now != held {
			t.Errorf("%s: the kernel holds\n%s\nand held\n%s", outage.name, now, held)
		}
		up := time.Now()
		run(t, a, "sh", "-c", outage.up)
		allFlowing(t, flows.streams)
		resumed := time.Since(up)
		t.Logf("%s: %d datagrams lost, all flows %v after its end", outage.name, lost(flows.streams)-before, resumed)
		if resumed > cluster.Patience(3*time.Second) {
			t.Errorf("%s: it took %v to flow again, want less than a handshake's 5 s", outage.name, resumed)
		}
		awaitOK(t, a)
		awaitRecord(t, m, a.Name, func(endpoints []string) bool { return slices.Equal(endpoints, announced) })
		if now := ours(t, a); now != held {
			t.Errorf("%s, and came back: the kernel holds\n%s\nand held\n%s", outage.name, now, held)
		}
	}
	if now := handshake(t, b); now != shaken {
		t.Errorf("a handshake of %s, after that of %s: the session should have gone on", now, shaken)
	}
	endAll(t, flows.streams)
	mustBeClean(t, capture)
}
