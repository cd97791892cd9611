package reconcile

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/wgcni/wgcni/pkg/registry"
)

// removed reports whether a tombstone has taken the place of our record in
// this run. One from before it is no reason not to join again.
func (l *Loop) removed() bool {
	if l.fresh == nil || !l.joined {
		return false
	}
	theirs, ok := l.fresh.Record(l.config.NodeName)
	return ok && theirs.Left && theirs.Revision > l.known.Self.Revision && !l.forgotten()
}

// forgotten reports whether the mesh has revoked our key. Then there is nothing
// to announce with it, and the plan has no tunnel: see mesh.Facts.Revoked.
func (l *Loop) forgotten() bool { return Forgotten(l.config.NodeName, l.Keys.Current, l.known) }

// announce publishes our record if the registry does not have it as it is now.
func (l *Loop) announce(now time.Time) {
	if l.fresh == nil {
		return // its revision of our record is not known yet
	}
	if l.rekeyed {
		return // who knows the new key shakes hands with it: see rekeyedAt
	}
	if l.forgotten() {
		if l.publisher.clear(); !l.outcast {
			l.Log.Error("the mesh has forgotten this node and revoked its key: traffic to other nodes is dropped", "mend", "to join again with a new key, stop wgcnid, run `wgcnid leave --purge`, and start it")
		}
		l.outcast = true
		return
	}
	l.outcast = false
	self := l.known.Self
	self.Seal.Secret = l.trust.Secrets.Current()
	accepted, _ := l.known.Records.Record(self.Name)
	theirs, there := l.fresh.Record(self.Name)
	if l.published != nil {
		theirs, there = *l.published, true
	}
	// Else the registry was rolled back: the others refuse what it has of us.
	current := there && theirs.Revision >= accepted.Revision
	if l.held = nil; current {
		l.held = theirs.Pods
	}
	if current && theirs.SameContent(self) {
		l.joined, l.rival = true, false
		l.known.Self.Revision = theirs.Revision
		return
	}
	// Nobody but us raises our revision. A machine that was cloned has our key too.
	// What we offered may still arrive after we have changed our mind.
	ours := theirs.PublicKey == self.PublicKey || theirs.Next == self.PublicKey // rotated since
	foreign := !ours || theirs.Revision > max(self.Revision, l.offered)
	if current && l.joined && !theirs.Left && foreign {
		if !l.rival {
			l.Log.Error("another node publishes under this node's name; its record stays", "name", self.Name, "mend", "set \"nodeName\" so that each node has its own")
		}
		l.rival = true
		return
	}
	if l.rival && l.away != nil {
		return // the other's record may well be there, out of our sight
	}
	if pending := l.publisher.pending(); pending != nil && pending.record.SameContent(self) {
		return
	}
	// What we offered before is not known to be there: a tombstone may be instead.
	seen := max(theirs.Revision, accepted.Revision)
	if accepted.SameContent(self) && accepted.Revision >= self.Revision {
		// The registry may have lost it. If not, nothing changes there: thousands
		// of nodes that all come back from an outage would wake each other.
		self.Revision = accepted.Revision
	} else {
		self.Revision = registry.NextRevision(max(seen, self.Revision), now)
	}
	sealed, err := l.trust.Seal(self)
	if err != nil { // it has nothing that could fail
		l.Log.Error("record not published", "error", err)
		return
	}
	l.known.Self.Revision, l.offered = self.Revision, max(l.offered, self.Revision)
	l.heard = false
	l.publisher.put(offer{sealed, seen})
}

func (l *Loop) hearPublished(r publishResult) {
	if final(r.err) {
		l.publisher.drop(r.offer)
	}
	record := r.offer.record
	accepted, _ := l.known.Records.Record(record.Name)
	switch {
	case r.err == nil:
		l.joined, l.unpublished, l.held = true, "", record.Pods
		if record.Revision > accepted.Revision {
			l.known.Records.Nodes[record.Name] = &record
			l.noteChanged(record.Name)
		}
		if !l.heard { // else what the registry told meanwhile may be later
			l.published = &record
		}
		l.Log.Info("published", "registry", l.Registry.String(), "revision", record.Revision,
			"prefixes", len(record.Prefixes), "pods", len(record.Pods), "hosts", len(record.Hosts))
	case errors.Is(r.err, registry.ErrStale):
		// Somebody was quicker; the registry's next word tells with what. Nothing is
		// offered before: it may be our tombstone, even one of a lesser revision.
		l.unpublished = ""
		l.Log.Warn("record not published; trying again", "error", r.err)
		l.known.Self.Revision = min(l.known.Self.Revision, accepted.Revision)
		if l.fresh != nil {
			if theirs, _ := l.fresh.Record(record.Name); theirs.Revision < staleKnown(r.err) {
				l.fresh, l.published = nil, nil
			}
		}
	default:
		if text := r.err.Error(); text != l.unpublished { // else it would be said every few seconds
			l.Log.Warn("record not published; trying again", "registry", l.Registry.String(), "error", r.err)
			if l.unpublished == "" {
				l.unpublishedSince = l.Now()
			}
			l.unpublished = text
		}
	}
}

func staleKnown(err error) uint64 {
	var s registry.Stale
	errors.As(err, &s)
	return s.Known
}

// offer is a record to be published, and the revision that it follows.
type offer struct {
	record registry.Record
	seen   uint64
}

type publishResult struct {
	offer *offer
	err   error
}

// final reports whether there is no use in trying again.
func final(err error) bool { return err == nil || errors.Is(err, registry.ErrStale) }

// publisher publishes in the background, the latest record only, until it
// succeeds: a registry that is slow or away holds nothing up.
type publisher struct {
	results chan publishResult
	wake    chan struct{}
	done    chan struct{}

	mu   sync.Mutex
	want *offer
}

const (
	publishTimeout  = 30 * time.Second
	publishRetry    = 200 * time.Millisecond
	publishRetryMax = 5 * time.Second
)

func newPublisher(ctx context.Context, r Registry) *publisher {
	p := &publisher{results: make(chan publishResult), wake: make(chan struct{}, 1), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.run(ctx, r)
	}()
	return p
}

func (p *publisher) run(ctx context.Context, r Registry) {
	retry := publishRetry
	var finished *offer // still pending until its result is heard
	for {
		o := p.pending()
		if o == nil || o == finished {
			select {
			case <-p.wake:
				continue
			case <-ctx.Done():
				return
			}
		}
		publishing, cancel := context.WithTimeout(ctx, publishTimeout)
		err := r.Publish(publishing, o.record, o.seen)
		cancel()
		select {
		case p.results <- publishResult{o, err}:
		case <-ctx.Done():
			return
		}
		if final(err) {
			finished, retry = o, publishRetry
			continue
		}
		select {
		case <-time.After(retry):
			retry = min(2*retry, publishRetryMax)
		case <-p.wake:
		case <-ctx.Done():
			return
		}
	}
}

func (p *publisher) put(o offer) {
	p.mu.Lock()
	p.want = &o
	p.mu.Unlock()
	poke(p.wake)
}

func (p *publisher) pending() *offer {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.want
}

// drop forgets an offer whose result was heard, unless a newer one waits. Not
// before: a pass in between would make it once more, as a new revision.
func (p *publisher) drop(o *offer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == o {
		p.want = nil
	}
}

// clear forgets what waits.
func (p *publisher) clear() { p.drop(p.pending()) }

func (p *publisher) wait() { <-p.done }

// poke wakes whoever reads c; once is enough.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
