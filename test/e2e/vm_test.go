package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/test/cluster"
)

const vmExample = "examples/vm-and-database/"

// vmBed is a cluster of two nodes with a pod each, and a machine beside it that
// is not in the mesh yet. All reverse path filters are strict.
type vmBed struct {
	*mesh
	vm      *cluster.Node
	secrets []string
	stanza  map[string]any
}

// newVMBed runs the nodes from the example's own file, with what differs here.
func newVMBed(t *testing.T, c *cluster.Cluster, stanza map[string]any) *vmBed {
	t.Helper()
	b := &vmBed{secrets: []string{newSecret(t)}, stanza: stanza}
	b.mesh = join(t, c, cluster.NetworkOptions{Example: vmExample + "node.conflist", Secrets: b.secrets, Stanza: stanza})
	vm, err := c.AddMachine(t.Context(), "database")
	if err != nil {
		t.Fatal(err)
	}
	b.vm = vm
	for _, p := range b.pods {
		serve(t, p)
	}
	for _, n := range []*cluster.Node{c.Nodes[0], c.Nodes[1], b.vm} {
		serveNode(t, n)
	}
	return b
}

// join starts the machine's helper from the example's own file.
func (b *vmBed) join(t *testing.T) *cluster.Process {
	t.Helper()
	err := b.vm.Configure(cluster.NetworkOptions{Example: vmExample + "vm.json", Secrets: b.secrets, Stanza: b.stanza})
	if err != nil {
		t.Fatal(err)
	}
	b.helpers = append(b.helpers, startHelper(t, b.vm))
	awaitMachine(t, b.vm, b.Nodes...)
	return b.helpers[2]
}

// routePods gives a machine ordinary routes to the pods: whatever is not held
// back gets to their nodes in the clear.
func routePods(t *testing.T, at *cluster.Node, nodes []*cluster.Node) {
	t.Helper()
	for _, n := range nodes {
		for i, p := range n.PodCIDRs() {
			run(t, at, "ip", "route", "replace", p.String(), "via", addressesOf(n)[i].String())
		}
	}
}

// awaitMachine waits until the nodes reach a machine by the tunnel.
func awaitMachine(t *testing.T, vm *cluster.Node, nodes ...*cluster.Node) {
	t.Helper()
	for _, n := range nodes {
		awaitStatus(t, n, vm.Name+" to be reached by the tunnel", func(s cluster.Status) bool { return s.OK && nodeTrafficOf(s, vm) == "encrypted" })
	}
	awaitStatus(t, vm, "the nodes", func(s cluster.Status) bool { return s.OK && len(s.Peers) == len(nodes) })
}

// mustReachAll checks every pair of pods and machine, both ways, with small and
// large packets, of which none is seen in the clear.
func (b *vmBed) mustReachAll(t *testing.T, when string) {
	t.Helper()
	capture := watchNodes(t, b.Cluster)
	large := append([]byte{}, nodeMarker...)
	large = append(large, make([]byte, 1<<14)...)
	for _, pod := range b.pods {
		for _, pair := range [][2]cluster.Endpointer{{pod, b.vm}, {b.vm, pod}} {
			for _, payload := range [][]byte{nodeMarker, large} {
				err := cluster.Poll(t.Context(), fmt.Sprintf("%s to reach %s %s", pair[0], pair[1], when), func() error {
					return reach(t.Context(), pair[0], pair[1], payload)
				})
				if err != nil {
					t.Error(err)
				}
			}
		}
	}
	for _, n := range b.Nodes {
		if err := reach(t.Context(), n, b.vm, nodeMarker); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	mustBeClean(t, capture)
}

// mustReachNodes checks that the machine reaches services of the nodes themselves,
// and ssh both ways: that needs no tunnel.
func (b *vmBed) mustReachNodes(t *testing.T, when string) {
	t.Helper()
	for _, n := range b.Nodes {
		if err := reach(t.Context(), b.vm, n, []byte("service of the node")); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		mustAnswerSSH(t, when, b.vm, n)
	}
}

// mustBeHeld checks that nothing gets through between pods and machine, nor out
// in the clear. A machine that holds nothing back, since nothing of ours is there,
// is not answered.
func (b *vmBed) mustBeHeld(t *testing.T, when string, unguarded bool, pods ...*cluster.Pod) {
	t.Helper()
	try := func(from cluster.Endpointer, to netip.Addr) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if _, err := cluster.UDP(ctx, from, netip.AddrPortFrom(to, echoPort), nodeMarker); err == nil {
			t.Errorf("%s: %s reached %s", when, from, to)
		}
	}
	capture := watchNodes(t, b.Cluster)
	for _, pod := range pods {
		for i, dst := range addressesOf(b.vm) {
			try(pod, dst)
			if !unguarded {
				try(b.vm, addressesOf(pod)[i])
			}
		}
	}
	report, err := capture.Stop(t.Context())
	if err := errors.Join(err, report.Clean()); err != nil {
		t.Errorf("%s: %v", when, err)
	}
	if unguarded {
		before := droppedIn(t, b.Nodes[0])
		try(b.vm, pods[0].IPv4())
		if droppedIn(t, b.Nodes[0]) == before {
			t.Errorf("%s: what the machine sends to a pod in the clear is not counted", when)
		}
	}
}

