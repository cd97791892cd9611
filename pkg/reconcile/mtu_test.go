package reconcile_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

func reachedAt(name string, endpoints ...string) registry.Record {
	return registry.Record{Name: name, Revision: 1, Endpoints: endpoints}
}

func TestFindMTU(t *testing.T) {
	v4, v6 := reachedAt("b", "192.0.2.2:1"), reachedAt("c", "[2001:db8::3]:1")
	const four, both = "10.244.0.0/16", "10.244.0.0/16 fd00:244::/32"
	for _, tt := range []struct {
		name     string
		underlay int
		cluster  string
		self     registry.Record
		others   []registry.Record
		want     int
	}{
		{"IPv4", 1500, four, reachedAt("a", "192.0.2.1:1"), []registry.Record{v4}, 1440},
		// cilium#23917: an IPv6 underlay needs 20 bytes more.
		{"IPv6", 1500, four, reachedAt("a", "[2001:db8::1]:1"), []registry.Record{v6}, 1420},
		{"both", 1500, four, reachedAt("a", "192.0.2.1:1", "[2001:db8::1]:1"), []registry.Record{v4}, 1420},
		{"one other node by IPv6", 1500, four, reachedAt("a", "192.0.2.1:1"), []registry.Record{v4, v6}, 1420},
		{"a name may be an IPv6 address", 1500, four, reachedAt("a", "node.example.org:1"), nil, 1420},
		{"alone", 1500, four, reachedAt("a"), nil, 1440},
		{"jumbo frames", 9001, both, reachedAt("a", "192.0.2.1:1"), nil, 8941},
		{"a VXLAN below", 1450, both, reachedAt("a", "192.0.2.1:1"), nil, 1390},
		{"no underlay", 0, both, reachedAt("a"), []registry.Record{v4}, 1440},
		{"IPv6 pods need 1280", 1280, both, reachedAt("a", "192.0.2.1:1"), nil, 1280},
		{"IPv4 pods do not", 1280, four, reachedAt("a", "192.0.2.1:1"), nil, 1220},
		{"nor over IPv6", 1280, four, reachedAt("a", "192.0.2.1:1"), []registry.Record{v6}, 1200},
		{"IPv4 pods need 576", 600, four, reachedAt("a", "192.0.2.1:1"), nil, 576},
	} {
		c := testConfig(t)
		c.ClusterCIDRs = prefixes(strings.Fields(tt.cluster)...)
		got := reconcile.FindMTU(c, kernel.Underlay{MTU: tt.underlay}, tt.self, registry.NewSnapshot(tt.others...))
		if got != tt.want {
			t.Errorf("%s: MTU %d, want %d", tt.name, got, tt.want)
		}
	}
}

// The peers may be behind another interface than the default route's.
func TestUnderlayOfAnEndpoint(t *testing.T) {
	for _, tt := range []struct {
		endpoint   string
		ethernet   int // 0: no default route
		mtu, addrs int
	}{
		{"", 1500, 1500, 1},
		{"node.example.org:51820", 1500, 1500, 1},
		{"203.0.113.5:51820", 1500, 1500, 1}, // translated on the way
		{"198.51.100.7:51820", 1500, 1450, 1},
		{"[::ffff:198.51.100.7]:51820", 1500, 1450, 1},
		{"198.51.100.7:51820", 1400, 1400, 1},
		{"198.51.100.7:51820", 0, 1450, 0},
	} {
		k, c := newKernel(), testConfig(t)
		k.underlay.MTU, c.Endpoint = tt.ethernet, tt.endpoint
		if tt.ethernet == 0 {
			k.underlay = kernel.Underlay{}
		}
		u, err := reconcile.Underlay(k, c)
		if err != nil || u.MTU != tt.mtu || len(u.Addresses) != tt.addrs {
			t.Errorf("%q over %d: %+v, %v; want MTU %d", tt.endpoint, tt.ethernet, u, err, tt.mtu)
		}
	}
}

