package reconcile_test

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// attachedAt is a pod's attachment with the time of its ADD.
func attachedAt(name string, since time.Time, a ...netip.Addr) store.Attachment {
	out := pod(name, a...)
	out.Since = since
	return out
}

// awaitFor is ADD's wait.
func (n *testNode) awaitFor(limit time.Duration, since time.Time, a ...netip.Addr) error {
	ctx, cancel := context.WithTimeout(n.t.Context(), limit)
	defer cancel()
	return reconcile.AwaitAnnounced(ctx, n.config.RunDir, a, since)
}

func TestAwaitAnnounced(t *testing.T) {
	n := newNode(t)
	lock, err := reconcile.HoldHelperLock(n.config.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	since := time.Now()
	put(t, n.config, attachedAt("x", since, outsider))
	n.joins()
	if err := n.awaitFor(patience, since, outsider); err != nil {
		t.Fatalf("announced, but: %v", err)
	}
	if rec, _ := n.registry.own(); len(rec.Pods) != 1 || rec.Pods[0].Prefix.Addr() != outsider {
		t.Errorf("what is said to be announced is not: %+v", rec.Pods)
	}
	if err := n.awaitFor(20*time.Millisecond, since, neighbour); err == nil || !strings.Contains(err.Error(), neighbour.String()) || strings.Contains(err.Error(), outsider.String()) {
		t.Errorf("a pod that the store does not have: %v", err)
	}
	// What was announced of an earlier pod of that address may belong to another node by now.
	if err := n.awaitFor(20*time.Millisecond, since.Add(time.Minute), outsider); err == nil {
		t.Error("a later pod of the same address counts as announced")
	}
	again := time.Now()
	put(t, n.config, attachedAt("y", again, outsider))
	if err := n.awaitFor(patience, again, outsider); err != nil {
		t.Errorf("a later pod of the same address: %v", err)
	}
}

// Nothing keeps a pod from starting: where waiting is in vain, nobody waits.
func TestAwaitAnnouncedInVain(t *testing.T) {
	n := newNode(t)
	if err := n.awaitFor(patience, time.Now(), outsider); err == nil || !strings.Contains(err.Error(), "does not run") {
		t.Errorf("no helper: %v", err)
	}
	lock, err := reconcile.HoldHelperLock(n.config.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	n.registry.away = errAway
	n.start()
	if err := n.awaitFor(patience, time.Now(), outsider); err == nil || !strings.Contains(err.Error(), errAway.Error()) {
		t.Errorf("the registry is away: %v", err)
	}
	n.registry.set(func(r *fakeRegistry) {
		r.away = nil
		r.onPublish = func(registry.Record) error { return errAway }
	})
	eventually(t, "the report", func() bool { return n.report().PublishError != "" && n.report().RegistryError == "" })
	if err := n.awaitFor(patience, time.Now(), outsider); err == nil || !strings.Contains(err.Error(), "published") {
		t.Errorf("the registry takes nothing: %v", err)
	}
	n.registry.set(func(r *fakeRegistry) { r.onPublish = nil })
	since := time.Now()
	put(t, n.config, attachedAt("x", since, outsider))
	eventually(t, "the announcement", func() bool { return n.awaitFor(patience, since, outsider) == nil })
	n.stop()
	// A helper that starts takes nothing over: somebody may have claimed the pod meanwhile.
	n.registry.set(func(r *fakeRegistry) { r.away = errAway })
	n.start()
	eventually(t, "what the earlier helper said to be gone", func() bool {
		err := n.awaitFor(patience, since, outsider)
		return err != nil && strings.Contains(err.Error(), errAway.Error())
	})
}

// A pod inside of the node's own prefix needs no word, but one that another node
// claims singly does (A -> B -> A).
func TestContestedPodInsideThePrefix(t *testing.T) {
	inside := netip.MustParseAddr("10.244.1.7")
	other := record("b")
	other.Pods = claims(time.Now().Add(-time.Hour), "10.244.1.7/32")
	n := newNode(t, other)
	n.joins()
	n.holds("10.244.1.7/32 dev wgcni0")
	put(t, n.config, attachedAt("x", time.Now(), inside))
	n.announced("its own claim", func(r registry.Record) bool {
		return len(r.Pods) == 1 && r.Pods[0].Prefix == netip.PrefixFrom(inside, 32) && r.Pods[0].Since.After(other.Pods[0].Since)
	})
	n.lacks("10.244.1.7/32 dev wgcni0")
	// It goes there again, and its DEL here is late.
	other.Revision++
	other.Pods = []mesh.Claim{{Prefix: netip.PrefixFrom(inside, 32), Since: time.Now().Add(time.Second)}}
	n.registry.put(other)
	n.holds("10.244.1.7/32 dev wgcni0")
}