func droppedIn(t *testing.T, n *cluster.Node) uint64 {
	t.Helper()
	s, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.Dropped.In.Packets
}

// A virtual machine joins by a bare stanza, and its pods and it reach each other
// at its real address, encrypted; before that, and without its tunnel, nothing
// leaves in the clear, and what is between the machines themselves goes on.
func TestVM(t *testing.T) {
	c := strictNodes(t)
	etcd := startEtcd(t, c, cluster.EtcdOptions{Node: c.Nodes[0]})
	b := newVMBed(t, c, map[string]any{"registry": etcd.Registry(nil)})
	strict(t, b.vm)
	a := b.Nodes[0]
	routePods(t, b.vm, b.Nodes)
	before := droppedOut(t, a)
	b.mustBeHeld(t, "before it has joined", true, b.pods...)
	if now := droppedOut(t, a); now == before {
		t.Error("what a pod sends to a machine that is no member is not counted")
	}
	b.mustReachNodes(t, "before it has joined")

	b.join(t)
	b.mustReachAll(t, "after it has joined")
	b.mustReachNodes(t, "after it has joined")
	for command, wants := range map[string][]string{
		"status": {"Traffic with the pods of all 2 other nodes is encrypted", "database, reached at 192.0.2.200 2001:db8:1::200, subnets behind it none\n"},
		"nodes":  {"192.0.2.200/32 2001:db8:1::200/128"},
	} {
		out := run(t, b.vm, bin("wgcnid"), command) // it finds what it ran with
		for _, want := range wants {
			if !strings.Contains(out, want) {
				t.Errorf("wgcnid %s does not say %q:\n%s", command, want, out)
			}
		}
	}

	stopHelper(t, b.helpers[2])
	loseTunnel(t, b.vm)
	b.mustBeHeld(t, "the machine's tunnel is gone", false, b.pods...)
	b.mustReachNodes(t, "the machine's tunnel is gone")
	b.helpers[2] = startHelper(t, b.vm)
	awaitMachine(t, b.vm, b.Nodes...)

	stopHelper(t, b.helpers[0])
	loseTunnel(t, a)
	before = droppedOut(t, a)
	b.mustBeHeld(t, "a node's tunnel is gone", false, b.pods[0])
	if now := droppedOut(t, a); now == before {
		t.Error("what a pod sends while its node has no tunnel is not counted")
	}
	b.mustReachNodes(t, "a node's tunnel is gone")
	b.helpers[0] = startHelper(t, a)
	awaitMachine(t, b.vm, b.Nodes...)
	b.mustReachAll(t, "with all tunnels back")
}

