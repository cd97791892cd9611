package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/endpoint"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// endpointConfig is of a machine with what an endpoint may meet.
func endpointConfig(t *testing.T) config.Config {
	t.Helper()
	c, err := config.Parse([]byte(`{"cniVersion": "1.0.0", "name": "pods", "nodeName": "a", "clusterCIDRs": ["10.244.0.0/16"],
		"externalCIDRs": ["10.250.255.0/24"], "peerCIDRs": ["10.99.0.0/24"], "registry": {"type": "file", "path": "/srv/mesh.json"},
		"runDir": "` + t.TempDir() + `", "stateDir": "` + t.TempDir() + `"}`))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var endpointSince = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func endpointRecord(name string, key byte, prefixes ...string) registry.Record {
	r := registry.Record{Name: name, PublicKey: wgtypes.Key{key}, Since: endpointSince, Revision: 1}
	for _, p := range prefixes {
		r.Prefixes = append(r.Prefixes, mesh.Claim{Prefix: netip.MustParsePrefix(p), Since: endpointSince})
	}
	return r
}

func endpointKnown() store.Known {
	laptop, branch, gone := endpointRecord("laptop", 3, "10.99.0.1/32"), endpointRecord("branch", 4, "10.99.0.2/32"), endpointRecord("gone", 5, "10.244.5.0/24")
	laptop.Via, branch.Via, branch.Masqueraded = []string{"b"}, []string{"a"}, true
	gone = registry.Record{Name: gone.Name, Left: true, Revision: 2}
	b := endpointRecord("b", 2, "10.244.2.0/24")
	b.Pods = []mesh.Claim{{Prefix: netip.MustParsePrefix("10.99.0.1/32"), Since: endpointSince}}
	self := endpointRecord("a", 1, "192.168.0.0/24", "10.244.1.0/24", "10.250.255.1/32")
	return store.Known{Self: self, Records: registry.NewSnapshot(self, b, laptop, branch, gone), Endpoints: map[string]netip.AddrPort{}, MTU: 1420}
}

func TestEndpointSources(t *testing.T) {
	s := sourcesOf(endpointConfig(t), endpointKnown())
	for addr, want := range map[string]string{
		"10.244.1.9": "a", "10.250.255.1": "a", "10.244.2.9": "b", "10.99.0.1": "laptop", "10.99.0.2": "branch", "10.244.5.1": "", "192.168.0.1": "",
	} {
		if got := s.Owner(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s belongs to %q, want %q", addr, got, want)
		}
	}
}

func TestEndpointInterface(t *testing.T) {
	c := endpointConfig(t)
	forward := func(allow ...string) []endpoint.Forward {
		a, err := endpoint.ParseAllow(allow)
		if err != nil {
			t.Fatal(err)
		}
		return []endpoint.Forward{{Protocol: endpoint.TCP, Port: 1, Target: "db:1", Allow: a}}
	}
	for _, tt := range []struct {
		addresses []string
		forwards  []endpoint.Forward
		want, err string
	}{
		{[]string{"10.244.1.0", "10.250.255.1"}, forward(), "wgcni0", ""},
		{[]string{"192.0.2.1"}, forward("192.0.2.0/24"), "", ""},
		{[]string{"192.0.2.1"}, forward(), "", "say by --allow which addresses"},
		{[]string{"192.0.2.1"}, forward("192.0.2.0/24", "laptop"), "", "not names"},
		{[]string{"192.0.2.1", "10.244.1.0"}, forward("192.0.2.0/24"), "", "run an endpoint for each"},
	} {
		addresses, err := endpointAddresses(tt.addresses)
		if err != nil {
			t.Fatal(err)
		}
		got, err := endpointInterface(c, addresses, tt.forwards)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%v: %q, %v; want %q, %q", tt.addresses, got, err, tt.want, tt.err)
		}
	}
}

