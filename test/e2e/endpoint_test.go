package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// servicePortOutside is where callers find the service, and healthAddr what
// `wgcnid endpoint` tells of itself.
const (
	servicePortOutside = 7000
	healthAddr         = "127.0.0.1:51821"
)

// nameServer answers every question for an address with the one that it was given last.
type nameServer struct {
	mu   sync.Mutex
	addr netip.Addr
}

func (n *nameServer) set(a netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addr = a
}

// startNameServer starts one at an address of a machine.
func startNameServer(t *testing.T, m *cluster.Node, at string, first netip.Addr) *nameServer {
	t.Helper()
	n := &nameServer{addr: first}
	var conn net.PacketConn
	if err := m.Do(func() (err error) {
		conn, err = net.ListenPacket("udp", at+":53")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			size, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer, err := n.answer(buf[:size]); err == nil {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })
	return n
}

func (n *nameServer) answer(question []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(question); err != nil {
		return nil, err
	}
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, q := range m.Questions {
		h := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class}
		switch {
		case q.Type == dnsmessage.TypeA && n.addr.Is4():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: n.addr.As4()}})
		case q.Type == dnsmessage.TypeAAAA && n.addr.Is6():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: n.addr.As16()}})
		}
	}
	return m.Pack()
}

// startEndpoint starts `wgcnid endpoint` and waits until it is healthy.
func startEndpoint(t *testing.T, n *cluster.Node, bin string, args ...string) *cluster.Process {
	t.Helper()
	p, err := n.Start(filepath.Join(bin, "wgcnid"), append([]string{"endpoint"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	awaitHealth(t, n, p, http.StatusOK)
	return p
}

func awaitHealth(t *testing.T, n *cluster.Node, p *cluster.Process, want int) {
	t.Helper()
	err := cluster.Poll(t.Context(), fmt.Sprintf("/healthz to say %d", want), func() error {
		code, text, err := ask(t.Context(), n, "/healthz")
		if err == nil && code != want {
			err = fmt.Errorf("%d: %s", code, text)
		}
		return err
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, p.Log)
	}
}

// ask gets a page that the endpoint serves on its node.
func ask(ctx context.Context, n *cluster.Node, path string) (int, string, error) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return cluster.Dial(ctx, n, network, netip.MustParseAddrPort(healthAddr))
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+healthAddr+path, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := (&http.Client{Transport: transport, Timeout: cluster.Patience(5 * time.Second)}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// awaitMetric waits until a line of /metrics is there.
func awaitMetric(t *testing.T, n *cluster.Node, line string) {
	t.Helper()
	err := cluster.Poll(t.Context(), "metric "+line, func() error {
		_, text, err := ask(t.Context(), n, "/metrics")
		if err == nil && !strings.Contains(text, "\n"+line+"\n") {
			err = fmt.Errorf("it has\n%s", text)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// served waits until a TCP or UDP caller gets its payload back.
func served(t *testing.T, network string, from cluster.Endpointer, to netip.AddrPort, payload []byte) {
	t.Helper()
	probe := cluster.TCP
	if network == "udp" {
		probe = cluster.UDP
	}
	err := cluster.Poll(t.Context(), fmt.Sprintf("%s from %s to %s", network, from, to), func() error {
		ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(2*time.Second))
		defer cancel()
		_, err := probe(ctx, from, to, payload)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func mustReset(t *testing.T, from cluster.Endpointer, to netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(5*time.Second))
	defer cancel()
	if _, err := cluster.TCP(ctx, from, to, []byte("x")); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("from %s to %s: %v; want a reset", from, to, err)
	}
}

// held is a connection to an echoing server that stays open.
type held struct{ net.Conn }

func hold(t *testing.T, from cluster.Endpointer, to netip.AddrPort) held {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(10*time.Second))
	defer cancel()
	c, err := cluster.Dial(ctx, from, "tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(cluster.Patience(60 * time.Second)))
	for b := make([]byte, 1); b[0] != '\n'; { // the server tells whence the call came
		if _, err := c.Read(b); err != nil {
			t.Fatal(err)
		}
	}
	return held{c}
}

func (h held) works(t *testing.T) {
	t.Helper()
	b := []byte("still here?")
	if _, err := h.Write(b); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(h, b); err != nil {
		t.Fatal(err)
	}
}

// A machine outside of the cluster reaches a service by name, at one address,
// while the service's pod moves, the tunnel is made anew, and the endpoint ends.
func TestEndpoint(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 3, 1, cluster.NetworkOptions{})
	a, outside := m.Nodes[0], m.Nodes[2]
	first, second := m.pods[0], m.pods[1] // one on the endpoint's own node
	serve(t, first)
	serve(t, second)
	names := startNameServer(t, a, "127.0.0.1", first.IPv4())
	if err := a.WriteFile("/etc/resolv.conf", "nameserver 127.0.0.1\n", 0o644); err != nil {
		t.Fatal(err)
	}
	marker := []byte("plaintext-marker-0123456789")
	capture, err := cluster.StartCapture(m.Underlay, cluster.Bridge, cluster.CaptureOptions{Markers: [][]byte{marker}, Prefixes: podRanges})
	if err != nil {
		t.Fatal(err)
	}
	p := startEndpoint(t, a, m.BinDir, "--forward", fmt.Sprintf("tcp/%d=db.prod.svc.cluster.local:%d,allow=%s", servicePortOutside, echoPort, outside.Name),
		"--forward", fmt.Sprintf("udp/%d=db.prod.svc.cluster.local:%d", servicePortOutside, echoPort), "--drain", "20s", "--log", "json")
	at4 := netip.AddrPortFrom(a.PodCIDRs()[0].Addr(), servicePortOutside)
	at6 := netip.AddrPortFrom(a.PodCIDRs()[1].Addr(), servicePortOutside)
	for _, at := range []netip.AddrPort{at4, at6} {
		served(t, "tcp", outside, at, marker)
		served(t, "udp", outside, at, marker)
	}

	// Not named, though of the mesh; and not by the tunnel, though the address is right.
	mustReset(t, second, at4)
	mustReset(t, first, at4)
	awaitMetric(t, a, `wgcni_endpoint_refused_total{forward="tcp/7000",reason="source"} 1`)
	awaitMetric(t, a, `wgcni_endpoint_refused_total{forward="tcp/7000",reason="interface"} 1`)

	// The service moves to another node, and to the other family.
	for _, to := range []netip.Addr{second.IPv4(), second.IPv6()} {
		names.set(to)
		if _, err := cluster.TCP(t.Context(), outside, at4, marker); err != nil {
			t.Errorf("service at %s: %v\n%s", to, err, p.Log)
		}
	}
	deletePod(t, first)
	served(t, "udp", outside, at4, marker)

	// Made anew under it, the tunnel goes on carrying what was open.
	open := hold(t, outside, at4)
	open.works(t)
	loseTunnel(t, a)
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	open.works(t)
	served(t, "tcp", outside, at4, marker)
	served(t, "udp", outside, at4, marker)
	awaitHealth(t, a, p, http.StatusOK)

	if err := p.Signal(t.Context(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	awaitHealth(t, a, p, http.StatusServiceUnavailable)
	open.works(t)
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(5*time.Second))
	defer cancel()
	if _, err := cluster.TCP(ctx, outside, at4, marker); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a call while draining: %v; want it refused", err)
	}
	open.Close()
	if err := p.Wait(ctx); err != nil {
		t.Errorf("the endpoint ended with %v\n%s", err, p.Log)
	}
	mustBeClean(t, capture)
}

// What cannot be served is said before anything listens; what is only missing yet is waited for.
func TestEndpointStart(t *testing.T) {
	t.Parallel()
	c := cluster.NewT(t, 1)
	n := c.Nodes[0]
	if err := n.Configure(cluster.NetworkOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteFile("/etc/wgcni/endpoint.json", `{"forwards": [{"listen": "tcp/80", "target": "db"}]}`, 0o644); err != nil {
		t.Fatal(err)
	}
	const ok = "--forward=tcp/80=db:80"
	for want, args := range map[string][]string{
		"nothing to forward":                        {},
		"tcp/80 is named twice":                     {ok, "--forward", "tcp/80=other:80"},
		"is neither tcp nor udp":                    {"--forward", "80=db:80"},
		`target "db" is not host:port`:              {"--file", "/etc/wgcni/endpoint.json"},
		"name the one that callers use":             {ok, "--address", "0.0.0.0"},
		"not an address":                            {ok, "--address", "eth0"},
		"do not come by the tunnel":                 {ok, "--address", "192.0.2.10"},
		"callers do not come by the tunnel":         {ok, "--address", "192.0.2.10", "--allow", "node-b"},
		"run an endpoint for each":                  {ok, "--address", "192.0.2.10,10.244.1.0", "--allow", "192.0.2.0/24"},
		"neither the name of a machine":             {ok, "--allow", "Laptop!"},
		"--max-connections":                         {ok, "--address", "10.244.1.0", "--max-connections", "0"},
		"--dns":                                     {ok, "--address", "10.244.1.0", "--dns", "ns.example"},
		"neither text nor json":                     {ok, "--log", "xml"},
		"name another address and port, or \"off\"": {ok, "--address", "10.244.1.0", "--health", "192.0.2.99:80"},
	} {
		mustRefuseCommand(t, n, want, append([]string{"endpoint"}, args...)...)
	}

	// It may be started first: it waits for the helper, which gives the node its tunnel address.
	p, err := n.Start(bin("wgcnid"), "endpoint", ok)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.WaitFor(t.Context(), "waiting for this node to join the mesh"); err != nil {
		t.Fatal(err)
	}
	startHelper(t, n)
	awaitHealth(t, n, p, http.StatusOK)
	if err := p.Stop(t.Context()); err != nil {
		t.Errorf("the endpoint ended with %v\n%s", err, p.Log)
	}
}
