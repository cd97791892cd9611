package metrics_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/metrics"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func state(p mesh.Peer, present bool, _ time.Time) string {
	switch {
	case !present:
		return "missing"
	case p.LastHandshake.IsZero():
		return "no handshake"
	}
	return "connected"
}

func newMetrics(read func() (metrics.Reading, error)) *metrics.Metrics {
	return metrics.New(metrics.Config{
		Version: "v1", Node: "a", Interface: "wgcni0", Encryption: "required",
		Read: read, State: state, States: []string{"connected", "no handshake", "missing"}, Now: func() time.Time { return now },
	})
}

// peers are as many as asked for: as planned, and as the kernel shows them.
func peers(n int) (planned, shown []mesh.Peer) {
	for i := range n {
		key := wgtypes.Key{byte(i), byte(i >> 8), 1}
		planned = append(planned, mesh.Peer{Name: fmt.Sprintf("node-%d", i), PublicKey: key})
		shown = append(shown, mesh.Peer{PublicKey: key, LastHandshake: now.Add(-time.Minute), ReceiveBytes: int64(i), TransmitBytes: 7})
	}
	return planned, shown
}

func get(t testing.TB, m *metrics.Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("%d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestScrape(t *testing.T) {
	planned, shown := peers(3)
	shown[1].LastHandshake = time.Time{}
	unallowed := uint64(11)
	var failure error
	m := newMetrics(func() (metrics.Reading, error) {
		return metrics.Reading{
			Reading: kernel.Reading{Name: "wgcni0", MTU: 1420, Up: true, Unallowed: &unallowed, Peers: shown[:2]},
			Drops:   kernel.Drops{Out: kernel.DropCount{Packets: 3, Bytes: 300}}, KeySince: now.Add(-time.Hour),
		}, failure
	})
	lines := func(wanted bool, want ...string) {
		t.Helper()
		text := get(t, m)
		for _, line := range want {
			if strings.Contains(text, "\n"+line+"\n") != wanted {
				t.Errorf("%s: want it there: %v", line, wanted)
			}
		}
		if problems, err := promlint.New(strings.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
			t.Errorf("promlint: %v, %v", problems, err)
		}
	}
	lines(true, "wgcni_ready 0", `wgcni_passes_total{result="error"} 0`, `wgcni_peers{state="connected"} 0`, `wgcni_refused_records_total{kind="unknown secret"} 0`,
		`wgcni_cni_verb_duration_seconds_count{result="error",verb="DEL"} 0`, `wgcni_info{encryption="required",interface="wgcni0",node="a",version="v1"} 1`,
		"wgcni_key_age_seconds 3600", "wgcni_key_rotation_waiting 0", `wgcni_key_rotation_stage{stage="out"} 0`, `wgcni_key_rotation_stage{stage="back"} 0`)

	m.Passed(reconcile.Passed{
		Peers: planned, Pods: 4, Repairs: 2, Took: reconcile.Took{Observe: time.Millisecond, Plan: time.Millisecond},
		Report: reconcile.Report{
			At: now, RefusedTotal: map[string]uint64{"forged": 2}, Rival: true, Conflicts: make([]mesh.Conflict, 2),
			RegistryError: "away", RegistrySince: now.Add(-90 * time.Second),
			Rotation: &reconcile.RotationReport{Stage: mesh.Out, Pairs: 3, Moved: 2, Waiting: make([]reconcile.RotationWait, 1)},
		},
	})
	m.Verbs([]store.Verb{{Name: "ADD", Took: 4 * time.Millisecond}, {Name: "DEL", Failed: true, Took: time.Second}})
	lines(true, "wgcni_key_rotation_waiting 1", `wgcni_key_rotation_stage{stage="out"} 1`, `wgcni_key_rotation_stage{stage="back"} 0`,
		"wgcni_ready 1", "wgcni_pods 4", "wgcni_repairs_total 2", "wgcni_conflicts 3", "wgcni_registry_up 0", "wgcni_registry_age_seconds 90",
		`wgcni_passes_total{result="ok"} 1`, `wgcni_refused_records_total{kind="forged"} 2`,
		`wgcni_peer_state{peer="node-0",state="connected"} 1`, `wgcni_peer_state{peer="node-1",state="no handshake"} 1`, `wgcni_peer_state{peer="node-2",state="missing"} 1`,
		`wgcni_peers{state="missing"} 1`, `wgcni_peer_receive_bytes_total{peer="node-1"} 1`, `wgcni_peer_last_handshake_timestamp_seconds{peer="node-0"} 1.767322985e+09`,
		`wgcni_plaintext_dropped_packets_total{direction="out"} 3`, `wgcni_plaintext_dropped_bytes_total{direction="in"} 0`, "wgcni_unallowed_source_packets_total 11",
		`wgcni_cni_verb_duration_seconds_count{result="ok",verb="ADD"} 1`, `wgcni_cni_verb_duration_seconds_bucket{result="ok",verb="ADD",le="0.003"} 0`,
		"wgcni_observe_duration_seconds_count 1", "wgcni_apply_duration_seconds_count 0", "wgcni_interface_mtu_bytes 1420")
	if strings.Contains(get(t, m), `handshake_timestamp_seconds{peer="node-1"}`) {
		t.Error("a handshake that never was has a time")
	}

	// The total is the loop's: it is not counted twice. A pass that failed says nothing of pods.
	m.Passed(reconcile.Passed{Report: reconcile.Report{At: now, Error: "broken", RefusedTotal: map[string]uint64{"forged": 3}}})
	lines(true, "wgcni_key_rotation_waiting 0", `wgcni_key_rotation_stage{stage="out"} 0`, "wgcni_ready 0", "wgcni_pods 4", `wgcni_refused_records_total{kind="forged"} 3`, `wgcni_passes_total{result="error"} 1`, "wgcni_registry_age_seconds 0")

	failure = errors.New("no netlink")
	lines(true, "wgcni_kernel_read_up 0", "wgcni_ready 0")
	lines(false, "wgcni_interface_up 1", "wgcni_interface_up 0")
}

// While keys are replaced, what goes by the second interface has series of its own,
// and the handshake is the newer one.
func TestScrapeOfBothPlanes(t *testing.T) {
	planned, shown := peers(2)
	shown[0].LastHandshake = now.Add(-time.Hour)
	spare := []mesh.Peer{{PublicKey: wgtypes.Key{9}, LastHandshake: now.Add(-time.Second), ReceiveBytes: 100, TransmitBytes: 200}, {PublicKey: wgtypes.Key{8}}}
	m := newMetrics(func() (metrics.Reading, error) {
		return metrics.Reading{Reading: kernel.Reading{Peers: shown}, Spare: spare}, nil
	})
	m.Passed(reconcile.Passed{Peers: planned, Spare: []mesh.Peer{{Name: "node-0", PublicKey: wgtypes.Key{9}}, {Name: "node-1", PublicKey: wgtypes.Key{7}}}})
	text := get(t, m)
	for _, line := range []string{
		`wgcni_peer_state{peer="node-0",state="connected"} 1`, `wgcni_peer_last_handshake_timestamp_seconds{peer="node-0"} 1.767323044e+09`,
		`wgcni_peer_receive_bytes_total{peer="node-0"} 0`, `wgcni_peer_receive_bytes_total{peer="node-0",plane="spare"} 100`, `wgcni_peer_transmit_bytes_total{peer="node-0",plane="spare"} 200`,
		`wgcni_peer_transmit_bytes_total{peer="node-1"} 7`,
	} {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
	if strings.Contains(text, `peer="node-1",plane`) {
		t.Error("a tunnel that is not there has counters")
	}
	if problems, err := promlint.New(strings.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
}

// A name that is no UTF-8 harms nobody.
func TestNames(t *testing.T) {
	planned, shown := peers(1)
	planned[0].Name = "a\xff\"\n{}"
	m := newMetrics(func() (metrics.Reading, error) { return metrics.Reading{Reading: kernel.Reading{Peers: shown}}, nil })
	m.Passed(reconcile.Passed{Peers: planned})
	if text := get(t, m); !strings.Contains(text, `peer="a�\"\n{}"`) {
		t.Errorf("it is not there:\n%s", text)
	}
}

// Scrapes that come together read the kernel once.
func TestScrapesShareTheReading(t *testing.T) {
	var reads atomic.Int32
	reading, go1 := make(chan struct{}, 9), make(chan struct{})
	m := newMetrics(func() (metrics.Reading, error) {
		reads.Add(1)
		reading <- struct{}{}
		<-go1
		return metrics.Reading{}, nil
	})
	var all sync.WaitGroup
	scrape := func() {
		all.Go(func() {
			m.Handler().ServeHTTP(discard{http.Header{}}, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		})
	}
	scrape()
	<-reading
	scrape()
	scrape()
	close(go1)
	all.Wait()
	if n := reads.Load(); n < 1 || n > 3 { // those that came after it was done read anew
		t.Errorf("the kernel was read %d times", n)
	}
}

// A reading that hangs leaves the scrapes what there is without it, and they are
// whole again once it comes back.
func TestReadingHangs(t *testing.T) {
	var reads atomic.Int32
	answer := make(chan struct{})
	m := newMetrics(func() (metrics.Reading, error) {
		reads.Add(1)
		<-answer
		return metrics.Reading{}, nil
	})
	m.Patience = time.Millisecond
	for range 10 {
		if text := get(t, m); !strings.Contains(text, "\nwgcni_kernel_read_up 0\n") || !strings.Contains(text, "\nwgcni_ready 0\n") {
			t.Fatalf("it says:\n%s", text)
		}
	}
	if n := reads.Load(); n != 1 {
		t.Errorf("%d readings hang", n)
	}
	close(answer)
	m.Patience = time.Minute
	for range 2 { // the first may get what the one that hung has brought
		if text := get(t, m); !strings.Contains(text, "\nwgcni_kernel_read_up 1\n") {
			t.Errorf("it says:\n%s", text)
		}
	}
}

// Nothing of any peer is kept between scrapes.
func TestScrapeKeepsNoPeers(t *testing.T) {
	const many = 5000
	planned, _ := peers(many)
	m := newMetrics(func() (metrics.Reading, error) {
		_, shown := peers(many)
		return metrics.Reading{Reading: kernel.Reading{Peers: shown}}, nil
	})
	m.Passed(reconcile.Passed{Peers: planned})
	scrape := func() {
		w := discard{http.Header{}}
		m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	}
	scrape()
	before := heap()
	for range 3 {
		scrape()
	}
	if more := int64(heap()) - int64(before); more > 256<<10 {
		t.Errorf("%d bytes more are held after three scrapes", more)
	}
	runtime.KeepAlive(planned)
}

type discard struct{ header http.Header }

func (d discard) Header() http.Header       { return d.header }
func (discard) Write(p []byte) (int, error) { return io.Discard.Write(p) }
func (discard) WriteHeader(int)             {}

func heap() uint64 {
	var s runtime.MemStats
	for range 3 { // what a sync.Pool holds goes with the second
		runtime.GC()
	}
	runtime.ReadMemStats(&s)
	return s.HeapAlloc
}

func TestAliveAndReady(t *testing.T) {
	at := func(ago time.Duration) *reconcile.Passed {
		return &reconcile.Passed{Report: reconcile.Report{At: now.Add(-ago)}}
	}
	for name, tt := range map[string]struct {
		last    *reconcile.Passed
		started time.Duration // ago
		alive   bool
	}{
		"just started":          {nil, time.Second, true},
		"never came round":      {nil, time.Minute, false},
		"comes round":           {at(9 * time.Second), time.Hour, true},
		"stuck":                 {at(31 * time.Second), time.Hour, false},
		"the clock jumped back": {at(-time.Hour), time.Hour, true},
	} {
		if err := metrics.Alive(tt.last, now.Add(-tt.started), now); (err == nil) != tt.alive {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, tt := range map[string]struct {
		report reconcile.Report
		ready  bool
	}{
		"well":           {reconcile.Report{RegistryError: "away"}, true},
		"failing":        {reconcile.Report{Error: "no"}, false},
		"forgotten":      {reconcile.Report{Forgotten: true}, false},
		"not believed":   {reconcile.Report{PublishError: "no"}, true},
		"refuses others": {reconcile.Report{Refused: make([]reconcile.Refusal, 3)}, true},
	} {
		if err := metrics.Ready(tt.report); (err == nil) != tt.ready {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkScrape(b *testing.B) {
	planned, shown := peers(5000)
	m := newMetrics(func() (metrics.Reading, error) { return metrics.Reading{Reading: kernel.Reading{Peers: shown}}, nil })
	m.Passed(reconcile.Passed{Peers: planned})
	b.ReportAllocs()
	for b.Loop() {
		m.Handler().ServeHTTP(discard{http.Header{}}, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	}
}
