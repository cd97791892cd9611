package endpoint

import (
	"log/slog"
	"sync"
	"time"
)

// warnEvery is how often one kind of warning is logged at most.
const warnEvery = 10 * time.Second

// warner logs warnings, and of those that come in crowds only one now and then,
// which says how many there were.
type warner struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[string]*crowd
}

type crowd struct {
	next    int64 // when one may be logged again; see monotonic
	skipped int
}

// warn logs, unless a warning of this message and forward was logged just now.
func (w *warner) warn(message string, f Forward, args ...any) {
	kind := message + f.String() + f.Target
	w.mu.Lock()
	if w.kinds == nil {
		w.kinds = map[string]*crowd{}
	}
	c := w.kinds[kind]
	if c == nil {
		c = &crowd{}
		w.kinds[kind] = c
	}
	now := monotonic()
	if now < c.next {
		c.skipped++
		w.mu.Unlock()
		return
	}
	skipped := c.skipped
	c.next, c.skipped = now+int64(warnEvery), 0
	w.mu.Unlock()
	args = append([]any{"forward", f.String()}, args...)
	if skipped > 0 {
		args = append(args, "alsoSinceLast", skipped)
	}
	w.log.Warn(message, args...)
}