// A virtual machine reboots, and reaches the registry's port before it has a
// tunnel; what it claims outside of the nodes' ranges is refused and told; and when
// it leaves, it is as it was.
func TestVMReboot(t *testing.T) {
	c := cluster.NewT(t, 2)
	registry := map[string]any{"type": "file", "path": c.RegistryFile()}
	b := newVMBed(t, c, map[string]any{"registry": registry})
	helper := b.join(t)
	b.mustReachAll(t, "after it has joined")
	stopHelper(t, helper)
	if err := b.vm.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	serveNode(t, b.vm)
	routePods(t, b.vm, b.Nodes)
	b.mustReachNodes(t, "while it has not started its helper")
	b.mustBeHeld(t, "while it has not started its helper", true, b.pods...)

	machine := func() string {
		return regexp.MustCompile(`(?m)^(private.key|next.key|rotation.json|peers.db.*|last.conflist)\n`).ReplaceAllString(machineState(t, b.vm), "")
	}
	before := machine()

	stanza := map[string]any{
		"registry": registry, "subnets": []string{"198.51.100.0/24", "192.0.2.240/28"},
		"externalCIDRs": append([]string{"198.51.100.0/24"}, texts(cluster.MachineCIDRs())...),
	}
	if err := b.vm.Configure(cluster.NetworkOptions{Example: vmExample + "vm.json", Secrets: b.secrets, Stanza: stanza}); err != nil {
		t.Fatal(err)
	}
	startHelper(t, b.vm)
	awaitMachine(t, b.vm, b.Nodes...)
	b.mustReachAll(t, "after it has rebooted")
	out, err := b.Nodes[0].Wgcnid(t.Context(), "status")
	if want := "database: 198.51.100.0/24 refused: inside neither clusterCIDRs nor externalCIDRs"; err != nil || !strings.Contains(out, want) || !strings.Contains(out, "192.0.2.240/28") {
		t.Errorf("%v: want %q, and the subnet that is allowed, in\n%s", err, want, out)
	}

	if out, err := b.vm.Wgcnid(t.Context(), "leave", "--purge"); err != nil {
		t.Fatal(err, out)
	}
	var diff string
	err = cluster.Poll(t.Context(), "the tunnel process to end", func() error {
		if diff = cmp.Diff(before, machine()); diff != "" {
			return fmt.Errorf("the machine is not as before (-before +after):\n%s", diff)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := awaitPeers(t, b.Nodes[0], 1); err != nil {
		t.Error(err)
	}
	b.mustBeHeld(t, "it has left", true, b.pods...)
}

// The nodes' own network is inside externalCIDRs, gateway and all: nobody is cut
// off from what has not joined, nor from the nodes, and the pods reach the machine
// by the tunnel all the same.
func TestVMInTheNodesNetwork(t *testing.T) {
	c := strictNodes(t)
	b := newVMBed(t, c, map[string]any{
		"registry":      map[string]any{"type": "file", "path": c.RegistryFile()},
		"externalCIDRs": []string{"192.0.2.0/24", "2001:db8:1::/64"},
	})
	strict(t, b.vm)
	b.join(t)
	b.mustReachAll(t, "in the nodes' network")
	b.mustReachNodes(t, "in the nodes' network")
	// A node's own address is inside, and not for the tunnel: what is bound to it gets
	// another source there.
	for i, dst := range addressesOf(b.vm) {
		run(t, b.Nodes[0], "ping", "-c", "1", "-W", "3", "-I", addressesOf(b.Nodes[0])[i].String(), dst.String())
	}
	gateways := []netip.Addr{cluster.Gateway4, cluster.Gateway6}
	for _, n := range []*cluster.Node{b.vm, b.Nodes[0]} {
		for _, gateway := range gateways {
			if _, err := cluster.Ping(t.Context(), n, gateway, nil); err != nil {
				t.Errorf("%s does not reach its gateway: %v", n, err)
			}
		}
	}
	for _, pair := range [][2]cluster.Endpointer{{b.Nodes[0], b.Nodes[1]}, {b.Nodes[1], b.Nodes[0]}} {
		if err := reach(t.Context(), pair[0], pair[1], []byte("node to node")); err != nil {
			t.Error(err)
		}
	}
	// A node's services, such as the API server's, are for pods too.
	for i, dst := range addressesOf(b.Nodes[1]) {
		if _, err := cluster.TCP(t.Context(), b.pods[0], netip.AddrPortFrom(dst, echoPort), []byte("service of the node")); err != nil {
			t.Errorf("family %d: %v", i, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := cluster.Ping(ctx, b.pods[0], gateways[0], nil); err == nil {
		t.Error("a pod reaches in the clear what is inside externalCIDRs and no member")
	}
	b.mustReachAnother(t)
}

// mustReachAnother has a second machine join, which the first one reaches by the
// tunnel, and by ssh without it.
func (b *vmBed) mustReachAnother(t *testing.T) {
	t.Helper()
	other, err := b.AddMachine(t.Context(), "cache")
	if err != nil {
		t.Fatal(err)
	}
	strict(t, other)
	serveNode(t, other)
	stanza := maps.Clone(b.stanza)
	stanza["nodeName"] = other.Name
	if err := other.Configure(cluster.NetworkOptions{Example: vmExample + "vm.json", Secrets: b.secrets, Stanza: stanza}); err != nil {
		t.Fatal(err)
	}
	b.helpers = append(b.helpers, startHelper(t, other))
	awaitNodesEncrypted(t, b.vm, other)
	capture := watchNodes(t, b.Cluster)
	for _, pair := range [][2]*cluster.Node{{b.vm, other}, {other, b.vm}} {
		err := cluster.Poll(t.Context(), "the machines to reach each other", func() error { return reach(t.Context(), pair[0], pair[1], nodeMarker) })
		if err != nil {
			t.Error(err)
		}
	}
	mustBeClean(t, capture)
	mustAnswerSSH(t, "between machines", b.vm, other)
}

func texts(prefixes []netip.Prefix) (out []string) {
	for _, p := range prefixes {
		out = append(out, p.String())
	}
	return out
}
