package endpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// The defaults of a Config.
const (
	DefaultIdleTimeout    = 10 * time.Minute
	DefaultUDPIdleTimeout = time.Minute
	DefaultDialTimeout    = 10 * time.Second
	DefaultDrain          = 30 * time.Second
	DefaultMaxConnections = 10000
	DefaultMaxSessions    = 4096
)

// Config describes a server. What is optional is filled in by New.
type Config struct {
	Addresses []netip.Addr // required: where every forward listens; never unspecified
	Forwards  []Forward    // required
	Metrics   *Metrics     // required
	Log       *slog.Logger // required
	Lookup    Lookup       // required: net.Resolver.LookupNetIP but in tests

	// Interface is the only one by which callers may come in; "" is any.
	Interface string

	IdleTimeout    time.Duration // optional: of a connection on which nothing moves either way; negative: none
	UDPIdleTimeout time.Duration // optional: of a UDP session
	DialTimeout    time.Duration // optional: of lookup and dial together
	// Drain is how long connections may go on once Run is told to end. 0: not at all.
	Drain          time.Duration
	MaxConnections int // optional: of all forwards together
	MaxSessions    int // optional: of UDP, of all forwards together
	// Resolve is how often the target of a UDP forward is resolved; optional.
	Resolve time.Duration
}

// Server forwards. Its methods may be called from any goroutine.
type Server struct {
	c        Config
	ingress  ingress
	resolver resolver
	pipes    pipes
	warner   warner
	sources  atomic.Pointer[Sources]
	places   chan struct{} // one for each connection
	ready    chan struct{}
	draining atomic.Bool

	mu     sync.Mutex
	tcp    []*tcpListener
	udp    []*udpListener
	relays map[*relay]*tcpListener
	work   sync.WaitGroup // connections and sessions

	sessions sessions
}

// New checks the configuration. Until SetSources is called nobody of the mesh is
// known, so that only callers listed by their address are allowed.
func New(c Config) (*Server, error) {
	if err := CheckForwards(c.Forwards); err != nil {
		return nil, err
	}
	if len(c.Addresses) == 0 {
		return nil, errors.New("no address to listen at")
	}
	for _, a := range c.Addresses {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
			return nil, fmt.Errorf("%s is no address to listen at: name one of this machine's", a)
		}
	}
	for _, d := range []struct {
		value    *time.Duration
		fallback time.Duration
	}{
		{&c.IdleTimeout, DefaultIdleTimeout},
		{&c.UDPIdleTimeout, DefaultUDPIdleTimeout},
		{&c.DialTimeout, DefaultDialTimeout},
		{&c.Resolve, 5 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.fallback
		}
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = DefaultMaxConnections
	}
	if c.MaxSessions == 0 {
		c.MaxSessions = DefaultMaxSessions
	}
	if c.MaxConnections < 0 || c.MaxSessions < 0 || c.Drain < 0 || c.UDPIdleTimeout < 0 || c.DialTimeout < 0 {
		return nil, errors.New("a limit or a time is negative")
	}
	s := &Server{
		c: c, ready: make(chan struct{}), relays: map[*relay]*tcpListener{},
		places:   make(chan struct{}, c.MaxConnections),
		resolver: resolver{lookup: c.Lookup},
		warner:   warner{log: c.Log},
	}
	s.ingress.name = c.Interface
	s.sessions.max = c.MaxSessions
	return s, nil
}

// reserve are the descriptors for what is neither a connection nor a session:
// listeners, pipes, name lookups, files and health checks.
const reserve = 2*maxPipes + 256

// Fit reduces the number of connections to what this many open files allow, and
// reports whether it had to.
func (c *Config) Fit(files uint64) bool {
	if c.MaxConnections == 0 {
		c.MaxConnections = DefaultMaxConnections
	}
	if c.MaxSessions == 0 {
		c.MaxSessions = DefaultMaxSessions
	}
	sessions := 0
	if slices.ContainsFunc(c.Forwards, func(f Forward) bool { return f.Protocol == UDP }) {
		sessions = min(c.MaxSessions, int(min(files, 1<<30))/8)
		c.MaxSessions = max(sessions, 1)
	}
	possible := max((int(min(files, 1<<30))-reserve-sessions)/2, 1)
	if c.MaxConnections <= possible {
		return false
	}
	c.MaxConnections = possible
	return true
}

// SetSources tells who is who in the mesh. Open connections of callers that are
// no longer allowed are reset.
func (s *Server) SetSources(to *Sources) {
	s.sources.Store(to)
	s.mu.Lock()
	var gone []*relay
	for r, l := range s.relays {
		if !to.allows(l.forward.Allow, r.source.Addr()) {
			gone = append(gone, r)
		}
	}
	s.mu.Unlock()
	for _, r := range gone {
		r.finish(endRefused)
	}
	s.sessions.closeIf(func(x *session) bool { return !to.allows(x.l.forward.Allow, x.client.Addr()) })
}

// Ready is closed when all listeners are open.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Health is nil while the server takes connections.
func (s *Server) Health() error {
	select {
	case <-s.ready:
	default:
		return errors.New("starting")
	}
	if s.draining.Load() {
		return errors.New("draining")
	}
	return nil
}

