package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/test/cluster"
)

// streamRate leaves room in sockets and queues for what a busy machine sends at
// once after it has stood still for a second or two: that is not to count as loss.
const streamRate = 50

// An outage of the registry, and what people are told of it.
type outage struct {
	name  string
	begin func() error
	end   func() error
	at    []int    // the nodes that notice
	says  []string // what `wgcnid status` says there of the registry
}

// A patient is a mesh of three nodes whose registry has outages. Meanwhile node-a
// gets new pods, node-b is left alone, and node-c is rebooted.
type patient struct {
	*mesh
	registry map[string]any
	records  func(context.Context) (registry.Snapshot, error)
	boot     func(*cluster.Node) error // optional: what the node's own start-up does
	port     int                       // that node-c's WireGuard listens on
	outages  int
}

// beyond is a range for pods of node-a which are announced one by one.
const beyond = "10.244.101.0/24"

// prepare lets a patient have pods, and a server that node-b's pod is.
func (p *patient) prepare(t *testing.T) {
	t.Helper()
	p.port = 51820
	beyondNode(t, p.Nodes[0], map[string]any{"registry": p.registry})
	serve(t, p.pods[1])
}

// survives has an outage, and checks that what does not need the registry does not suffer.
func (p *patient) survives(t *testing.T, o outage) {
	a, b, c := p.Nodes[0], p.Nodes[1], p.Nodes[2]
	p.outages++
	name := func(what string) string { return fmt.Sprintf("%s%d", what, p.outages) }
	p.routeAround(t)
	capture := watchUnderlay(t, p.Cluster)
	bystander := stream(t, p.pods[0], p.pods[1].IPv4(), streamRate)
	flowing(t, bystander)
	warm := bystander.Report().Lost
	peers := peerKeys(t, a, b)

	if err := o.begin(); err != nil {
		t.Fatal(err)
	}
	inside := addPod(t, a, cluster.NetworkName, name("inside"), cluster.PodOptions{})
	if err := talk(t.Context(), inside, p.pods[1], []byte("x")); err != nil {
		t.Error(err)
	}
	outside := addPod(t, a, "beyond", name("outside"), cluster.PodOptions{})
	serve(t, outside)
	if reaches(t, p.pods[1], outside) {
		t.Error("a pod was reached that nobody could have heard of")
	}
	early := p.reboot(t, name("early"))
	for _, n := range []*cluster.Node{a, c} {
		if r := plugin(t, n, call{verb: "STATUS", stdin: stanza(t, n, p.keys(n))}); r.code != 0 {
			t.Errorf("STATUS on %s: %d, %s", n, r.code, r.stdout)
		}
	}
	for _, i := range o.at {
		awaitRegistryLine(t, p.Nodes[i], append(o.says, " since ")...)
	}

	if err := o.end(); err != nil {
		t.Fatal(err)
	}
	if err := p.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.awaitAllowed(t, outside, true)
	if err := talk(t.Context(), p.pods[1], outside, []byte("x")); err != nil {
		t.Error(err)
	}
	records := awaitAgreement(t, p.Cluster, p.records)
	port := fmt.Sprintf(":%d", p.port)
	record, _ := records.Record(c.Name)
	if got := record.Endpoints; len(got) == 0 || !strings.HasSuffix(got[0], port) {
		t.Errorf("%s announces %v, and listens on port %s since its reboot", c, got, port)
	}
	for _, n := range p.Nodes {
		p.awaitNoNote(t, n)
	}
	for _, pod := range []*cluster.Pod{inside, outside, early} {
		deletePod(t, pod)
	}
	p.awaitAllowed(t, outside, false)

	if now := peerKeys(t, a, b); now != peers {
		t.Errorf("the peers were\n%s\nand are\n%s", peers, now)
	}
	checkPeersKept(t, p.helpers)
	if r := bystander.Stop(); r.Lost > warm {
		t.Errorf("pods that nobody touched: %s; want no loss after the first handshake, which took %d", r, warm)
	}
	mustBeClean(t, capture)
}

