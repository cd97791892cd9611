package reconcile_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

func TestSelfRecordHosts(t *testing.T) {
	c := testConfig(t)
	u := kernel.Underlay{Addresses: addrs("192.0.2.1", "2001:db8::1"), All: addrs("192.0.2.1", "172.17.0.1", "2001:db8::1"), MTU: 1500}
	before := registry.Record{Name: "a", PublicKey: keyA, Since: at(1), Hosts: claims(at(2), "192.0.2.1/32")}
	if got := reconcile.SelfRecord(c, keyA, u, nil, nil, before, at(9)); got.Hosts != nil {
		t.Errorf("without encryptNodes: %v", got.Hosts)
	}
	c.EncryptNodes = true
	want := append(claims(at(2), "192.0.2.1/32"), claims(at(9), "2001:db8::1/128")...)
	if diff := cmp.Diff(want, reconcile.SelfRecord(c, keyA, u, nil, nil, before, at(9)).Hosts, byValue); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	before.Left = true
	if got := reconcile.SelfRecord(c, keyA, underlay("192.0.2.1"), nil, nil, before, at(9)).Hosts; cmp.Diff(claims(at(9), "192.0.2.1/32"), got, byValue) != "" {
		t.Errorf("after a tombstone: %v", got)
	}
}

// What others cannot have heard of does not count: they would not let it through.
func TestOnlyPublishedHostsCount(t *testing.T) {
	self := registry.Record{Name: "a", PublicKey: keyA, Hosts: claims(at(1), "192.0.2.1/32", "2001:db8::1/128")}
	on := config.Config{NodeName: "a", Settings: mesh.Settings{EncryptNodes: true}}
	for _, tt := range []struct {
		name      string
		config    config.Config
		published registry.Record
		want      []mesh.Claim
	}{
		{"both", on, self, self.Hosts},
		{"one", on, registry.Record{Name: "a", Hosts: self.Hosts[:1]}, self.Hosts[:1]},
		{"of another time", on, registry.Record{Name: "a", Hosts: claims(at(0), "192.0.2.1/32")}, self.Hosts[:1]},
		{"not yet", on, registry.Record{Name: "a"}, nil},
		{"not any more", on, registry.Record{Name: "a", Left: true, Hosts: self.Hosts}, nil},
		{"switched off", config.Config{NodeName: "a"}, self, nil},
	} {
		known := store.Known{Self: self, Records: registry.NewSnapshot(tt.published)}
		got := reconcile.Facts(tt.config, keyA, nil, known, nil).Self.Hosts
		if diff := cmp.Diff(tt.want, got, byValue, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestDigestCoversEncryptNodes(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range []mesh.Settings{{}, {EncryptNodes: true}, {EncryptNodes: true, DirectPorts: []uint16{22}}, {EncryptNodes: true, DirectPorts: []uint16{22, 2379}}} {
		seen[reconcile.Digest(s)] = true
	}
	if len(seen) != 4 {
		t.Errorf("%d digests of 4 settings", len(seen))
	}
}

func TestNodesUnreached(t *testing.T) {
	now := at(60)
	p := func(n byte, name, host string, handshake time.Time) mesh.Peer {
		return mesh.Peer{Name: name, PublicKey: wgtypes.Key{n}, LastHandshake: handshake, AllowedIPs: prefixes("10.244.2.0/24", host)}
	}
	var o reconcile.Outcome
	o.Plan.Filter.Nodes.Peers = addrs("192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5")
	o.Plan.Peers = []mesh.Peer{
		p(5, "never", "192.0.2.5/32", time.Time{}), p(2, "fresh", "192.0.2.2/32", time.Time{}),
		p(3, "old", "192.0.2.3/32", time.Time{}), p(4, "missing", "192.0.2.4/32", time.Time{}),
		p(6, "not routed", "192.0.2.6/32", time.Time{}),
	}
	o.Observed.Peers = []mesh.Peer{
		p(5, "", "192.0.2.5/32", time.Time{}), p(2, "", "192.0.2.2/32", now.Add(-mesh.HandshakeFresh+time.Second)), p(3, "", "192.0.2.3/32", now.Add(-mesh.HandshakeFresh)),
	}
	want := []reconcile.Unreached{{Node: "missing"}, {Node: "never"}, {Node: "old", Since: now.Add(-mesh.HandshakeFresh)}}
	if diff := cmp.Diff(want, reconcile.NodesUnreached(o, now)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := reconcile.RoutedHosts(o.Plan.State, o.Plan.Peers[4]); got != nil {
		t.Errorf("not routed: %v", got)
	}
	if diff := cmp.Diff([]netip.Addr{netip.MustParseAddr("192.0.2.5")}, reconcile.RoutedHosts(o.Plan.State, o.Plan.Peers[0]), byValue); diff != "" {
		t.Errorf("routed (-want +got):\n%s", diff)
	}
}

// A peer is named once, when its silence has lasted; the first handshake has some time.
func TestUnreachedIsNews(t *testing.T) {
	var u reconcile.UnreachedNodes
	never, old := reconcile.Unreached{Node: "b"}, reconcile.Unreached{Node: "c", Since: at(1)}
	for _, tt := range []struct {
		at             time.Time
		found          []reconcile.Unreached
		standing, news string
	}{
		{at(10), []reconcile.Unreached{never, old}, "c", "c"},
		{at(10).Add(time.Second), []reconcile.Unreached{never, old}, "c", ""},
		{at(10).Add(10 * time.Second), []reconcile.Unreached{never, old}, "bc", "b"},
		{at(11), []reconcile.Unreached{never}, "b", ""},
		{at(12), nil, "", ""},
		{at(13), []reconcile.Unreached{old}, "c", "c"},
	} {
		standing, news := u.Hear(tt.found, tt.at)
		if got := names(standing) + "/" + names(news); got != tt.standing+"/"+tt.news {
			t.Errorf("at %s: %s, want %s/%s", tt.at, got, tt.standing, tt.news)
		}
	}
}

func names(all []reconcile.Unreached) string {
	var b strings.Builder
	for _, u := range all {
		b.WriteString(u.Node)
	}
	return b.String()
}

// The record first, the route when all can have heard of it, without waiting for a resync.
func TestLoopRoutesHostsWhenTheyHaveSettled(t *testing.T) {
	b := record("b")
	b.Hosts = claims(epoch, "192.0.2.2/32")
	n := newNode(t, b)
	n.resync = time.Hour
	n.config.EncryptNodes, n.config.DirectPorts = true, []uint16{22}
	n.kernel.Own = addrs("192.0.2.1")
	n.start()
	rec := n.announced("the record with its hosts", func(r registry.Record) bool { return len(r.Hosts) == 1 })
	n.holds("peer b endpoint 192.0.2.2:51820 persistent-keepalive 25s allowed-ips 10.244.2.0/24,192.0.2.2/32", "nft nodes mark 0x4 direct [22]", "sysctl src_valid_mark=1")
	if strings.Contains(n.kernel.String(), "ip route 192.0.2.2/32") && time.Since(rec.Hosts[0].Since) < mesh.HostsSettle {
		t.Error("routed before the others can have heard of it")
	}
	n.holds("ip route 192.0.2.2/32 dev wgcni0 src 192.0.2.1", "nft set nodes 192.0.2.2", "nft set held 192.0.2.2")
	if age := time.Since(rec.Hosts[0].Since); age < mesh.HostsSettle {
		t.Errorf("routed after %s", age)
	}
	b.Revision, b.Hosts = 11, nil
	n.registry.put(b)
	n.lacks("192.0.2.2/32")
}
