package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// lookupTimeout bounds one lookup, and lookupPatience how long a connection
	// waits for it when there is an earlier answer.
	lookupTimeout  = 5 * time.Second
	lookupPatience = 2 * time.Second
)

// Lookup is net.Resolver.LookupNetIP.
type Lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

// resolver asks anew for every connection; those that come while a question is
// under way share its answer. The last good answer stays in use while the name
// server is away, however long that takes. That a name is no more is an answer as well.
type resolver struct {
	lookup Lookup

	mu    sync.Mutex
	hosts map[string]*host
}

type host struct {
	last   []netip.Addr // nil: there never was an answer
	flight *flight      // nil: none is under way
}

type flight struct {
	done  chan struct{}
	addrs []netip.Addr
	err   error
}

// errNoLookup is why an earlier answer is used.
var errNoLookup = errors.New("no answer yet")

// resolve returns at least one address, or err. stale says why they are those of an earlier answer.
func (r *resolver) resolve(ctx context.Context, name string) (addrs []netip.Addr, stale, err error) {
	if a, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{a.Unmap()}, nil, nil
	}
	r.mu.Lock()
	if r.hosts == nil {
		r.hosts = map[string]*host{}
	}
	h := r.hosts[name]
	if h == nil {
		h = &host{}
		r.hosts[name] = h
	}
	f := h.flight
	if f == nil {
		f = &flight{done: make(chan struct{})}
		h.flight = f
		go r.fly(name, h, f)
	}
	last := h.last
	r.mu.Unlock()

	var patience <-chan time.Time
	if last != nil {
		t := time.NewTimer(lookupPatience)
		defer t.Stop()
		patience = t.C
	}
	select {
	case <-f.done:
	case <-patience:
		return last, errNoLookup, nil
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("resolve %s: %w", name, ctx.Err())
	}
	if f.err == nil {
		return f.addrs, nil, nil
	}
	if gone := (*net.DNSError)(nil); last != nil && (!errors.As(f.err, &gone) || !gone.IsNotFound) {
		return last, f.err, nil
	}
	return nil, nil, fmt.Errorf("resolve %s: %w", name, f.err)
}

func (r *resolver) fly(name string, h *host, f *flight) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	addrs, err := r.lookup(ctx, "ip", name)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	if err == nil && len(addrs) == 0 {
		err = errors.New("the answer has no address")
	}
	r.mu.Lock()
	f.addrs, f.err = addrs, err
	h.flight = nil
	if err == nil {
		h.last = addrs
	}
	r.mu.Unlock()
	close(f.done)
}
