package metrics

import (
	"bufio"
	"cmp"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// manyScrapes is how many are answered at once.
const manyScrapes = 4

// Handler serves the metrics, in Prometheus' text format alone.
func (m *Metrics) Handler() http.Handler {
	slots := make(chan struct{}, manyScrapes)
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			http.Error(w, "too many scrapes at once", http.StatusServiceUnavailable)
			return
		}
		n := m.look()
		own := prometheus.NewRegistry()
		own.MustRegister(n)
		families, err := prometheus.Gatherers{m.registry, own}.Gather()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
		n.write(w, families)
	})
}

// now is what was read for one scrape.
type now struct {
	m     *Metrics
	read  Reading
	err   error         // why nothing was read
	away  time.Duration // for how long the registry is
	peers []peer
}

type peer struct {
	name      string // as the value of a label
	state     string
	mesh.Peer            // endpoint and handshake are of the plane that shook hands last
	spare     *mesh.Peer // nil: there is none
}

// readPatience is Config.Patience where it is not set.
const readPatience = 5 * time.Second

// readOnce reads the kernel. Scrapes that come while one is at it take what that
// one gets. A tunnel process that has been stopped answers nobody: what hangs then
// is one reading, and the scrapes go on without.
func (m *Metrics) readOnce() (Reading, error) {
	patience := time.NewTimer(cmp.Or(m.Patience, readPatience))
	defer patience.Stop()
	select {
	case got := <-m.flight.DoChan("", func() (any, error) { return m.Read() }):
		if got.Err != nil {
			return Reading{}, got.Err
		}
		return got.Val.(Reading), nil //nolint:forcetypeassert // it is what Read returns
	case <-patience.C:
		return Reading{}, errors.New("the kernel, or the tunnel process, does not answer")
	}
}

func (m *Metrics) look() *now {
	n := &now{m: m}
	n.read, n.err = m.readOnce()
	at, last := m.Now(), m.Last()
	if last == nil {
		return n
	}
	if last.Report.RegistryError != "" {
		n.away = max(at.Sub(last.Report.RegistrySince), 0)
	}
	if n.err != nil {
		return n
	}
	have := make(map[wgtypes.Key]int, len(n.read.Peers))
	for i, p := range n.read.Peers {
		have[p.PublicKey] = i
	}
	spares := spareByName(last.Spare, n.read.Spare)
	n.peers = make([]peer, 0, len(last.Peers))
	for _, planned := range last.Peers {
		name := escape.Replace(strings.ToValidUTF8(planned.Name, "\ufffd"))
		p, spare := planned, spares[planned.Name]
		i, there := have[p.PublicKey]
		if there {
			p = n.read.Peers[i]
		}
		if there && spare != nil && spare.LastHandshake.After(p.LastHandshake) {
			p.LastHandshake, p.Endpoint = spare.LastHandshake, spare.Endpoint
		}
		n.peers = append(n.peers, peer{name, m.State(p, there, at), p, spare})
	}
	return n
}

// spareByName are the peers of the second interface, by the names that are planned.
func spareByName(planned, have []mesh.Peer) map[string]*mesh.Peer {
	if len(planned) == 0 || len(have) == 0 {
		return nil
	}
	byKey := make(map[wgtypes.Key]*mesh.Peer, len(have))
	for i, p := range have {
		byKey[p.PublicKey] = &have[i]
	}
	out := make(map[string]*mesh.Peer, len(planned))
	for _, p := range planned {
		if spare, there := byKey[p.PublicKey]; there {
			out[p.Name] = spare
		}
	}
	return out
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descRead         = desc("kernel_read_up", "1 if the kernel could be read for this scrape; else what is read from it is missing.")
	descUp           = desc("interface_up", "1 if the WireGuard interface is there and up.")
	descMTU          = desc("interface_mtu_bytes", "MTU of the WireGuard interface.")
	descUserspace    = desc("interface_userspace", "1 if WireGuard is a process, 0 if it is the kernel's.")
	descPeers        = desc("peers", "Peers by state.", "state")
	descDropped      = desc("plaintext_dropped_packets_total", "Plaintext packets that were kept from leaving (out) and from coming in.", "direction")
	descDroppedBytes = desc("plaintext_dropped_bytes_total", "Bytes of plaintext packets that were kept from leaving (out) and from coming in.", "direction")
	descUnallowed    = desc("unallowed_source_packets_total", "Packets that a peer had sealed with a source address that is not allowed to it.")
	descKeyAge       = desc("key_age_seconds", "For how long this node's key has been in use.")
	descAway         = desc("registry_age_seconds", "For how long the registry could not be read; 0 while it can.")
)

