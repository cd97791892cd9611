package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// The ports of the endpoint's section. What listens there on the middle machine
// forwards to the far one: a bulk port to itself, where iperf3 is, and an echo port
// to echoPort.
const (
	echoPort     = 7000
	bulkPort     = 5200
	openCount    = 2000
	messageBytes = 64
)

// hop is a way from the near machine to the far one, by a proxy or directly.
type hop struct {
	name    string
	process string // command line of the proxy; "" if there is none
	at      netip.Addr
	bulk    uint16
	echo    uint16

	pids                  []int
	rate, perGB           samples // bits per second, CPU seconds of the proxy for 2^30 bytes
	trips                 samples // seconds, of all rounds
	medians, tails        samples // seconds, of each round
	calls, perCall, bytes samples // per second, CPU seconds, memory of an open connection
}

// benchEndpoint measures `wgcnid endpoint` beside the proxies that people use for
// the same, in plain TCP: what the tunnel costs is measured elsewhere.
func benchEndpoint(ctx context.Context, b *bench) ([]section, error) {
	b.progress("endpoint: three machines")
	c, err := cluster.New(ctx, cluster.Options{Nodes: 3})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	near, middle, far := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	ways := []*hop{
		{name: "direct", at: far.IPv4, bulk: bulkPort, echo: echoPort},
		{name: "wgcnid endpoint", process: "wgcnid endpoint", at: middle.IPv4, bulk: bulkPort + 1, echo: echoPort + 1},
		{name: "HAProxy", process: "haproxy", at: middle.IPv4, bulk: bulkPort + 2, echo: echoPort + 2},
		{name: "nginx", process: "nginx", at: middle.IPv4, bulk: bulkPort + 3, echo: echoPort + 3},
	}
	stop, err := startEcho(far)
	if err != nil {
		return nil, err
	}
	defer stop()
	if err := startProxies(ctx, c.BinDir, middle, far, ways); err != nil {
		return nil, err
	}
	rounds := b.rounds(5, 2)
	for i := range rounds {
		for at := range ways {
			w := ways[(at+i)%len(ways)]
			b.progress("endpoint: round %d of %d, %s", i+1, rounds, w.name)
			if err := w.measure(ctx, b, near, far); err != nil {
				return nil, fmt.Errorf("%s: %w", w.name, err)
			}
		}
	}
	for _, w := range ways[1:] {
		b.progress("endpoint: open connections, %s", w.name)
		if err := w.hold(ctx, near); err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return endpointSections(ways, rounds), nil
}

// startEcho has the far machine echo what is sent to it.
func startEcho(far *cluster.Node) (stop func(), err error) {
	var l net.Listener
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	if err := far.Do(func() (err error) {
		l, err = lc.Listen(context.Background(), "tcp4", fmt.Sprintf(":%d", echoPort))
		return err
	}); err != nil {
		return nil, err
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer c.Close()
				buf := make([]byte, messageBytes)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if _, err := c.Write(buf[:n]); err != nil {
						return
					}
				}
			})
		}
	})
	return func() { _ = l.Close(); work.Wait() }, nil
}

