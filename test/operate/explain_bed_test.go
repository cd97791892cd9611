package operate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/explain"
	"github.com/wgcni/wgcni/test/cluster"
)

// explainPort is where the packets of these tests go.
const explainPort = 7790

// explainBed is a mesh of three nodes with a pod each. Every node has a route for
// the others' pods past the tunnel: whatever is not held back gets there, in the clear.
type explainBed struct {
	*testing.T
	*cluster.Cluster
	helpers []*cluster.Process
	pods    []*cluster.Pod

	mu      sync.Mutex
	arrived map[string]netip.Addr // by marker: from where
}

func newExplainBed(t *testing.T, stanzas ...map[string]any) *explainBed {
	t.Helper()
	b := &explainBed{T: t, Cluster: cluster.NewT(t, len(stanzas)), arrived: map[string]netip.Addr{}}
	for i, n := range b.Nodes {
		o := cluster.NetworkOptions{Stanza: stanzas[i]}
		if stanzas[i] == nil { // a node that wgcni was never put on, and its pods' addresses on the wire
			o = cluster.NetworkOptions{Plain: true, Primary: map[string]any{"ipMasq": false}}
		}
		b.must(n.Configure(o))
		var h *cluster.Process
		if stanzas[i] != nil {
			var err error
			h, err = n.StartHelper()
			b.must(err)
		}
		b.helpers = append(b.helpers, h)
	}
	for i, n := range b.Nodes {
		p, err := n.AddPod(t.Context(), cluster.NetworkName, n.Name+"-pod", cluster.PodOptions{
			Args: map[string]string{"IgnoreUnknown": "1", "K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": n.Name + "-pod"},
		})
		b.must(err)
		b.pods = append(b.pods, p)
		b.listen(p)
		b.listen(n)
		for j, other := range b.Nodes {
			if i == j {
				continue
			}
			for k, prefix := range other.PodCIDRs() {
				_, err := n.Run(t.Context(), "ip", "route", "replace", prefix.String(), "via", []netip.Addr{other.IPv4, other.IPv6}[k].String())
				b.must(err)
			}
		}
	}
	b.settle()
	return b
}

func (b *explainBed) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// settle waits until what the joined nodes plan is in their kernels, and each knows
// the others that run.
func (b *explainBed) settle() {
	b.Helper()
	running := 0
	for _, h := range b.helpers {
		if h != nil {
			running++
		}
	}
	for i, n := range b.Nodes {
		if b.helpers[i] == nil {
			continue
		}
		b.must(cluster.Poll(b.Context(), n.Name+" to know the mesh", func() error {
			s, err := n.Status(b.Context())
			if err == nil && len(s.Pending) > 0 {
				err = fmt.Errorf("pending %v", s.Pending)
			}
			if err != nil {
				return err
			}
			text, err := n.Wgcnid(b.Context(), "nodes", "--json")
			if known := strings.Count(text, `"publicKey"`); err != nil || known != running {
				return errors.Join(err, fmt.Errorf("%d nodes known, of %d", known, running))
			}
			return nil
		}))
	}
}

