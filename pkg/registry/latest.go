package registry

import (
	"bytes"
	"slices"
)

// Latest is what a Watch has to send: the last state of its store, to a reader who
// may be slow, and none that the reader has. The zero value has nothing to send.
type Latest struct {
	next, sent *Change
	held       Entries  // of the last Change sent that had any
	differ     []string // the names by which those put last differ from these
}

// Put takes the place of what has not been sent. c.Changed is about the last Change
// put that had Entries.
func (l *Latest) Put(c Change) {
	if c.Err == nil {
		l.differ = l.differing(c)
		c.Changed = l.differ
	}
	l.next = &c
}

func (l *Latest) differing(c Change) []string {
	if len(c.Changed) == 0 || l.held == nil {
		return Differing(l.held, c.Entries, bytes.Equal)
	}
	return slices.DeleteFunc(union(l.differ, c.Changed), func(name string) bool {
		was, held := l.held[name]
		is, there := c.Entries[name]
		return held == there && bytes.Equal(was, is)
	})
}

// union returns a new list, sorted, of all names.
func union(a, b []string) []string {
	names := slices.Concat(a, b)
	slices.Sort(names)
	return slices.Compact(names)
}

// News returns what was put last, and whether the reader lacks it.
func (l *Latest) News() (c Change, news bool) {
	switch {
	case l.next == nil:
		return c, false
	case l.sent == nil:
		news = true
	case l.next.Err != nil:
		news = l.sent.Err == nil || l.sent.Err.Error() != l.next.Err.Error()
	default:
		news = l.sent.Err != nil || len(l.differ) > 0
	}
	return *l.next, news
}

// Sent says that the reader has what News returned.
func (l *Latest) Sent() {
	if l.sent = l.next; l.sent.Err == nil {
		l.held, l.differ = l.sent.Entries, nil
	}
}