func TestEndpointForwards(t *testing.T) {
	got, err := endpointForwards(endpointFlags{
		forwards: []string{"tcp/1=db:1", "tcp/2=db:2,allow=vm", "udp/1=db:1"}, allow: []string{"laptop"}, proxyProtocol: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		who   string
		proxy bool
	}{{"laptop", true}, {"vm", true}, {"laptop", false}} {
		if got[i].Allow.Names[0] != want.who || got[i].ProxyProtocol != want.proxy {
			t.Errorf("%s: %+v", got[i], got[i])
		}
	}
}

// The records are read again when they have changed, and only then; a machine that
// is new is let in, and a tunnel address that changes ends the endpoint.
func TestEndpointFollowsTheRecords(t *testing.T) {
	c, known := endpointConfig(t), endpointKnown()
	var log strings.Builder
	f := &follower{config: c, log: slog.New(slog.NewTextHandler(&log, nil))}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := f.awaitAddresses(ctx); err == nil || !strings.Contains(log.String(), "waiting for this node to join") {
		t.Errorf("without records: %v; log %s", err, &log)
	}
	save := func(before, now store.Known) {
		t.Helper()
		if err := store.SaveKnown(t.Context(), c.StateDir, before, now); err != nil {
			t.Fatal(err)
		}
	}
	save(store.Known{}, known)
	var err error
	if f.given, err = f.awaitAddresses(t.Context()); err != nil || len(f.given) != 1 || f.given[0] != netip.MustParseAddr("10.244.1.0") {
		t.Fatalf("tunnel addresses %v, %v", f.given, err)
	}
	f.server, err = endpoint.New(endpoint.Config{
		Addresses: f.given, Forwards: []endpoint.Forward{{Protocol: endpoint.TCP, Port: 1, Target: "db:1"}},
		Metrics: endpoint.NewMetrics(prometheus.NewRegistry()), Log: f.log, Lookup: net.DefaultResolver.LookupNetIP,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.follow(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 { // reading does not change the file
		if again, err := f.known(t.Context()); again != nil || err != nil {
			t.Errorf("read again although nothing has changed: %v", err)
		}
	}
	moved := known.Clone()
	moved.Self = endpointRecord("a", 1, "10.244.7.0/24")
	save(known, moved)
	if err := f.follow(t.Context()); err == nil || !strings.Contains(err.Error(), "were [10.244.1.0] and now are [10.244.7.0]") {
		t.Errorf("after the address has changed: %v", err)
	}
}

func TestEndpointHealth(t *testing.T) {
	f := &follower{config: endpointConfig(t), log: slog.New(slog.DiscardHandler), addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}
	var err error
	f.server, err = endpoint.New(endpoint.Config{
		Addresses: f.addresses, Forwards: []endpoint.Forward{{Protocol: endpoint.TCP, Target: "127.0.0.1:1"}},
		Metrics: endpoint.NewMetrics(prometheus.NewRegistry()), Log: f.log, Lookup: net.DefaultResolver.LookupNetIP,
	})
	if err != nil {
		t.Fatal(err)
	}
	health := func() (int, string) {
		w := httptest.NewRecorder()
		f.handler(prometheus.NewRegistry()).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/healthz", nil))
		return w.Code, strings.TrimSpace(w.Body.String())
	}
	wants := func(code int, text string) {
		t.Helper()
		if c, got := health(); c != code || got != text {
			t.Errorf("%d %q, want %d %q", c, got, code, text)
		}
	}
	wants(http.StatusServiceUnavailable, "starting")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.server.Run(ctx) }()
	<-f.server.Ready()
	f.look()
	wants(http.StatusOK, "ok")
	f.addresses = []netip.Addr{netip.MustParseAddr("192.0.2.77")}
	f.look()
	wants(http.StatusServiceUnavailable, "waiting for this machine to have [192.0.2.77]")
	f.iface, f.addresses = "lo", []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	f.look()
	wants(http.StatusOK, "ok")
	cancel()
	if err := errors.Join(<-done); err != nil {
		t.Error(err)
	}
	wants(http.StatusServiceUnavailable, "draining")
}
