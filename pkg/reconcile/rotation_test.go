package reconcile_test

import (
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// A key that is older than keyRotation is replaced, once, by the one that all know
// already; a node that nobody talks to has nobody to wait for.
func TestLoopRotatesByTheSchedule(t *testing.T) {
	n := newNode(t)
	n.config.KeyRotation, n.config.SparePort = time.Hour, 51821
	first, err := identity.LoadOrCreateKeys(n.config.StateDir, time.Now().Add(-3*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	n.keys = first
	var early []registry.Record
	n.registry.onPublish = func(r registry.Record) error {
		// A handshake with a key of which the others know first may come before the
		// node can tell it from those with the key before; the next is 2 minutes off.
		if held, err := n.kernel.Kernel.Observe(); err != nil || held.Link.PublicKey != r.PublicKey {
			early = append(early, r)
		}
		return nil
	}
	n.start()
	eventually(t, "the new key to be in use", func() bool {
		keys, err := identity.LoadKeys(n.config.StateDir)
		return err == nil && keys.Current == first.Next && keys.Stage == mesh.Resting && keys.Next != (wgtypes.Key{})
	})
	rec := n.announced("the new key", func(r registry.Record) bool {
		return r.PublicKey == first.Next && r.Stage == mesh.Resting && r.Next != first.Next
	})
	n.stop()
	if slices.ContainsFunc(early, func(r registry.Record) bool { return r.PublicKey == first.Next }) {
		t.Error("the new key was announced before the interface had it")
	}
	if keys, err := identity.LoadKeys(n.config.StateDir); err != nil || keys.Current != first.Next || rec.Next != keys.Next {
		t.Errorf("%v, %v, %v; want a key that is new to stay", keys, err, rec.Next)
	}
}
