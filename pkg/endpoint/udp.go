package endpoint

import (
	"container/list"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// udpListener is one forward at one address. Its one socket is bound to that
// address, so that answers leave with the source that the caller called.
type udpListener struct {
	s       *Server
	forward Forward
	at      [2]int
	addr    netip.AddrPort
	conn    *net.UDPConn
	host    string
	port    uint16
	metrics forwardMetrics

	target atomic.Pointer[netip.AddrPort] // for new sessions; nil while there is none
	first  chan struct{}                  // closed when the target was looked up once
	again  chan struct{}                  // asks for another lookup
}

// datagram is the largest there is, in bytes; udpBacklog is what may wait to be
// received, if the system allows it (net.core.rmem_max).
const (
	datagram   = 1 << 16
	udpBacklog = 2 << 20
)

var datagrams = sync.Pool{New: func() any { return new([datagram]byte) }}

func newUDPListener(s *Server, f Forward, at [2]int, c *net.UDPConn, host string, port uint16) *udpListener {
	_ = c.SetReadBuffer(udpBacklog)
	addr, _ := c.LocalAddr().(*net.UDPAddr)
	return &udpListener{
		s: s, forward: f, at: at, addr: unmapped(addr.AddrPort()), conn: c, host: host, port: port, metrics: s.c.Metrics.of(f),
		first: make(chan struct{}), again: make(chan struct{}, 1),
	}
}

// follow looks the target up again and again. Sessions with an address that the
// answer no longer has are closed: their caller's next datagram begins another.
func (l *udpListener) follow(life context.Context) {
	_, literal := netip.ParseAddr(l.host)
	for first := true; ; first = false {
		l.lookup(life)
		if first {
			close(l.first)
		}
		if literal == nil {
			return
		}
		timer := time.NewTimer(l.s.c.Resolve)
		select {
		case <-life.Done():
			timer.Stop()
			return
		case <-l.again:
			// A crowd of refusals is one reason, not many.
			timer.Stop()
			if !pause(life, min(l.s.c.Resolve, time.Second)) {
				return
			}
		case <-timer.C:
		}
	}
}

func (l *udpListener) lookup(ctx context.Context) {
	addrs, stale, err := l.s.resolver.resolve(ctx, l.host)
	if ctx.Err() != nil {
		return
	}
	if stale != nil || err != nil {
		l.metrics.lookupFailures.Inc()
		l.s.warner.warn("cannot resolve the target; using its last answer if there was one", l.forward, "target", l.forward.Target, "error", errors.Join(stale, err))
	}
	var gone *net.DNSError
	if err != nil && (!errors.As(err, &gone) || !gone.IsNotFound) {
		return
	}
	to := l.s.targets(addrs, l.port)
	if len(to) == 0 {
		l.target.Store(nil)
	} else {
		l.target.Store(&to[0])
	}
	l.s.sessions.closeIf(func(x *session) bool { return x.l == l && !slices.Contains(to, x.target) })
}

// receive relays what callers send, until the listener is closed.
func (l *udpListener) receive() {
	<-l.first
	buf, oob := make([]byte, datagram), make([]byte, 256)
	for {
		n, oobn, _, from, err := l.conn.ReadMsgUDPAddrPort(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of an answer that was sent before
		}
		from = unmapped(from)
		switch {
		case !l.s.ingress.ok(controlIndex(oob[:oobn])):
			l.refuse(refusedInterface, from)
		case !l.s.sources.Load().allows(l.forward.Allow, from.Addr()):
			l.refuse(refusedSource, from)
		default:
			l.relay(from, buf[:n])
		}
	}
}

func (l *udpListener) refuse(reason string, from netip.AddrPort) {
	l.metrics.refused(reason).Inc()
	l.s.warner.warn("refused", l.forward, "source", from, "machine", l.s.sources.Load().Owner(from.Addr()), "reason", reason)
}

func (l *udpListener) relay(from netip.AddrPort, payload []byte) {
	x := l.s.sessions.use(l, from)
	if x == nil {
		target := l.target.Load()
		if target == nil {
			l.refuse(refusedResolve, from)
			return
		}
		conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(*target))
		if err != nil {
			l.refuse(refusedSocket, from)
			return
		}
		x = &session{l: l, client: from, conn: conn, target: *target}
		if !l.s.begin(x) {
			_ = conn.Close()
			l.metrics.refused(refusedDrain).Inc()
			return
		}
	}
	_, err := x.conn.Write(payload)
	if errors.Is(err, unix.ECONNREFUSED) { // that was the answer to an earlier one
		l.lookAgain()
		_, err = x.conn.Write(payload)
	}
	if err == nil {
		l.metrics.datagramsIn.Inc()
		l.metrics.in.Add(float64(len(payload)))
	}
}

