package reconcile_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// A clock that is 60 s off, the others' or our own, and the registry away for 60 s
// empty no mesh (kilo's Node.Ready took a node that had not said so lately for gone).
func TestMinuteOff(t *testing.T) {
	for name, off := range map[string]time.Duration{"behind": -time.Minute, "ahead": time.Minute, "an hour ahead": time.Hour, "right": 0} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, record("b"))
			n.resync = shortResync
			var clock atomic.Int64
			clock.Store(int64(off))
			n.now = func() time.Time { return time.Now().Add(time.Duration(clock.Load())) }
			late := record("c") // made just now, by a clock that is right
			late.Since, late.Revision = time.Now(), uint64(time.Now().UnixMilli())
			late.Prefixes = claims(time.Now(), "10.244.3.0/24")
			n.registry.put(late)
			own := n.joins()
			held := []string{"peer b endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24", "peer c endpoint 192.0.2.3:51820 allowed-ips 10.244.3.0/24"}
			n.holds(held...)
			n.quiet()
			before := len(n.kernel.calls())
			stays := func(what string) {
				t.Helper()
				seen := n.kernel.observations()
				eventually(t, "resyncs "+what, func() bool { return n.kernel.observations() > seen+5 })
				n.holds(held...)
				for _, ops := range n.kernel.calls()[before:] {
					t.Errorf("%s: applied\n%s", what, mesh.Text(ops))
				}
			}
			for _, jump := range []time.Duration{time.Minute, -2 * time.Minute, time.Minute} {
				clock.Add(int64(jump))
				stays("after the clock was set by " + jump.String())
			}
			n.registry.set(func(r *fakeRegistry) { r.away = errAway })
			eventually(t, "the registry to be missed", func() bool { return n.report().RegistryError != "" })
			clock.Add(int64(time.Minute))
			stays("while the registry is away")
			n.registry.set(func(r *fakeRegistry) { r.away = nil })
			n.announced("the same record", func(r registry.Record) bool { return r.SameContent(own) })
			stays("when the registry is back")
		})
	}
}

// A key change takes all along that the node had: its own addresses were lost
// elsewhere (cilium#35644).
func TestKeyChangeKeepsHosts(t *testing.T) {
	n := newNode(t)
	n.config.EncryptNodes, n.config.DirectPorts = true, []uint16{22}
	n.kernel.Own = addrs("192.0.2.1")
	b := record("b")
	b.Hosts = claims(epoch, "192.0.2.2/32")
	n.registry.put(b)
	n.joins()
	n.holds("peer b endpoint 192.0.2.2:51820", "allowed-ips 10.244.2.0/24,192.0.2.2/32")
	b.Revision, b.PublicKey = 12, [32]byte{5}
	n.registry.put(b)
	n.holds("peer e endpoint 192.0.2.2:51820", "allowed-ips 10.244.2.0/24,192.0.2.2/32")
	n.lacks("peer b")
}
