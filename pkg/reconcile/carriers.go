package reconcile

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// callBytes is the least that a node receives when a peer calls it: an initiation
// of 148 bytes, and a packet of 32 behind it. When the node is the one that calls,
// the response is 92 and no packet need follow (messages in the WireGuard paper,
// section 5.4).
const callBytes = 148

// Entry is what a node's claims for the plain machines that enter by it depend on.
type Entry struct {
	Name      string // this node's
	Segments  []string
	PeerCIDRs []netip.Prefix
	Records   registry.Snapshot
	// Heard is what WireGuard has heard of its peers, and HeardBefore the same two
	// looks earlier; nil if nobody has looked then.
	Heard, HeardBefore map[wgtypes.Key]kernel.Handshake
	Before             []mesh.Claim // this node's own claims of single pods
}

// Carried returns the claims that the node makes for plain machines, one an
// address, sorted. Of several nodes by which a machine enters, the newest claim
// carries it (mesh.Owners), so that nodes agree without talking to each other:
//
//	            a is the machine's first     b's link goes    a's comes back
//	machine  ---calls a------------------calls b-------------------------------calls a---
//	a        claims, since it was added          | hears b's claim: gives up    | claims
//	b                                    | claims, since that handshake                | gives up
//
// A node that does not carry the machine allows it no address, and so lets it
// shake hands only. A handshake counts if the machine was the one to call: a node
// that was cut off, and still thinks that it carries the machine, calls it when it
// comes back, and the machine answers, although it has gone elsewhere.
//
// Times are compared on one clock where that can be done. A claim from this
// node's future was made by a clock that is ahead, and no call would ever be newer;
// claims made here are newer than the ones that they follow.
func (e Entry) Carried(now time.Time) []mesh.Claim {
	var out []mesh.Claim
	revoked := map[wgtypes.Key]bool{}
	for _, r := range e.Records.Nodes {
		if key, ok := r.Revoked(); ok {
			revoked[key] = true
		}
	}
	for _, r := range e.Records.Nodes {
		if !r.Enters(e.Name) || r.Masqueraded || revoked[r.PublicKey] || !mesh.MayCarry(e.Segments, r.Segments) {
			continue
		}
		since, ok := e.carries(*r, now)
		for _, c := range r.Prefixes {
			inside := slices.ContainsFunc(e.PeerCIDRs, func(p netip.Prefix) bool { return p.Contains(c.Prefix.Addr()) })
			if ok && inside && c.Prefix.IsSingleIP() {
				out = append(out, mesh.Claim{Prefix: c.Prefix, Since: since})
			}
		}
	}
	slices.SortFunc(out, func(a, b mesh.Claim) int { return mesh.ComparePrefixes(a.Prefix, b.Prefix) })
	return slices.CompactFunc(out, func(a, b mesh.Claim) bool { return a.Prefix == b.Prefix })
}

// carries says whether this node carries a machine, and since when.
func (e Entry) carries(r registry.Record, now time.Time) (since time.Time, ok bool) {
	own := newestClaim(r, e.Before)
	rival, by := e.rival(r)
	switch {
	case by == "" && own.IsZero(): // nobody carries it yet
		first, found := e.first(r)
		return r.Since, found && first == e.Name
	case by == "":
		return own, true
	case !own.IsZero() && cmp.Or(rival.Compare(own), cmp.Compare(e.Name, by)) < 0:
		return own, true
	}
	at, called := e.call(r.PublicKey)
	if !called || !at.After(rival) && !rival.After(now) {
		return time.Time{}, false
	}
	if !at.After(rival) {
		at = rival.Add(time.Millisecond)
	}
	return at, true
}

// call returns the last handshake with a machine if it was the machine that began it.
func (e Entry) call(key wgtypes.Key) (at time.Time, called bool) {
	last := e.Heard[key]
	if last.At.IsZero() {
		return at, false
	}
	at = mesh.ClaimTime(last.At)
	if e.HeardBefore == nil { // nobody can tell
		return at, true
	}
	before := e.HeardBefore[key]
	if last.Received < before.Received { // the interface is a new one
		before = kernel.Handshake{}
	}
	return at, !last.At.Equal(before.At) && last.Received-before.Received >= callBytes
}