// Addr is where a forward listens; for tests that let the kernel choose the port.
func (s *Server) Addr(forward, address int) netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.tcp {
		if l.at == [2]int{forward, address} {
			return l.addr
		}
	}
	for _, l := range s.udp {
		if l.at == [2]int{forward, address} {
			return l.addr
		}
	}
	return netip.AddrPort{}
}

// Open is how many connections and UDP sessions there are.
func (s *Server) Open() (connections, sessions int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.relays), s.sessions.len()
}

// String names what is forwarded.
func (s *Server) String() string {
	return fmt.Sprintf("endpoint with %d forwards at %v", len(s.c.Forwards), s.c.Addresses)
}

// Run listens and forwards until ctx ends, and then until the connections have
// ended, or Drain has. Its error is that it could not listen.
func (s *Server) Run(ctx context.Context) error {
	defer s.pipes.close()
	if err := s.listen(ctx); err != nil {
		s.closeListeners()
		return err
	}
	// Connections outlive ctx; kill ends what has not ended by itself.
	life, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	var accepting, listening sync.WaitGroup
	for _, l := range s.tcp {
		accepting.Go(func() { l.accept(ctx, life) })
	}
	for _, l := range s.udp {
		listening.Go(func() { l.receive() })
		listening.Go(func() { l.follow(life) })
	}
	sweeping := make(chan struct{})
	go func() { defer close(sweeping); s.sessions.sweep(life, s.c.UDPIdleTimeout, &s.draining) }()
	s.c.Metrics.listeners.Set(float64(len(s.tcp) + len(s.udp)))
	close(s.ready)

	<-ctx.Done()
	s.draining.Store(true)
	s.c.Metrics.draining.Set(1)
	s.c.Metrics.listeners.Set(0)
	for _, l := range s.tcp {
		_ = l.Close()
	}
	s.sessions.shut()
	accepting.Wait() // from here on there is no new work
	s.drain()
	kill()
	s.closeListeners()
	listening.Wait()
	<-sweeping
	return nil
}

// drain waits for connections and sessions to end, and ends those that do not.
func (s *Server) drain() {
	connections, sessions := s.Open()
	s.c.Log.Info("draining", "connections", connections, "udpSessions", sessions, "atMost", s.c.Drain)
	done := make(chan struct{})
	go func() { s.work.Wait(); close(done) }()
	timer := time.NewTimer(s.c.Drain)
	defer timer.Stop()
	select {
	case <-done:
		return
	case <-timer.C:
	}
	s.mu.Lock()
	left := make([]*relay, 0, len(s.relays))
	for r := range s.relays {
		left = append(left, r)
	}
	s.mu.Unlock()
	if len(left) > 0 {
		s.c.Log.Warn("connections were still open; they are reset", "connections", len(left))
	}
	for _, r := range left {
		r.finish(endDrain)
	}
	s.sessions.closeIf(func(*session) bool { return true })
	<-done
}

func (s *Server) listen(ctx context.Context) error {
	for i, f := range s.c.Forwards {
		host, port, err := splitTarget(f.Target)
		if err != nil {
			return fmt.Errorf("forward %s: %w", f, err)
		}
		var places chan struct{}
		if f.MaxConnections > 0 {
			places = make(chan struct{}, f.MaxConnections)
		}
		for j, a := range s.c.Addresses {
			lc := net.ListenConfig{Control: control(a, s.c.Interface != "", f.Protocol == TCP), KeepAlive: -1}
			lc.SetMultipathTCP(false) // whose sockets do not splice
			at := net.JoinHostPort(a.String(), strconv.Itoa(int(f.Port)))
			if f.Protocol == UDP {
				c, err := lc.ListenPacket(ctx, "udp", at)
				if err != nil {
					return listenError(f, err)
				}
				u, _ := c.(*net.UDPConn)
				s.mu.Lock()
				s.udp = append(s.udp, newUDPListener(s, f, [2]int{i, j}, u, host, port))
				s.mu.Unlock()
				continue
			}
			l, err := lc.Listen(ctx, "tcp", at)
			if err != nil {
				return listenError(f, err)
			}
			t, _ := l.(*net.TCPListener)
			s.mu.Lock()
			s.tcp = append(s.tcp, &tcpListener{
				TCPListener: t, s: s, forward: f, at: [2]int{i, j}, addr: unmapped(t.Addr().(*net.TCPAddr).AddrPort()),
				host: host, port: port, places: places, metrics: s.c.Metrics.of(f),
			})
			s.mu.Unlock()
		}
	}
	return nil
}

func listenError(f Forward, err error) error {
	return fmt.Errorf("forward %s: %w: stop what uses the port, or choose another", f, err)
}

func (s *Server) closeListeners() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.tcp {
		_ = l.Close()
	}
	for _, l := range s.udp {
		_ = l.conn.Close()
	}
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// targets are the addresses to dial, without our own listeners, which would call
// themselves for ever.
func (s *Server) targets(addrs []netip.Addr, port uint16) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range interleave(addrs) {
		to := netip.AddrPortFrom(a, port)
		own := slices.ContainsFunc(s.c.Forwards, func(f Forward) bool { return f.Port == port }) && slices.Contains(s.c.Addresses, a)
		if !own {
			out = append(out, to)
		}
	}
	return out
}