// reboot cuts node-c's power. It comes up with another port, which the others
// cannot hear of, and first without a helper. It returns a pod of it that talks.
func (p *patient) reboot(t *testing.T, name string) *cluster.Pod {
	t.Helper()
	c := p.Nodes[2]
	p.port = 51820 + 51821 - p.port
	if err := c.Configure(cluster.NetworkOptions{Stanza: p.keys(c)}); err != nil {
		t.Fatal(err)
	}
	if err := c.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p.boot != nil {
		if err := p.boot(c); err != nil {
			t.Fatal(err)
		}
	}
	p.routeAround(t)
	pod := addPod(t, c, cluster.NetworkName, name, cluster.PodOptions{})
	// Where the kernel has WireGuard the plugin alone makes the tunnel.
	want := kernel.HasWireGuard()
	if _, err := c.Tunnel(); (err == nil) != want {
		t.Errorf("before the helper's start: tunnel: %v; want one: %v", err, want)
	}
	if !want {
		if reaches(t, pod, p.pods[1]) {
			t.Error("a pod reaches another node without a tunnel")
		}
	} else if err := talk(t.Context(), pod, p.pods[1], []byte("x")); err != nil {
		t.Errorf("by the plugin's tunnel: %v", err)
	}
	p.helpers = append(p.helpers, helperUp(t, c))
	if err := talk(t.Context(), pod, p.pods[1], []byte("x")); err != nil {
		t.Error(err)
	}
	return pod
}

// keys are those of a node's stanza.
func (p *patient) keys(n *cluster.Node) map[string]any {
	keys := map[string]any{"registry": p.registry}
	if n == p.Nodes[2] {
		keys["listenPort"] = p.port
	}
	return keys
}

// routeAround is routeAroundTunnel with the pods of node-a beyond its range.
func (p *patient) routeAround(t *testing.T) {
	t.Helper()
	routeAroundTunnel(t, p.Cluster)
	for _, n := range p.Nodes[1:] {
		run(t, n, "ip", "route", "replace", beyond, "via", p.Nodes[0].IPv4.String())
	}
}

