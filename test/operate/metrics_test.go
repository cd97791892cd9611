package operate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/wgcni/wgcni/test/cluster"
)

// scrape reads a node's metrics, which must be as promlint wants them.
func scrape(t testing.TB, n *cluster.Node) map[string]*dto.MetricFamily {
	t.Helper()
	status, text, err := n.Get(t.Context(), "/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("metrics of %s: %d, %v\n%s", n.Name, status, err, text)
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	out, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// value is that of a counter, a gauge or a histogram's count, of these labels and
// perhaps more; NaN if there is none.
func value(families map[string]*dto.MetricFamily, name string, labels ...string) float64 {
	for _, m := range families[name].GetMetric() {
		has := map[string]string{}
		for _, l := range m.GetLabel() {
			has[l.GetName()] = l.GetValue()
		}
		matches := true
		for i := 0; i < len(labels); i += 2 {
			matches = matches && has[labels[i]] == labels[i+1]
		}
		switch {
		case !matches:
		case m.Counter != nil:
			return m.Counter.GetValue()
		case m.Gauge != nil:
			return m.Gauge.GetValue()
		case m.Histogram != nil:
			return float64(m.Histogram.GetSampleCount())
		}
	}
	return math.NaN()
}

// A quiet mesh: everybody is alive and ready, and the metrics say what there is.
func TestMetrics(t *testing.T) {
	c, _, pods := cluster.NewMeshT(t, 2, 1, cluster.NetworkOptions{})
	a, b := c.Nodes[0], c.Nodes[1]
	for _, path := range []string{"/healthz", "/readyz"} {
		if status, text, err := a.Get(t.Context(), path); err != nil || status != http.StatusOK || text != "ok\n" {
			t.Errorf("%s: %d %q %v", path, status, text, err)
		}
	}
	cluster.ServeT(t, pods[1])
	if err := cluster.Talk(t.Context(), pods[0], pods[1], bytes.Repeat([]byte("x"), 1000)); err != nil {
		t.Fatal(err)
	}
	awaitMetrics(t, a, func(m map[string]*dto.MetricFamily) error {
		for _, w := range []struct {
			name   string
			labels []string
			want   float64
		}{
			{"wgcni_ready", nil, 1},
			{"wgcni_registry_up", nil, 1},
			{"wgcni_registry_publish_up", nil, 1},
			{"wgcni_registry_age_seconds", nil, 0},
			{"wgcni_kernel_read_up", nil, 1},
			{"wgcni_interface_up", nil, 1},
			{"wgcni_pods", nil, 1},
			{"wgcni_peers", []string{"state", "connected"}, 1},
			{"wgcni_peers", []string{"state", "idle"}, 0},
			{"wgcni_peer_state", []string{"peer", b.Name, "state", "connected"}, 1},
			{"wgcni_conflicts", nil, 0},
			{"wgcni_refused_records_total", []string{"kind", "forged"}, 0},
			{"wgcni_plaintext_dropped_packets_total", []string{"direction", "in"}, 0},
			{"wgcni_unallowed_source_packets_total", nil, 0},
			{"wgcni_repairs_total", nil, 0},
			{"wgcni_cni_verb_duration_seconds", []string{"verb", "ADD", "result", "ok"}, 1},
			{"wgcni_cni_verb_duration_seconds", []string{"verb", "ADD", "result", "error"}, 0},
			{"wgcni_info", []string{"node", a.Name, "encryption", "required"}, 1},
		} {
			if got := value(m, w.name, w.labels...); got != w.want {
				return fmt.Errorf("%s%v is %v, want %v", w.name, w.labels, got, w.want)
			}
		}
		for _, name := range []string{"wgcni_peer_receive_bytes_total", "wgcni_peer_transmit_bytes_total"} {
			if got := value(m, name, "peer", b.Name); !(got > 2000) {
				return fmt.Errorf("%s is %v", name, got)
			}
		}
		if at := value(m, "wgcni_peer_last_handshake_timestamp_seconds", "peer", b.Name); math.Abs(at-float64(time.Now().Unix())) > 120 {
			return fmt.Errorf("the last handshake was at %v", at)
		}
		return nil
	})
	checkMonitoring(t, scrape(t, a))
}

// awaitMetrics scrapes until the metrics are as they should be.
func awaitMetrics(t *testing.T, n *cluster.Node, right func(map[string]*dto.MetricFamily) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(30*time.Second))
	defer cancel()
	var last map[string]*dto.MetricFamily
	if err := cluster.Poll(ctx, "the metrics of "+n.Name, func() error {
		last = scrape(t, n)
		return right(last)
	}); err != nil {
		t.Errorf("%v; there are %v", err, slices.Sorted(maps.Keys(last)))
	}
}

func run(t testing.TB, n *cluster.Node, name string, args ...string) string {
	t.Helper()
	out, err := n.Run(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// atLeast awaits a metric.
func atLeast(t *testing.T, n *cluster.Node, least float64, name string, labels ...string) {
	t.Helper()
	awaitMetrics(t, n, func(m map[string]*dto.MetricFamily) error {
		if got := value(m, name, labels...); !(got >= least) {
			return fmt.Errorf("%s%v is %v, want %v at least", name, labels, got, least)
		}
		return nil
	})
}

// What goes wrong is counted, one fault after the other.
func TestMetricsOfFaults(t *testing.T) {
	c, helpers, pods := cluster.NewMeshT(t, 2, 1, cluster.NetworkOptions{})
	a, b := c.Nodes[0], c.Nodes[1]

	// Somebody takes something away, and wgcnid puts it back.
	run(t, a, "ip", "rule", "del", "priority", "110")
	atLeast(t, a, 1, "wgcni_repairs_total")

	// The registry breaks; nothing else does.
	// Its folder goes: in a file's place they would put a new one.
	if err := os.Rename(c.Shared, c.Shared+".away"); err != nil {
		t.Fatal(err)
	}
	awaitMetrics(t, a, func(m map[string]*dto.MetricFamily) error {
		up, ready, age := value(m, "wgcni_registry_up"), value(m, "wgcni_ready"), value(m, "wgcni_registry_age_seconds")
		if up != 0 || ready != 1 || !(age > 0) {
			return fmt.Errorf("up %v, ready %v, age %v", up, ready, age)
		}
		return nil
	})
	if err := os.Rename(c.Shared+".away", c.Shared); err != nil {
		t.Fatal(err)
	}
	atLeast(t, a, 1, "wgcni_registry_up")

	// The tunnel's process is stopped: nobody can say how its peers are, and the rest is served.
	if tunnel, err := a.Tunnel(); err != nil {
		t.Error(err)
	} else if tunnel.PID != 0 {
		signal := func(sig string) { run(t, a, "kill", "-"+sig, fmt.Sprint(tunnel.PID)) }
		signal("STOP")
		awaitMetrics(t, a, func(m map[string]*dto.MetricFamily) error {
			if up, there := value(m, "wgcni_kernel_read_up"), m["wgcni_peers"] != nil; up != 0 || there {
				return fmt.Errorf("it can be read: %v, peers: %v", up, there)
			}
			return nil
		})
		signal("CONT")
		atLeast(t, a, 1, "wgcni_kernel_read_up")
	}

	// b, with its guard taken away, sends what is not its own, sealed.
	if err := helpers[1].Kill(); err != nil {
		t.Fatal(err)
	}
	run(t, b, "nft", "delete", "table", "inet", "wgcni")
	run(t, b, "ip", "address", "add", "10.99.0.1/32", "dev", "lo")
	if out, err := b.Run(t.Context(), "ping", "-c3", "-i0.2", "-W1", "-I", "10.99.0.1", "10.244.1.0"); err == nil {
		t.Errorf("it is answered: %s", out)
	}
	atLeast(t, a, 3, "wgcni_unallowed_source_packets_total")

	// And it goes around the tunnel.
	run(t, b, "ip", "rule", "add", "priority", "50", "lookup", "main")
	run(t, b, "ip", "route", "add", "10.244.1.0/24", "via", a.IPv4.String())
	if out, err := b.Run(t.Context(), "ping", "-c2", "-i0.2", "-W1", "-I", "10.244.2.0", pods[0].IPv4().String()); err == nil {
		t.Errorf("plaintext is answered: %s", out)
	}
	atLeast(t, a, 2, "wgcni_plaintext_dropped_packets_total", "direction", "in")

	// So does a, while its helper is away.
	if err := helpers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	run(t, a, "ip", "rule", "add", "priority", "50", "lookup", "main")
	run(t, a, "ip", "route", "add", "10.244.2.0/24", "via", b.IPv4.String())
	if out, err := pods[0].Run(t.Context(), "ping", "-c2", "-i0.2", "-W1", pods[1].IPv4().String()); err == nil {
		t.Errorf("plaintext is answered: %s", out)
	}
	if _, err := a.StartHelper(); err != nil {
		t.Fatal(err)
	}
	awaitServed(t, a)
	atLeast(t, a, 2, "wgcni_plaintext_dropped_packets_total", "direction", "out")
	atLeast(t, a, 4, "wgcni_plaintext_dropped_bytes_total", "direction", "out")
}

// awaitServed waits until the helper answers at all.
func awaitServed(t *testing.T, n *cluster.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(20*time.Second))
	defer cancel()
	if err := cluster.Poll(ctx, n.Name+" to serve", func() error {
		_, _, err := n.Get(ctx, "/healthz")
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// The server itself: whom it answers, and that a port which is taken is waited for.
func TestServe(t *testing.T) {
	c := cluster.NewT(t, 1)
	a := c.Nodes[0]
	if err := a.Configure(cluster.NetworkOptions{}); err != nil {
		t.Fatal(err)
	}
	// The tunnel's port is taken: the node lives, and is not ready.
	var squatters []io.Closer
	if err := a.Do(func() error {
		l, err := net.Listen("tcp", cluster.HelperHTTP)
		if err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", ":51820")
		squatters = append(squatters, l, u)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	h, err := a.StartHelper()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.WaitFor(t.Context(), "cannot serve metrics and status; trying again every few seconds"); err != nil {
		t.Fatal(err)
	}
	squatters[0].Close()
	if err := h.WaitFor(t.Context(), "serving metrics and status"); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(h.Log.String(), "cannot serve metrics"); n != 1 {
		t.Errorf("it is said %d times", n)
	}
	if status, text, err := a.Get(t.Context(), "/readyz"); err != nil || status != http.StatusServiceUnavailable || !strings.Contains(text, "port 51820 is taken") {
		t.Errorf("readyz: %d %q %v", status, text, err)
	}
	if status, text, err := a.Get(t.Context(), "/healthz"); err != nil || status != http.StatusOK {
		t.Errorf("healthz: %d %q %v", status, text, err)
	}
	awaitMetrics(t, a, func(m map[string]*dto.MetricFamily) error {
		if failed, ready := value(m, "wgcni_passes_total", "result", "error"), value(m, "wgcni_ready"); !(failed >= 1) || ready != 0 {
			return fmt.Errorf("%v passes failed, ready %v", failed, ready)
		}
		return nil
	})
	squatters[1].Close()
	atLeast(t, a, 1, "wgcni_ready")
	if status, text, err := a.Get(t.Context(), "/readyz"); err != nil || status != http.StatusOK {
		t.Errorf("readyz: %d %q %v", status, text, err)
	}

	for _, tt := range []struct {
		method, path, host string
		want               int
	}{
		{"GET", "/", "", 200},
		{"HEAD", "/", "", 200},
		{"GET", "/graph.svg", "", 200},
		{"GET", "/metrics", "localhost:51822", 200},
		{"GET", "/metrics", "[::1]:51822", 200},
		{"GET", "/metrics", "192.0.2.7", 200},
		{"GET", "/metrics", "attacker.example", 421},
		{"GET", "/", "localhost.attacker.example:51822", 421},
		{"POST", "/", "", 405},
		{"DELETE", "/metrics", "", 405},
		{"GET", "/index.html", "", 404},
		{"GET", "/metrics/", "", 404},
		{"GET", "/debug/pprof/", "", 404},
		{"GET", "//metrics", "", 404},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://"+cluster.HelperHTTP+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = tt.host
		client := cluster.HTTP(a)
		client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		answer, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if got := answer.StatusCode; got != tt.want && (tt.path != "//metrics" || got != http.StatusMovedPermanently && got != http.StatusTemporaryRedirect) {
			t.Errorf("%s %s of %q: %d, want %d", tt.method, tt.path, tt.host, got, tt.want)
		}
	}

	// Many at once have the same to say, and leave nothing behind.
	var wait sync.WaitGroup
	for range 20 {
		wait.Go(func() {
			for _, path := range []string{"/", "/metrics", "/graph.svg"} {
				if status, _, err := a.Get(t.Context(), path); err != nil || status != http.StatusOK && status != http.StatusServiceUnavailable {
					t.Errorf("%s: %d, %v", path, status, err)
				}
			}
		})
	}
	wait.Wait()
	awaitMetrics(t, a, func(m map[string]*dto.MetricFamily) error {
		if n := value(m, "process_open_fds"); !(n < 60) {
			return fmt.Errorf("%v files are open", n)
		}
		return nil
	})
}
