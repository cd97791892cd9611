package cluster

import (
	"bytes"
	"context"
	"fmt"
	"sync"
)

// Log collects a program's output. The zero value is empty and ready, and all
// methods may be called from any goroutine.
type Log struct {
	mu      sync.Mutex
	buf     []byte
	changed chan struct{} // closed at the next write; nil when nobody waits
}

// Write appends p. It never fails.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	return len(p), nil
}

// String returns all that was written so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.buf)
}

// WaitFor waits until the log contains text.
func (l *Log) WaitFor(ctx context.Context, text string) error {
	for {
		l.mu.Lock()
		found := bytes.Contains(l.buf, []byte(text))
		if !found && l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		if found {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %q in the log: %w; it has:\n%s", text, context.Cause(ctx), l.String())
		}
	}
}
