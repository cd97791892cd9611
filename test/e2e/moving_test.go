package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

// cloudAddresses are a pod's two addresses outside of every node's prefix, by their last number.
func cloudAddresses(n int) [2]netip.Addr {
	return [2]netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.244.99.%d", n)), netip.MustParseAddr(fmt.Sprintf("fd00:244:99::%x", n))}
}

// roaming is a mesh with a pod on each node that asks around. Its nodes also have
// the network static, whose pods get whatever addresses CNI_ARGS name.
func roaming(t *testing.T, c *cluster.Cluster, stanza map[string]any) *mesh {
	t.Helper()
	m := join(t, c, cluster.NetworkOptions{Stanza: stanza})
	for _, n := range m.Nodes {
		text, err := n.Conflist(cluster.NetworkOptions{Example: "ptp.conflist", Stanza: stanza, Primary: map[string]any{
			"ipMasq": false, "ipam": map[string]any{"type": "static", "routes": []any{map[string]any{"dst": "0.0.0.0/0"}, map[string]any{"dst": "::/0"}}},
		}})
		if err != nil {
			t.Fatal(err)
		}
		if err := n.WriteConflist("20-static.conflist", strings.Replace(text, `"name": "pods"`, `"name": "`+static+`"`, 1)); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// visitor is a pod that answers at addresses which another node may have had.
type visitor struct{ *cluster.Pod }

func visit(t *testing.T, n *cluster.Node, name string, addresses [2]netip.Addr) *visitor {
	t.Helper()
	four, six := addresses[0], addresses[1]
	p := addPod(t, n, static, name, cluster.PodOptions{Args: map[string]string{
		"IgnoreUnknown": "1", "IP": four.String() + "/24," + six.String() + "/64", "GATEWAY": gateway(four, 24) + "," + gateway(six, 64),
	}})
	return &visitor{Pod: p}
}

// gateway is the first address of the network that a pod believes to be in.
func gateway(a netip.Addr, bits int) string {
	return netip.PrefixFrom(a, bits).Masked().Addr().Next().String()
}

// answersAt waits until this pod, and no other, answers at its addresses
// whoever asks.
func (v *visitor) answersAt(t *testing.T, from ...*cluster.Pod) {
	t.Helper()
	server, err := cluster.StartServer(v.Pod, echoPort)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	for _, p := range from {
		for _, addr := range []netip.Addr{v.IPv4(), v.IPv6()} {
			err := cluster.Poll(t.Context(), fmt.Sprintf("%s to reach %s at %s", p, v, addr), func() error {
				ctx, cancel := withTimeout(t)
				defer cancel()
				_, err := cluster.TCP(ctx, p, netip.AddrPortFrom(addr, echoPort), []byte("x"))
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// singles are the claims of single pods in a node's record.
func singles(t *testing.T, m *mesh, n *cluster.Node) (out []string) {
	t.Helper()
	s, err := openRegistry(m).Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range s.Nodes[n.Name].Pods {
		out = append(out, c.Prefix.String())
	}
	return out
}

// When ADD returns the pod is announced; neighbours are announced as one; DEL
// takes away what was its own.
func TestPodsOutsideThePrefixAreAnnounced(t *testing.T) {
	m := roaming(t, cluster.NewT(t, 2), nil)
	a, b := m.Nodes[0], m.Nodes[1]
	var pods []*cluster.Pod
	for i, want := range []string{
		"10.244.99.4/32 fd00:244:99::4/128", "10.244.99.4/31 fd00:244:99::4/127",
		"10.244.99.4/31 10.244.99.6/32 fd00:244:99::4/127 fd00:244:99::6/128", "10.244.99.4/30 fd00:244:99::4/126",
	} {
		v := visit(t, a, fmt.Sprintf("cloud%d", i), cloudAddresses(4+i))
		if got := strings.Join(singles(t, m, a), " "); got != want {
			t.Fatalf("when ADD returned the record had %q, want %q", got, want)
		}
		pods = append(pods, v.Pod)
		v.answersAt(t, m.pods[1])
	}
	serve(t, m.pods[1])
	for _, p := range pods {
		if err := talk(t.Context(), p, m.pods[1], []byte("x")); err != nil {
			t.Error(err)
		}
	}
	deletePod(t, pods[1])
	awaitAllowed(t, b, "10.244.99.4/32 10.244.99.6/31 fd00:244:99::4/128 fd00:244:99::6/127")
	for _, p := range []*cluster.Pod{pods[0], pods[2], pods[3]} {
		deletePod(t, p)
	}
	awaitAllowed(t, b, "")
	for _, n := range m.Nodes {
		synced(t, n)
	}
}

// awaitAllowed waits until a node allows its peers these single pods.
func awaitAllowed(t *testing.T, n *cluster.Node, want string) {
	t.Helper()
	err := cluster.Poll(t.Context(), n.Name+" to know of "+want, func() error {
		s, err := n.Status(t.Context())
		if err != nil {
			return err
		}
		var got []string
		for _, p := range s.Peers {
			for _, q := range p.AllowedIPs {
				if !slices.Contains([]int{24, 64}, q.Bits()) {
					got = append(got, q.String())
				}
			}
		}
		if strings.Join(got, " ") != want {
			return fmt.Errorf("it has %q", got)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// A pod is where its latest ADD was, however late the DELs are (CNI: ADD x for A,
// ADD x for B, DEL x for A; felix: A -> B -> A was skipped by a stale cache), also
// for the pods of the node that it left, and also inside that node's own prefix.
func TestPodMovesThereAndBack(t *testing.T) {
	m := roaming(t, cluster.NewT(t, 3), nil)
	a, b := m.Nodes[0], m.Nodes[1]
	inA, inB, inC := m.pods[0], m.pods[1], m.pods[2]
	for name, addresses := range map[string][2]netip.Addr{
		"outside": cloudAddresses(7),
		"inside":  {netip.MustParseAddr("10.244.1.77"), netip.MustParseAddr("fd00:244:1::77")},
	} {
		t.Run(name, func(t *testing.T) {
			inA := inA
			if name == "inside" { // node-a's pods look for it on their bridge, and do not ask the node
				inA = inB
			}
			first := visit(t, a, name+"-1", addresses)
			first.answersAt(t, inA, inB, inC)
			second := visit(t, b, name+"-2", addresses)
			second.answersAt(t, inA, inB, inC)
			deletePod(t, first.Pod)
			for _, n := range m.Nodes {
				synced(t, n)
			}
			second.answersAt(t, inA, inB, inC)
			third := visit(t, a, name+"-3", addresses)
			third.answersAt(t, inA, inB, inC)
			deletePod(t, second.Pod)
			for _, n := range m.Nodes {
				synced(t, n)
			}
			third.answersAt(t, inA, inB, inC)
			deletePod(t, third.Pod)
			awaitAllowed(t, m.Nodes[2], "")
		})
	}
}

// Two pods that change places, beside neighbours that stay and are announced with
// them, and lose nothing.
func TestPodsSwap(t *testing.T) {
	m := roaming(t, cluster.NewT(t, 3), nil)
	a, b := m.Nodes[0], m.Nodes[1]
	inC := m.pods[2]
	x, y := visit(t, a, "x", cloudAddresses(4)), visit(t, b, "y", cloudAddresses(12))
	stays := []*visitor{visit(t, a, "stays-a", cloudAddresses(5)), visit(t, b, "stays-b", cloudAddresses(13))}
	var streams []*cluster.Stream
	for _, s := range stays {
		serve(t, s.Pod)
		st := stream(t, inC, s.IPv4(), 100)
		flowing(t, st)
		streams = append(streams, st)
	}
	x2, y2 := visit(t, b, "x2", cloudAddresses(4)), visit(t, a, "y2", cloudAddresses(12))
	x2.answersAt(t, inC, m.pods[0])
	y2.answersAt(t, inC, m.pods[1])
	deletePod(t, x.Pod)
	deletePod(t, y.Pod)
	for _, n := range m.Nodes {
		synced(t, n)
	}
	x2.answersAt(t, inC, m.pods[0])
	y2.answersAt(t, inC, m.pods[1])
	for i, s := range streams {
		if r := s.Stop(); r.Lost > 0 {
			t.Errorf("to %s, which nobody moved: %s", stays[i], r)
		}
	}
}

// The registry being away never keeps a pod from starting, as a plugin does that
// needs the API server (istio#55894): ADD says what it means for the pod, and the
// others hear of it later.
func TestPodOutsideThePrefixWithoutRegistry(t *testing.T) {
	c := cluster.NewT(t, 2)
	folder := filepath.Join(c.Shared, "registry")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	registry := map[string]any{"type": "file", "path": filepath.Join(folder, "mesh.json")}
	m := roaming(t, c, map[string]any{"registry": registry})
	a := m.Nodes[0]
	if err := os.Rename(folder, folder+".away"); err != nil {
		t.Fatal(err)
	}
	away := cluster.Poll(t.Context(), "the helper to notice", func() error {
		s, err := a.Status(t.Context())
		if err == nil && (s.Report == nil || s.Report.RegistryError == "") {
			err = fmt.Errorf("not yet: %+v", s.Report)
		}
		return err
	})
	if away != nil {
		t.Fatal(away)
	}
	v := visit(t, a, "cloud", cloudAddresses(7))
	add := call{verb: "ADD", container: "late", netns: v.Netns, ifname: "eth0", stdin: stanza(t, a, map[string]any{
		"registry": registry, "prevResult": prevResult(v.Netns, "eth0", "10.244.99.8/24"),
	})}
	if r := plugin(t, a, add); r.code != 0 || !strings.Contains(r.stderr, "other nodes do not reach it yet: the registry cannot be read") {
		t.Errorf("the registry is away: %+v", r)
	}
	if err := m.helpers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	if r := plugin(t, a, add); r.code != 0 || !strings.Contains(r.stderr, "other nodes do not reach it yet: wgcnid does not run") {
		t.Errorf("the helper is dead: %+v", r)
	}
	helperUp(t, a)
	if err := os.Rename(folder+".away", folder); err != nil {
		t.Fatal(err)
	}
	v.answersAt(t, m.pods[1])
}
