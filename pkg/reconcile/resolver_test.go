package reconcile_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
)

// nameServer answers what the test says, once the test lets it.
type nameServer struct {
	mu      sync.Mutex
	answers map[string][]netip.Addr
	asked   []string
	chosen  int           // answers that no later set changes
	gate    chan struct{} // nil: answer at once
}

func (n *nameServer) lookup(ctx context.Context, network, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	n.asked = append(n.asked, network+" "+host)
	gate := n.gate
	n.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.chosen++
	if a := n.answers[host]; a != nil {
		return slices.Clone(a), nil
	}
	return nil, errors.New("server misbehaving")
}

func (n *nameServer) set(host string, answer ...netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.answers[host] = answer
}

func (n *nameServer) questions() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.asked)
}

// answered waits until so many questions have got the answers of now.
func (n *nameServer) answered(t *testing.T, questions int) {
	t.Helper()
	eventually(t, "answers", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.chosen >= questions
	})
}

func newResolver() (*reconcile.Resolver, *nameServer, chan struct{}) {
	n, changed := &nameServer{answers: map[string][]netip.Addr{}}, make(chan struct{}, 100)
	return &reconcile.Resolver{Lookup: n.lookup, Changed: func() { changed <- struct{}{} }}, n, changed
}

func reached(endpoints ...string) registry.Record {
	return registry.Record{Name: "b", Endpoints: endpoints}
}

func await(t *testing.T, changed <-chan struct{}) {
	t.Helper()
	select {
	case <-changed:
	case <-time.After(patience):
		t.Fatal("Changed was not called")
	}
}

func TestResolverLiterals(t *testing.T) {
	r, n, _ := newResolver()
	v4, v6, both := addrs("198.51.100.9"), addrs("2001:db8::9"), addrs("198.51.100.9", "2001:db8::9")
	known := netip.MustParseAddrPort("203.0.113.5:5")
	for _, tt := range []struct {
		name      string
		endpoints []string
		own       []netip.Addr
		want      string // "" for none
	}{
		{"one", []string{"192.0.2.2:1"}, v4, "192.0.2.2:1"},
		{"own family first", []string{"192.0.2.2:1", "[2001:db8::2]:2"}, v6, "[2001:db8::2]:2"},
		{"the first of several", []string{"192.0.2.2:1", "192.0.2.3:1"}, v4, "192.0.2.2:1"},
		{"the preferred one, of both families", []string{"[2001:db8::2]:2", "192.0.2.2:1"}, both, "[2001:db8::2]:2"},
		{"only another family", []string{"[2001:db8::2]:2"}, v4, "[2001:db8::2]:2"},
		{"no address of our own", []string{"[2001:db8::2]:2", "192.0.2.2:1"}, nil, "[2001:db8::2]:2"},
		{"IPv4 in IPv6", []string{"[::ffff:192.0.2.2]:1"}, v4, "192.0.2.2:1"},
		{"behind NAT", nil, v4, ""},
		{"nonsense", []string{"192.0.2.2", "192.0.2.2:x"}, v4, known.String()},
		{"nonsense beside sense", []string{"192.0.2.2", "192.0.2.3:3"}, v4, "192.0.2.3:3"},
	} {
		got := r.Endpoint(t.Context(), reached(tt.endpoints...), tt.own, known, epoch)
		if tt.want == "" && got.IsValid() || tt.want != "" && got.String() != tt.want {
			t.Errorf("%s: %v, want %q", tt.name, got, tt.want)
		}
	}
	if n.questions() != 0 {
		t.Errorf("asked %v for literals", n.asked)
	}
}

// A name server that is away holds nothing up: names are looked up in the
// background, and the known endpoint stays in use.
func TestResolverNames(t *testing.T) {
	r, n, changed := newResolver()
	n.gate = make(chan struct{})
	rec, own := reached("node.example.org:1"), addrs("198.51.100.9")
	known := netip.MustParseAddrPort("203.0.113.5:1")
	ask := func(known netip.AddrPort, now time.Time) netip.AddrPort {
		return r.Endpoint(t.Context(), rec, own, known, now)
	}

	if got := ask(known, epoch); got != known { // the name server hangs
		t.Errorf("before an answer: %v, want %v", got, known)
	}
	if got := ask(netip.AddrPort{}, at(5)); got.IsValid() {
		t.Errorf("before an answer: %v, want none", got)
	}
	eventually(t, "the question", func() bool { return n.questions() == 1 }) // one, however often we ask
	n.set("node.example.org", addrs("2001:db8::2", "192.0.2.2")...)
	close(n.gate)
	await(t, changed)
	want := netip.MustParseAddrPort("192.0.2.2:1") // our family
	if got := ask(known, epoch.Add(time.Second)); got != want || n.questions() != 1 {
		t.Errorf("after the answer: %v, %d questions; want %v", got, n.questions(), want)
	}

	if got := ask(want, at(6)); got != want {
		t.Errorf("after the time to live: %v, want %v", got, want)
	}
	n.answered(t, 2)
	n.set("node.example.org", addrs("192.0.2.3")...)
	if got := ask(want, at(6).Add(29*time.Second)); got != want || n.questions() != 2 {
		t.Errorf("within the time to live: %v after %d questions", got, n.questions())
	}
	// The lookup before may still be busy: it is asked at later and later times.
	moved := netip.MustParseAddrPort("192.0.2.3:1")
	minute := 7
	eventually(t, "the moved name", func() bool { minute++; return ask(want, at(minute)) == moved })
	await(t, changed)
	n.answered(t, n.questions())

	n.set("node.example.org") // gone from the name server
	asked := n.questions()
	eventually(t, "more questions", func() bool { minute++; return ask(moved, at(minute)) == moved && n.questions() > asked+1 })
	if got := ask(moved, at(minute)); got != moved {
		t.Errorf("without a name server: %v, want %v", got, moved)
	}
	if len(changed) != 0 {
		t.Errorf("Changed was called %d times more", len(changed))
	}
}

// The order in which a name server rotates its answers changes nothing.
func TestResolverOrderOfAnswers(t *testing.T) {
	r, n, changed := newResolver()
	n.set("node.example.org", addrs("192.0.2.3", "192.0.2.2")...)
	rec, want := reached("node.example.org:1"), netip.MustParseAddrPort("192.0.2.2:1")
	r.Endpoint(t.Context(), rec, nil, netip.AddrPort{}, epoch)
	await(t, changed)
	n.answered(t, 1)
	n.set("node.example.org", addrs("192.0.2.2", "192.0.2.3")...)
	minute := 0
	eventually(t, "another look-up", func() bool {
		minute++
		if got := r.Endpoint(t.Context(), rec, nil, netip.AddrPort{}, at(minute)); got != want {
			t.Fatalf("%v, want %v", got, want)
		}
		return n.questions() > 2
	})
	if len(changed) != 0 {
		t.Error("Changed was called for the same addresses")
	}
}
