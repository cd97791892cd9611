package endpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"golang.org/x/sys/unix"
)

var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.MustParseAddr("::1")
	everyone  = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
)

// names is a name server that the test may change.
type names struct {
	mu      sync.Mutex
	answers map[string][]netip.Addr
	err     error
	hang    chan struct{} // until it is closed there is no answer
	asked   int
}

func (n *names) set(name string, addrs ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.answers == nil {
		n.answers = map[string][]netip.Addr{}
	}
	n.answers[name] = nil
	for _, a := range addrs {
		n.answers[name] = append(n.answers[name], netip.MustParseAddr(a))
	}
}

func (n *names) fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
}

func (n *names) lookup(ctx context.Context, _, name string) ([]netip.Addr, error) {
	n.mu.Lock()
	n.asked++
	addrs, err, hang := slices.Clone(n.answers[name]), n.err, n.hang
	n.mu.Unlock()
	if hang != nil {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-hang:
		}
	}
	if err != nil {
		return nil, err
	}
	if len(addrs) == 0 {
		return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
	}
	return addrs, nil
}

// running is a server under test.
type running struct {
	*Server
	registry *prometheus.Registry
	log      *lockedBuffer
	stop     func()
	done     chan struct{}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t testing.TB, c Config) *running {
	t.Helper()
	before := runtime.NumGoroutine()
	r := &running{registry: prometheus.NewRegistry(), log: &lockedBuffer{}, done: make(chan struct{})}
	c.Metrics = NewMetrics(r.registry)
	c.Log = slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: logLevel(t)}))
	if c.Addresses == nil {
		c.Addresses = []netip.Addr{loopback4}
	}
	if c.Lookup == nil {
		c.Lookup = (&names{}).lookup
	}
	var err error
	if r.Server, err = New(c); err != nil {
		t.Fatal(err)
	}
	r.SetSources(NewSources(everyone, nil))
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() {
		defer close(r.done)
		if err := r.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-r.done
		await(t, "goroutines to end", func() error {
			if now := runtime.NumGoroutine(); now > before {
				return fmt.Errorf("%d goroutines, %d before", now, before)
			}
			return nil
		})
		if t.Failed() {
			t.Logf("log:\n%s", r.log)
		}
	})
	<-r.Ready()
	return r
}

func await(t testing.TB, what string, cond func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = cond(); err == nil {
			return
		}
	}
	t.Errorf("waited for %s: %v", what, err)
}

