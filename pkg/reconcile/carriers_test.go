package reconcile_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
)

// Sizes of WireGuard's messages, in bytes.
const (
	initiation = 148
	response   = 92
	keepalive  = 32
)

// peerRecord is a laptop that was added at epoch and enters by these nodes.
func peerRecord(via ...string) registry.Record {
	return registry.Record{
		Name: "z", PublicKey: wgtypes.Key{26}, Revision: 10, Since: epoch,
		Prefixes: claims(epoch, "10.99.0.1/32", "fd99::1/128"), Place: registry.Place{Via: via},
	}
}

func secs(n int) time.Time { return epoch.Add(time.Duration(n) * time.Second) }

// A site is a mesh of entry nodes in which the laptop calls one after the other,
// and claims take no time to spread.
type site struct {
	t       *testing.T
	laptop  registry.Record
	now     time.Time
	ahead   map[string]time.Duration // by which a node's clock is
	records registry.Snapshot
	heard   map[string][3]kernel.Handshake // at the last looks of each node
}

func newSite(t *testing.T, laptop registry.Record, nodes ...string) *site {
	t.Helper()
	s := &site{
		t: t, laptop: laptop, now: epoch, ahead: map[string]time.Duration{}, heard: map[string][3]kernel.Handshake{},
		records: registry.NewSnapshot(laptop),
	}
	for _, n := range nodes {
		s.records.Nodes[n] = new(record(n))
	}
	return s
}

// hears has a node's WireGuard hear of the laptop: a handshake, and so many bytes.
func (s *site) hears(node string, bytes int64) {
	h := s.heard[node]
	h[0] = kernel.Handshake{At: s.now.Add(s.ahead[node]), Received: h[0].Received + bytes}
	s.heard[node] = h
}

// step lets a second pass: every node looks, in turn.
func (s *site) step() {
	for _, name := range []string{"a", "b", "c"} {
		own, known := s.records.Record(name)
		if !known {
			continue
		}
		h := s.heard[name]
		e := reconcile.Entry{
			Name: name, PeerCIDRs: prefixes("10.99.0.0/24", "fd99::/64"), Records: s.records, Before: own.Pods,
			Heard: looked(h[0]), HeardBefore: looked(h[2]),
		}
		now := s.now.Add(s.ahead[name])
		own.Pods = e.Carried(now)
		s.records.Nodes[name] = &own
		e.Before = own.Pods
		if again := e.Carried(now); !slices.Equal(again, own.Pods) {
			s.t.Errorf("%s at %v: claims %v, and asked again %v", name, s.now, own.Pods, again)
		}
		s.heard[name] = [3]kernel.Handshake{h[0], h[0], h[1]}
	}
	s.now = s.now.Add(time.Second)
}

func looked(h kernel.Handshake) map[wgtypes.Key]kernel.Handshake {
	out := map[wgtypes.Key]kernel.Handshake{}
	if !h.At.IsZero() {
		out[peerRecord().PublicKey] = h
	}
	return out
}

// carrier is who carries the laptop, as all nodes decide, and who claims to.
func (s *site) carrier() (by string, claimants string) {
	var nodes []mesh.Node
	for _, r := range s.records.Records() {
		if r.Left {
			continue
		}
		nodes = append(nodes, mesh.Node{Name: r.Name, PublicKey: r.PublicKey, Prefixes: r.Prefixes, Pods: r.Pods, Since: r.Since, Via: r.Via})
		if len(r.Pods) > 0 {
			claimants += r.Name
		}
	}
	bounds := mesh.Bounds{Cluster: prefixes("10.244.0.0/16"), Peer: prefixes("10.99.0.0/24", "fd99::/64")}
	return mesh.Owners(nodes, bounds, nil).Carrier["z"], claimants
}

func (s *site) want(by string) {
	s.t.Helper()
	if got, _ := s.carrier(); got != by {
		s.t.Errorf("at %ds it is carried by %q; want %q", int(s.now.Sub(epoch).Seconds()), got, by)
	}
}

