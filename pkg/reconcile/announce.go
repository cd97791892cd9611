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
	theirs, ok := l.fresh.Nodes[l.config.NodeName]
	return ok && theirs.Left && theirs.Revision > l.known.Self.Revision
}

// announce publishes our record if the registry does not have it as it is now.
func (l *Loop) announce(now time.Time) {
	if l.fresh == nil {
		return // its revision of our record is not known yet
	}
	self := l.known.Self
	accepted := l.known.Records.Nodes[self.Name]
	theirs, there := l.fresh.Nodes[self.Name]
	if l.published != nil {
		theirs, there = *l.published, true
	}
	// Else the registry was rolled back: the others refuse what it has of us.
	current := there && theirs.Revision >= accepted.Revision
	if current && sameContent(theirs, self) {
		l.joined, l.rival = true, false
		l.known.Self.Revision = theirs.Revision
		return
	}
	// Nobody but us raises our revision. A machine that was cloned has our key too.
	foreign := theirs.PublicKey != self.PublicKey || theirs.Revision > self.Revision
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
	if pending := l.publisher.pending(); pending != nil && sameContent(*pending, self) {
		return
	}
	if sameContent(accepted, self) && accepted.Revision >= self.Revision {
		// The registry may have lost it. If not, nothing changes there: thousands
		// of nodes that all come back from an outage would wake each other.
		self.Revision = accepted.Revision
	} else {
		self.Revision = registry.NextRevision(max(self.Revision, theirs.Revision, accepted.Revision), now)
	}
	l.known.Self.Revision = self.Revision
	l.heard = false
	l.publisher.put(self)
}

// sameContent compares all but the revision.
func sameContent(a, b registry.Record) bool {
	a.Revision = b.Revision
	return a.Equal(b)
}

func (l *Loop) hearPublished(r publishResult) {
	if final(r.err) {
		l.publisher.drop(r.record)
	}
	switch {
	case r.err == nil:
		l.joined, l.unpublished = true, ""
		if r.record.Revision > l.known.Records.Nodes[r.record.Name].Revision {
			l.known.Records.Nodes[r.record.Name] = *r.record
		}
		if !l.heard { // else what the registry told meanwhile may be later
			l.published = r.record
		}
		l.Log.Info("published", "registry", l.Registry.String(), "revision", r.record.Revision,
			"prefixes", len(r.record.Prefixes), "pods", len(r.record.Pods))
	case errors.Is(r.err, registry.ErrStale):
		// Somebody was quicker; the registry's next word tells with what. Nothing is
		// offered before: it may be our tombstone.
		l.Log.Warn("record not published; trying again", "error", r.err)
		if l.fresh != nil && l.fresh.Nodes[r.record.Name].Revision < staleKnown(r.err) {
			l.fresh, l.published = nil, nil
		}
	default:
		if text := r.err.Error(); text != l.unpublished { // else it would be said every few seconds
			l.Log.Warn("record not published; trying again", "registry", l.Registry.String(), "error", r.err)
			l.unpublished = text
		}
	}
}

func staleKnown(err error) uint64 {
	var s registry.Stale
	errors.As(err, &s)
	return s.Known
}

type publishResult struct {
	record *registry.Record
	err    error
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
	want *registry.Record
}

const (
	publishTimeout  = 30 * time.Second
	publishRetry    = 200 * time.Millisecond
	publishRetryMax = 5 * time.Second
)

func newPublisher(ctx context.Context, r registry.Registry) *publisher {
	p := &publisher{results: make(chan publishResult), wake: make(chan struct{}, 1), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.run(ctx, r)
	}()
	return p
}

func (p *publisher) run(ctx context.Context, r registry.Registry) {
	retry := publishRetry
	var finished *registry.Record // still pending until its result is heard
	for {
		record := p.pending()
		if record == nil || record == finished {
			select {
			case <-p.wake:
				continue
			case <-ctx.Done():
				return
			}
		}
		publishing, cancel := context.WithTimeout(ctx, publishTimeout)
		err := r.Publish(publishing, *record)
		cancel()
		select {
		case p.results <- publishResult{record, err}:
		case <-ctx.Done():
			return
		}
		if final(err) {
			finished, retry = record, publishRetry
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

func (p *publisher) put(r registry.Record) {
	p.mu.Lock()
	p.want = &r
	p.mu.Unlock()
	poke(p.wake)
}

func (p *publisher) pending() *registry.Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.want
}

// drop forgets a record whose result was heard, unless a newer one waits. Not
// before: a pass in between would offer it once more, as a new revision.
func (p *publisher) drop(r *registry.Record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == r {
		p.want = nil
	}
}

func (p *publisher) wait() { <-p.done }

// poke wakes whoever reads c; once is enough.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