func (l *udpListener) lookAgain() {
	select {
	case l.again <- struct{}{}:
	default:
	}
}

// session is one caller of one forward, with a socket of its own to the target.
type session struct {
	l      *udpListener
	client netip.AddrPort
	conn   *net.UDPConn
	target netip.AddrPort

	// Of the sessions' mutex.
	last  int64 // when a datagram passed, either way; see monotonic
	place *list.Element
}

// begin enters a session and relays its answers. It is false while draining.
func (s *Server) begin(x *session) bool {
	evicted, ok := s.sessions.enter(x, &s.work)
	if !ok {
		return false
	}
	if evicted != nil {
		_ = evicted.conn.Close()
		s.c.Metrics.evicted.Inc()
		s.warner.warn("as many UDP sessions as may be; the longest silent one made room", x.l.forward, "limit", s.sessions.max)
	}
	s.c.Metrics.sessions.Inc()
	go func() {
		defer s.work.Done()
		x.answers()
		_ = x.conn.Close()
		s.sessions.remove(x)
		s.c.Metrics.sessions.Dec()
	}()
	return true
}

// answers relays what the target sends, until the session's socket is closed.
// The memory for a datagram is borrowed when there is one.
func (x *session) answers() {
	raw, err := x.conn.SyscallConn()
	if err != nil {
		return
	}
	var buf *[datagram]byte
	var n int
	var failed error
	read := func(fd uintptr) bool {
		buf, _ = datagrams.Get().(*[datagram]byte)
		n, failed = retry(func() (int, error) { return unix.Read(int(fd), buf[:]) })
		if errors.Is(failed, unix.EAGAIN) {
			datagrams.Put(buf)
			return false
		}
		return true
	}
	for {
		if err := raw.Read(read); err != nil {
			return
		}
		switch {
		case failed == nil:
			if _, err := x.l.conn.WriteToUDPAddrPort(buf[:n], x.client); err == nil {
				x.l.metrics.datagramsOut.Inc()
				x.l.metrics.out.Add(float64(n))
			}
			x.l.s.sessions.use(x.l, x.client)
		case errors.Is(failed, unix.ECONNREFUSED): // nobody listens there: has it moved?
			x.l.lookAgain()
		}
		datagrams.Put(buf)
	}
}

// sessions are those of all forwards, in the order of their last use.
type sessions struct {
	max int

	mu     sync.Mutex
	table  map[sessionKey]*session
	order  list.List // the latest in front
	closed bool      // no more are let in
}

type sessionKey struct {
	l      *udpListener
	client netip.AddrPort
}

// use returns a caller's session, which becomes the latest; nil if there is none.
func (t *sessions) use(l *udpListener, client netip.AddrPort) *session {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.table[sessionKey{l, client}]
	if x != nil {
		x.last = monotonic()
		t.order.MoveToFront(x.place)
	}
	return x
}

// enter lets a session in, and out the one that was silent longest if they are too many.
func (t *sessions) enter(x *session, work *sync.WaitGroup) (evicted *session, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, false
	}
	if len(t.table) >= t.max {
		evicted, _ = t.order.Back().Value.(*session)
		t.drop(evicted)
	}
	if t.table == nil {
		t.table = map[sessionKey]*session{}
	}
	x.last = monotonic()
	x.place = t.order.PushFront(x)
	t.table[sessionKey{x.l, x.client}] = x
	work.Add(1)
	return evicted, true
}

// drop takes a session out, if it still is in.
func (t *sessions) drop(x *session) {
	if key := (sessionKey{x.l, x.client}); t.table[key] == x {
		delete(t.table, key)
		t.order.Remove(x.place)
	}
}

func (t *sessions) remove(x *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drop(x)
}

func (t *sessions) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.table)
}

// shut lets no more in.
func (t *sessions) shut() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
}

func (t *sessions) closeIf(gone func(*session) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, x := range t.table {
		if gone(x) {
			t.drop(x)
			_ = x.conn.Close()
		}
	}
}

// drainQuiet is how long a session must have been silent to be over when the
// server is to end: UDP has no end of its own.
const drainQuiet = 2 * time.Second

// sweep ends sessions that have been silent for idle.
func (t *sessions) sweep(life context.Context, idle time.Duration, draining *atomic.Bool) {
	for pause(life, min(idle/4, time.Second)) {
		silent := idle
		if draining.Load() {
			silent = min(idle, drainQuiet)
		}
		t.mu.Lock()
		for e := t.order.Back(); e != nil; e = t.order.Back() {
			x, _ := e.Value.(*session)
			if monotonic()-x.last < int64(silent) {
				break
			}
			t.drop(x)
			_ = x.conn.Close()
		}
		t.mu.Unlock()
	}
}
