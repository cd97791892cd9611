package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

// Whoever can write to the registry, and does not have the secret, changes
// nothing: no peer, no packet. Every node says what it refuses, and why.
func TestRegistryUnderAttack(t *testing.T) {
	secret, foreign := newSecret(t), newSecret(t)
	s := newSiege(t, secret, cluster.NetworkOptions{}, func(c *cluster.Cluster) rawRegistry { return rawFile(c.RegistryFile()) })
	captured := s.registry.read(t)["node-b"]
	s.change(t, s.Nodes[1])

	put := func(r registry.Record) func(entries) {
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return func(e entries) { e[r.Name] = text }
	}
	sealed, err := trusting(t, foreign).Seal(newRecord(t, "stranger"))
	if err != nil {
		t.Fatal(err)
	}
	mallory, err := wgtypes.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	const (
		unsealed = "not sealed with a cluster secret: set clusterSecretFile on its node too"
		forged   = "its seal does not fit its content"
		steering = "\x1b[2J\x1b]0;owned\x07"
	)
	altered := func(name string, fields map[string]any) attack {
		return attack{name + " altered", func(e entries) { e.alter("node-b", fields) }, "node-b", reconcile.KindForged, forged}
	}
	malformed := func(name string, fields map[string]any, why string) attack {
		return attack{name, func(e entries) {
			put(newRecord(t, "stranger"))(e)
			e.alter("stranger", fields)
		}, "stranger", reconcile.KindMalformed, why}
	}
	own := s.Nodes[0].PodCIDRs()[0].String()
	for _, a := range []attack{
		{"new node without a seal", put(newRecord(t, "stranger")), "stranger", reconcile.KindUnsealed, unsealed},
		{"new node with the seal of another cluster", put(sealed), "stranger", reconcile.KindUnknownSecret, "sealed with an unknown cluster secret: " + secretID(t, foreign)},
		{"new node with the seal of a member", func(e entries) {
			put(newRecord(t, "stranger"))(e)
			e.alter("stranger", map[string]any{"seal": e.field("node-b", "seal")})
		}, "stranger", reconcile.KindForged, forged},
		{"another's prefix, held longer", func(e entries) {
			put(newRecord(t, "stranger"))(e)
			e.alter("stranger", map[string]any{"prefixes": claims(aeon, own)})
		}, "stranger", reconcile.KindUnsealed, unsealed},
		altered("endpoint", map[string]any{"endpoints": []string{"192.0.2.66:51820"}}),
		altered("prefix", map[string]any{"prefixes": claims(aeon, own, "10.244.2.0/24", "fd00:244:2::/64")}),
		altered("public key", map[string]any{"publicKey": mallory.String()}),
		altered("revision", map[string]any{"revision": uint64(registry.MaxRevision)}),
		altered("unknown field", map[string]any{"clearance": "admin"}),
		{"seal taken away", func(e entries) {
			e.alter("node-b", map[string]any{"seal": ""})
		}, "node-b", reconcile.KindUnsealed, unsealed},
		{"replay", func(e entries) { e["node-b"] = captured }, "node-b", reconcile.KindReplayed, "stale revision"},
		{"another's record under its name", func(e entries) { e["node-b"] = e["node-c"] }, "node-b", reconcile.KindMalformed, `it is stored under "node-b"`},
		{"truncated", func(e entries) { e["node-b"] = e["node-b"][:len(e["node-b"])/2] }, "node-b", reconcile.KindMalformed, `record of "node-b"`},
		{"cut down to its name", func(e entries) { e["node-b"] = []byte(`{"name": "node-b"}`) }, "node-b", reconcile.KindMalformed, "revision: 0"},
		{"future version", func(e entries) { e.alter("node-b", map[string]any{"version": 99, "endpoints": 7}) }, "node-b", reconcile.KindNewer, "upgrade wgcni on this node"},
		{"tombstone without a seal", func(e entries) {
			e["node-b"] = fmt.Appendf(nil, `{"name": "node-b", "left": true, "revision": %d}`, uint64(registry.MaxRevision))
		}, "node-b", reconcile.KindUnsealed, unsealed},
		{"tombstone with the seal of the record", func(e entries) {
			e["node-b"] = fmt.Appendf(nil, `{"name": "node-b", "left": true, "publicKey": %s, "revision": %d, "seal": %s}`,
				e.field("node-b", "publicKey"), uint64(registry.MaxRevision), e.field("node-b", "seal"))
		}, "node-b", reconcile.KindForged, forged},
		{"everything deleted", func(e entries) { clear(e) }, "", "", ""},
		{"a name that steers the terminal", func(e entries) {
			e[steering], _ = json.Marshal(map[string]any{"name": steering, "revision": 1})
		}, steering, reconcile.KindMalformed, `record "\x1b[2J\x1b]0;owned\a": name`},
		{"stored under such a name", func(e entries) {
			e[steering] = e["node-b"]
		}, steering, reconcile.KindMalformed, `it is stored under "\x1b[2J\x1b]0;owned\a"`},
		malformed("an endpoint that steers the terminal", map[string]any{"endpoints": []string{steering + ":1"}}, `endpoints[0]: "\x1b[2J`),
		malformed("a time that steers the terminal", map[string]any{"since": steering}, `\u001b[2J`),
		malformed("a field in two spellings", map[string]any{"Revision": 1}, `field "Revision": want revision`),
	} {
		t.Run(a.name, func(t *testing.T) { s.withstand(t, a) })
	}
}