func (r *running) value(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	families, err := r.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var sum float64
	for _, f := range families {
		if f.GetName() != "wgcni_endpoint_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			have := map[string]bool{}
			for _, l := range m.GetLabel() {
				have[l.GetName()+"="+l.GetValue()] = true
			}
			match := true
			for _, l := range labels {
				match = match && have[l]
			}
			if match {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

func (r *running) awaitValue(t *testing.T, want float64, name string, labels ...string) {
	t.Helper()
	await(t, name, func() error {
		if got := r.value(t, name, labels...); got != want {
			return fmt.Errorf("%s %v is %v, want %v", name, labels, got, want)
		}
		return nil
	})
}

// target listens at an address, and gives every connection to serve, which closes it.
func target(t testing.TB, at string, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() { serve(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); work.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func echo(c *net.TCPConn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}

// handed gives the target's end of each connection to the test.
func handed() (chan *net.TCPConn, func(*net.TCPConn)) {
	ch := make(chan *net.TCPConn, 16)
	return ch, func(c *net.TCPConn) { ch <- c }
}

func tcpForward(to netip.AddrPort) []Forward { return []Forward{{Protocol: TCP, Target: to.String()}} }

func call(t testing.TB, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second}
	c, err := d.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

func take(t *testing.T, ch chan *net.TCPConn) *net.TCPConn {
	t.Helper()
	select {
	case c := <-ch:
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		return c
	case <-time.After(20 * time.Second):
		t.Fatal("no connection came to the target")
		return nil
	}
}

func say(t *testing.T, c io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, c io.Reader, text string) {
	t.Helper()
	buf := make([]byte, len(text))
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != text {
		t.Fatalf("heard %q, %v; want %q", buf, err, text)
	}
}

func hearEnd(t *testing.T, c io.Reader) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("heard %d bytes, %v; want the end", n, err)
	}
}

func hearReset(t *testing.T, c io.Reader) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("got %v; want a reset", err)
	}
}

// mustBeRefused calls, and wants a reset: most often it comes once the call is through.
func mustBeRefused(t *testing.T, to netip.AddrPort) {
	t.Helper()
	c, err := net.DialTimeout("tcp", to.String(), 10*time.Second)
	if errors.Is(err, unix.ECONNRESET) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	hearReset(t, c)
}

func talk(t *testing.T, c *net.TCPConn) {
	t.Helper()
	say(t, c, "hello")
	hear(t, c, "hello")
}

func TestHalfClose(t *testing.T) {
	ch, serve := handed()
	s := start(t, Config{Forwards: tcpForward(target(t, "127.0.0.1:0", serve))})
	for _, clientFirst := range []bool{true, false} {
		client := call(t, s.Addr(0, 0))
		first, second := client, take(t, ch)
		if !clientFirst {
			first, second = second, first
		}
		say(t, first, "all I have to say")
		if err := first.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		hear(t, second, "all I have to say")
		hearEnd(t, second)
		// The other way stays open for as long as it takes.
		for range 3 {
			say(t, second, "answer")
			hear(t, first, "answer")
		}
		second.Close()
		hearEnd(t, first)
	}
	s.awaitValue(t, 2, "closed_total", "how=closed")
	s.awaitValue(t, 0, "connections_open")
}

func TestReset(t *testing.T) {
	ch, serve := handed()
	s := start(t, Config{Forwards: tcpForward(target(t, "127.0.0.1:0", serve))})
	reset := func(c *net.TCPConn) {
		_ = c.SetLinger(0)
		c.Close()
	}
	pair := func() (client, far *net.TCPConn) {
		client = call(t, s.Addr(0, 0))
		far = take(t, ch)
		say(t, client, "x")
		hear(t, far, "x")
		return client, far
	}
	t.Run("of the caller", func(t *testing.T) {
		client, far := pair()
		reset(client)
		hearReset(t, far)
	})
	t.Run("of the target", func(t *testing.T) {
		client, far := pair()
		reset(far)
		hearReset(t, client)
	})
	// Nobody reads from the caller any more, who says nothing.
	t.Run("of the caller behind its FIN", func(t *testing.T) {
		client, far := pair()
		_ = client.CloseWrite()
		hearEnd(t, far)
		reset(client)
		await(t, "the reset", func() error {
			if _, err := far.Write([]byte("x")); err == nil {
				return errors.New("the target could write")
			}
			return nil
		})
	})
	t.Run("of the target, which had said something", func(t *testing.T) {
		client, far := pair()
		say(t, far, "go away")
		hear(t, client, "go away")
		far.Close() // with unread bytes, or more to come: a RST
		await(t, "the caller to notice", func() error {
			if _, err := client.Write(make([]byte, 1<<16)); err == nil {
				return errors.New("it could write")
			}
			return nil
		})
	})
	s.awaitValue(t, 4, "closed_total", "how=reset")
	s.awaitValue(t, 0, "connections_open")
}

func TestIdleTimeout(t *testing.T) {
	ch, serve := handed()
	const idle = 300 * time.Millisecond
	s := start(t, Config{Forwards: tcpForward(target(t, "127.0.0.1:0", serve)), IdleTimeout: idle})
	client := call(t, s.Addr(0, 0))
	far := take(t, ch)
	// One direction alone is enough to keep it: three times the timeout.
	for begin := time.Now(); time.Since(begin) < 3*idle; time.Sleep(idle / 6) {
		say(t, far, "tick")
		hear(t, client, "tick")
	}
	last := time.Now()
	hearReset(t, client)
	hearReset(t, far)
	if d := time.Since(last); d < idle/2 {
		t.Errorf("ended after %s, want %s", d, idle)
	}
	s.awaitValue(t, 1, "closed_total", "how=idle")
}

func TestTargetsThatAreNotThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	s := start(t, Config{Forwards: []Forward{
		{Protocol: TCP, Target: nobody.String()}, {Protocol: TCP, Target: "nobody.example:1"},
	}})
	mustBeRefused(t, s.Addr(0, 0))
	mustBeRefused(t, s.Addr(1, 0))
	s.awaitValue(t, 1, "refused_total", "reason=dial")
	s.awaitValue(t, 1, "refused_total", "reason=resolve")
	if log := s.log.String(); !strings.Contains(log, "cannot reach the target") || !strings.Contains(log, "nobody.example") {
		t.Errorf("the log does not say what failed:\n%s", log)
	}
}

