// Package metrics counts what a node does, and reads what its kernel shows, for
// Prometheus.
//
// What the helper's loop tells is kept as counters and gauges. What there is of
// each peer is read from the kernel when it is asked for, and kept by nobody.
package metrics

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/singleflight"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

// Config is what a node's metrics are made of. All fields but Patience are required.
type Config struct {
	Version, Node, Interface, Encryption string
	// Read asks the kernel. It is called once for all scrapes of a moment, by a
	// goroutine that is not the loop's.
	Read func() (Reading, error)
	// State names the state of a planned peer: one of States.
	State  func(p mesh.Peer, present bool, now time.Time) string
	States []string
	Now    func() time.Time
	// Patience is how long a scrape waits for Read, 5 s if it is zero.
	Patience time.Duration
}

// Reading is what the kernel shows.
type Reading struct {
	kernel.Reading
	// Spare are the peers of the second interface, which is there while keys are replaced.
	Spare []mesh.Peer
	Drops kernel.Drops
	// KeySince is when the node's key came into use; zero: not known.
	KeySince time.Time
}

// Metrics are those of a node. Its methods may be called at the same time.
type Metrics struct {
	Config
	registry *prometheus.Registry
	last     atomic.Pointer[reconcile.Passed] // nil before the first pass
	flight   singleflight.Group               // of Read

	passes, refused        *prometheus.CounterVec
	repairs                prometheus.Counter
	observe, plan, apply   prometheus.Histogram
	pods, conflicts, ready prometheus.Gauge
	refusedNow, unreached  prometheus.Gauge
	rotationWaits          prometheus.Gauge
	rotation               *prometheus.GaugeVec // by stage
	registryUp, publishUp  prometheus.Gauge
	lastPass               prometheus.Gauge
	verbs                  *prometheus.HistogramVec
	counted                map[string]uint64 // of refused; the loop's alone
}

const prefix = "wgcni_"

// The values of labels.
const (
	ok     = "ok"
	failed = "error"
	in     = "in"
	out    = "out"
)

// kinds are those of refused records.
var kinds = []string{
	reconcile.KindUnsealed, reconcile.KindUnknownSecret, reconcile.KindForged, reconcile.KindReplayed, reconcile.KindNewer, reconcile.KindMalformed,
}

// stages are those of a rotation.
var stages = []string{string(mesh.Out), string(mesh.Back)}

