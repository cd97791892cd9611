package metrics

import (
	"errors"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

// now collects what is read when it is asked for.
type now struct {
	*Metrics
	flight singleflight.Group

	readUp, up, mtu, userspace                  *prometheus.Desc
	handshake, received, sent, peerState, peers *prometheus.Desc
	dropped, droppedBytes, unallowed, away      *prometheus.Desc
}

func newNow(m *Metrics) *now {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prefix+name, help, labels, nil)
	}
	return &now{
		Metrics:      m,
		readUp:       desc("kernel_read_up", "1 if the kernel could be read for this scrape; else what is read from it is missing."),
		up:           desc("interface_up", "1 if the WireGuard interface is there and up."),
		mtu:          desc("interface_mtu_bytes", "MTU of the WireGuard interface."),
		userspace:    desc("interface_userspace", "1 if WireGuard is a process, 0 if it is the kernel's."),
		handshake:    desc("peer_last_handshake_timestamp_seconds", "When the last handshake with the peer was, in Unix time; missing if there was none.", "peer"),
		received:     desc("peer_receive_bytes_total", "Bytes received from the peer, as sealed.", "peer"),
		sent:         desc("peer_transmit_bytes_total", "Bytes sent to the peer, as sealed.", "peer"),
		peerState:    desc("peer_state", "1, with the state that the peer is in now.", "peer", "state"),
		peers:        desc("peers", "Peers by state.", "state"),
		dropped:      desc("plaintext_dropped_packets_total", "Plaintext packets that were kept from leaving (out) and from coming in.", "direction"),
		droppedBytes: desc("plaintext_dropped_bytes_total", "Bytes of plaintext packets that were kept from leaving (out) and from coming in.", "direction"),
		unallowed:    desc("unallowed_source_packets_total", "Packets that a peer had sealed with a source address that is not allowed to it."),
		away:         desc("registry_age_seconds", "For how long the registry could not be read; 0 while it can."),
	}
}

// Describe implements prometheus.Collector.
func (n *now) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		n.readUp, n.up, n.mtu, n.userspace, n.handshake, n.received, n.sent, n.peerState, n.peers, n.dropped, n.droppedBytes, n.unallowed, n.away,
	} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (n *now) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	at := n.Now()
	last := n.Last()
	age := 0.0
	if last != nil && last.Report.RegistryError != "" {
		age = max(at.Sub(last.Report.RegistrySince), 0).Seconds()
	}
	gauge(n.away, age)
	// Scrapes that come while one is at it take what that one gets.
	read, err, _ := n.flight.Do("", func() (any, error) { return n.Read() })
	gauge(n.readUp, one(err == nil))
	if err != nil {
		return
	}
	r := read.(Reading) //nolint:forcetypeassert // it is what Read returns
	gauge(n.up, one(r.Up))
	gauge(n.userspace, one(r.Userspace))
	if r.MTU > 0 {
		gauge(n.mtu, float64(r.MTU))
	}
	counter(n.dropped, float64(r.Drops.Out.Packets), out)
	counter(n.dropped, float64(r.Drops.In.Packets), in)
	counter(n.droppedBytes, float64(r.Drops.Out.Bytes), out)
	counter(n.droppedBytes, float64(r.Drops.In.Bytes), in)
	if r.Unallowed != nil {
		counter(n.unallowed, float64(*r.Unallowed))
	}
	n.collectPeers(r, last, at, gauge, counter)
}

func (n *now) collectPeers(r Reading, last *reconcile.Passed, at time.Time, gauge, counter func(*prometheus.Desc, float64, ...string)) {
	states := map[string]int{}
	if last != nil {
		have := make(map[wgtypes.Key]*mesh.Peer, len(r.Peers))
		for i, p := range r.Peers {
			have[p.PublicKey] = &r.Peers[i]
		}
		for _, want := range last.Peers {
			p, there := have[want.PublicKey]
			if !there {
				p = &want
			}
			name := strings.ToValidUTF8(want.Name, "\ufffd") // client_golang panics on others
			state := n.State(*p, there, at)
			states[state]++
			gauge(n.peerState, 1, name, state)
			counter(n.received, float64(p.ReceiveBytes), name)
			counter(n.sent, float64(p.TransmitBytes), name)
			if !p.LastHandshake.IsZero() {
				gauge(n.handshake, float64(p.LastHandshake.UnixMilli())/1000, name)
			}
		}
	}
	for _, state := range n.States {
		gauge(n.peers, float64(states[state]), state)
	}
}

// stuck is after how long without a pass the loop is taken for dead: passes come
// every ten seconds, or every second where they fail.
const stuck = 30 * time.Second

// Alive says why the loop is taken for dead; nil while it comes round. Started is
// when it began.
func Alive(last *reconcile.Passed, started, now time.Time) error {
	at := started
	if last != nil && last.Report.At.After(at) {
		at = last.Report.At
	}
	if d := now.Sub(at); d > stuck {
		return errors.New("the loop has not come round for " + d.Round(time.Second).String())
	}
	return nil
}

// Ready says why the kernel is not as planned, or why that helps nobody; nil if
// it is.
func Ready(r reconcile.Report) error {
	switch {
	case r.Error != "":
		return errors.New("the last pass failed: " + r.Error)
	case r.Forgotten:
		return errors.New("the mesh has forgotten this node and revoked its key")
	}
	return nil
}