// Describe implements prometheus.Collector.
func (n *now) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descRead, descUp, descMTU, descUserspace, descPeers, descDropped, descDroppedBytes, descUnallowed, descKeyAge, descAway,
	} {
		to <- d
	}
}

// Collect implements prometheus.Collector, for all but what there is of each peer.
func (n *now) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge(descAway, n.away.Seconds())
	gauge(descRead, one(n.err == nil))
	if n.err != nil {
		return
	}
	if !n.read.KeySince.IsZero() {
		gauge(descKeyAge, max(n.m.Now().Sub(n.read.KeySince), 0).Seconds())
	}
	gauge(descUp, one(n.read.Up))
	gauge(descUserspace, one(n.read.Userspace))
	if n.read.MTU > 0 {
		gauge(descMTU, float64(n.read.MTU))
	}
	drops := n.read.Drops
	counter(descDropped, drops.Out.Packets, out)
	counter(descDropped, drops.In.Packets, in)
	counter(descDroppedBytes, drops.Out.Bytes, out)
	counter(descDroppedBytes, drops.In.Bytes, in)
	if n.read.Unallowed != nil {
		counter(descUnallowed, *n.read.Unallowed)
	}
	states := map[string]int{}
	for _, p := range n.peers {
		states[p.state]++
	}
	for _, state := range n.m.States {
		gauge(descPeers, float64(states[state]), state)
	}
}

// write writes the metrics as text. Those of peers are written as they go: as
// objects of the library they would cost megabytes in a large mesh, at every scrape.
func (n *now) write(to io.Writer, families []*dto.MetricFamily) {
	w := bufio.NewWriter(to) // keeps the first error; a caller that has gone needs no answer
	defer w.Flush()          //nolint:errcheck // see above
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(w, f); err != nil {
			return
		}
	}
	family := func(name, kind, help string, value func(peer) (rest string, v float64, there bool)) (sample func(peer, string, float64)) {
		head := prefix + name + `{peer="`
		line := append([]byte(nil), "# HELP "+prefix+name+" "+help+"\n# TYPE "+prefix+name+" "+kind+"\n"...)
		sample = func(p peer, rest string, v float64) {
			line = append(append(append(append(line, head...), p.name...), rest...), "} "...)
			line = append(strconv.AppendFloat(line, v, 'g', -1, 64), '\n')
			_, _ = w.Write(line)
			line = line[:0]
		}
		for _, p := range n.peers {
			if rest, v, there := value(p); there {
				sample(p, rest, v)
			}
		}
		return sample
	}
	// A second interface has series of its own: as one sum, its end would look like a
	// counter that has begun anew (Prometheus, rate).
	bytes := func(name, help string, value func(mesh.Peer) int64) {
		sample := family(name, "counter", help, func(p peer) (string, float64, bool) { return `"`, float64(value(p.Peer)), true })
		for _, p := range n.peers {
			if p.spare != nil {
				sample(p, `",plane="`+mesh.Spare.String()+`"`, float64(value(*p.spare)))
			}
		}
	}
	if len(n.peers) == 0 {
		return
	}
	family("peer_last_handshake_timestamp_seconds", "gauge", "When the last handshake with the peer was, in Unix time; missing if there was none.",
		func(p peer) (string, float64, bool) {
			return `"`, float64(p.LastHandshake.UnixMilli()) / 1000, !p.LastHandshake.IsZero()
		})
	bytes("peer_receive_bytes_total", "Bytes received from the peer, as sealed.", func(p mesh.Peer) int64 { return p.ReceiveBytes })
	family("peer_state", "gauge", "1, with the state that the peer is in now.",
		func(p peer) (string, float64, bool) { return `",state="` + p.state + `"`, 1, true })
	bytes("peer_transmit_bytes_total", "Bytes sent to the peer, as sealed.", func(p mesh.Peer) int64 { return p.TransmitBytes })
}

// escape is the text format's for the value of a label.
var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
