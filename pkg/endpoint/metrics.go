package endpoint

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are what a server counts.
type Metrics struct {
	connections, closed, refused, bytes, datagrams, lookupFailures *prometheus.CounterVec
	open, waiting                                                  *prometheus.GaugeVec
	dial                                                           *prometheus.HistogramVec
	sessions, listeners, draining                                  prometheus.Gauge
	evicted                                                        prometheus.Counter
}

// NewMetrics makes the metrics and registers them.
func NewMetrics(r prometheus.Registerer) *Metrics {
	name := func(s string) string { return "wgcni_endpoint_" + s }
	counter := func(n, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name(n), Help: help}, append([]string{"forward"}, labels...))
	}
	gauge := func(n, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name(n), Help: help})
	}
	m := &Metrics{
		connections:    counter("connections_total", "TCP connections that were accepted, without those refused."),
		closed:         counter("closed_total", "TCP connections that have ended, by how.", "how"),
		refused:        counter("refused_total", "Connections and datagrams that were refused, by why.", "reason"),
		bytes:          counter("bytes_total", "Bytes of payload; in is from the caller to the target.", "direction"),
		datagrams:      counter("datagrams_total", "UDP datagrams; in is from the caller to the target.", "direction"),
		lookupFailures: counter("lookup_failures_total", "Lookups of the target's name that failed."),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: name("connections_open"), Help: "TCP connections that are open.",
		}, []string{"forward"}),
		waiting: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: name("accept_waiting"), Help: "1 while callers wait, since as many connections are open as may be.",
		}, []string{"forward"}),
		dial: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: name("dial_seconds"), Help: "Time until the target was reached, its name's lookup included.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"forward"}),
		sessions:  gauge("udp_sessions", "Callers that UDP answers are relayed to."),
		listeners: gauge("listeners", "Listeners that are open."),
		draining:  gauge("draining", "1 once the endpoint has been told to end."),
		evicted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: name("udp_sessions_evicted_total"), Help: "UDP sessions that had to make room for newer ones.",
		}),
	}
	r.MustRegister(m.connections, m.closed, m.refused, m.bytes, m.datagrams, m.lookupFailures, m.open, m.waiting, m.dial,
		m.sessions, m.listeners, m.draining, m.evicted)
	return m
}

// The reasons of refused_total.
const (
	refusedSource    = "source"    // it is not allowed
	refusedInterface = "interface" // it came in by another one
	refusedResolve   = "resolve"   // the target's name has no address
	refusedDial      = "dial"      // the target does not answer
	refusedSocket    = "socket"    // no descriptor was free
	refusedDrain     = "drain"     // the endpoint is about to end
)

// forwardMetrics are those of one forward, looked up once.
type forwardMetrics struct {
	connections, in, out, datagramsIn, datagramsOut, lookupFailures prometheus.Counter
	open, waiting                                                   prometheus.Gauge
	dial                                                            prometheus.Observer
	closed                                                          func(end) prometheus.Counter
	refused                                                         func(reason string) prometheus.Counter
}

// of makes the metrics of a forward, at zero from the start: an alert on a rate
// would miss the first one otherwise.
func (m *Metrics) of(f Forward) forwardMetrics {
	n := f.String()
	out := forwardMetrics{
		in: m.bytes.WithLabelValues(n, "in"), out: m.bytes.WithLabelValues(n, "out"),
		lookupFailures: m.lookupFailures.WithLabelValues(n),
		refused:        func(reason string) prometheus.Counter { return m.refused.WithLabelValues(n, reason) },
	}
	if f.Protocol == UDP {
		out.datagramsIn, out.datagramsOut = m.datagrams.WithLabelValues(n, "in"), m.datagrams.WithLabelValues(n, "out")
	} else {
		out.connections, out.open = m.connections.WithLabelValues(n), m.open.WithLabelValues(n)
		out.waiting, out.dial = m.waiting.WithLabelValues(n), m.dial.WithLabelValues(n)
		out.closed = func(how end) prometheus.Counter { return m.closed.WithLabelValues(n, string(how)) }
		for _, how := range []end{endClosed, endReset, endIdle, endDrain, endRefused, endFailed} {
			out.closed(how)
		}
	}
	for _, reason := range []string{refusedSource, refusedInterface, refusedResolve, refusedDial, refusedSocket, refusedDrain} {
		out.refused(reason)
	}
	return out
}
