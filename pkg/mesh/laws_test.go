package mesh_test

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// seed is WGCNI_SEED, or a fixed one: a test that passes must pass again.
func seed(t *testing.T) uint64 {
	s := uint64(20261)
	if env := os.Getenv("WGCNI_SEED"); env != "" {
		var err error
		if s, err = strconv.ParseUint(env, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("WGCNI_SEED=%d", s)
	return s
}

// TestLaws walks through random facts and holds every single op against the
// laws that watch.check states.
func TestLaws(t *testing.T) {
	s := seed(t)
	for walk := range uint64(8) {
		rng := rand.New(rand.NewPCG(s, walk))
		w, k := newWorld(rng), newKernel(mesh.State{})
		before, pods := mesh.State{}, []netip.Addr(nil)
		for range 60 {
			w.step()
			var after mesh.State
			attached := w.facts.LocalPods
			if rng.IntN(15) != 0 { // else all is removed
				f := w.snapshot()
				p := mesh.NewPlan(f)
				if q := mesh.NewPlan(w.snapshot()); !reflect.DeepEqual(p, q) {
					t.Fatalf("equal facts, two plans:\n%s", cmp.Diff(p, q, byEqual))
				}
				after = p.State
			}
			pods = slices.DeleteFunc(pods, func(a netip.Addr) bool { return !slices.Contains(attached, a) })
			transit(t, rng, k, newWatch(before, after, pods), after)
			pods = slices.Clone(attached)
			if t.Failed() {
				t.Fatalf("walk %d, minute %d", walk, w.now)
			}
			before = after
		}
	}
}

// newKernel is a kernel that holds s, beside what is not ours.
func newKernel(s mesh.State) *kerneltest.Kernel {
	k := &kerneltest.Kernel{Name: keyName, Own: addrs("192.0.2.100", "2001:db8::100")}
	k.AddForeignRoute(mesh.Route{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Table: kerneltest.MainTable}, kerneltest.Uplink)
	k.AddForeignRoute(mesh.Route{Prefix: netip.MustParsePrefix("10.99.0.0/16"), Table: 5182}, "eth9")
	k.AddForeignRule(mesh.Rule{Priority: 100, FwMark: 0x20000, Table: 52})
	k.AddForeignRule(mesh.Rule{IPv6: true, Priority: 5182, FwMark: 0x20000, Table: 53})
	if err := k.Apply(mesh.Diff(mesh.State{}, s, mesh.Context{})); err != nil {
		panic(err)
	}
	return k
}

func foreignLines(k *kerneltest.Kernel) string {
	lines := slices.DeleteFunc(strings.Split(k.String(), "\n"), func(s string) bool { return !strings.HasSuffix(s, "(foreign)") })
	return strings.Join(lines, "\n")
}

func observe(t *testing.T, k *kerneltest.Kernel) mesh.State {
	t.Helper()
	s, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// transit takes the kernel from one plan to the next, op by op.
func transit(t *testing.T, rng *rand.Rand, k *kerneltest.Kernel, law watch, after mesh.State) {
	t.Helper()
	start := observe(t, k)
	ops := mesh.Diff(start, after, mesh.Context{Now: epoch})
	if after.Link.Name == "" && after.Filter.Interface == "" && start.Filter.Interface != "" {
		if _, last := ops[len(ops)-1].(mesh.RemoveFilter); !last { // what guards goes last
			t.Errorf("the last op of a removal is %s", ops[len(ops)-1])
		}
	}
	if rng.IntN(2) == 0 { // ADD applies the local ones first
		ops = slices.Concat(mesh.Split(ops))
		law.pods = nil // where the own prefix grows over a pod, its /32 goes before the prefix comes
	}
	cut := rng.IntN(len(ops) + 1)
	for i := 0; ; i++ {
		if i == cut || len(ops) < 6 { // a crash after any prefix must converge
			converge(t, newKernelAt(t, start, ops[:i]), after, false)
			converge(t, newKernelAt(t, start, ops[:i]), after, true)
		}
		law.check(t, k, newKernelAt(t, start, ops[:i]))
		if t.Failed() {
			t.Fatalf("after %d of the ops:\n%s", i, mesh.Text(ops))
		}
		if i == len(ops) {
			break
		}
		if err := k.Apply(ops[i : i+1]); err != nil {
			t.Fatalf("op %d of\n%s%v", i, mesh.Text(ops), err)
		}
	}
	settled(t, k, after)
}

func newKernelAt(t *testing.T, start mesh.State, ops []mesh.Op) *kerneltest.Kernel {
	t.Helper()
	k := newKernel(start)
	if err := k.Apply(ops); err != nil {
		t.Fatal(err)
	}
	return k
}

// converge asks for a fresh diff, applies it, and finds the plan in the kernel.
func converge(t *testing.T, k *kerneltest.Kernel, want mesh.State, killed bool) {
	t.Helper()
	if killed {
		k.KillTunnel()
	}
	ops := mesh.Diff(observe(t, k), want, mesh.Context{Now: epoch})
	if err := k.Apply(ops); err != nil {
		t.Fatalf("killed %v: %v\n%s", killed, err, mesh.Text(ops))
	}
	settled(t, k, want)
}

// settled: the kernel holds the plan, and there is nothing left to do.
func settled(t *testing.T, k *kerneltest.Kernel, want mesh.State) {
	t.Helper()
	got := observe(t, k)
	if ops := mesh.Diff(got, want, mesh.Context{Now: epoch}); len(ops) > 0 {
		t.Fatalf("left to do:\n%s", mesh.Text(ops))
	}
	if ops := mesh.Diff(want, want, mesh.Context{Now: epoch}); len(ops) > 0 {
		t.Fatalf("from the plan to the plan:\n%s", mesh.Text(ops))
	}
	for i := range got.Peers { // WireGuard has no way to forget an endpoint
		if i < len(want.Peers) && !want.Peers[i].Endpoint.IsValid() {
			got.Peers[i].Endpoint = netip.AddrPort{}
		}
	}
	for i := range got.Spare.Peers {
		if i < len(want.Spare.Peers) && !want.Spare.Peers[i].Endpoint.IsValid() {
			got.Spare.Peers[i].Endpoint = netip.AddrPort{}
		}
	}
	if !same(want, got) {
		t.Fatalf("kernel (-want +got):\n%s", cmp.Diff(want, got, byEqual, cmpopts.IgnoreFields(mesh.Peer{}, "Name")))
	}
}

// same is cmp.Diff's question, a hundred times faster.
func same(a, b mesh.State) bool {
	f, g := a.Filter, b.Filter
	samePeer := func(p, q mesh.Peer) bool {
		return p.PublicKey == q.PublicKey && p.PresharedKey == q.PresharedKey && p.Endpoint == q.Endpoint && p.Keepalive == q.Keepalive && slices.Equal(p.AllowedIPs, q.AllowedIPs)
	}
	return a.Link == b.Link && slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Routes, b.Routes) && slices.Equal(a.Rules, b.Rules) &&
		slices.EqualFunc(a.Peers, b.Peers, samePeer) && a.Spare.Link == b.Spare.Link && slices.EqualFunc(a.Spare.Peers, b.Spare.Peers, samePeer) &&
		f.Interface == g.Interface && f.Broken == g.Broken && slices.Equal(f.Cluster, g.Cluster) && slices.Equal(f.Guarded, g.Guarded) && slices.Equal(f.Withheld, g.Withheld) &&
		slices.Equal(f.Local, g.Local) && slices.Equal(f.Pods, g.Pods) && slices.Equal(f.Exempt, g.Exempt) &&
		slices.Equal(f.Masqueraded, g.Masqueraded) && slices.Equal(f.Behind, g.Behind) &&
		f.Nodes.Equal(g.Nodes) && a.SrcValidMark == b.SrcValidMark
}

// watch is what must hold at every moment between two plans.
type watch struct {
	stays   map[netip.Prefix]wgtypes.Key       // allowed to the same peer before and after
	moves   map[netip.Prefix]bool              // allowed to some peer before, to another after
	guarded []netip.Addr                       // may never leave in plaintext
	pods    []netip.Addr                       // attached, and in the cluster, before and after
	keys    map[wgtypes.Key][]mesh.Fingerprint // each peer's preshared key before, and after
	foreign string
	paths   map[netip.Prefix][]path // into the tunnel: those that may be taken, of before and after
	hosts   []netip.Prefix          // machines that are reached by the tunnel, before or after
	held    map[netip.Addr]bool     // before the first op
}

func newWatch(before, after mesh.State, pods []netip.Addr) watch {
	w := watch{stays: map[netip.Prefix]wgtypes.Key{}, moves: map[netip.Prefix]bool{}, foreign: foreignLines(newKernel(mesh.State{}))}
	owner := owners(after)
	for p, k := range owners(before) {
		switch {
		case !routed(before)[p] || !routed(after)[p]: // allowed to a machine that is not reached by the tunnel
		case owner[p] == k:
			w.stays[p] = k
		case owner[p] == wgtypes.Key{}:
		case k == after.Link.PublicKey: // WireGuard drops the peer that has its own new key
		default:
			w.moves[p] = true
		}
	}
	for _, a := range slices.Concat(before.Filter.Nodes.Peers, after.Filter.Nodes.Peers) {
		w.hosts = append(w.hosts, netip.PrefixFrom(a, a.BitLen()))
	}
	w.held = map[netip.Addr]bool{}
	for _, a := range before.Filter.Nodes.Held {
		w.held[a] = true
	}
	w.keys = map[wgtypes.Key][]mesh.Fingerprint{}
	for _, p := range slices.Concat(before.Peers, after.Peers, before.Spare.Peers, after.Spare.Peers) {
		w.keys[p.PublicKey] = append(w.keys[p.PublicKey], p.PresharedKey)
	}
	w.paths = map[netip.Prefix][]path{}
	waysAfter := paths(after)
	for p, was := range paths(before) {
		is, stays := waysAfter[p]
		if !stays {
			continue
		}
		for _, s := range []mesh.State{before, after} {
			for _, plane := range []mesh.Plane{was.plane, is.plane} {
				if peer := peersOn(s, plane)[p]; peer != (wgtypes.Key{}) {
					w.paths[p] = append(w.paths[p], path{plane, peer})
				}
			}
		}
	}
	if before.Link.Name != after.Link.Name || before.Link.PublicKey != after.Link.PublicKey { // the interface itself goes, or its sessions
		w.paths = nil
	}
	if before.Link.Name != after.Link.Name {
		w.stays, w.moves = nil, nil
	}
	removed := after.Filter.Interface == ""
	for _, a := range samples() {
		excepted := except(before.Filter, a) || except(after.Filter, a)
		fromCluster := in(before.Filter.Cluster, source(a)) && (removed || in(after.Filter.Cluster, source(a)))
		if !excepted && fromCluster && in(before.Filter.Guarded, a) && (removed || in(after.Filter.Guarded, a)) {
			w.guarded = append(w.guarded, a)
		}
	}
	for _, a := range pods {
		if in(before.Filter.Cluster, a) && (removed || in(after.Filter.Cluster, a)) {
			w.pods = append(w.pods, a)
		}
	}
	return w
}

func (w watch) check(t *testing.T, k, doomed *kerneltest.Kernel) {
	t.Helper()
	now := observe(t, k)
	owner := owners(now)
	routed := routed(now)
	w.noMachineLockedOut(t, now, routed)
	allowed := 0
	for i, p := range slices.Concat(now.Peers, now.Spare.Peers) {
		if i < len(now.Peers) {
			allowed += len(p.AllowedIPs)
		}
		// A peer that is made first and given its key then could shake hands without it.
		if !slices.Contains(w.keys[p.PublicKey], p.PresharedKey) {
			t.Errorf("peer %s has preshared key %s, want one of %v", keyName(p.PublicKey), p.PresharedKey, w.keys[p.PublicKey])
		}
	}
	if allowed != len(owner) {
		t.Errorf("an allowed IP has two owners")
	}
	// ReplaceAllowedIPs empties the list first (cilium PR 34612), and a configuration
	// that is replaced as a whole at each reconcile does all the time (kilo#34, kilo#39,
	// kilo#82).
	for p, want := range w.stays {
		if owner[p] != want || !routed[p] {
			t.Errorf("%s stays with %s; now owner %s, routed %v", p, keyName(want), keyName(owner[p]), routed[p])
		}
	}
	pathsNow := paths(now)
	for p, ways := range w.paths { // no packet goes where its peer does not have it yet, or not any more
		if got := pathsNow[p]; !slices.Contains(ways, got) {
			t.Errorf("%s goes by %v, want one of %v", p, got, ways)
		}
	}
	for p := range w.moves { // A -> B -> A (felix#2535)
		if owner[p] == (wgtypes.Key{}) || !routed[p] {
			t.Errorf("%s moves; now owner %s, routed %v", p, keyName(owner[p]), routed[p])
		}
	}
	if f := foreignLines(k); f != w.foreign { // nothing foreign is touched
		t.Errorf("foreign objects (-want +got):\n%s", cmp.Diff(w.foreign, f))
	}
	// plaintext leaks. At each op, and with the tunnel killed at each op.
	if now.Filter.Interface != "" {
		w.neverPlaintext(t, k, "")
		doomed.KillTunnel()
		w.neverPlaintext(t, doomed, ", tunnel killed")
	}
	for _, pod := range w.pods { // the main table knows them; nothing of ours may be in the way
		if got := k.Verdict(source(pod), pod); got != kerneltest.Plaintext && now.Filter.Interface != "" {
			t.Errorf("local pod %s: %s", pod, got)
		}
	}
}

// noMachineLockedOut: whoever is routed into the tunnel is one whose packets the
// filter knows (else a strict rp_filter drops WireGuard's own), and what is held
// back in the clear has its way.
func (w watch) noMachineLockedOut(t *testing.T, now mesh.State, routed map[netip.Prefix]bool) {
	t.Helper()
	nodes := now.Filter.Nodes
	if now.Link.Name == "" || now.Filter.Broken || nodes.Mark == 0 {
		return
	}
	for _, p := range w.hosts {
		if routed[p] && !slices.Contains(nodes.Peers, p.Addr()) {
			t.Errorf("machine %s is routed into the tunnel, and the filter does not know it", p)
		}
	}
	for _, n := range nodes.Held {
		if !routed[netip.PrefixFrom(n, n.BitLen())] && !w.held[n] {
			t.Errorf("machine %s is held, and not routed", n)
		}
	}
}

// routed are the prefixes that lead into the tunnel.
func routed(s mesh.State) map[netip.Prefix]bool {
	out := map[netip.Prefix]bool{}
	for _, r := range s.Routes {
		out[r.Prefix] = out[r.Prefix] || r.Type == mesh.ViaLink
	}
	return out
}

// A path is the plane that a route leads to, and the peer that has its prefix there.
type path struct {
	plane mesh.Plane
	peer  wgtypes.Key
}

func paths(s mesh.State) map[netip.Prefix]path {
	owner := map[mesh.Plane]map[netip.Prefix]wgtypes.Key{mesh.Primary: peersOn(s, mesh.Primary), mesh.Spare: peersOn(s, mesh.Spare)}
	out := map[netip.Prefix]path{}
	for _, r := range s.Routes {
		if r.Type == mesh.ViaLink {
			out[r.Prefix] = path{r.Plane, owner[r.Plane][r.Prefix]}
		}
	}
	return out
}

// peersOn are those to whom a plane allows each prefix.
func peersOn(s mesh.State, p mesh.Plane) map[netip.Prefix]wgtypes.Key {
	if p == mesh.Spare {
		s.Peers = s.Spare.Peers
	}
	return owners(s)
}

func (w watch) neverPlaintext(t *testing.T, k *kerneltest.Kernel, when string) {
	t.Helper()
	for _, dst := range w.guarded {
		if got := k.Verdict(source(dst), dst); got == kerneltest.Plaintext {
			t.Errorf("%s in %s%s\n%s", dst, got, when, k)
		}
	}
}

// source is a pod of the same family, inside the cluster.
func source(dst netip.Addr) netip.Addr {
	if dst.Is4() {
		return addr("10.244.100.1")
	}
	return addr("fd00:244:100::1")
}

// samples are an address of each prefix, and each single one, that a world has.
func samples() (out []netip.Addr) {
	for n := range 10 {
		s := strconv.Itoa(n)
		out = append(out, addrs("10.244."+s+".9", "10.244."+s+".200", "10.244.200."+s, "fd00:244:"+s+"::9", "fd00:244:ffff::"+s)...)
		out = append(out, addrs("192.0.2."+s, "172.16."+s+".9", "2001:db8::"+s)...)
		out = append(out, addrs("10.244.0."+s, "10.244.1."+s, "10.244.2."+s)...)
	}
	return out
}

func owners(s mesh.State) map[netip.Prefix]wgtypes.Key {
	out := map[netip.Prefix]wgtypes.Key{}
	for _, p := range s.Peers {
		for _, ip := range p.AllowedIPs {
			out[ip] = p.PublicKey
		}
	}
	return out
}

func in(set []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(set, func(p netip.Prefix) bool { return p.Contains(a) })
}

func except(f mesh.Filter, a netip.Addr) bool {
	return in(f.Local, a) || slices.Contains(f.Pods, a) || slices.Contains(f.Exempt, a)
}

// Removing everything, with the tunnel dead or alive at any point, lets nothing
// out while the filter stands; and the time it takes is a parameter, not a fact.
func TestRemovalKeepsTheGuard(t *testing.T) {
	p := mesh.NewPlan(mesh.Facts{
		Settings: settings("10.244.0.0/16"), Self: node("a", 1, "10.244.1.0/24"), Nodes: []mesh.Node{node("b", 2, "10.244.2.0/24")},
	}).State
	k := newKernel(p)
	if got := k.Verdict(addr("10.244.1.5"), addr("10.244.2.9")); got != "encrypted:k2" {
		t.Fatalf("before: %s", got)
	}
	ops := mesh.Diff(p, mesh.State{}, mesh.Context{Now: epoch.Add(time.Hour)})
	for i, o := range ops {
		if err := k.Apply(ops[i : i+1]); err != nil {
			t.Fatal(err)
		}
		last := i == len(ops)-1
		if got := k.Verdict(addr("10.244.1.5"), addr("10.244.2.9")); (got == kerneltest.Plaintext) != last {
			t.Errorf("after %q: %s", o, got)
		}
	}
	if diff := cmp.Diff(newKernel(mesh.State{}).String(), k.String()); diff != "" {
		t.Errorf("left over (-want +got):\n%s", diff)
	}
}
