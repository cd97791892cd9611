package e2e

import (
	"maps"
	"testing"
	"fmt"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

func TestAdhocRollback(t *testing.T) {
	m := newSealedMesh(t, 3)
	a, c := m.Nodes[0], m.Nodes[2]
	raw := rawFile(m.RegistryFile())
	old := raw.read(t)["node-c"]
	run(t, a, bin("wgcnid"), "forget", "node-c")
	awaitStatus(t, c, "forgotten", func(s cluster.Status) bool { return s.Report.Forgotten })
	e := maps.Clone(raw.read(t))
	e["node-c"] = old
	raw.write(t, e)
	awaitStatus(t, a, "refused", func(s cluster.Status) bool { return len(s.Report.Refused) == 1 })
	late, err := m.AddNode(t.Context(), "node-d")
	if err != nil {
		t.Fatal(err)
	}
	if err := late.Configure(m.options); err != nil {
		t.Fatal(err)
	}
	h := startHelper(t, late)
	s := awaitStatus(t, late, "peers", func(s cluster.Status) bool { return s.OK && len(s.Peers) >= 2 })
	for _, p := range s.Peers {
		t.Log(p.Name, p.AllowedIPs)
	}
	time.Sleep(2*time.Second)
	s, _ = late.Status(t.Context())
	for _, p := range s.Peers {
		t.Log(p.Name, p.AllowedIPs)
	}
	t.Log(h.Log)
	t.Log(run(t, a, bin("wgcnid"), "nodes"))
}

func TestAdhocFlood(t *testing.T) {
	m := newSealedMesh(t, 3)
	raw := rawFile(m.RegistryFile())
	flows := streams(t, m.pods)
	for round := range 5 {
		e := maps.Clone(raw.read(t))
		for k := range e { if len(k) > 8 { delete(e, k) } }
		for i := range 30000 {
			e[fmt.Sprintf("stranger-%d-%d", round, i)] = fmt.Appendf(nil, `{"name":"stranger-%d-%d"}`, round, i)
		}
		t0 := time.Now()
		raw.write(t, e)
		for _, n := range m.Nodes {
			awaitStatus(t, n, "refused", func(s cluster.Status) bool { return s.Report.RefusedTotal["malformed"] == uint64(30000*(round+1)) })
		}
		t.Log(time.Since(t0))
	}
	for _, h := range m.helpers { t.Log(len(h.Log.String())) }
	t.Log(run(t, m.Nodes[0], "sh", "-c", "grep -h 'VmHWM\\|VmRSS' /proc/$(pgrep -f 'wgcnid run')/status; ls -la /run/wgcni"))
	t0 := time.Now()
	out := run(t, m.Nodes[0], bin("wgcnid"), "status")
	t.Log(len(out), time.Since(t0))
	t0 = time.Now()
	out = run(t, m.Nodes[0], bin("wgcnid"), "nodes")
	t.Log(len(out), time.Since(t0))
	allFlowing(t, flows)
	lossless(t, flows)
}
