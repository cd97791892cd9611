package mesh_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// underway is what the plans of a world do to packets.
type underway struct {
	topologyWorld
	plans map[string]mesh.Plan // of all but plain peers
}

func (w topologyWorld) settings() mesh.Settings {
	s := settings("10.244.0.0/16", "fd00:244::/32")
	s.ExternalCIDRs, s.PeerCIDRs = prefixes("172.20.0.0/16"), prefixes("10.99.0.0/24")
	return s
}

func (w topologyWorld) plan(rng *rand.Rand) underway {
	u := underway{w, map[string]mesh.Plan{}}
	for _, n := range w.nodes {
		if n.Plain() {
			continue
		}
		u.plans[n.Name] = mesh.NewPlan(mesh.Facts{Settings: w.settings(), Self: n, Nodes: shuffled(rng, w.nodes)})
	}
	return u
}

// addresses are one behind each of a machine's claims, and those of no peer.
func (w topologyWorld) addresses(name string) (out []netip.Addr) {
	n := w.named(name)
	for _, c := range slices.Concat(n.Prefixes, n.Pods) {
		switch a := c.Prefix.Addr(); {
		case n.Plain():
			out = append(out, a)
		case !w.settings().PeerCIDRs[0].Contains(a):
			if !c.Prefix.IsSingleIP() {
				a = a.Next().Next()
			}
			out = append(out, a)
		}
	}
	return out
}

// peer is the neighbour to whom a machine's WireGuard sends what goes to an
// address, and from whom alone it takes what comes from there (cryptokey routing).
func (u underway) peer(at string, a netip.Addr) string {
	best, name := -1, ""
	for _, p := range u.plans[at].Peers {
		for _, q := range p.AllowedIPs {
			if q.Contains(a) && q.Bits() > best {
				best, name = q.Bits(), p.Name
			}
		}
	}
	return name
}

// routed reports whether a machine's routes lead to an address by the tunnel.
func (u underway) routed(at string, a netip.Addr) bool {
	best, by := -1, mesh.Unreachable
	for _, r := range u.plans[at].Routes {
		if r.Prefix.Contains(a) && (r.Prefix.Bits() > best || r.Prefix.Bits() == best && r.Metric == 0) {
			best, by = r.Prefix.Bits(), r.Type
		}
	}
	return best >= 0 && by == mesh.ViaLink
}

// walk follows a packet by the plans alone, and returns whom it came to, and
// whether it arrived at the last one. With force its sender hands it to that
// neighbour, whatever its own plan says.
func (u underway) walk(from, to string, src, dst netip.Addr, force string) (way []string, arrived bool) {
	way = []string{from}
	for at := from; at != to; {
		next := u.peer(at, dst)
		switch {
		case len(way) == 1 && force != "":
			next = force
		case u.named(at).Plain():
			next = u.carrier[at]
		case !u.routed(at, dst):
			return way, false
		}
		if next == "" || slices.Contains(way, next) {
			return way, false
		}
		if !u.named(next).Plain() && u.peer(next, src) != at {
			return way, false // dropped: the sender may not send from there
		}
		way, at = append(way, next), next
	}
	return way, true
}

// A packet arrives iff Path says so, by exactly that path. It is the far end that
// refuses what its segments do not allow; for a plain machine, which has no plan to
// do so, its carrier does.
func TestPlansFollowPaths(t *testing.T) {
	forWorlds(t, func(t *testing.T, rng *rand.Rand, w topologyWorld) {
		o, u := oracle{w}, w.plan(rng)
		for _, a := range w.nodes {
			for _, b := range w.nodes {
				if a.Name == b.Name {
					continue
				}
				want := o.talk(a.Name, b.Name)
				for _, src := range w.addresses(a.Name) {
					for _, dst := range w.addresses(b.Name) {
						if src.Is4() != dst.Is4() {
							continue
						}
						way, arrived := u.walk(a.Name, b.Name, src, dst, "")
						switch {
						case want != nil && (!arrived || !slices.Equal(way, want)):
							t.Errorf("%s of %s to %s of %s went %q, arrived %v; want %q", src, a.Name, dst, b.Name, way, arrived, want)
						case want == nil && arrived:
							t.Errorf("%s of %s to %s of %s went %q; want it not to arrive", src, a.Name, dst, b.Name, way)
						case want == nil && len(way) > 1 && !a.Plain():
							t.Errorf("%s of %s to %s of %s, which may not talk, got to %q", src, a.Name, dst, b.Name, way)
						}
						// A plain machine takes what its entry nodes send it, be they its carrier or not.
						if want == nil && (!b.Plain() || !o.common([]string{a.Name, b.Name})) {
							u.checkForced(t, a.Name, b.Name, src, dst)
						}
					}
				}
			}
		}
	})
}

