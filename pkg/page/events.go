package page

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// Event is a line of the log.
type Event struct {
	Time  string
	Level string
	Text  string
}

// longest bounds the text of an event, in bytes.
const longest = 600

// Events keep the last lines of a log, of level Info and above. They may be used
// by several at once.
type Events struct {
	most int

	mu   sync.Mutex
	kept []Event // the latest last
}

// NewEvents keeps this many lines.
func NewEvents(most int) *Events { return &Events{most: most} }

// Handler returns a handler that keeps the lines and hands them on.
func (e *Events) Handler(next slog.Handler) slog.Handler { return keeper{next: next, events: e} }

// Latest returns the lines that are kept, the latest first.
func (e *Events) Latest() []Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := slices.Clone(e.kept)
	slices.Reverse(out)
	return out
}

func (e *Events) add(v Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.kept) == e.most {
		copy(e.kept, e.kept[1:])
		e.kept = e.kept[:e.most-1]
	}
	e.kept = append(e.kept, v)
}

// keeper is a slog.Handler.
type keeper struct {
	next   slog.Handler
	events *Events
	group  string // "" or with a dot at its end
	attrs  string
}

// Enabled implements slog.Handler.
func (k keeper) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelInfo || k.next.Enabled(ctx, l)
}

// Handle implements slog.Handler.
func (k keeper) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		var b strings.Builder
		b.WriteString(r.Message + k.attrs)
		r.Attrs(func(a slog.Attr) bool {
			writeAttr(&b, k.group, a)
			return b.Len() < longest
		})
		k.events.add(Event{Time: r.Time.Local().Format(time.DateTime), Level: level(r.Level), Text: cut(b.String())})
	}
	if !k.next.Enabled(ctx, r.Level) {
		return nil
	}
	return k.next.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (k keeper) WithAttrs(attrs []slog.Attr) slog.Handler {
	var b strings.Builder
	for _, a := range attrs {
		writeAttr(&b, k.group, a)
	}
	k.next, k.attrs = k.next.WithAttrs(attrs), k.attrs+b.String()
	return k
}

// WithGroup implements slog.Handler.
func (k keeper) WithGroup(name string) slog.Handler {
	k.next, k.group = k.next.WithGroup(name), k.group+name+"."
	return k
}

func writeAttr(b *strings.Builder, group string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		for _, one := range v.Group() {
			writeAttr(b, strings.TrimPrefix(group+a.Key+".", "."), one)
		}
		return
	}
	if a.Equal(slog.Attr{}) {
		return
	}
	text := v.String()
	if strings.ContainsAny(text, " =\"\n") || text == "" {
		text = fmt.Sprintf("%q", text)
	}
	b.WriteString(" " + group + a.Key + "=" + text)
}

func level(l slog.Level) string {
	switch {
	case l >= slog.LevelError:
		return Fault
	case l >= slog.LevelWarn:
		return Note
	}
	return OK
}

func cut(s string) string {
	if len(s) <= longest {
		return s
	}
	return strings.ToValidUTF8(s[:longest], "") + "…"
}
