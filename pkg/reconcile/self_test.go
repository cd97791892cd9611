package reconcile_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

func TestSelfRecord(t *testing.T) {
	both := kernel.Underlay{Addresses: addrs("192.0.2.1", "2001:db8::1"), All: addrs("192.0.2.1", "198.51.100.1", "2001:db8::1"), MTU: 1500}
	before := registry.Record{
		Name: "a", PublicKey: keyA, Revision: 7, Since: at(1),
		Prefixes: claims(at(1), "10.244.1.0/24"), Pods: claims(at(2), "10.244.200.7/32"),
	}
	for _, tt := range []struct {
		name     string
		podCIDRs string
		underlay kernel.Underlay
		pods     []netip.Addr
		before   registry.Record
		want     registry.Record
	}{
		{
			"the first", "10.244.1.0/24", ethernet, nil,
			registry.Record{},
			registry.Record{
				Endpoints: []string{"192.0.2.1:51820"}, Addresses: addrs("192.0.2.1"),
				Since: at(9), Prefixes: claims(at(9), "10.244.1.0/24"),
			},
		},
		{
			"both families", "10.244.1.0/24", both, nil, before,
			registry.Record{
				Endpoints: []string{"192.0.2.1:51820", "[2001:db8::1]:51820"}, Addresses: both.All,
				Since: at(1), Revision: 7, Prefixes: claims(at(1), "10.244.1.0/24"),
			},
		},
		{
			"no underlay", "10.244.1.0/24",
			kernel.Underlay{},
			nil, before,
			registry.Record{Since: at(1), Revision: 7, Prefixes: claims(at(1), "10.244.1.0/24")},
		},
		{
			"claims keep their time, new ones begin", "10.244.1.0/24",
			kernel.Underlay{},
			[]netip.Addr{netip.MustParseAddr("10.244.1.5"), outsider, netip.MustParseAddr("10.244.201.1")},
			before,
			registry.Record{
				Since: at(1), Revision: 7, Prefixes: claims(at(1), "10.244.1.0/24"),
				Pods: append(claims(at(2), "10.244.200.7/32"), claims(at(9), "10.244.201.1/32")...),
			},
		},
		{
			"pods outside are announced merged", "10.244.1.0/24",
			kernel.Underlay{},
			addrs("10.244.200.4", "10.244.200.5", "10.244.200.6", "10.244.200.7", "10.244.200.9"), before,
			registry.Record{
				Since: at(1), Revision: 7, Prefixes: claims(at(1), "10.244.1.0/24"),
				Pods: claims(at(9), "10.244.200.4/30", "10.244.200.9/32"),
			},
		},
		{
			"no range: every pod by itself", "",
			kernel.Underlay{},
			addrs("10.244.1.5", "172.16.0.1"),
			registry.Record{},
			registry.Record{Since: at(9), Pods: claims(at(9), "10.244.1.5/32")},
		},
		{ // else it would take back what others have got meanwhile
			"again after a tombstone", "10.244.1.0/24",
			kernel.Underlay{},
			[]netip.Addr{outsider},
			registry.Record{Name: "a", Left: true, Revision: 8, Since: at(1), Prefixes: before.Prefixes, Pods: before.Pods},
			registry.Record{
				Since: at(9), Revision: 8,
				Prefixes: claims(at(9), "10.244.1.0/24"), Pods: claims(at(9), "10.244.200.7/32"),
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := testConfig(t)
			if c.PodCIDRs = nil; tt.podCIDRs != "" {
				c.PodCIDRs = prefixes(tt.podCIDRs)
			}
			tt.want.Name, tt.want.PublicKey = "a", keyA
			var pods []mesh.Pod
			for _, a := range tt.pods {
				pods = append(pods, mesh.Pod{Addr: a})
			}
			got := reconcile.SelfRecord(c, keyA, tt.underlay, pods, nil, tt.before, at(9))
			if diff := cmp.Diff(tt.want, got, byValue); diff != "" {
				t.Errorf("record (-want +got):\n%s", diff)
			}
			again := reconcile.SelfRecord(c, keyA, tt.underlay, pods, nil, got, at(10))
			if !again.Equal(got) {
				t.Errorf("made again it differs: %+v", again)
			}
		})
	}
}