// rival is the best claim to a machine among those of the other nodes by which it enters.
func (e Entry) rival(r registry.Record) (since time.Time, by string) {
	for _, name := range slices.Sorted(slices.Values(r.Via)) {
		other, known := e.Records.Record(name)
		if name == e.Name || !known || other.Left {
			continue
		}
		if c := newestClaim(r, other.Pods); c.After(since) {
			since, by = c, name
		}
	}
	return since, by
}

// first is the node that a machine prefers, of those that are members.
func (e Entry) first(r registry.Record) (name string, ok bool) {
	i := slices.IndexFunc(r.Via, func(name string) bool {
		n, known := e.Records.Record(name)
		return name == e.Name || known && !n.Left && mesh.MayCarry(n.Segments, r.Segments)
	})
	if i < 0 {
		return "", false
	}
	return r.Via[i], true
}

// newestClaim is the newest time by which a machine's addresses are claimed; zero
// if they are not. Claims from before the machine was added are to another that
// had its addresses.
func newestClaim(r registry.Record, claims []mesh.Claim) (since time.Time) {
	for _, c := range claims {
		mine := slices.ContainsFunc(r.Prefixes, func(own mesh.Claim) bool { return own.Prefix == c.Prefix })
		if mine && !c.Since.Before(mesh.ClaimTime(r.Since)) && c.Since.After(since) {
			since = c.Since
		}
	}
	return since
}

// calls is what WireGuard has heard of its peers, as of the last looks, the last
// one first. Two looks are compared that have one between them: what arrives may
// be counted before one, and the handshake be complete after it.
type calls [3]map[wgtypes.Key]kernel.Handshake

// isEntry reports whether plain machines enter by this node.
func (l *Loop) isEntry() bool { return l.planner.members.entry }

// hearMachines looks who has called, and reports whether that changes what this
// node carries.
func (l *Loop) hearMachines(heard map[wgtypes.Key]kernel.Handshake, now time.Time) bool {
	if !l.isEntry() {
		l.calls = calls{}
		return false
	}
	l.calls = calls{heard, l.calls[0], l.calls[1]}
	return !slices.EqualFunc(l.carried(l.known.Self.Pods, now), l.entered(), func(a, b mesh.Claim) bool {
		return a.Prefix == b.Prefix && a.Since.Equal(b.Since)
	})
}

// carried returns this node's claims for plain machines, those before among them.
func (l *Loop) carried(before []mesh.Claim, now time.Time) []mesh.Claim {
	if !l.isEntry() { // nearly all nodes: thousands of records need not be sorted out at each pass
		return nil
	}
	return Entry{
		Name: l.config.NodeName, Segments: l.config.Segments, PeerCIDRs: l.config.PeerCIDRs, Records: l.known.Records,
		Heard: l.calls[0], HeardBefore: l.calls[2], Before: before,
	}.Carried(now)
}

// logCarried says which machines this node carries from now on, and which no more.
func (l *Loop) logCarried(before, now []mesh.Claim) {
	if len(before) == 0 && len(now) == 0 {
		return
	}
	for _, r := range l.known.Records.Nodes {
		if !r.Enters(l.config.NodeName) {
			continue
		}
		switch was, is := !newestClaim(*r, before).IsZero(), !newestClaim(*r, now).IsZero(); {
		case is && !was:
			l.Log.Info("a machine enters the mesh by this node", "peer", r.Name)
		case was && !is:
			l.Log.Info("a machine enters the mesh by another node now", "peer", r.Name)
		}
	}
}

// entered are the claims for plain machines in this node's record.
func (l *Loop) entered() []mesh.Claim {
	return slices.DeleteFunc(slices.Clone(l.known.Self.Pods), func(c mesh.Claim) bool {
		return !slices.ContainsFunc(l.config.PeerCIDRs, func(p netip.Prefix) bool { return p.Contains(c.Prefix.Addr()) })
	})
}
