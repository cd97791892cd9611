package reconcile

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

const (
	// lookGap is the longest time between two looks that still count as one
	// continuous watch: a machine that was asleep, or starved, has not listened.
	lookGap = 3 * time.Second
	// silentAfter is how long a gateway is not heard before that is said: three
	// keepalives may be lost.
	silentAfter = 9 * time.Second
	// returnedAfter is how long it is heard before that is taken back.
	returnedAfter = 5 * time.Second
	// pause is the longest one in what comes from a gateway that is well.
	pause = mesh.GatewayKeepalive + 2*lookInterval
)

// liveness watches the other gateways of a gateway's own location. It is a pure
// state machine: counters and time go in, accusations come out.
//
//	seconds  0  3  6  9       15                30 33 36 39
//	bytes    |  |  |                            |  |  |  |
//	look     ···············································
//	accused                   ├───────────────────────┤
//	               └silentAfter┘                └─────┘ heard again for returnedAfter
//
// Whoever is watched for the first time counts as heard just then, and so do all
// after a time in which nobody listened, so that neither a start nor a nap accuses.
// Accusations that stand go on standing meanwhile.
type liveness struct {
	ears    map[string]*ear // by the gateway's name
	last    time.Time       // of the latest look
	greeted time.Time       // when the others were last greeted
}

// An ear listens to one gateway.
type ear struct {
	bytes   int64     // received as of the latest look
	heard   time.Time // when some came last
	again   time.Time // since when they come without a pause; zero while they do not
	accused time.Time // since when silence is said of it; zero while it is not
}

// newLiveness goes on where an earlier run has stopped.
func newLiveness(said []mesh.Silence) *liveness {
	v := &liveness{ears: map[string]*ear{}}
	for _, s := range said {
		v.ears[s.Node] = &ear{bytes: -1, accused: s.Since}
	}
	return v
}

// look takes in how many bytes have come so far from each gateway that is to be
// watched, -1 where that is not known. Deaf says that this machine hears nobody
// at all, and knows why.
func (v *liveness) look(now time.Time, deaf bool, received map[string]int64) {
	listened := !deaf && !v.last.IsZero() && now.Sub(v.last) >= 0 && now.Sub(v.last) <= lookGap
	v.last = now
	maps.DeleteFunc(v.ears, func(name string, _ *ear) bool { _, watched := received[name]; return !watched })
	for name, bytes := range received {
		e, known := v.ears[name]
		if !known {
			e = &ear{bytes: -1}
			v.ears[name] = e
		}
		// Less than before is the count of another interface.
		e.look(now, listened && e.bytes >= 0 && bytes >= e.bytes, bytes)
	}
}

// look goes by what has come since the look before, where that is comparable.
func (e *ear) look(now time.Time, comparable bool, bytes int64) {
	more := bytes > e.bytes
	e.bytes = bytes
	switch {
	case !comparable:
		e.heard, e.again = now, time.Time{}
		return
	case more:
		e.heard = now
		if e.again.IsZero() {
			e.again = now
		}
	case now.Sub(e.heard) > pause:
		e.again = time.Time{}
	}
	switch {
	case e.accused.IsZero() && now.Sub(e.heard) >= silentAfter:
		e.accused = mesh.ClaimTime(now)
	case more && now.Sub(e.again) >= returnedAfter:
		e.accused = time.Time{}
	}
}

// silences are the accusations that stand, by name.
func (v *liveness) silences() (out []mesh.Silence) {
	for name, e := range v.ears {
		if !e.accused.IsZero() {
			out = append(out, mesh.Silence{Node: name, Since: e.accused})
		}
	}
	slices.SortFunc(out, func(a, b mesh.Silence) int { return cmp.Compare(a.Node, b.Node) })
	return out
}

// hearGateways looks at the other gateways of this gateway's location, and reports
// whether there is something new to say of them.
func (l *Loop) hearGateways(heard map[wgtypes.Key]kernel.Handshake, now time.Time) bool {
	before := l.liveness.silences()
	watched := l.fellowGateways()
	if len(watched) == 0 {
		l.liveness = newLiveness(nil)
		return len(before) > 0
	}
	received := make(map[string]int64, len(watched))
	var peers []wgtypes.Key
	for name, key := range watched {
		received[name] = -1
		if h, isPeer := heard[key]; isPeer {
			received[name] = h.Received
			peers = append(peers, key)
		}
	}
	l.liveness.look(now, l.cutOff(), received)
	l.greet(peers, now)
	after := l.liveness.silences()
	l.logSilences(before, after)
	return !slices.Equal(before, after)
}

// greet lets the other gateways hear this one. Their WireGuard's keepalive does not
// do that by itself: each packet that comes puts it off as well
// (wg_timers_any_authenticated_packet_traversal in drivers/net/wireguard/timers.c),
// so that of two peers with the same one it may always be the same that sends.
func (l *Loop) greet(peers []wgtypes.Key, now time.Time) {
	if now.Sub(l.liveness.greeted).Abs() < mesh.GatewayKeepalive-lookInterval/2 || len(peers) == 0 {
		return
	}
	l.liveness.greeted = now
	if err := l.Kernel.Greet(peers, mesh.GatewayKeepalive); err != nil {
		l.Log.Debug("other gateways of this location are not greeted", "error", err) // the next pass finds the cause
	}
}

// fellowGateways are the keys of the other gateways of this one's location.
func (l *Loop) fellowGateways() map[string]wgtypes.Key {
	if l.config.Role != mesh.RoleGateway {
		return nil
	}
	out := map[string]wgtypes.Key{}
	for name, r := range l.known.Records.Nodes {
		if !r.Left && name != l.config.NodeName && r.Role == mesh.RoleGateway && r.Location == l.config.Location && len(r.Via) == 0 {
			out[name] = r.PublicKey
		}
	}
	return out
}

// cutOff reports whether this machine had a way out, and has none now. Of two
// gateways that do not hear each other it is the one that has no say.
func (l *Loop) cutOff() bool {
	if len(l.underlay.Addresses) == 0 {
		return false // it never had one: nothing can be told by that
	}
	up, err := l.Kernel.Uplink()
	return err == nil && !up
}

func (l *Loop) logSilences(before, after []mesh.Silence) {
	for _, s := range after {
		if !slices.Contains(before, s) {
			l.Log.Warn("a gateway of this location is not heard any more: another one carries its traffic", "gateway", s.Node)
		}
	}
	for _, s := range before {
		if !slices.ContainsFunc(after, func(a mesh.Silence) bool { return a.Node == s.Node }) {
			l.Log.Info("a gateway of this location is heard again", "gateway", s.Node, "since", s.Since)
		}
	}
}