// passBuckets hold a pass that finds nothing to do on a small mesh, and the first
// one on a large.
var passBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// verbBuckets have their middle where an ADD is, some milliseconds; it gives up after 10 s.
var verbBuckets = []float64{.001, .002, .003, .005, .0075, .01, .015, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// New makes the metrics of a node. What is counted is there from the start, as
// zero: the first increase would be lost to rate() otherwise.
func New(c Config) *Metrics {
	r := prometheus.NewRegistry()
	m := &Metrics{Config: c, registry: r, counted: map[string]uint64{}}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, labels)
		r.MustRegister(v)
		return v
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + name, Help: help})
		r.MustRegister(g)
		return g
	}
	histogram := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: prefix + name, Help: help, Buckets: passBuckets})
		r.MustRegister(h)
		return h
	}
	m.passes = counter("passes_total", "Passes of the helper's loop, by result.", "result")
	m.refused = counter("refused_records_total", "Records of the registry that were refused, by why.", "kind")
	m.repairs = counter("repairs_total", "Operations that put back what somebody else had changed in the kernel.").WithLabelValues()
	m.observe = histogram("observe_duration_seconds", "Time to read from the kernel all that it holds of wgcni.")
	m.plan = histogram("plan_duration_seconds", "Time to plan what the kernel should hold, and to compare.")
	m.apply = histogram("apply_duration_seconds", "Time to carry out what differs, where something does.")
	m.pods = gauge("pods", "Pods attached to this node.")
	m.conflicts = gauge("conflicts", "Claims of nodes that are refused now, such as a prefix that another node holds.")
	m.refusedNow = gauge("refused_records", "Records of the registry that are refused now.")
	m.unreached = gauge("unreached_nodes", "Nodes to which node traffic cannot be delivered now.")
	m.rotationWaits = gauge("key_rotation_waiting", "Peers that the rotation of this node's key waits for.")
	m.rotation = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: prefix + "key_rotation_stage", Help: "1 for how far the rotation of this node's key is: out, to the new key, or back, to the first interface with it.",
	}, []string{"stage"})
	m.ready = gauge("ready", "1 while the kernel is as planned and this node belongs to the mesh.")
	m.registryUp = gauge("registry_up", "1 while the registry can be read.")
	m.publishUp = gauge("registry_publish_up", "1 while the registry takes this node's record.")
	m.lastPass = gauge("last_pass_timestamp_seconds", "When the last pass ended, in Unix time.")
	m.verbs = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: prefix + "cni_verb_duration_seconds", Buckets: verbBuckets,
		Help: "Time that the CNI plugin took for a verb, by result; of DEL, error means that something was left to the helper.",
	}, []string{"verb", "result"})
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: prefix + "info", Help: "1, with what this node is."},
		[]string{"version", "node", "interface", "encryption"})
	info.WithLabelValues(c.Version, c.Node, c.Interface, c.Encryption).Set(1)
	r.MustRegister(m.verbs, m.rotation, info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, result := range []string{ok, failed} {
		m.passes.WithLabelValues(result)
		for _, verb := range store.VerbNames {
			m.verbs.WithLabelValues(verb, result)
		}
	}
	for _, kind := range kinds {
		m.refused.WithLabelValues(kind)
	}
	for _, stage := range stages {
		m.rotation.WithLabelValues(stage)
	}
	return m
}

// Passed takes in a pass. It is the loop's to call.
func (m *Metrics) Passed(p reconcile.Passed) {
	m.last.Store(&p)
	result := ok
	if p.Report.Error != "" {
		result = failed
	} else {
		m.pods.Set(float64(p.Pods))
	}
	m.passes.WithLabelValues(result).Inc()
	m.repairs.Add(float64(p.Repairs))
	if p.Took.Observe > 0 {
		m.observe.Observe(p.Took.Observe.Seconds())
	}
	if p.Took.Plan > 0 { // else it was not come to
		m.plan.Observe(p.Took.Plan.Seconds())
	}
	if p.Took.Apply > 0 {
		m.apply.Observe(p.Took.Apply.Seconds())
	}
	r := p.Report
	conflicts := len(r.Conflicts)
	if r.Rival {
		conflicts++
	}
	m.conflicts.Set(float64(conflicts))
	m.refusedNow.Set(float64(len(r.Refused)))
	m.unreached.Set(float64(len(r.Unreached)))
	rotation := reconcile.RotationReport{}
	if r.Rotation != nil {
		rotation = *r.Rotation
	}
	m.rotationWaits.Set(float64(len(rotation.Waiting)))
	for _, stage := range stages {
		m.rotation.WithLabelValues(stage).Set(one(string(rotation.Stage) == stage))
	}
	m.ready.Set(one(Ready(r) == nil))
	m.registryUp.Set(one(r.RegistryError == ""))
	m.publishUp.Set(one(r.PublishError == ""))
	m.lastPass.Set(float64(r.At.UnixMilli()) / 1000)
	for kind, n := range r.RefusedTotal {
		m.refused.WithLabelValues(kind).Add(float64(n - m.counted[kind]))
		m.counted[kind] = n
	}
}

// Verbs takes in what the plugin has left.
func (m *Metrics) Verbs(verbs []store.Verb) {
	for _, v := range verbs {
		result := ok
		if v.Failed {
			result = failed
		}
		m.verbs.WithLabelValues(v.Name, result).Observe(v.Took.Seconds())
	}
}

// Last is the last pass; nil before the first.
func (m *Metrics) Last() *reconcile.Passed { return m.last.Load() }

func one(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
