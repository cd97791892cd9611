package reconcile_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// The tests' world: this node is a, and b, c, … are others. 10.244.n.0/24 is the
// range of the n-th node, 192.0.2.n its address. 10.244.200.0/24 is nobody's:
// pods there are announced one by one.
var (
	epoch     = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	keyA      = wgtypes.Key{1}
	outsider  = netip.MustParseAddr("10.244.200.7")
	neighbour = netip.MustParseAddr("10.244.200.6")
	ethernet  = underlay("192.0.2.1")
	private   = netip.MustParseAddr("198.51.100.7")
)

// byValue lets cmp.Diff compare what has no exported fields.
var byValue = cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}, netip.AddrPort{})

func at(minutes int) time.Time { return epoch.Add(time.Duration(minutes) * time.Minute) }

func addrs(in ...string) (out []netip.Addr) {
	for _, s := range in {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(in ...string) (out []netip.Prefix) {
	for _, s := range in {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func claims(since time.Time, in ...string) (out []mesh.Claim) {
	for _, p := range prefixes(in...) {
		out = append(out, mesh.Claim{Prefix: p, Since: since})
	}
	return out
}

func underlay(in ...string) kernel.Underlay {
	return kernel.Underlay{Addresses: addrs(in...), All: addrs(in...), MTU: 1500}
}

// number is 1 for a, 2 for b.
func number(node string) int { return int(node[0]-'a') + 1 }

func digits(node string) string { return string(rune('0' + number(node))) }

// record is what another node publishes.
func record(node string) registry.Record {
	return registry.Record{
		Name: node, PublicKey: wgtypes.Key{byte(number(node))}, Revision: 10, Since: epoch,
		Endpoints: []string{"192.0.2." + digits(node) + ":51820"},
		Addresses: addrs("192.0.2." + digits(node)),
		Prefixes:  claims(epoch, "10.244."+digits(node)+".0/24"),
	}
}

func tombstone(node string, revision uint64) registry.Record {
	return registry.Record{Name: node, Left: true, Revision: revision}
}

func pod(id string, addresses ...netip.Addr) store.Attachment {
	return store.Attachment{Network: "pods", ContainerID: id, IfName: "eth0", Addresses: addresses}
}

func testConfig(t *testing.T) config.Config {
	t.Helper()
	return config.Config{
		Name: "pods", NodeName: "a",
		Settings: mesh.Settings{
			ClusterCIDRs: prefixes("10.244.0.0/16"), Interface: "wgcni0", ListenPort: 51820,
			FwMark: 0x4, Table: 77, RulePriority: 110,
		},
		PodCIDRs: prefixes("10.244.1.0/24"),
		RunDir:   t.TempDir(), StateDir: t.TempDir(),
	}
}

// fakeKernel is a kernel in memory with the hooks that the tests need.
type fakeKernel struct {
	*kerneltest.Kernel
	events chan kernel.Event

	mu       sync.Mutex
	underlay kernel.Underlay
	heard    map[wgtypes.Key]kernel.Handshake
	observed int         // how often
	applied  [][]mesh.Op // the calls that had something to do
	greeted  []wgtypes.Key
	cutOff   bool
	// onObserve and onApply are called before the kernel is; the latter's error
	// is Apply's.
	onObserve func()
	onApply   func([]mesh.Op) error
}

func newKernel() *fakeKernel {
	k := &fakeKernel{Kernel: &kerneltest.Kernel{}, events: make(chan kernel.Event), underlay: ethernet}
	k.Name = func(key wgtypes.Key) string {
		if key[0] == 0 || key != (wgtypes.Key{key[0]}) {
			return ""
		}
		return string(rune('a' + key[0] - 1))
	}
	return k
}

func (k *fakeKernel) Observe() (mesh.State, error) {
	k.mu.Lock()
	k.observed++
	hook := k.onObserve
	k.mu.Unlock()
	if hook != nil {
		hook()
	}
	return k.Kernel.Observe()
}

func (k *fakeKernel) Apply(ops []mesh.Op) error {
	if len(ops) == 0 {
		return nil
	}
	k.mu.Lock()
	k.applied = append(k.applied, ops)
	hook := k.onApply
	k.mu.Unlock()
	if hook != nil {
		if err := hook(ops); err != nil {
			return err
		}
	}
	return k.Kernel.Apply(ops)
}

func (k *fakeKernel) Watch(ctx context.Context) (<-chan kernel.Event, error) {
	out := make(chan kernel.Event)
	go func() {
		defer close(out)
		for {
			select {
			case e := <-k.events:
				select {
				case out <- e:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

func (k *fakeKernel) Underlay() (kernel.Underlay, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.underlay, nil
}

// Handshakes are those that the test says there were, and the bytes that the
// kernel below has counted.
func (k *fakeKernel) Handshakes() (map[wgtypes.Key]kernel.Handshake, error) {
	received, err := k.Received()
	k.mu.Lock()
	defer k.mu.Unlock()
	out := map[wgtypes.Key]kernel.Handshake{}
	for peer, bytes := range received {
		out[peer] = kernel.Handshake{Received: bytes}
	}
	maps.Copy(out, k.heard)
	return out, err
}

// HandshakesOn the spare plane are none: the tests of rotations have nodes of their own.
func (k *fakeKernel) HandshakesOn(p mesh.Plane) (map[wgtypes.Key]kernel.Handshake, error) {
	if p == mesh.Spare {
		return nil, nil
	}
	return k.Handshakes()
}

func (k *fakeKernel) Wave(netip.Addr, netip.Addr) error { return nil }

func (k *fakeKernel) Uplink() (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.cutOff, nil
}

func (k *fakeKernel) Greet(peers []wgtypes.Key, _ time.Duration) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.greeted = append(k.greeted, peers...)
	return nil
}

// MTUOf knows one more interface, of a private network.
func (k *fakeKernel) MTUOf(a netip.Addr) (int, error) {
	if a == private {
		return 1450, nil
	}
	return 0, nil
}

func (k *fakeKernel) set(f func(*fakeKernel)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(k)
}

func (k *fakeKernel) observations() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.observed
}

// calls are the non-empty Applies so far.
func (k *fakeKernel) calls() [][]mesh.Op {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.applied)
}

// fakeRegistry is a registry that the tests rule: a real one, in a fake store.
type fakeRegistry struct {
	*registry.Registry

	mu        sync.Mutex
	records   map[string]registry.Record
	raw       map[string]string // what else is stored
	away      error             // of reading and of publishing
	published []registry.Record
	changed   chan struct{} // closed and replaced at every change
	silent    chan struct{} // watches tell nothing before it is closed; optional
	// onPublish, if set, is called before a record is taken; its error is Publish's.
	onPublish func(registry.Record) error
}

var errAway = errors.New("no route to host")

func newRegistry(records ...registry.Record) *fakeRegistry {
	r := &fakeRegistry{records: map[string]registry.Record{}, changed: make(chan struct{})}
	for _, rec := range records {
		r.records[rec.Name] = rec
	}
	r.Registry = registry.New(fakeStore{r}, registry.Trust{})
	return r
}

// set changes the registry, as an administrator or other nodes do.
func (r *fakeRegistry) set(f func(*fakeRegistry)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(r)
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *fakeRegistry) put(rec registry.Record) {
	r.set(func(r *fakeRegistry) { r.records[rec.Name] = rec })
}

// own is this node's record in the registry.
func (r *fakeRegistry) own() (registry.Record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, ok := r.records["a"]
	return rec, ok
}

// publications are the records that Publish was offered.
func (r *fakeRegistry) publications() []registry.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.published)
}

func (r *fakeRegistry) Publish(ctx context.Context, rec registry.Record, seen uint64) error {
	r.mu.Lock()
	r.published = append(r.published, rec)
	hook := r.onPublish
	r.mu.Unlock()
	if hook != nil {
		if err := hook(rec); err != nil {
			return err
		}
	}
	return r.Registry.Publish(ctx, rec, seen)
}

// fakeStore is the store of a fakeRegistry.
type fakeStore struct{ r *fakeRegistry }

func (fakeStore) String() string { return "fake:" }

func (s fakeStore) state() (registry.Change, <-chan struct{}) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	return s.locked()
}

func (s fakeStore) locked() (registry.Change, <-chan struct{}) {
	if s.r.away != nil {
		return registry.Change{Err: s.r.away}, s.r.changed
	}
	entries := registry.Entries{}
	for name, rec := range s.r.records {
		text, err := json.Marshal(rec)
		if err != nil {
			return registry.Change{Err: err}, s.r.changed
		}
		entries[name] = text
	}
	for name, text := range s.r.raw {
		entries[name] = []byte(text)
	}
	return registry.Change{Entries: entries}, s.r.changed
}

func (s fakeStore) Entries(context.Context) (registry.Entries, error) {
	c, _ := s.state()
	return c.Entries, c.Err
}

func (s fakeStore) Update(_ context.Context, name string, change func([]byte) ([]byte, error)) error {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	c, _ := s.locked()
	if c.Err != nil {
		return c.Err
	}
	text, err := change(c.Entries[name])
	if err != nil || text == nil {
		return err
	}
	rec, err := registry.Decode(name, text)
	if err != nil {
		return err
	}
	s.r.records[name] = rec
	delete(s.r.raw, name)
	close(s.r.changed)
	s.r.changed = make(chan struct{})
	return nil
}

func (s fakeStore) Watch(ctx context.Context) <-chan registry.Change {
	out := make(chan registry.Change)
	go func() {
		defer close(out)
		s.r.mu.Lock()
		silent := s.r.silent
		s.r.mu.Unlock()
		if silent != nil {
			select {
			case <-silent:
			case <-ctx.Done():
				return
			}
		}
		for {
			c, changed := s.state()
			select {
			case out <- c:
			case <-ctx.Done():
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// logLines keeps what was logged, as JSON lines.
type logLines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logLines) logger() *slog.Logger { return slog.New(slog.NewJSONHandler(l, nil)) }

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// count is the number of lines whose message begins so; "" counts all.
func (l *logLines) count(message string) int {
	n := 0
	for line := range strings.Lines(l.String()) {
		var entry struct{ Msg string }
		if json.Unmarshal([]byte(line), &entry) == nil && strings.HasPrefix(entry.Msg, message) {
			n++
		}
	}
	return n
}

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

// eventually waits until the condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still waiting after %v: %s", patience, what)
		}
	}
}

// inStore works on the store of this boot as another process would.
func inStore(t *testing.T, c config.Config, f func(*store.Attachments) error) {
	t.Helper()
	st, err := store.OpenAttachments(t.Context(), c.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f(st), st.Close()); err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, c config.Config, pods ...store.Attachment) {
	t.Helper()
	inStore(t, c, func(st *store.Attachments) error {
		for _, p := range pods {
			if err := st.Put(p); err != nil {
				return err
			}
		}
		return nil
	})
}

// errInStore is inStore for goroutines that are not the test's own.
func errInStore(c config.Config, f func(*store.Attachments) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	st, err := store.OpenAttachments(ctx, c.RunDir)
	if err != nil {
		return err
	}
	return errors.Join(f(st), st.Close())
}