func startProxies(ctx context.Context, bin string, middle, far *cluster.Node, ways []*hop) error {
	if err := middle.Configure(cluster.NetworkOptions{}); err != nil {
		return err
	}
	// Else the ports of calls that have ended run out, and what is measured is the search for one.
	if _, err := middle.Run(ctx, "sysctl", "-q", "net.ipv4.tcp_tw_reuse=1", "net.ipv4.ip_local_port_range=10000 65535"); err != nil {
		return err
	}
	ours, haproxy, nginx := ways[1], ways[2], ways[3]
	to := func(port uint16) string { return netip.AddrPortFrom(far.IPv4, port).String() }
	at := func(port uint16) string { return netip.AddrPortFrom(middle.IPv4, port).String() }
	for path, text := range map[string]string{
		"/etc/bench/haproxy.cfg": fmt.Sprintf("global\n  maxconn 4000\n  nbthread 2\n"+
			"defaults\n  mode tcp\n  option splice-auto\n  timeout connect 10s\n  timeout client 10m\n  timeout server 10m\n"+
			"listen bulk\n  bind %s\n  server far %s\nlisten echo\n  bind %s\n  server far %s\n",
			at(haproxy.bulk), to(haproxy.bulk), at(haproxy.echo), to(echoPort)),
		"/etc/bench/nginx.conf": fmt.Sprintf("load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n"+
			"daemon off;\nworker_processes 2;\npid /run/nginx.pid;\nerror_log stderr crit;\nevents { worker_connections 9000; }\n"+
			"stream {\n  server { listen %s; proxy_pass %s; proxy_timeout 10m; }\n  server { listen %s; proxy_pass %s; proxy_timeout 10m; }\n}\n",
			at(nginx.bulk), to(nginx.bulk), at(nginx.echo), to(echoPort)),
	} {
		if err := middle.WriteFile(path, text, 0o644); err != nil {
			return err
		}
	}
	for _, command := range [][]string{
		{
			filepath.Join(bin, "wgcnid"), "endpoint", "--address", middle.IPv4.String(), "--allow", "192.0.2.0/24", "--max-connections", "9000",
			"--forward", fmt.Sprintf("tcp/%d=%s", ours.bulk, to(ours.bulk)), "--forward", fmt.Sprintf("tcp/%d=%s", ours.echo, to(echoPort)),
		},
		{"haproxy", "-db", "-f", "/etc/bench/haproxy.cfg"},
		{"nginx", "-c", "/etc/bench/nginx.conf"},
	} {
		p, err := middle.Start(command[0], command[1:]...)
		if err != nil {
			return err
		}
		defer func() {
			select {
			case <-p.Done():
				fmt.Print(p.Log)
			default:
			}
		}()
	}
	for _, w := range ways[1:] {
		if err := cluster.Poll(ctx, w.name+" to listen", func() error {
			c, err := cluster.Dial(ctx, far, "tcp", netip.AddrPortFrom(w.at, w.echo))
			if err == nil {
				_ = c.Close()
			}
			return err
		}); err != nil {
			return err
		}
		found, err := middle.FindProcesses(w.process)
		if err != nil {
			return err
		}
		for _, p := range found {
			w.pids = append(w.pids, p.HostPID)
		}
	}
	return nil
}

// cpu is what the proxy has run for since its start.
func (w *hop) cpu() (sum time.Duration, err error) {
	for _, pid := range w.pids {
		t, err := cpuTime(pid)
		if err != nil {
			return 0, err
		}
		sum += t
	}
	return sum, nil
}

func (w *hop) measure(ctx context.Context, b *bench, near, far *cluster.Node) error {
	for _, part := range []func(context.Context, *bench, *cluster.Node, *cluster.Node) error{w.measureBulk, w.measureTrips, w.measureCalls} {
		if err := part(ctx, b, near, far); err != nil {
			return err
		}
	}
	return nil
}

// measureBulk is one stream from near to far.
func (w *hop) measureBulk(ctx context.Context, b *bench, near, far *cluster.Node) error {
	before, err := w.cpu()
	if err != nil {
		return err
	}
	o := cluster.ThroughputOptions{Duration: b.span(4*time.Second, time.Second), Port: w.bulk}
	r, err := cluster.Throughput(ctx, near, far, w.at, o)
	if err != nil {
		return err
	}
	after, err := w.cpu()
	if err != nil {
		return err
	}
	w.rate = append(w.rate, r.BytesPerSecond*8)
	w.perGB = append(w.perGB, (after-before).Seconds()/(r.BytesPerSecond*o.Duration.Seconds()/(1<<30)))
	return nil
}

// measureTrips sends a small message to and fro, on one connection.
func (w *hop) measureTrips(ctx context.Context, b *bench, near, _ *cluster.Node) error {
	c, err := cluster.Dial(ctx, near, "tcp", netip.AddrPortFrom(w.at, w.echo))
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	buf := make([]byte, messageBytes)
	var trips samples
	for i := range b.rounds(10000, 2000) {
		start := time.Now()
		if _, err := c.Write(buf); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return err
		}
		if i >= 200 { // the first ones find cold caches
			trips = append(trips, time.Since(start).Seconds())
		}
	}
	w.trips = append(w.trips, trips...)
	w.medians, w.tails = append(w.medians, trips.median()), append(w.tails, trips.quantile(0.99))
	return nil
}

// callers call at once.
const callers = 16