// listen notes which datagrams arrive at a pod or a node.
func (b *explainBed) listen(at cluster.Endpointer) {
	b.Helper()
	var conn net.PacketConn
	b.must(at.Do(func() (err error) {
		conn, err = net.ListenPacket("udp", fmt.Sprintf("[::]:%d", explainPort))
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			b.mu.Lock()
			b.arrived[string(buf[:n])] = from.(*net.UDPAddr).AddrPort().Addr().Unmap()
			b.mu.Unlock()
		}
	}()
	b.Cleanup(func() { _ = conn.Close(); <-done })
}

// ask runs `wgcnid explain --json`, whose exit status must tell a fault.
func (b *explainBed) ask(at *cluster.Node, args ...string) explain.Explanation {
	b.Helper()
	cmd := at.Command(b.Context(), filepath.Join(b.BinDir, "wgcnid"), append([]string{"explain", "--json"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var e explain.Explanation
	if jerr := json.Unmarshal(out, &e); jerr != nil {
		b.Fatalf("explain %v on %s: %v, %v, %s", args, at, err, jerr, &stderr)
	}
	if (err != nil) != e.Fault {
		b.Errorf("explain %v on %s: fault %v, and the exit status says %v", args, at, e.Fault, err)
	}
	return e
}

// A trial is one packet.
type trial struct {
	from    cluster.Endpointer
	node    *cluster.Node // of from
	source  string        // as explain gets it
	to      netip.Addr
	toNode  *cluster.Node // nil: none of the cluster's
	free    bool          // nobody has the address
	tunnel  bool          // it is the node's own, while it has a tunnel
	marker  string
	verdict explain.Explanation
}

func (tr trial) String() string { return fmt.Sprintf("%s -> %s", tr.from, tr.to) }

// trials are random pairs of everything that there is.
func (b *explainBed) trials(rng *rand.Rand, n int) (out []trial) {
	type target struct {
		addr         netip.Addr
		node         *cluster.Node
		free, tunnel bool
	}
	var targets []target
	for i, node := range b.Nodes {
		pods := []netip.Addr{b.pods[i].IPv4(), b.pods[i].IPv6()}
		for _, a := range append(pods, node.IPv4, node.IPv6) {
			targets = append(targets, target{addr: a, node: node})
		}
		if b.helpers[i] == nil {
			continue
		}
		for _, p := range node.PodCIDRs() {
			targets = append(targets, target{addr: p.Addr(), node: node, tunnel: true})
		}
		free := netip.AddrFrom4([4]byte{10, 244, byte(i + 1), 200})
		targets = append(targets, target{addr: free, node: node, free: true})
	}
	for _, a := range []string{"10.244.99.7", "fd00:244:99::7", "198.51.100.7", "2001:db8:99::7", "203.0.113.80", "10.244.200.1"} {
		targets = append(targets, target{addr: netip.MustParseAddr(a)})
	}
	for i := range n {
		at := rng.IntN(len(b.Nodes))
		for b.helpers[at] == nil {
			at = rng.IntN(len(b.Nodes))
		}
		to := targets[rng.IntN(len(targets))]
		tr := trial{from: b.pods[at], node: b.Nodes[at], to: to.addr, toNode: to.node, free: to.free, tunnel: to.tunnel}
		tr.source = b.pods[at].IPv4().String()
		switch {
		case rng.IntN(3) == 0:
			tr.from, tr.source = b.Nodes[at], b.Nodes[at].Name
		case rng.IntN(2) == 0:
			tr.source = "default/" + b.pods[at].Name
		case to.addr.Is6():
			tr.source = b.pods[at].IPv6().String()
		}
		tr.marker = fmt.Sprintf("explain-%d-%016x", i, rng.Uint64())
		out = append(out, tr)
	}
	return out
}

// agree sends all of the packets, and compares what explain says with what is seen.
func (b *explainBed) agree(trials []trial) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), cluster.Patience(15*time.Second))
	defer cancel()
	var markers [][]byte
	for i := range trials {
		tr := &trials[i]
		markers = append(markers, []byte(tr.marker))
		tr.verdict = b.ask(tr.node, tr.source, tr.to.String(), "--proto", "udp", "--dport", fmt.Sprint(explainPort))
	}
	o := cluster.CaptureOptions{Markers: markers}
	underlay, err := cluster.StartCapture(b.Underlay, cluster.Bridge, o)
	b.must(err)
	tunnels := map[*cluster.Node]*cluster.Capture{}
	for _, n := range b.Nodes {
		if _, err := n.Tunnel(); err == nil {
			tunnels[n], err = cluster.StartCapture(n, cluster.Interface, o)
			b.must(err)
		}
	}
	for _, tr := range trials {
		conn, err := cluster.Dial(ctx, tr.from, "udp", netip.AddrPortFrom(tr.to, explainPort))
		if err != nil {
			continue // no route: it is dropped before it is made
		}
		_, _ = conn.Write([]byte(tr.marker))
		_ = conn.Close()
	}
	// What is to be seen comes within a handshake. Of what is not to be seen, all
	// that was under way has passed by the end of Sync.
	perr := cluster.Poll(ctx, "the packets to fare as explained", func() error {
		seen, err := b.look(ctx, underlay, tunnels)
		if err != nil {
			return err
		}
		return b.compare(trials, seen)
	})
	ctx, cancel = context.WithTimeout(b.Context(), cluster.Patience(10*time.Second))
	defer cancel()
	seen, err := b.look(ctx, underlay, tunnels)
	if perr != nil || err != nil || b.compare(trials, seen) != nil {
		b.Errorf("%v, %v", perr, err)
		for _, tr := range trials {
			if got := b.fared(tr, seen); !b.right(tr, got) {
				text, _ := json.MarshalIndent(tr.verdict, "", "  ")
				b.Logf("%s: %s\n%s", tr, got, text)
			}
		}
	}
	b.backwards(trials, seen)
	for _, c := range tunnels {
		_, _ = c.Stop(context.WithoutCancel(ctx))
	}
	if _, err := underlay.Stop(ctx); err != nil {
		b.Error(err)
	}
}

// sightings are where a marker was seen: on the underlay, and in the tunnels of nodes.
type sightings struct {
	underlay map[string]int
	tunnels  map[*cluster.Node]map[string]int
	gone     map[*cluster.Node]bool // nodes that have lost their tunnel
	arrived  map[string]netip.Addr
}

func (b *explainBed) look(ctx context.Context, underlay *cluster.Capture, tunnels map[*cluster.Node]*cluster.Capture) (s sightings, err error) {
	if err := underlay.Sync(ctx); err != nil {
		return s, err
	}
	r, err := underlay.Report()
	if err != nil || r.Dropped > 0 {
		return s, errors.Join(err, fmt.Errorf("%d frames were missed", r.Dropped))
	}
	s = sightings{underlay: r.Seen, tunnels: map[*cluster.Node]map[string]int{}, gone: map[*cluster.Node]bool{}, arrived: map[string]netip.Addr{}}
	for i, n := range b.Nodes {
		s.gone[n] = b.helpers[i] != nil && tunnels[n] == nil
	}
	for n, c := range tunnels {
		r, err := c.Report()
		if err != nil {
			return s, err
		}
		s.tunnels[n] = r.Seen
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.Copy(s.arrived, b.arrived)
	return s, nil
}

// fared is what became of a packet.
func (b *explainBed) fared(tr trial, s sightings) explain.Verdict {
	marker := tr.marker
	switch {
	case s.underlay[marker] > 0:
		return explain.Plaintext
	case tr.toNode != nil && tr.toNode != tr.node && s.tunnels[tr.toNode][marker] > 0:
		return explain.Encrypted
	case tr.toNode != nil && tr.toNode != tr.node && s.gone[tr.toNode] && s.tunnels[tr.node][marker] > 0:
		return explain.Encrypted // and lost: nobody is there to decrypt it
	case tr.toNode == tr.node && (s.arrived[marker].IsValid() || (tr.free || tr.tunnel && s.gone[tr.node]) && s.tunnels[tr.node][marker] == 0):
		return explain.Local
	}
	return explain.Dropped
}

func (b *explainBed) right(tr trial, got explain.Verdict) bool { return tr.verdict.Verdict == got }

func (b *explainBed) compare(trials []trial, s sightings) error {
	var wrong []string
	for _, tr := range trials {
		if got := b.fared(tr, s); !b.right(tr, got) {
			wrong = append(wrong, fmt.Sprintf("%s: explained as %s, fared as %s", tr, tr.verdict.Verdict, got))
		}
	}
	if len(wrong) > 0 {
		return errors.New(strings.Join(wrong, "\n"))
	}
	return nil
}

// backwards asks the other end about the packets that came to it.
func (b *explainBed) backwards(trials []trial, s sightings) {
	b.Helper()
	for _, tr := range trials {
		marker := tr.marker
		i := slices.Index(b.Nodes, tr.toNode)
		if i < 0 || tr.toNode == tr.node || tr.free || b.helpers[i] == nil {
			continue
		}
		got := b.fared(tr, s)
		if got == explain.Dropped {
			continue // it never got there
		}
		src := s.arrived[marker]
		switch {
		case src.IsValid():
		case s.gone[tr.toNode], s.gone[tr.node]:
			continue // the other end cannot know what this one lacks
		case tr.from == cluster.Endpointer(tr.node):
			src, got = b.sourceOf(tr), explain.Dropped
		default:
			src, got = tr.verdict.Source.Address, explain.Dropped
		}
		e := b.ask(tr.toNode, src.String(), tr.to.String(), "--proto", "udp", "--dport", fmt.Sprint(explainPort))
		if e.Verdict != got {
			text, _ := json.MarshalIndent(e, "", "  ")
			b.Errorf("%s, asked at %s: fared as %s, and %s", tr, tr.toNode, got, text)
		}
	}
}

// sourceOf is the address that a node's kernel chooses for a packet of its own.
func (b *explainBed) sourceOf(tr trial) netip.Addr {
	b.Helper()
	conn, err := cluster.Dial(b.Context(), tr.from, "udp", netip.AddrPortFrom(tr.to, explainPort))
	b.must(err)
	defer conn.Close()
	at, err := netip.ParseAddrPort(conn.LocalAddr().String())
	b.must(err)
	return at.Addr().Unmap()
}