// A target that is the endpoint itself would call itself until no descriptor is left.
func TestNoLoop(t *testing.T) {
	port := freePort(t)
	n := &names{}
	n.set("self.example", "127.0.0.1")
	s := start(t, Config{Lookup: n.lookup, Forwards: []Forward{{Protocol: TCP, Port: port, Target: fmt.Sprintf("self.example:%d", port)}}})
	mustBeRefused(t, s.Addr(0, 0))
	s.awaitValue(t, 1, "connections_total")
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func TestPortTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := New(Config{
		Addresses: []netip.Addr{loopback4}, Lookup: (&names{}).lookup, Metrics: NewMetrics(prometheus.NewRegistry()),
		Log: slog.New(slog.DiscardHandler), Forwards: []Forward{{Protocol: TCP, Port: l.Addr().(*net.TCPAddr).AddrPort().Port(), Target: "127.0.0.1:1"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "choose another") {
		t.Errorf("got %v", err)
	}
}

// Callers must come in by the interface; here all do by lo.
func TestIngress(t *testing.T) {
	to := target(t, "127.0.0.1:0", echo)
	for _, tt := range []struct {
		iface string
		ok    bool
	}{{"", true}, {"lo", true}, {"wgcni-none0", false}} {
		s := start(t, Config{
			Addresses: []netip.Addr{loopback4, loopback6}, Interface: tt.iface,
			Forwards: append(tcpForward(to), Forward{Protocol: UDP, Target: udpEcho(t).String()}),
		})
		for family := range 2 {
			u := dialUDP(t, s.Addr(1, family))
			if tt.ok {
				talk(t, call(t, s.Addr(0, family)))
				talkUDP(t, u)
				continue
			}
			mustBeRefused(t, s.Addr(0, family))
			say(t, u, "x")
		}
		if !tt.ok {
			s.awaitValue(t, 2, "refused_total", "reason=interface", "forward=tcp/0")
			s.awaitValue(t, 2, "refused_total", "reason=interface", "forward=udp/0")
		}
		s.stop()
		<-s.done
	}
}

func TestAllowListChanges(t *testing.T) {
	f := tcpForward(target(t, "127.0.0.1:0", echo))
	f[0].Allow = Allow{Names: []string{"laptop"}}
	s := start(t, Config{Forwards: f})
	machine := func(name string) *Sources {
		return NewSources(everyone, map[string][]netip.Prefix{name: {netip.MustParsePrefix("127.0.0.1/32")}, "node": {netip.MustParsePrefix("127.0.0.0/8")}})
	}
	mustBeRefused(t, s.Addr(0, 0))
	s.SetSources(machine("laptop"))
	c := call(t, s.Addr(0, 0))
	talk(t, c)
	s.SetSources(machine("laptop")) // the same again disturbs nobody
	talk(t, c)
	s.SetSources(machine("other"))
	hearReset(t, c)
	mustBeRefused(t, s.Addr(0, 0))
	s.awaitValue(t, 1, "closed_total", "how=refused")
	s.awaitValue(t, 2, "refused_total", "reason=source")
	if log := s.log.String(); !strings.Contains(log, "msg=refused") {
		t.Errorf("refusals are not logged:\n%s", log)
	}
}

// At the limit callers wait, and find a place when there is one.
func TestConnectionLimit(t *testing.T) {
	to := target(t, "127.0.0.1:0", echo)
	for name, c := range map[string]Config{
		"of all":         {MaxConnections: 2, Forwards: tcpForward(to)},
		"of the forward": {Forwards: []Forward{{Protocol: TCP, Target: to.String(), MaxConnections: 2}}},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, c)
			a, b := call(t, s.Addr(0, 0)), call(t, s.Addr(0, 0))
			talk(t, a)
			talk(t, b)
			waiting := call(t, s.Addr(0, 0))
			say(t, waiting, "hello")
			s.awaitValue(t, 1, "accept_waiting")
			if open, _ := s.Open(); open != 2 {
				t.Errorf("%d connections are open, want 2", open)
			}
			a.Close()
			hear(t, waiting, "hello")
			s.awaitValue(t, 0, "accept_waiting")
		})
	}
}

func TestDrain(t *testing.T) {
	to := target(t, "127.0.0.1:0", echo)
	s := start(t, Config{Forwards: tcpForward(to), Drain: 700 * time.Millisecond})
	quick, slow := call(t, s.Addr(0, 0)), call(t, s.Addr(0, 0))
	talk(t, quick)
	talk(t, slow)
	at := s.Addr(0, 0)
	begin := time.Now()
	s.stop()
	await(t, "the listener to be closed", func() error {
		c, err := net.Dial("tcp", at.String())
		if err == nil {
			c.Close()
			return errors.New("it is open")
		}
		return nil
	})
	if err := s.Health(); err == nil || err.Error() != "draining" {
		t.Errorf("health while draining: %v", err)
	}
	talk(t, quick)
	talk(t, slow)
	_ = quick.CloseWrite()
	hearEnd(t, quick)
	hearReset(t, slow)
	<-s.done
	if d := time.Since(begin); d < 600*time.Millisecond || d > 10*time.Second {
		t.Errorf("drained in %s, want 700 ms", d)
	}
	s.awaitValue(t, 1, "closed_total", "how=drain")

	s = start(t, Config{Forwards: tcpForward(to), Drain: time.Hour})
	c := call(t, s.Addr(0, 0))
	talk(t, c)
	s.stop()
	await(t, "draining", func() error {
		if s.Health() == nil {
			return errors.New("not yet")
		}
		return nil
	})
	c.Close()
	<-s.done // at once, not after an hour
}

func TestMetricsAreWellFormed(t *testing.T) {
	s := start(t, Config{Forwards: append(tcpForward(target(t, "127.0.0.1:0", echo)), Forward{Protocol: UDP, Target: "127.0.0.1:9"})})
	c := call(t, s.Addr(0, 0))
	talk(t, c)
	s.awaitValue(t, 5, "bytes_total", "direction=in")
	s.awaitValue(t, 5, "bytes_total", "direction=out")
	s.awaitValue(t, 1, "dial_seconds")
	s.awaitValue(t, 2, "listeners")
	families, err := s.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// logLevel has tests log everything, and benchmarks what a server logs.
func logLevel(t testing.TB) slog.Level {
	if _, ok := t.(*testing.B); ok {
		return slog.LevelInfo
	}
	return slog.LevelDebug
}
