package reconcile_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
	"github.com/wgcni/wgcni/pkg/store"
)

// writeSecrets makes these the node's secrets, as an operator's editor does.
func (n *testNode) writeSecrets(t registry.Trust, order ...int) {
	n.t.Helper()
	var text strings.Builder
	for _, i := range order {
		text.WriteString(t.Secrets[i].Reveal() + "\n")
	}
	n.writeSecretFile(text.String())
}

// writeSecretFile replaces the file in one step: the helper never sees half of it.
func (n *testNode) writeSecretFile(text string) {
	n.t.Helper()
	if err := os.WriteFile(n.config.SecretFile+".new", []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(n.config.SecretFile+".new", n.config.SecretFile); err != nil {
		n.t.Fatal(err)
	}
}

// sealedNode has the first of two secrets.
func sealedNode(t *testing.T) (*testNode, registry.Trust) {
	t.Helper()
	n, two := newNode(t), registrytest.Secrets(t, 2)
	n.config.SecretFile = filepath.Join(t.TempDir(), "secret")
	n.config.AcceptUnsealed = false
	n.writeSecrets(two, 0)
	n.resync = shortResync
	return n, two
}

// by is the trust that seals with the i-th secret.
func by(t registry.Trust, i int) registry.Trust {
	return registry.Trust{Secrets: t.Secrets[i : i+1]}
}

// key is the fingerprint of the preshared key with a peer, under the i-th secret.
func key(t registry.Trust, i int, peer string) mesh.Fingerprint {
	return mesh.FingerprintOf(t.Secrets[i].PresharedKey(keyA, record(peer).PublicKey))
}

// sharing waits until the kernel has this preshared key for a peer.
func (n *testNode) sharing(what, peer string, want mesh.Fingerprint) {
	n.t.Helper()
	eventually(n.t, what, func() bool {
		s, err := n.kernel.Kernel.Observe()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, p := range s.Peers {
			if p.PublicKey == record(peer).PublicKey {
				return p.PresharedKey == want
			}
		}
		return false
	})
}

const (
	peerB = "10.244.2.0/24"
	peerC = "10.244.3.0/24"
)

func TestSealedMesh(t *testing.T) {
	n, two := sealedNode(t)
	altered := registrytest.Seal(t, two, record("d"))
	altered.Endpoints = []string{"198.51.100.66:51820"}
	n.registry.put(registrytest.Seal(t, two, record("b")))
	n.registry.put(record("c"))
	n.registry.put(altered)
	n.registry.put(registrytest.Seal(t, by(two, 1), record("e")))
	n.registry.raw = map[string]string{"f": `{"name": "f", "version": 2}`}
	own := n.joins()
	if err := by(two, 0).Check(own); err != nil {
		t.Errorf("own record: %v", err)
	}
	n.holds(peerB)
	n.sharing("b's preshared key", "b", key(two, 0, "b"))

	var kinds []string
	for _, r := range n.report().Refused {
		kinds = append(kinds, r.Node+" "+r.Kind)
		if r.Since.IsZero() || !strings.Contains(r.Reason, `record `) {
			t.Errorf("refusal %+v", r)
		}
	}
	if got, want := strings.Join(kinds, ", "), "c unsealed, d forged, e unknown secret, f newer"; got != want {
		t.Errorf("refused: %s; want %s", got, want)
	}
	if peers := strings.Count(n.kernel.String(), "allowed"); peers != 1 {
		t.Errorf("%d peers:\n%s", peers, n.kernel)
	}

	// A replayed record, and one that is refused and changes: counted, and b stays.
	later := record("b")
	later.Revision = 20
	n.registry.put(registrytest.Seal(t, two, later))
	eventually(t, "b's later record", func() bool { return n.savedRecord("b").Revision == 20 })
	n.registry.put(registrytest.Seal(t, two, record("b")))
	eventually(t, "the replay to be counted", func() bool { return n.report().RefusedTotal[reconcile.KindReplayed] == 1 })
	n.registry.put(registrytest.Seal(t, two, record("g")))
	eventually(t, "g's record", func() bool { return n.savedRecord("g").Name == "g" })
	n.holds(peerB)
	n.quiet()
	if !slices.ContainsFunc(n.report().Refused, func(r reconcile.Refusal) bool { return r.Node == "b" && r.Kind == reconcile.KindReplayed }) {
		t.Errorf("the replay stands no longer once another record has come: %+v", n.report().Refused)
	}
	want := map[string]uint64{
		reconcile.KindReplayed: 1, reconcile.KindUnsealed: 1, reconcile.KindForged: 1, reconcile.KindUnknownSecret: 1, reconcile.KindNewer: 1,
	}
	for kind, n := range n.report().RefusedTotal {
		if want[kind] != n {
			t.Errorf("%d %s, want %d", n, kind, want[kind])
		}
	}
	for _, s := range two.Secrets {
		if strings.Contains(n.log.String(), s.Reveal()) {
			t.Error("the log has a secret")
		}
	}
}

// Somebody overwrites this node's record: it comes back, and stays.
func TestOwnRecordIsForged(t *testing.T) {
	n, two := sealedNode(t)
	own := n.joins()
	forged := own
	forged.Revision, forged.Endpoints = registry.MaxRevision, []string{"198.51.100.66:51820"}
	n.registry.put(forged)
	rec := n.announced("this node's own record", func(r registry.Record) bool { return r.Revision != registry.MaxRevision })
	if !rec.Equal(own) {
		t.Errorf("it is %+v now, was %+v", rec, own)
	}
	if err := two.Check(rec); err != nil {
		t.Error(err)
	}
	n.quiet()
	if n.report().RefusedTotal[reconcile.KindForged] != 1 || n.report().Rival {
		t.Errorf("report %+v", n.report())
	}
}

// A mesh without seals takes them on: this node seals and accepts both, others
// follow one by one, then only sealed records count. The tunnel to a node has a
// preshared key from the moment on that both records are sealed.
func TestTurningTheSealOn(t *testing.T) {
	n := newNode(t, record("b"), record("c"))
	n.resync = shortResync
	n.joins()
	n.holds(peerB, peerC)

	two := registrytest.Secrets(t, 2)
	secret := filepath.Join(t.TempDir(), "secret")
	n.configure(func(c *config.Config) { c.SecretFile, c.AcceptUnsealed = secret, true })
	n.writeSecrets(two, 0)
	own := n.announced("a sealed record", func(r registry.Record) bool { return !r.Seal.IsZero() })
	n.sharing("no preshared key with b", "b", mesh.Fingerprint{})

	b := record("b")
	b.Revision++
	n.registry.put(registrytest.Seal(t, by(two, 0), b))
	n.sharing("b's preshared key", "b", key(two, 0, "b"))
	n.sharing("no preshared key with c", "c", mesh.Fingerprint{})

	n.configure(func(c *config.Config) { c.AcceptUnsealed = false })
	n.lacks(peerC) // it has not followed
	n.holds(peerB)
	if got, _ := n.registry.own(); !got.Equal(own) {
		t.Errorf("the record changed on the way: %+v", got)
	}
	c := record("c")
	c.Revision++
	n.registry.put(registrytest.Seal(t, by(two, 0), c))
	n.sharing("c's preshared key", "c", key(two, 0, "c"))
}

// The secret changes node by node. A peer keeps its key until both records are
// sealed by the new secret, and at no moment is a peer gone.
func TestChangingTheSecret(t *testing.T) {
	n, two := sealedNode(t)
	put := func(node string, revision uint64, with registry.Trust) {
		r := record(node)
		r.Revision = revision
		n.registry.put(registrytest.Seal(t, with, r))
	}
	put("b", 11, by(two, 0))
	put("c", 11, by(two, 0))
	first := n.joins()
	n.sharing("the old key with b", "b", key(two, 0, "b"))
	lost := make(chan string, 1)
	n.kernel.set(func(k *fakeKernel) {
		k.onApply = func(ops []mesh.Op) error {
			for _, op := range ops {
				if _, remove := op.(mesh.RemovePeer); remove {
					select {
					case lost <- op.String():
					default:
					}
				}
			}
			return nil
		}
	})

	n.writeSecrets(two, 0, 1) // both accepted, the old one seals
	put("b", 12, by(two, 1))  // b is a step ahead
	eventually(t, "b's record to be accepted", func() bool { return n.savedRecord("b").Revision == 12 })
	n.quiet()
	n.sharing("still the old key with b", "b", key(two, 0, "b"))

	n.writeSecrets(two, 1, 0) // the new one seals
	second := n.announced("a record sealed anew", func(r registry.Record) bool { return r.Seal.Secret == two.Secrets[1].ID() })
	if second.Revision <= first.Revision {
		t.Errorf("revision %d after %d: others would refuse it", second.Revision, first.Revision)
	}
	n.sharing("the new key with b", "b", key(two, 1, "b"))
	n.sharing("the old key with c", "c", key(two, 0, "c"))

	put("c", 12, by(two, 1))
	n.sharing("the new key with c", "c", key(two, 1, "c"))
	n.writeSecrets(two, 1) // the old one is given up
	n.quiet()
	n.holds(peerB, peerC)
	select {
	case op := <-lost:
		t.Errorf("a peer was removed: %s", op)
	default:
	}
	if got, _ := n.registry.own(); !got.Equal(second) {
		t.Errorf("published again: %+v", got)
	}
}

// While the registry is away nobody sees our new seal, so the keys stay.
func TestNewSecretWhileTheRegistryIsAway(t *testing.T) {
	n, two := sealedNode(t)
	n.registry.put(registrytest.Seal(t, by(two, 0), record("b")))
	n.joins()
	n.writeSecrets(two, 0, 1)
	b := record("b")
	b.Revision = 12
	n.registry.put(registrytest.Seal(t, by(two, 1), b))
	eventually(t, "b's record to be accepted", func() bool { return n.savedRecord("b").Revision == 12 })
	n.registry.set(func(r *fakeRegistry) { r.away = errAway })
	n.writeSecrets(two, 1, 0)
	eventually(t, "an attempt to publish", func() bool { return n.report().PublishError != "" })
	n.sharing("the old key", "b", key(two, 0, "b"))
	n.registry.set(func(r *fakeRegistry) { r.away = nil })
	n.sharing("the new key", "b", key(two, 1, "b"))
	eventually(t, "the report", func() bool { return n.report().PublishError == "" && n.report().PublishSince.IsZero() })
}

// What was taken on trust before does not stay when trust needs a seal.
func TestCachedRecordsAreChecked(t *testing.T) {
	n, two := sealedNode(t)
	n.registry.away = errAway
	n.knowing(store.Known{
		Self: record("a"), MTU: 1440,
		Records: registry.NewSnapshot(registrytest.Seal(t, by(two, 0), record("b")), record("c")),
	})
	n.start()
	n.holds(peerB)
	n.sharing("b's preshared key", "b", key(two, 0, "b"))
	n.lacks(peerC)
	if n.log.count("a record that was known is no longer trusted") != 1 {
		t.Errorf("log:\n%s", n.log)
	}
}

func TestSecretFileFaults(t *testing.T) {
	n, two := sealedNode(t)
	n.registry.put(registrytest.Seal(t, by(two, 0), record("b")))
	if err := os.Chmod(n.config.SecretFile, 0o644); err != nil {
		t.Fatal(err)
	}
	n.start()
	if err := n.ended(); err == nil || !strings.Contains(err.Error(), "chmod 600 "+n.config.SecretFile) {
		t.Errorf("a secret that all can read: %v", err)
	}
	if err := os.Chmod(n.config.SecretFile, 0o600); err != nil {
		t.Fatal(err)
	}
	n.joins()
	n.holds(peerB)
	// Damaged while it runs: the last ones stay in use, it is said once, and shown.
	n.writeSecretFile("hunter2\n")
	eventually(t, "the report", func() bool { return strings.Contains(n.report().SecretsError, "line 1") })
	n.quiet()
	n.holds(peerB)
	if said := n.log.count("the cluster's secrets cannot be read; going on with the last ones"); said != 1 || strings.Contains(n.log.String(), "hunter2") {
		t.Errorf("said %d times; log:\n%s", said, n.log)
	}
	n.writeSecrets(two, 0)
	eventually(t, "the report", func() bool { return n.report().SecretsError == "" })
}

// A forgotten node keeps what keeps plaintext from leaving, tells nobody
// anything, and is back with a new key only.
func TestForgotten(t *testing.T) {
	n, two := sealedNode(t)
	n.registry.put(registrytest.Seal(t, by(two, 0), record("b")))
	own := n.joins()
	n.holds(peerB)
	gone := tombstone("a", own.Revision+1)
	gone.PublicKey = keyA
	gone = registrytest.Seal(t, by(two, 0), gone)
	n.registry.put(gone)
	n.lacks("192.0.2.2:51820")
	n.holds("unreachable 10.244.0.0/16")
	eventually(t, "the report", func() bool { return n.report().Forgotten })
	n.quiet()
	n.stop()

	n.start() // with the same key, also after a restart
	eventually(t, "the report", func() bool { return n.report().Forgotten })
	n.quiet()
	n.lacks("192.0.2.2:51820")
	if got, _ := n.registry.own(); !got.Equal(gone) {
		t.Errorf("the tombstone was replaced by %+v", got)
	}
	if n.log.count("the mesh has forgotten this node and revoked its key: traffic to other nodes is dropped") != 2 { // once a start
		t.Errorf("log:\n%s", n.log)
	}
	n.stop()

	n.key[5]++
	n.start()
	n.announced("the node with its new key", func(r registry.Record) bool { return r.PublicKey == n.key && r.Revision > gone.Revision })
	n.holds(peerB)
}

// The key of a forgotten node is worth nothing under another name either.
func TestRevokedKey(t *testing.T) {
	n := newNode(t, record("b"))
	n.joins()
	n.holds(peerB)
	gone := tombstone("b", 11)
	gone.PublicKey = record("b").PublicKey
	again := record("c")
	again.PublicKey = record("b").PublicKey
	n.registry.set(func(r *fakeRegistry) { r.records["b"], r.records["c"] = gone, again })
	eventually(t, "the conflict", func() bool {
		c := n.report().Conflicts
		return len(c) == 1 && c[0].Node == "c" && strings.Contains(c[0].Reason, "revoked")
	})
	n.lacks(peerB)
	n.lacks(peerC)
}

// A tombstone that came while this node's record, of a later revision, was on
// its way is not overwritten by it, nor by the next one.
func TestTombstoneWithLesserRevision(t *testing.T) {
	n := newNode(t)
	own := n.joins()
	gone := tombstone("a", own.Revision+1)
	arrived := make(chan struct{})
	n.registry.set(func(r *fakeRegistry) {
		r.onPublish = func(rec registry.Record) error {
			if rec.Revision <= gone.Revision {
				return errors.New("the clock has not moved on") // tried again
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.records["a"] = gone // the watch has not told yet
			select {
			case <-arrived:
			default:
				close(arrived)
			}
			return nil
		}
	})
	n.kernel.set(func(k *fakeKernel) { k.underlay = underlay("192.0.2.77") })
	n.tell(kernel.Event{Underlay: true})
	select {
	case <-arrived:
	case <-time.After(patience):
		t.Fatal("nothing was published")
	}
	eventually(t, "the refusal", func() bool { return strings.Contains(n.log.String(), "without knowing of") })
	n.registry.set(func(r *fakeRegistry) { r.onPublish = nil }) // now it tells
	if err := n.ended(); !errors.Is(err, reconcile.ErrLeft) {
		t.Errorf("Run: %v, want ErrLeft", err)
	}
	if got, _ := n.registry.own(); !got.Equal(gone) {
		t.Errorf("the tombstone was replaced by %+v", got)
	}
}

// The same for a node that has changed its record twice since the registry could
// last be written to: its own offer is nothing that it knows to be stored.
func TestTombstoneBetweenTwoChanges(t *testing.T) {
	n := newNode(t)
	own := n.joins()
	gone := tombstone("a", own.Revision+1)
	gone.PublicKey = keyA
	const last = "192.0.2.78:51820"
	n.registry.set(func(r *fakeRegistry) {
		r.onPublish = func(rec registry.Record) error {
			if rec.Endpoints[0] != last {
				return errAway
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.records["a"] = gone // the watch has not told yet
			return nil
		}
	})
	for _, address := range []string{"192.0.2.77", "192.0.2.78"} {
		n.kernel.set(func(k *fakeKernel) { k.underlay = underlay(address) })
		n.tell(kernel.Event{Underlay: true})
		eventually(t, "the change to be offered", func() bool {
			all := n.registry.publications()
			return all[len(all)-1].Endpoints[0] == address+":51820"
		})
	}
	eventually(t, "the refusal", func() bool { return strings.Contains(n.log.String(), "without knowing of") })
	n.registry.set(func(r *fakeRegistry) { r.onPublish = nil }) // now it tells
	eventually(t, "the report", func() bool { return n.report().Forgotten })
	if got, _ := n.registry.own(); !got.Equal(gone) {
		t.Errorf("the tombstone was replaced by %+v", got)
	}
}

// The seal needs no clock and no order: the same secret seals alike on each node.
func TestSealsAgree(t *testing.T) {
	two := registrytest.Secrets(t, 2)
	a := registrytest.Seal(t, two, record("b"))
	b := registrytest.Seal(t, by(two, 0), record("b"))
	if !a.Equal(b) || a.Seal == (identity.Seal{}) {
		t.Errorf("%+v and %+v", a.Seal, b.Seal)
	}
}
