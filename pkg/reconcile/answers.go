package reconcile

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

const (
	// unansweredAfter is how long something is sent to a peer and nothing comes
	// back until its name is looked up again. One that only takes in answers every
	// ten seconds (KEEPALIVE_TIMEOUT, WireGuard paper, section 6.1): its name is looked
	// up in vain now and then.
	unansweredAfter = 3 * time.Second
	// lookupAgain is how long the name of a peer that does not answer is left alone,
	// and one that could not be looked up.
	lookupAgain = 5 * time.Second
	// lookShare bounds what looking costs: a look that takes d is followed by none for
	// this many times d. WireGuard tells of all its peers or of none.
	lookShare = 100
)

// answers watches the peers that may be called where they are not any more: those
// that are called by a DNS name, since it may lead elsewhere by now, and those that
// WireGuard calls elsewhere than their records say.
type answers struct {
	peers  map[wgtypes.Key]answer
	astray map[wgtypes.Key]bool // as of the last look at the kernel
	next   time.Time            // when to look again
}

// answer is what has been heard of one peer, and sent to it, in bytes.
type answer struct {
	received, sent int64
	at             time.Time // when it had answered all that was sent, as far as is known
	tried          time.Time // when something was sent last
}

// look takes in what was heard of a peer, and reports whether somebody calls it in
// vain. WireGuard gives up after 90 s (REKEY_ATTEMPT_TIME), until there is something
// to be sent again.
func (n *answers) look(peer wgtypes.Key, h kernel.Handshake, now time.Time) bool {
	if n.peers == nil {
		n.peers = map[wgtypes.Key]answer{}
	}
	a, known := n.peers[peer]
	switch {
	case !known, h.Received != a.received, now.Before(a.at):
		a.at, a.tried = now, time.Time{}
	case h.Sent != a.sent:
		a.tried = now
	case a.tried.IsZero():
		a.at = now // there is nothing to be answered
	}
	a.received, a.sent = h.Received, h.Sent
	n.peers[peer] = a
	return now.Sub(a.at) >= unansweredAfter && now.Sub(a.tried) < lookupTTL
}

// byName reports whether a record names an endpoint that has to be looked up.
func byName(r registry.Record) bool {
	for _, e := range r.Endpoints {
		if host, _, err := net.SplitHostPort(e); err == nil {
			if _, err := netip.ParseAddr(host); err != nil {
				return true
			}
		}
	}
	return false
}

// findAstray notes the peers that WireGuard calls elsewhere than planned, and the ops
// leave there: they have roamed, and a handshake is fresh. One that is called at a
// family which this node has no more is to be called where its record says: what
// cannot be sent is not even counted as sent.
func (l *Loop) findAstray(o Outcome) {
	clear(l.answers.astray)
	have := map[wgtypes.Key]netip.AddrPort{}
	for _, p := range o.Observed.Peers {
		have[p.PublicKey] = p.Endpoint
	}
	for _, op := range o.Ops {
		if p, ok := op.(mesh.SetPeer); ok && p.Endpoint.IsValid() {
			delete(have, p.PublicKey)
		}
	}
	for _, p := range o.Plan.Peers {
		if at := have[p.PublicKey]; at.IsValid() && p.Endpoint.IsValid() && at != p.Endpoint {
			if l.answers.astray == nil {
				l.answers.astray = map[wgtypes.Key]bool{}
			}
			l.answers.astray[p.PublicKey] = true
			if l.sends(p.Endpoint) && !l.sends(at) {
				l.setMoved(p.PublicKey)
			}
		}
	}
}

// sends reports whether this node has an address of an endpoint's family.
func (l *Loop) sends(to netip.AddrPort) bool {
	return slices.ContainsFunc(l.underlay.Addresses, func(a netip.Addr) bool { return a.Is4() == to.Addr().Is4() })
}

// watchesAnswers reports whether it is time to look who answers.
func (l *Loop) watchesAnswers(now time.Time) bool {
	some := len(l.answers.astray) > 0 || l.Resolver.asked()
	return some && (!now.Before(l.answers.next) || l.answers.next.Sub(now) > time.Hour)
}

// hearAnswers has the names of those looked up again that do not answer, or could not
// be looked up; the Resolver tells of what it finds. Those that are astray, and do
// not answer, are to be called where their records say, however fresh the handshake
// is: it reports whether there are any.
func (l *Loop) hearAnswers(ctx context.Context, heard map[wgtypes.Key]kernel.Handshake, took time.Duration, now time.Time) (lost bool) {
	l.answers.next = now.Add(took * lookShare)
	if l.cutOff() {
		return false // it is not the others' fault, and there is no name server either
	}
	silent := map[wgtypes.Key]bool{}
	for key, h := range heard {
		silent[key] = l.answers.look(key, h, now)
	}
	maps.DeleteFunc(l.answers.peers, func(key wgtypes.Key, _ answer) bool { _, there := heard[key]; return !there })
	for key := range l.answers.astray {
		if silent[key] {
			l.setMoved(key)
			lost = true
		}
	}
	if l.Resolver.asked() {
		for name, r := range l.known.Records.Nodes {
			if !r.Left && name != l.config.NodeName && byName(*r) {
				l.Resolver.again(ctx, *r, silent[r.PublicKey], now)
			}
		}
	}
	if lost {
		l.observed = nil
	}
	return lost
}

// setMoved has a peer called where its record says at the next pass.
func (l *Loop) setMoved(key wgtypes.Key) {
	if l.moved == nil {
		l.moved = map[wgtypes.Key]bool{}
	}
	l.moved[key] = true
}

// asked reports whether any name had to be looked up so far.
func (r *Resolver) asked() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.names) > 0
}

// again looks up the names of a record's endpoints, where the node does not answer or
// a name could not be looked up the last time.
func (r *Resolver) again(ctx context.Context, rec registry.Record, unanswered bool, now time.Time) {
	for _, e := range rec.Endpoints {
		host, _, err := net.SplitHostPort(e)
		if err != nil {
			continue
		}
		r.mu.Lock()
		if l := r.names[host]; l != nil && (unanswered || l.failed) && now.Sub(l.at).Abs() >= lookupAgain {
			r.begin(ctx, host, l, now)
		}
		r.mu.Unlock()
	}
}