// Each letter is a second; what stands there happens in it:
//
//	A B C  the laptop calls that node, which hears an initiation and a keepalive
//	r      the laptop's session with its last node is renewed
//	x y    a (or b) calls the laptop, which answers
//	.      nothing
//
// The line below tells who carries the laptop when the second is over.
func TestCarriedFollowsTheCalls(t *testing.T) {
	for _, tt := range []struct {
		name, calls, carrier string
		via                  string
		ahead                map[string]time.Duration
	}{
		{name: "the first carries it before it has called", calls: "...A..", carrier: "aaaaaa"},
		{name: "another is called", calls: ".A..B..", carrier: "aaaabbb"},
		{name: "and the first again", calls: ".A..B..A..", carrier: "aaaabbbaaa"},
		{name: "renewed sessions change nothing", calls: "A.r.B.r.r", carrier: "aaaabbbbb"},
		{name: "in a row", calls: "ABCBA", carrier: "abcba"},
		{name: "a node calls that thinks it carries the laptop", calls: "A..B...x..x", carrier: "aaabbbbbbbb"},
		{name: "the second preferred", calls: "..A.B", carrier: "bbaab", via: "ba"},
		{name: "a clock that is ahead", calls: ".A..B..A.B.", carrier: "aaaabbbaabb", ahead: map[string]time.Duration{"a": time.Minute}},
		{name: "a clock that is behind", calls: ".A..B..A.B.", carrier: "aaaabbbaabb", ahead: map[string]time.Duration{"b": -time.Minute}},
		{name: "one behind that carries from the start", calls: ".A..B..A.B.", carrier: "aaaabbbaabb", ahead: map[string]time.Duration{"a": -time.Minute}},
		{name: "a node that is none of its own", calls: ".A.C.", carrier: "aaaaa", via: "ab"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			via := tt.via
			if via == "" {
				via = "abc"
			}
			s := newSite(t, peerRecord(strings.Split(via, "")...), "a", "b", "c")
			if tt.ahead != nil {
				s.ahead = tt.ahead
			}
			for range 3 { // the nodes have looked before
				s.step()
			}
			last := ""
			for i, c := range tt.calls {
				switch {
				case c >= 'A' && c <= 'C':
					last = strings.ToLower(string(c))
					s.hears(last, initiation+keepalive)
				case c == 'r':
					s.hears(last, initiation+keepalive+10_000)
				case c >= 'x':
					s.hears(string(c-'x'+'a'), response+keepalive)
				}
				s.step()
				s.want(tt.carrier[i : i+1])
			}
			s.step() // whoever carries it no more has heard of that
			if by, claimants := s.carrier(); claimants != by {
				t.Errorf("carried by %q, and claimed by %q", by, claimants)
			}
		})
	}
}

// What arrives is counted before one look, and the handshake is complete after it.
func TestCarriedCallBetweenTwoLooks(t *testing.T) {
	s := newSite(t, peerRecord("a", "b"), "a", "b")
	for range 3 {
		s.step()
	}
	h := s.heard["b"]
	h[0].Received = initiation
	s.heard["b"] = h
	s.step()
	s.want("a")
	s.hears("b", keepalive)
	s.step()
	s.want("b")
}