// checkForced: whoever may not talk is not let through by forcing a route either.
func (u underway) checkForced(t *testing.T, from, to string, src, dst netip.Addr) {
	t.Helper()
	for _, p := range u.plans[from].Peers {
		if way, arrived := u.walk(from, to, src, dst, p.Name); arrived {
			t.Errorf("%s of %s to %s of %s, which may not talk, arrived by force: %q", src, from, dst, to, way)
		}
	}
}

// unable are the machines that share a segment with one and cannot talk to it all
// the same: somebody has to be told. Not those that wait for an entry node.
func (o oracle) unable(name string) (out []string) {
	for _, n := range o.nodes {
		carried := !n.Plain() || o.carriedBy(n) != ""
		if n.Name != name && carried && o.common([]string{name, n.Name}) && o.talk(name, n.Name) == nil {
			out = append(out, n.Name)
		}
	}
	slices.Sort(out)
	return out
}

// What may come from a WireGuard peer comes from a neighbour. Other peers are there
// to have a session with once they are needed: gateways that may take over, and
// plain machines that this one is an entry for.
func TestPeersAreNeighbours(t *testing.T) {
	forWorlds(t, func(t *testing.T, rng *rand.Rand, w topologyWorld) {
		top := mesh.NewTopology(w.nodes, w.carrier)
		for name, plan := range w.plan(rng).plans {
			var refused []string
			for _, c := range plan.Conflicts {
				if c.What == "entry by "+name && !mesh.MayCarry(w.named(name).Segments, w.named(c.Node).Segments) {
					continue
				}
				if c.What != "traffic with "+name || c.Reason == "" {
					t.Errorf("plan of %s: %s", name, c)
				}
				refused = append(refused, c.Node)
			}
			if diff := cmp.Diff(oracle{w}.unable(name), refused); diff != "" {
				t.Errorf("%s cannot talk to (-want +got):\n%s", name, diff)
			}
			for _, p := range plan.Peers {
				carries := oracle{w}.carriedBy(w.named(p.Name)) == name
				entry := slices.Contains(w.named(p.Name).Via, name)
				neighbour := slices.Contains(top.Peers(name), p.Name)
				gateway := w.named(p.Name).Role == mesh.RoleGateway || w.named(name).Role == mesh.RoleGateway
				switch {
				case !neighbour && (len(p.AllowedIPs) > 0 || !entry && !gateway):
					t.Errorf("%s has the peer %s with %v, and the neighbours %q", name, p.Name, p.AllowedIPs, top.Peers(name))
				case entry && !carries && len(p.AllowedIPs) > 0:
					t.Errorf("%s does not carry %s, and allows it %v", name, p.Name, p.AllowedIPs)
				}
			}
		}
	})
}

// Gateways of one location hear each other at least every three seconds.
func TestGatewaysKeepEachOtherAlive(t *testing.T) {
	var nodes []mesh.Node
	for i, text := range []string{"g1@a gateway", "g2@a gateway", "n@a", "h@b gateway"} {
		n := machine(text)
		n.PublicKey, n.Since = key(i+1), at(i)
		n.Prefixes = claims(i, fmt.Sprintf("10.244.%d.0/24", i))
		n.Endpoint = endpoint(fmt.Sprintf("192.0.2.%d:51820", i+1))
		nodes = append(nodes, n)
	}
	for i, self := range nodes {
		for _, configured := range []bool{false, true} {
			s := settings("10.244.0.0/16")
			if configured {
				s.Keepalive = 15 * time.Second
			}
			for _, p := range mesh.NewPlan(mesh.Facts{Settings: s, Self: self, Nodes: nodes}).Peers {
				fellows := i < 2 && (p.Name == "g1" || p.Name == "g2")
				if is := p.Keepalive == 3*time.Second; is != fellows || !fellows && configured && p.Keepalive != s.Keepalive {
					t.Errorf("%s has keepalive %v for %s", self.Name, p.Keepalive, p.Name)
				}
			}
		}
	}
}