func TestFragmentsNote(t *testing.T) {
	const four, both = "10.244.0.0/16", "10.244.0.0/16 fd00:244::/32"
	for _, tt := range []struct {
		name              string
		underlay          int
		cluster           string
		configured, found int
		want              string
	}{
		{"found", 1500, four, 0, 1440, ""},
		{"configured, and fits", 1500, four, 1440, 1440, ""},
		{"no underlay", 0, four, 9000, 1440, ""},
		{
			"configured, one byte too many", 1500, four, 1441, 1440,
			`packets of more than 1440 bytes leave in fragments, since the tunnel's MTU of 1441 does not fit into the underlay's 1500: set "mtu" to 1440 at most, or leave it out`,
		},
		{
			"IPv6 over 1280", 1280, both, 0, 1280,
			"packets of more than 1220 bytes leave in fragments, since the tunnel's MTU of 1280 does not fit into the underlay's 1280: the ranges in the tunnel need an MTU of 1280, so raise the underlay's to 1340",
		},
	} {
		c := testConfig(t)
		c.ClusterCIDRs, c.MTU = prefixes(strings.Fields(tt.cluster)...), tt.configured
		got := reconcile.FragmentsNote(c, kernel.Underlay{MTU: tt.underlay}, store.Known{Self: reachedAt("a", "192.0.2.1:1"), MTU: tt.found})
		if got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

// fakeLink is a pod's link in memory. With an IPv6 address it cannot have less than 1280.
type fakeLink struct {
	mtu  int
	ipv6 bool
	err  error
}

func (l *fakeLink) MTU() int { return l.mtu }

func (l *fakeLink) Fit(tunnel int) (int, error) {
	if l.ipv6 {
		tunnel = max(tunnel, 1280)
	}
	return tunnel, l.err
}

func (l *fakeLink) SetMTU(mtu, most int) error {
	if l.err == nil {
		l.mtu = min(mtu, most)
	}
	return l.err
}

// A pod's link follows the tunnel's MTU, but somebody else's smaller one stays:
// each row is one life of a link, as "MTU of the tunnel -> that of the link" or
// "= what somebody else sets".
func TestFitLink(t *testing.T) {
	type step struct{ tunnel, others, want int }
	for _, tt := range []struct {
		name  string
		first int // MTU that the primary plugin gave
		ipv6  bool
		steps []step
	}{
		{"follows down and up", 1500, false, []step{{tunnel: 1420, want: 1420}, {tunnel: 1220, want: 1220}, {tunnel: 1420, want: 1420}}},
		{"not above what the primary plugin gave", 1500, false, []step{{tunnel: 1420, want: 1420}, {tunnel: 8921, want: 1500}, {tunnel: 1220, want: 1220}, {tunnel: 8921, want: 1500}}},
		{"tuning ahead of us asked for less", 1400, false, []step{{tunnel: 1420, want: 1400}, {tunnel: 1220, want: 1220}, {tunnel: 8921, want: 1400}}},
		{"tuning behind us asked for less", 1500, false, []step{{tunnel: 1420, want: 1420}, {others: 1400}, {tunnel: 1220, want: 1220}, {tunnel: 8921, want: 1400}}},
		{"tuning behind us asked for still less", 1500, false, []step{{tunnel: 1420, want: 1420}, {others: 1000}, {tunnel: 1220, want: 1000}, {tunnel: 8921, want: 1000}}},
		{"somebody asked for more", 1500, false, []step{{tunnel: 1420, want: 1420}, {others: 9000}, {tunnel: 1220, want: 1220}, {tunnel: 8921, want: 8921}}},
		{"the same once more", 1500, false, []step{{tunnel: 1420, want: 1420}, {tunnel: 1420, want: 1420}, {tunnel: 1440, want: 1440}}},
		{"an IPv6 address in an IPv4 cluster", 1500, true, []step{{tunnel: 1220, want: 1280}, {tunnel: 576, want: 1280}, {tunnel: 1420, want: 1420}}},
	} {
		link, at := &fakeLink{mtu: tt.first, ipv6: tt.ipv6}, store.Attachment{}
		for i, s := range tt.steps {
			if s.others != 0 {
				link.mtu = s.others
				continue
			}
			got, err := reconcile.FitLink(&at, link, s.tunnel)
			if err != nil || got != s.want || link.mtu != s.want || at.TunnelMTU != s.tunnel {
				t.Errorf("%s, step %d: over a tunnel of %d the link has %d (said %d, noted %+v, %v), want %d", tt.name, i, s.tunnel, link.mtu, got, at, err, s.want)
			}
		}
	}
	broken := errors.New("no such device")
	if _, err := reconcile.FitLink(&store.Attachment{}, &fakeLink{mtu: 1500, err: broken}, 1420); !errors.Is(err, broken) {
		t.Errorf("error %v, want %v", err, broken)
	}
}
