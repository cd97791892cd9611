package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"maps"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/etcd/etcdtest"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// brisk lets a Watch notice within tenths of a second what else takes seconds.
func brisk(s *Store) {
	s.timeout, s.probe, s.longest, s.costly = 2*time.Second, 50*time.Millisecond, 200*time.Millisecond, 200*time.Millisecond
}

// open returns a store that is closed at the test's end.
func open(t testing.TB, cfg Config, options ...Option) *Store {
	t.Helper()
	s := New(cfg, append([]Option{brisk}, options...)...)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// set is a change that stores value whatever is there.
func set(value string) func([]byte) ([]byte, error) {
	return func([]byte) ([]byte, error) { return []byte(value), nil }
}

func put(t testing.TB, s *Store, name, value string) {
	t.Helper()
	must(t, s.Update(t.Context(), name, set(value)))
}

// texts makes entries readable.
func texts(e registry.Entries) map[string]string {
	out := map[string]string{}
	for name, value := range e {
		out[name] = string(value)
	}
	return out
}

// reader reads a Watch.
type reader struct {
	t       *testing.T
	changes <-chan registry.Change
	seen    []registry.Change
}

func watching(t *testing.T, s *Store) *reader {
	t.Helper()
	return &reader{t: t, changes: s.Watch(t.Context())}
}

// await reads changes until one fulfils done.
func (r *reader) await(what string, done func(registry.Change) bool) registry.Change {
	r.t.Helper()
	timeout := time.After(registrytest.Deadline)
	for {
		select {
		case c, more := <-r.changes:
			if !more {
				r.t.Fatalf("channel closed while waiting for: %s", what)
			}
			r.seen = append(r.seen, c)
			if done(c) {
				return c
			}
		case <-timeout:
			r.t.Fatalf("not within %v: %s; seen: %v", registrytest.Deadline, what, r.seen)
		}
	}
}

// entries waits for exactly these: pairs of a name and a value.
func (r *reader) entries(pairs ...string) {
	r.t.Helper()
	want := map[string]string{}
	for pair := range slices.Chunk(pairs, 2) {
		want[pair[0]] = pair[1]
	}
	r.await(fmt.Sprint(want), func(c registry.Change) bool { return c.Err == nil && maps.Equal(texts(c.Entries), want) })
}

// fails waits for an error that is want, or for any if that is nil, and demands
// that it say all of parts.
func (r *reader) fails(want error, parts ...string) {
	r.t.Helper()
	got := r.await(fmt.Sprintf("an error that is %v", want), func(c registry.Change) bool {
		return c.Err != nil && (want == nil || errors.Is(c.Err, want))
	})
	says(r.t, got.Err, parts...)
}

func says(t *testing.T, err error, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error %v; want it to say %q", err, part)
		}
	}
}

// errors are the texts of all errors that were seen.
func (r *reader) errors() []string {
	var out []string
	for _, c := range r.seen {
		if c.Err != nil {
			out = append(out, c.Err.Error())
		}
	}
	return out
}

// gate is what lies between a store and etcd.
type gate struct {
	mu    sync.Mutex
	shut  bool
	conns map[net.Conn]bool
	dials int // while it was shut
}

func (g *gate) option(s *Store) {
	g.conns = map[net.Conn]bool{}
	s.options = append(s.options, grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		g.mu.Lock()
		defer g.mu.Unlock()
		if err == nil && g.shut {
			g.dials++
			conn.Close()
			return nil, fmt.Errorf("dial %s: no way today, port %d", address, g.dials)
		}
		if err == nil {
			g.conns[conn] = true
		}
		return conn, err
	}))
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut, g.dials = true, 0
	for c := range g.conns {
		c.Close()
	}
	clear(g.conns)
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = false
}

// awaitDials waits until so many attempts have failed.
func (g *gate) awaitDials(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d attempts to connect", n), func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.dials >= n
	})
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(registrytest.Deadline); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", registrytest.Deadline, what)
		}
	}
}

// counter counts a store's requests that were answered.
type counter struct {
	mu sync.Mutex
	n  map[string]int

	// after is called after each request that was no probe, and may make it fail.
	after func(kind string, n int) error
}

func (c *counter) option(s *Store) {
	c.n = map[string]int{}
	s.options = append(s.options, grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		kind := method[strings.LastIndex(method, "/")+1:]
		if r, ok := req.(*etcdserverpb.RangeRequest); ok && r.KeysOnly {
			kind = "probe"
		} else if ok && r.Limit > 0 {
			kind = "page"
		}
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.n[kind]++
		n := c.n[kind]
		c.mu.Unlock()
		if c.after != nil && kind != "probe" {
			return c.after(kind, n)
		}
		return nil
	}))
}

func (c *counter) of(kind string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[kind]
}

// noLeaks fails the test if goroutines that began during it do not end.
func noLeaks(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		deadline := time.Now().Add(registrytest.Deadline)
		for runtime.NumGoroutine() > before {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<16)
				t.Fatalf("goroutines leaked:\n%s", buf[:runtime.Stack(buf, true)])
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// compact removes all history up to now.
func compact(t *testing.T, c *clientv3.Client) {
	t.Helper()
	resp, err := c.Put(t.Context(), "elsewhere", "")
	must(t, err)
	_, err = c.Compact(t.Context(), resp.Header.Revision)
	must(t, err)
}

// shared is one server for the tests that do it no harm, each with a prefix of
// its own.
var shared struct {
	once   sync.Once
	server *etcdtest.Server
	err    error
}

func TestMain(m *testing.M) {
	m.Run()
	if shared.server != nil {
		if err := shared.server.Close(); err != nil {
			log.Fatal(err)
		}
	}
}

func sharedServer(t testing.TB) *etcdtest.Server {
	t.Helper()
	shared.once.Do(func() { shared.server, shared.err = etcdtest.Run(context.Background(), etcdtest.Options{}) })
	must(t, shared.err)
	return shared.server
}

// sharedConfig is for a place of the shared server that nobody else uses.
func sharedConfig(t testing.TB) Config {
	t.Helper()
	return Config{Endpoints: sharedServer(t).Endpoints(), Prefix: fmt.Sprintf("/%s-%d/", t.Name(), time.Now().UnixNano())}
}

func equalEntries(a registry.Entries, b map[string]string) bool {
	return maps.EqualFunc(a, b, func(a []byte, b string) bool { return bytes.Equal(a, []byte(b)) })
}