// measureCalls connects, has one message echoed, and closes, again and again.
func (w *hop) measureCalls(ctx context.Context, b *bench, near, _ *cluster.Node) error {
	before, err := w.cpu()
	if err != nil {
		return err
	}
	span := b.span(3*time.Second, time.Second)
	var count atomic.Int64
	errs := make([]error, callers)
	start := time.Now()
	var work sync.WaitGroup
	for i := range callers {
		work.Go(func() {
			errs[i] = near.Do(func() error {
				d := net.Dialer{Timeout: 10 * time.Second}
				buf := make([]byte, messageBytes)
				for time.Since(start) < span {
					if err := callOnce(ctx, &d, netip.AddrPortFrom(w.at, w.echo), buf); err != nil {
						return err
					}
					count.Add(1)
				}
				return nil
			})
		})
	}
	work.Wait()
	took := time.Since(start)
	after, err := w.cpu()
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	w.calls = append(w.calls, float64(count.Load())/took.Seconds())
	w.perCall = append(w.perCall, (after-before).Seconds()/float64(count.Load()))
	return nil
}

func callOnce(ctx context.Context, d *net.Dialer, to netip.AddrPort, buf []byte) error {
	c, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write(buf); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	// With a RST no port waits for late packets: there are only so many.
	return c.(*net.TCPConn).SetLinger(0)
}

// hold opens many connections, uses each once, and measures the proxy's memory.
func (w *hop) hold(ctx context.Context, near *cluster.Node) error {
	before, err := w.memory()
	if err != nil {
		return err
	}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	err = near.Do(func() error {
		d := net.Dialer{Timeout: 10 * time.Second}
		buf := make([]byte, messageBytes)
		for range openCount {
			c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(w.at, w.echo).String())
			if err != nil {
				return err
			}
			open = append(open, c)
			if _, err := c.Write(buf); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, buf); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	after, err := w.memory()
	if err != nil {
		return err
	}
	w.bytes = append(w.bytes, float64(after-before)/openCount)
	return nil
}

func (w *hop) memory() (sum int64, err error) {
	for _, pid := range w.pids {
		n, err := memory(pid, "RssAnon")
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

func endpointSections(ways []*hop, rounds int) []section {
	direct, ours, haproxy := ways[0], ways[1], ways[2]
	bulk := section{title: fmt.Sprintf("Endpoint: one TCP stream, %d rounds", rounds)}
	trips := section{title: "Endpoint: 64 bytes to and fro", figures: [3]string{"median", "p90", "p99"}}
	calls := section{title: fmt.Sprintf("Endpoint: connections, %d callers", callers), figures: [3]string{"median", "memory", "cpu"}}
	for _, w := range ways {
		b := row{what: w.name, median: megabits(w.rate.median())}
		t := row{what: w.name, median: microseconds(w.trips.median()), p90: microseconds(w.trips.quantile(0.9)), p99: microseconds(w.trips.quantile(0.99))}
		c := row{what: w.name, median: strconv.Itoa(int(w.calls.median())) + " /s"}
		if w != direct {
			b.ratio, b.to = w.rate.paired(direct.rate), direct.name
			t.ratio, t.to = w.medians.paired(direct.medians), direct.name
			c.ratio, c.to = w.calls.paired(direct.calls), direct.name
			b.cpu = fmt.Sprintf("%.2f s/GiB", w.perGB.median())
			c.cpu, c.memory = microseconds(w.perCall.median()), fmt.Sprintf("%.1f KiB", w.bytes.median()/1024)
		}
		bulk.rows, trips.rows, calls.rows = append(bulk.rows, b), append(trips.rows, t), append(calls.rows, c)
	}
	bulk.rows = append(bulk.rows, row{what: ours.name, ratio: ours.rate.paired(haproxy.rate), to: haproxy.name, budget: atLeast(0.9)})
	trips.rows = append(
		trips.rows, row{what: ours.name, ratio: ours.medians.paired(haproxy.medians), to: haproxy.name, budget: atMost(2)},
		row{what: ours.name + ", p99", ratio: ours.tails.paired(haproxy.tails), to: haproxy.name},
	)
	calls.rows = append(calls.rows, row{what: ours.name, ratio: ours.calls.paired(haproxy.calls), to: haproxy.name, budget: atLeast(0.6)})
	bulk.notes = []string{"cpu is the proxy's own; all machines share this one's CPUs, and nothing is encrypted"}
	calls.notes = []string{fmt.Sprintf("each call is connected, answered once and closed; memory is the proxy's for one of %d open connections, without the kernel's", openCount)}
	return []section{bulk, trips, calls}
}

func microseconds(seconds float64) string { return fmt.Sprintf("%.0f µs", seconds*1e6) }