// Trust does not depend on the store: etcd's keys can be written by others too.
func TestEtcdUnderAttack(t *testing.T) {
	s := newSiege(t, newSecret(t), cluster.NetworkOptions{}, func(c *cluster.Cluster) rawRegistry {
		return rawEtcd{startEtcd(t, c, cluster.EtcdOptions{})}
	})
	for _, a := range []attack{
		{"new node without a seal", func(e entries) {
			e["stranger"] = e["node-b"]
			e.alter("stranger", map[string]any{"name": "stranger", "seal": ""})
		}, "stranger", reconcile.KindUnsealed, "not sealed"},
		{"truncated", func(e entries) { e["node-b"] = e["node-b"][:len(e["node-b"])/2] }, "node-b", reconcile.KindMalformed, `record of "node-b"`},
		{"endpoint altered", func(e entries) {
			e.alter("node-b", map[string]any{"endpoints": []string{"192.0.2.66:51820"}})
		}, "node-b", reconcile.KindForged, "its seal does not fit"},
		{"a name that steers the terminal", func(e entries) { e["\x1b[2J"] = e["node-b"] }, "\x1b[2J", reconcile.KindMalformed, `"\x1b[2J"`},
		{"everything deleted", func(e entries) { clear(e) }, "", "", ""},
	} {
		t.Run(a.name, func(t *testing.T) { s.withstand(t, a) })
	}
}

// Whoever floods the registry fills neither the log nor the operator's screen,
// and pushes nobody out.
func TestFloodOfRecords(t *testing.T) {
	m := newSealedMesh(t)
	raw := rawFile(m.RegistryFile())
	traffic := flowAll(t, m.pods)
	honest := raw.read(t)
	flooded := maps.Clone(honest)
	const many = 3000
	for i := range many {
		name := fmt.Sprintf("stranger-%d", i)
		flooded[name] = fmt.Appendf(nil, `{"name": "node-b", "revision": %d}`, i)
	}
	before := map[string]int{}
	for i, n := range m.Nodes {
		before[n.Name] = len(m.helpers[i].Log.String())
	}
	raw.write(t, flooded)
	for i, n := range m.Nodes {
		s := awaitStatus(t, n, "the flood to be counted", func(s cluster.Status) bool { return s.Report.RefusedTotal[reconcile.KindMalformed] == many })
		if len(s.Peers) != 2 || !s.OK || len(s.Report.Refused) != many {
			t.Errorf("%s has %d peers and refuses %d records; %s", n.Name, len(s.Peers), len(s.Report.Refused), s.Verdict)
		}
		if grown := len(m.helpers[i].Log.String()) - before[n.Name]; grown > 16<<10 {
			t.Errorf("%s: %d records gave %d bytes of log", n.Name, many, grown)
		}
		out := run(t, n, bin("wgcnid"), "status")
		if lines := strings.Count(out, "\n"); lines > 40 || !strings.Contains(out, fmt.Sprintf("%d malformed", many)) {
			t.Errorf("%s: status has %d lines:\n%.2000s", n.Name, lines, out)
		}
		if out := run(t, n, bin("wgcnid"), "nodes"); strings.Count(out, "\nrefused: ") != many {
			t.Errorf("%s: nodes lists %d refused records of %d", n.Name, strings.Count(out, "\nrefused: "), many)
		}
	}
	raw.write(t, honest)
	for _, n := range m.Nodes {
		awaitStatus(t, n, "the flood to ebb", func(s cluster.Status) bool { return s.OK && len(s.Report.Refused) == 0 })
	}
	traffic.lossless(t)
}