// awaitAllowed waits until the other nodes allow a pod's address to its node, or don't.
func (p *patient) awaitAllowed(t *testing.T, pod *cluster.Pod, want bool) {
	t.Helper()
	for _, n := range p.Nodes {
		if n == pod.Node {
			continue
		}
		err := cluster.Poll(t.Context(), fmt.Sprintf("%s to allow %s: %v", n, pod.IPv4(), want), func() error {
			s, err := n.Status(t.Context())
			if err != nil {
				return err
			}
			for _, peer := range s.Peers {
				got := slices.ContainsFunc(peer.AllowedIPs, func(q netip.Prefix) bool { return q.Contains(pod.IPv4()) })
				if got != (want && peer.Name == pod.Node.Name) {
					return fmt.Errorf("%s may send from %v", peer.Name, peer.AllowedIPs)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// awaitNoNote waits until `wgcnid status` has nothing to say of the registry but its name.
func (p *patient) awaitNoNote(t *testing.T, n *cluster.Node) {
	t.Helper()
	err := cluster.Poll(t.Context(), n.Name+" to be content with the registry", func() error {
		line, err := registryLine(t.Context(), n)
		if err == nil && strings.Contains(line, " since ") {
			err = errors.New(line)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// reaches tries for a moment.
func reaches(t *testing.T, from, to *cluster.Pod) bool {
	t.Helper()
	ctx, cancel := withTimeout(t)
	defer cancel()
	_, err := cluster.UDP(ctx, from, netip.AddrPortFrom(to.IPv4(), echoPort), []byte("x"))
	return err == nil
}

// peerKeys are the public keys of the peers that nodes have, sorted.
func peerKeys(t *testing.T, nodes ...*cluster.Node) string {
	t.Helper()
	var all []string
	for _, n := range nodes {
		peers := strings.Fields(run(t, n, "wg", "show", "wgcni0", "peers"))
		slices.Sort(peers)
		all = append(all, n.Name+": "+strings.Join(peers, " "))
	}
	return strings.Join(all, "\n")
}

func TestOutagesOfEtcd(t *testing.T) {
	const user, password = "mesh", "the nodes' password"
	ctx := t.Context()
	dir := t.TempDir()
	passwordFile, backup := filepath.Join(dir, "password"), filepath.Join(dir, "backup")
	if err := os.WriteFile(passwordFile, []byte(password), 0o600); err != nil {
		t.Fatal(err)
	}
	c := cluster.NewT(t, 2)
	e := startEtcd(t, c, cluster.EtcdOptions{Flags: []string{"--quota-backend-bytes", "8388608"}})
	authorize := func() error {
		return errors.Join(e.AddUser(ctx, user, password), e.Grant(ctx, user, "readwrite", etcdPrefix), e.EnableAuth(ctx))
	}
	if err := authorize(); err != nil {
		t.Fatal(err)
	}
	p := &patient{
		registry: e.Registry(map[string]any{"username": user, "passwordFile": passwordFile}),
		records:  func(ctx context.Context) (registry.Snapshot, error) { return etcdRecords(ctx, e) },
	}
	p.mesh = join(t, c, withRegistry(p.registry))
	if err := e.Backup(ctx, backup); err != nil { // node-c is yet to come
		t.Fatal(err)
	}
	late, err := c.AddNode(ctx, "node-c")
	if err != nil {
		t.Fatal(err)
	}
	if err := late.Configure(withRegistry(p.registry)); err != nil {
		t.Fatal(err)
	}
	p.helpers = append(p.helpers, startHelper(t, late))
	if err := c.AwaitConverged(ctx); err != nil {
		t.Fatal(err)
	}
	p.prepare(t)

	everybody, writers := []int{0, 1, 2}, []int{0, 2}
	for _, o := range []outage{
		{
			"killed and started again", e.Kill, func() error { return e.Start(ctx) },
			everybody,
			[]string{"away", "connection refused"},
		},
		{
			"killed and replaced by an empty one", e.Kill, func() error { return errors.Join(e.Wipe(), e.Start(ctx), authorize()) },
			everybody,
			[]string{"away", "connection refused"},
		},
		{
			"restored from a backup that lacks a node", e.Kill, func() error { return errors.Join(e.Restore(ctx, backup), e.Start(ctx)) },
			everybody,
			[]string{"away", "connection refused"},
		},
		{
			"as slow as if it were stopped", e.Members[0].Pause, e.Members[0].Resume,
			everybody,
			[]string{"away", "is unreachable: no answer within 5s"},
		},
		{
			"cut off from half of the nodes",
			func() error { return cutOff(ctx, c, writers...) }, func() error { return cutOff(ctx, c) },
			writers,
			[]string{"away", "is unreachable"},
		},
		{
			"read-only",
			func() error { return e.Grant(ctx, user, "read", etcdPrefix) }, func() error { return e.Grant(ctx, user, "readwrite", etcdPrefix) },
			writers,
			[]string{"refuses this node's record", `user "mesh" may not do this: grant it with`},
		},
		{
			"out of space", func() error { return e.Fill(ctx) }, func() error { return e.Free(ctx) },
			writers,
			[]string{"refuses this node's record", "is out of space: free some with"},
		},
	} {
		if !t.Run(o.name, func(t *testing.T) { p.survives(t, o) }) {
			return // who comes next would not find it mended
		}
	}
}

// cutOff lets nothing of these nodes reach etcd, and of others again.
func cutOff(ctx context.Context, c *cluster.Cluster, nodes ...int) error {
	rules := "table ip outage\ndelete table ip outage\ntable ip outage {\n  chain in {\n    type filter hook input priority 0\n"
	for _, i := range nodes {
		rules += fmt.Sprintf("    ip saddr %s tcp dport 2379 drop\n", c.Nodes[i].IPv4)
	}
	_, err := c.Underlay.Batch(ctx, rules+"  }\n}\n", "nft", "-f", "-")
	return err
}

// The file registry's folder is a share that every node mounts.
func TestOutagesOfTheSharedFile(t *testing.T) {
	const mountpoint = "/run/shared"
	c := cluster.NewT(t, 3)
	mount := func(n *cluster.Node) error {
		_, err := n.Run(t.Context(), "sh", "-c", "mkdir -p "+mountpoint+" && mount --bind "+c.Shared+" "+mountpoint)
		return err
	}
	onAll := func(f func(*cluster.Node) error) func() error {
		return func() error {
			var errs []error
			for _, n := range c.Nodes {
				errs = append(errs, f(n))
			}
			return errors.Join(errs...)
		}
	}
	if err := onAll(mount)(); err != nil {
		t.Fatal(err)
	}
	p := &patient{
		registry: map[string]any{"type": "file", "path": mountpoint + "/mesh.json"},
		records: func(ctx context.Context) (registry.Snapshot, error) {
			return registry.New(file.New(c.RegistryFile()), registry.Trust{}).Snapshot(ctx)
		},
	}
	p.mesh = join(t, c, withRegistry(p.registry))
	p.prepare(t)
	shell := func(script string) func() error {
		return onAll(func(n *cluster.Node) error {
			_, err := n.Run(t.Context(), "sh", "-c", script)
			return err
		})
	}
	for _, o := range []outage{
		{
			"unmounted, with its mountpoint", shell("umount -l " + mountpoint + " && rmdir " + mountpoint), onAll(mount),
			[]int{0, 1, 2},
			[]string{"away", "registry folder " + mountpoint + " is missing: create it or mount it"},
		},
		{ // an empty folder is left, which looks like a registry that was emptied
			"unmounted", shell("umount -l " + mountpoint), onAll(mount), []int{2}, []string{"away", "is missing: create it or mount it"},
		},
	} {
		if !t.Run(o.name, func(t *testing.T) { p.survives(t, o) }) {
			return // who comes next would not find it mended
		}
	}
}
