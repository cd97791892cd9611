package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// tcpListener is one forward at one address.
type tcpListener struct {
	*net.TCPListener
	s       *Server
	forward Forward
	at      [2]int // number of the forward, and of the address
	addr    netip.AddrPort
	host    string
	port    uint16
	places  chan struct{} // those of the forward alone; nil: no limit
	metrics forwardMetrics
}

// acceptPause is the pause after an accept that failed, most likely since no
// descriptor is free.
const acceptPause = 50 * time.Millisecond

// accept takes connections until ctx ends. At the limit it waits: further callers
// are kept in the kernel's queue (somaxconn, 4096), connected and not yet served,
// and find a place as soon as one is free. To drop them would make every one of
// them call again, at once.
func (l *tcpListener) accept(ctx, life context.Context) {
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			l.metrics.refused(refusedSocket).Inc()
			l.s.warner.warn("cannot accept", l.forward, "error", err)
			if !pause(ctx, acceptPause) {
				return
			}
			continue
		}
		source := remote(c)
		if reason := l.refusal(c, source); reason != "" {
			l.metrics.refused(reason).Inc()
			l.s.warner.warn("refused", l.forward, "source", source, "machine", l.s.sources.Load().Owner(source.Addr()), "reason", reason)
			abandon(c, true)
			continue
		}
		if !l.takePlace(ctx) {
			l.metrics.refused(refusedDrain).Inc()
			abandon(c, true)
			return
		}
		dialing, abort := context.WithTimeout(life, l.s.c.DialTimeout)
		r := &relay{source: source, client: c, abort: abort, idle: l.s.c.IdleTimeout}
		l.s.mu.Lock()
		l.s.relays[r] = l
		l.s.work.Add(1)
		l.s.mu.Unlock()
		if !l.s.sources.Load().allows(l.forward.Allow, source.Addr()) {
			r.finish(endRefused) // SetSources came in between, and did not see it
		}
		l.metrics.connections.Inc()
		l.metrics.open.Inc()
		go l.serve(dialing, r)
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func remote(c net.Conn) netip.AddrPort {
	a, _ := c.RemoteAddr().(*net.TCPAddr)
	if a == nil {
		return netip.AddrPort{}
	}
	return unmapped(a.AddrPort())
}

// refusal is why a caller is not served; "" if it is.
func (l *tcpListener) refusal(c *net.TCPConn, source netip.AddrPort) string {
	switch {
	case !l.s.ingress.tcpOK(c):
		return refusedInterface
	case !l.s.sources.Load().allows(l.forward.Allow, source.Addr()):
		return refusedSource
	}
	return ""
}

// takePlace waits for a place of the forward's and one of the server's, in this
// order, so that a forward at its own limit does not hold places of all.
func (l *tcpListener) takePlace(ctx context.Context) bool {
	for _, places := range []chan struct{}{l.places, l.s.places} {
		if places == nil {
			continue
		}
		select {
		case places <- struct{}{}:
			continue
		default:
		}
		l.s.warner.warn("as many connections as may be; further callers wait", l.forward, "limit", cap(places))
		l.metrics.waiting.Set(1)
		select {
		case places <- struct{}{}:
			l.metrics.waiting.Set(0)
		case <-ctx.Done():
			l.metrics.waiting.Set(0)
			return false
		}
	}
	return true
}

func (l *tcpListener) serve(dialing context.Context, r *relay) {
	s := l.s
	start := time.Now()
	var in, out int64
	target, err := l.reach(dialing, r)
	r.abort()
	if err != nil {
		r.finish(endFailed)
	} else {
		s.c.Log.Debug("connected", "forward", l.forward.String(), "source", r.source, "target", target.RemoteAddr(), "took", time.Since(start))
		r.run(target, &s.pipes,
			func(n int) { in += int64(n); l.metrics.in.Add(float64(n)) },
			func(n int) { out += int64(n); l.metrics.out.Add(float64(n)) })
	}
	s.mu.Lock()
	delete(s.relays, r)
	s.mu.Unlock()
	l.metrics.open.Dec()
	how := r.ended()
	l.metrics.closed(how).Inc()
	<-s.places
	if l.places != nil {
		<-l.places
	}
	s.c.Log.Debug("ended", "forward", l.forward.String(), "source", r.source, "how", string(how), "in", in, "out", out, "after", time.Since(start))
	s.work.Done()
}

// reach resolves the target and connects to it.
func (l *tcpListener) reach(ctx context.Context, r *relay) (*net.TCPConn, error) {
	start := time.Now()
	addrs, stale, err := l.s.resolver.resolve(ctx, l.host)
	if stale != nil || err != nil {
		l.metrics.lookupFailures.Inc()
	}
	if stale != nil {
		l.s.warner.warn("the name server does not answer; using its last answer", l.forward, "target", l.forward.Target, "addresses", fmt.Sprint(addrs), "error", stale)
	}
	if err != nil {
		l.fail(refusedResolve, r, err)
		return nil, err
	}
	to := l.s.targets(addrs, l.port)
	if len(to) == 0 {
		err := fmt.Errorf("%s is this endpoint itself: correct the target", l.forward.Target)
		l.fail(refusedDial, r, err)
		return nil, err
	}
	c, err := dial(ctx, to)
	if err == nil && l.forward.ProxyProtocol {
		if _, err = c.Write(proxyHeader(r.source, l.addr)); err != nil {
			abandon(c, true)
		}
	}
	if err != nil {
		l.fail(refusedDial, r, err)
		return nil, err
	}
	l.metrics.dial.Observe(time.Since(start).Seconds())
	return c, nil
}

func (l *tcpListener) fail(reason string, r *relay, err error) {
	if r.ended() != "" {
		return // it was no longer wanted
	}
	l.metrics.refused(reason).Inc()
	l.s.warner.warn("cannot reach the target", l.forward, "target", l.forward.Target, "source", r.source, "error", err)
}
