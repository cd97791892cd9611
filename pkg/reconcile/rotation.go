package reconcile

import (
	"errors"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// Rotation is what a plan has to know while keys are replaced; see mesh.Plane.
type Rotation struct {
	Key    wgtypes.Key // of the spare interface, public
	Planes map[string]mesh.Plane
}

// RotationOf reads it from the kernel: those who do not drive a rotation take it as
// it is.
func RotationOf(observed mesh.State, known store.Known) Rotation {
	r := Rotation{Key: observed.Spare.Link.PublicKey, Planes: map[string]mesh.Plane{}}
	if len(observed.Spare.Peers) == 0 {
		return r
	}
	byKey := make(map[wgtypes.Key]string, len(observed.Spare.Peers))
	for name, record := range known.Records.Nodes {
		if !record.Left {
			byKey[record.Next] = name
		}
	}
	spare := map[netip.Prefix]bool{}
	for _, route := range observed.Routes {
		if route.Type == mesh.ViaLink && route.Plane == mesh.Spare {
			spare[route.Prefix] = true
		}
	}
	for _, p := range observed.Spare.Peers {
		if name, ok := byKey[p.PublicKey]; ok {
			r.Planes[name] = mesh.Plane(slices.ContainsFunc(p.AllowedIPs, func(q netip.Prefix) bool { return spare[q] }))
		}
	}
	return r
}

// enter puts this node's part into the facts, and reports whether there is any.
func (r Rotation) enter(f *mesh.Facts, c config.Config) bool {
	if len(r.Planes) == 0 || c.SparePort == 0 {
		return false
	}
	f.Crossing = r.Planes
	f.Self.Spare = mesh.SpareEnd{PublicKey: r.Key, Port: uint16(c.SparePort)}
	return true
}

// cross gives a node its spare end if it is one that changes planes with this one.
func (r Rotation) cross(n *mesh.Node, p Pass) bool {
	if _, crossing := r.Planes[n.Name]; !crossing {
		return false
	}
	record := p.Known.Records.Nodes[n.Name]
	n.Spare = mesh.SpareEnd{PublicKey: record.Next, Port: record.SparePort}
	own := sealedBy(p.Config, p.Pairs, p.Known)
	if psk, ok := p.Pairs.For(r.Key).PresharedKey(own, record.Seal.Secret, n.Spare.PublicKey); ok {
		n.Spare.PresharedKey = mesh.FingerprintOf(psk)
	}
	return true
}

// crossed takes note of a pass that has succeeded, with the planes of the last look.
// The first of a run leaves the pairs as the kernel has them.
func (l *Loop) crossed(o Outcome, now time.Time) {
	if l.rekeyed || o.Observed.Link.PublicKey != l.Keys.Current {
		l.rekeyedAt = now
	}
	l.rekeyed = false
	if l.crossings != nil {
		l.crossings.carriedOut()
		return
	}
	var planes map[string]mesh.Plane
	if r := RotationOf(o.Observed, l.known); r.Key == l.Keys.Spare() {
		planes = r.Planes
	}
	l.crossings = newCrossings(l.Keys.Stage, planes, now)
}

// rotation is what the next plan has to know; nil before the first.
func (l *Loop) rotation() *Rotation {
	if l.crossings == nil {
		return nil
	}
	return &Rotation{Key: l.Keys.Spare(), Planes: l.crossings.planes()}
}

// rotating reports whether any node replaces its key, this one among them.
func (l *Loop) rotating() bool {
	return l.Keys.Stage != mesh.Resting || len(l.crossings.pairs) > 0 || l.planner.members.rotating
}

// rotate moves the rotations on that this node takes part in, and reports whether
// there is something to apply or to publish.
func (l *Loop) rotate(now time.Time) (changed bool) {
	if l.crossings == nil {
		return false
	}
	changed = l.beginRotation(now)
	if !l.rotating() {
		return changed
	}
	neighbours, err := l.neighbours()
	if err != nil {
		return changed // the next pass says so
	}
	before := l.crossings.planes()
	published, _ := l.known.Records.Record(l.config.NodeName)
	hearsay := news{announced: published.Stage == l.Keys.Stage, informed: l.fresh != nil && l.away == nil}
	l.crossings.enter(l.Keys.Stage, now)
	turning := RotationReport{Stage: l.Keys.Stage, Since: l.crossings.since, Waiting: l.crossings.look(neighbours, hearsay, now)}
	turning.Moved, turning.Pairs = l.crossings.moved(neighbours)
	if !maps.Equal(before, l.crossings.planes()) || !turning.equal(l.turning) {
		changed = true
	}
	l.turning = turning
	l.wave()
	if len(turning.Waiting) == 0 && l.joined && hearsay == (news{true, true}) {
		return l.nextStage(now) || changed
	}
	return changed
}

// nextStage goes on with this node's own rotation, for which nobody has to be
// waited for any more.
func (l *Loop) nextStage(now time.Time) bool {
	var err error
	keys := l.Keys
	switch keys.Stage {
	case mesh.Out:
		keys, err = keys.Switch(l.config.StateDir, now)
	case mesh.Back:
		keys, err = keys.End(l.config.StateDir, now)
	default:
		return false
	}
	if err != nil {
		l.complain("key rotation cannot go on", err)
		return false
	}
	l.rotationError = ""
	l.setKeys(keys, now)
	if keys.Stage == mesh.Back {
		l.Log.Info("the new key is in use; moving back to the primary interface", "publicKey", keys.Current.String())
	} else {
		l.Log.Info("the key is rotated", "publicKey", keys.Current.String())
	}
	return true
}

// setKeys takes over keys that have changed.
func (l *Loop) setKeys(keys identity.Keys, now time.Time) {
	if keys.Current != l.Keys.Current {
		l.pairs = l.pairs.For(keys.Current)
		l.rekeyed = true
	}
	l.Keys = keys
	l.crossings.enter(keys.Stage, now)
}

// beginRotation starts a rotation if it was asked for: by this node's operator, by
// another node for all, or by the schedule.
func (l *Loop) beginRotation(now time.Time) bool {
	taken := false
	err := identity.CarryOutOrder(l.config.StateDir, func(order identity.Order) error {
		taken, l.crossings.force = true, l.crossings.force || order.Force
		if order.Cluster {
			l.rotateAll = order.At
		}
		if l.Keys.Stage != mesh.Resting {
			return nil // it goes on
		}
		return l.startRotation(order.At, "an operator has asked for it", now)
	})
	if err != nil {
		l.complain("the order to rotate the key cannot be carried out", err)
	}
	if taken {
		return true
	}
	if l.Keys.Stage != mesh.Resting || l.Keys.Next == (wgtypes.Key{}) || !l.joined || l.forgotten() {
		return false
	}
	every := l.config.KeyRotation
	switch o := l.planner.members.ordered; {
	case o.at.After(l.Keys.Answered) && o.at.After(l.Keys.Since):
		err = l.startRotation(o.at, o.by+" has asked all nodes for it", now)
	case every > 0 && now.Sub(l.Keys.Since) > every+jitter(l.config.NodeName, every):
		err = l.startRotation(now, "the key is older than \"keyRotation\"", now)
	default:
		return false
	}
	if err != nil {
		l.complain("key rotation cannot begin", err)
	}
	return err == nil
}

func (l *Loop) startRotation(order time.Time, why string, now time.Time) error {
	keys, err := l.Keys.Begin(l.config.StateDir, order)
	if err != nil {
		return err
	}
	l.setKeys(keys, now)
	l.Log.Info("rotating this node's key", "why", why, "nextPublicKey", keys.Next.String())
	return nil
}

// complain says what keeps a rotation from going on, once, and not every second.
func (l *Loop) complain(what string, err error) {
	if text := err.Error(); text != l.rotationError {
		l.Log.Error(what+"; trying again every second", "error", err)
		l.rotationError = text
	}
}

// jitter spreads the nodes' schedules over a tenth of the interval, each always at
// the same place.
func jitter(name string, every time.Duration) time.Duration {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // never fails
	return time.Duration(float64(every) / 10 * float64(h.Sum32()) / float64(1<<32))
}

// neighbours are the other sides of this node's pairs, as of now.
func (l *Loop) neighbours() ([]neighbour, error) {
	heard := map[mesh.Plane]map[wgtypes.Key]kernel.Handshake{}
	for _, plane := range []mesh.Plane{mesh.Primary, mesh.Spare} {
		var err error
		if heard[plane], err = l.Kernel.HandshakesOn(plane); err != nil {
			return nil, err
		}
	}
	if l.planned == nil {
		return nil, errors.New("there is no plan yet")
	}
	claims := len(l.known.Self.Prefixes)+len(l.known.Self.Pods)+len(l.known.Self.Hosts) > 0
	self := mesh.Node{Spare: mesh.SpareEnd{PublicKey: l.Keys.Spare(), Port: uint16(l.config.SparePort)}}
	out := make([]neighbour, 0, len(l.planned.Peers))
	for _, p := range l.planned.Peers {
		r, ok := l.known.Records.Record(p.Name)
		if !ok || r.Left {
			continue
		}
		n := neighbour{name: p.Name, stage: r.Stage, plain: len(r.Via) > 0, talks: claims && len(p.AllowedIPs) > 0}
		n.crosses = spareNode(r).Crosses(self)
		primary := heard[mesh.Primary][p.PublicKey]
		if l.rekeyed || !primary.At.After(l.rekeyedAt) {
			primary.At = time.Time{}
		}
		n.heard = map[mesh.Plane]kernel.Handshake{mesh.Primary: primary, mesh.Spare: heard[mesh.Spare][r.Next]}
		out = append(out, n)
	}
	return out, nil
}

func spareNode(r registry.Record) mesh.Node {
	return mesh.Node{Via: r.Via, Spare: mesh.SpareEnd{PublicKey: r.Next, Port: r.SparePort}}
}

// wave shows the others by which plane this node sends to them.
func (l *Loop) wave() {
	peers := make(map[string]*mesh.Peer, len(l.planned.Peers))
	for i := range l.planned.Peers {
		peers[l.planned.Peers[i].Name] = &l.planned.Peers[i]
	}
	for _, name := range l.crossings.waving() {
		p := peers[name]
		if p == nil {
			continue
		}
		for _, to := range p.AllowedIPs {
			if from, ok := l.waveFrom(to.Addr().Is6()); ok {
				_ = l.Kernel.Wave(from, to.Addr()) // it is sent again with the next look
				break
			}
		}
	}
}

// waveFrom is an address that all others take from this node.
func (l *Loop) waveFrom(v6 bool) (netip.Addr, bool) {
	for _, claims := range [][]mesh.Claim{l.known.Self.Prefixes, l.known.Self.Pods, l.known.Self.Hosts} {
		for _, c := range claims {
			if a := c.Prefix.Addr(); a.Is6() == v6 {
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}