func TestCarried(t *testing.T) {
	sealed := func(r registry.Record, change func(*registry.Record)) registry.Record { change(&r); return r }
	laptop := peerRecord("a", "b")
	claim := func(node string, at time.Time) registry.Record {
		return sealed(record(node), func(r *registry.Record) { r.Pods = claims(at, "10.99.0.1/32", "fd99::1/128") })
	}
	called := map[wgtypes.Key]kernel.Handshake{laptop.PublicKey: {At: secs(10), Received: 500}}
	never := map[wgtypes.Key]kernel.Handshake{}
	forgotten := registry.Record{Name: "thief", PublicKey: laptop.PublicKey, Left: true, Revision: 5}
	for _, tt := range []struct {
		name    string
		records []registry.Record
		before  []mesh.Claim
		heard   map[wgtypes.Key]kernel.Handshake
		earlier map[wgtypes.Key]kernel.Handshake
		want    []mesh.Claim
	}{
		{"no machine", []registry.Record{record("b")}, nil, nil, nil, nil},
		{"first", []registry.Record{laptop}, nil, nil, nil, claims(epoch, "10.99.0.1/32", "fd99::1/128")},
		{"the first has not joined", []registry.Record{peerRecord("b", "a")}, nil, nil, nil, claims(epoch, "10.99.0.1/32", "fd99::1/128")},
		{"the first has left", []registry.Record{peerRecord("b", "a"), tombstone("b", 9)}, nil, nil, nil, claims(epoch, "10.99.0.1/32", "fd99::1/128")},
		{"the second", []registry.Record{peerRecord("b", "a"), record("b")}, nil, nil, nil, nil},
		{"another's", []registry.Record{peerRecord("b")}, nil, called, never, nil},
		{"removed", []registry.Record{tombstone("z", 11)}, claims(epoch, "10.99.0.1/32"), called, never, nil},
		{"its key is revoked", []registry.Record{laptop, forgotten}, nil, nil, nil, nil},
		{"masqueraded", []registry.Record{sealed(laptop, func(r *registry.Record) { r.Masqueraded = true })}, nil, called, never, nil},
		{"addresses out of range, and ranges", []registry.Record{sealed(laptop, func(r *registry.Record) {
			r.Prefixes = claims(epoch, "10.98.0.1/32", "10.99.0.0/25", "10.99.0.7/32")
		})}, nil, nil, nil, claims(epoch, "10.99.0.7/32")},
		{"a claim is kept", []registry.Record{laptop, claim("b", secs(3))}, claims(secs(4), "10.99.0.1/32", "fd99::1/128"), nil, nil, claims(secs(4), "10.99.0.1/32", "fd99::1/128")},
		{"and given up", []registry.Record{laptop, claim("b", secs(5))}, claims(secs(4), "10.99.0.1/32", "fd99::1/128"), nil, nil, nil},
		{"of two at the same time the lesser name's", []registry.Record{laptop, claim("b", secs(4))}, claims(secs(4), "10.99.0.1/32", "fd99::1/128"), nil, nil, claims(secs(4), "10.99.0.1/32", "fd99::1/128")},
		{"a rival that has left", []registry.Record{laptop, sealed(claim("b", secs(5)), func(r *registry.Record) { r.Left = true })}, claims(secs(4), "10.99.0.1/32"), nil, nil, claims(secs(4), "10.99.0.1/32", "fd99::1/128")},
		{"a rival that is no entry", []registry.Record{laptop, claim("c", secs(5))}, claims(secs(4), "10.99.0.1/32"), nil, nil, claims(secs(4), "10.99.0.1/32", "fd99::1/128")},
		{"claims to whoever had the addresses before", []registry.Record{laptop, claim("b", secs(-5))}, claims(secs(-4), "10.99.0.1/32"), nil, nil, claims(epoch, "10.99.0.1/32", "fd99::1/128")},
		{"called, and nobody has looked before", []registry.Record{laptop, claim("b", secs(5))}, nil, called, nil, claims(secs(10), "10.99.0.1/32", "fd99::1/128")},
		{"called before the other was, likewise", []registry.Record{laptop, claim("b", secs(15))}, nil, called, nil, nil},
		{"the interface is a new one", []registry.Record{laptop, claim("b", secs(5))}, nil, called, map[wgtypes.Key]kernel.Handshake{laptop.PublicKey: {At: secs(2), Received: 9000}}, claims(secs(10), "10.99.0.1/32", "fd99::1/128")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := reconcile.Entry{
				Name: "a", PeerCIDRs: prefixes("10.99.0.0/24", "fd99::/64"), Before: tt.before, Heard: tt.heard, HeardBefore: tt.earlier,
				Records: registry.NewSnapshot(append(tt.records, record("a"))...),
			}
			if diff := cmp.Diff(tt.want, e.Carried(secs(20)), byValue); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// The loop publishes what it carries, gives it up for a newer claim, and takes it
// again when it is called.
func TestLoopCarries(t *testing.T) {
	n := newNode(t, record("b"), peerRecord("a", "b"))
	n.config.PeerCIDRs = prefixes("10.99.0.0/24", "fd99::/64")
	n.joins()
	carries := func(want []mesh.Claim) {
		t.Helper()
		n.announced(fmt.Sprintf("claims %v", want), func(r registry.Record) bool { return cmp.Equal(want, r.Pods, byValue) })
	}
	carries(claims(epoch, "10.99.0.1/32", "fd99::1/128"))
	rival := record("b")
	rival.Pods, rival.Revision = claims(secs(5), "10.99.0.1/32", "fd99::1/128"), 11
	n.registry.put(rival)
	carries(nil)
	n.kernel.set(func(k *fakeKernel) {
		k.heard = map[wgtypes.Key]kernel.Handshake{peerRecord().PublicKey: {At: secs(30), Received: initiation + keepalive}}
	})
	carries(claims(secs(30), "10.99.0.1/32", "fd99::1/128"))
}