func TestEndpoints(t *testing.T) {
	for _, tt := range []struct {
		configured string
		underlay   kernel.Underlay
		want       []string
	}{
		{"", underlay("192.0.2.1"), []string{"192.0.2.1:51820"}},
		{"", underlay("2001:db8::1"), []string{"[2001:db8::1]:51820"}},
		{"", underlay("192.0.2.1", "2001:db8::1"), []string{"192.0.2.1:51820", "[2001:db8::1]:51820"}},
		{"", kernel.Underlay{}, nil},
		{"node.example.org:1", underlay("192.0.2.1"), []string{"node.example.org:1"}},
		{"203.0.113.1:1", kernel.Underlay{}, []string{"203.0.113.1:1"}},
	} {
		got := reconcile.Endpoints(config.Config{Endpoint: tt.configured, Settings: mesh.Settings{ListenPort: 51820}}, tt.underlay)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("configured %q, underlay %v (-want +got):\n%s", tt.configured, tt.underlay.Addresses, diff)
		}
	}
}

func TestBootstrap(t *testing.T) {
	since := at(1)
	for _, tt := range []struct {
		name     string
		known    store.Known
		podCIDRs []netip.Prefix
		prefixes []mesh.Claim
		mtu      int
		asked    int // the underlay
	}{
		{"nothing known", store.Known{}, prefixes("10.244.1.0/24"), claims(at(5), "10.244.1.0/24"), 1440, 1},
		{"no ranges", store.Known{}, nil, nil, 1440, 1},
		{
			"the helper has run",
			store.Known{Self: registry.Record{Since: since, Prefixes: claims(since, "10.244.7.0/24")}, MTU: 1400},
			prefixes("10.244.1.0/24"), claims(since, "10.244.7.0/24"), 1400, 0,
		},
		{"a peer by IPv6", store.Known{Records: registry.NewSnapshot(registry.Record{Name: "b", Endpoints: []string{"[2001:db8::2]:1"}})}, nil, nil, 1420, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, below := testConfig(t), &fakeUnderlay{}
			c.Name, c.PodCIDRs = "no-such-network", tt.podCIDRs
			got, err := reconcile.Bootstrap(c, tt.known, below, at(5))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.prefixes, got.Self.Prefixes, byValue); diff != "" {
				t.Errorf("prefixes (-want +got):\n%s", diff)
			}
			if got.MTU != tt.mtu || below.asked != tt.asked {
				t.Errorf("MTU %d after asking for the underlay %d times, want %d after %d", got.MTU, below.asked, tt.mtu, tt.asked)
			}
			if !got.Self.Since.Equal(tt.known.Self.Since) {
				t.Errorf("it says that the helper has run: since %v", got.Self.Since)
			}
		})
	}
	broken := errors.New("no netlink")
	_, err := reconcile.Bootstrap(testConfig(t), store.Known{}, &fakeUnderlay{err: broken}, time.Time{})
	if !errors.Is(err, broken) {
		t.Errorf("error %v, want %v", err, broken)
	}
}

// After a boot flannel's file comes late: the node holds on to what it had, so
// that the mesh does not hear of every boot twice.
func TestSelfRecordBeforeFlannel(t *testing.T) {
	before := registry.Record{Name: "a", PublicKey: keyA, Revision: 7, Since: at(1), Prefixes: claims(at(1), "10.244.1.0/24")}
	c := testConfig(t)
	c.PodCIDRs, c.PodCIDRsLater = nil, true
	got := reconcile.SelfRecord(c, keyA, ethernet, nil, nil, before, at(9))
	if diff := cmp.Diff(before.Prefixes, got.Prefixes, byValue); diff != "" {
		t.Errorf("prefixes (-want +got):\n%s", diff)
	}
	c.PodCIDRs, c.PodCIDRsLater = prefixes("10.244.5.0/24"), false
	got = reconcile.SelfRecord(c, keyA, ethernet, nil, nil, got, at(10))
	if diff := cmp.Diff(claims(at(10), "10.244.5.0/24"), got.Prefixes, byValue); diff != "" {
		t.Errorf("prefixes (-want +got):\n%s", diff)
	}
}

// fakeUnderlay is that of a machine on Ethernet, which counts how often it is asked.
type fakeUnderlay struct {
	asked int
	err   error
}

func (u *fakeUnderlay) Underlay() (kernel.Underlay, error) {
	u.asked++
	return ethernet, u.err
}

func (u *fakeUnderlay) MTUOf(netip.Addr) (int, error) { return 0, u.err }
