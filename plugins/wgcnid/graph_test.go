package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/graph"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// threeMachines has this node, a gateway, a spoke of another location that has none,
// and two that do not count: one has left, and one has the key of another.
func threeMachines(t *testing.T) *testMesh {
	m := newMesh(t, 1)
	gateway, spoke, copied := registrytest.Record("b", 2), registrytest.Record("c", 3), registrytest.Record("copied", 4)
	gateway.Place = registry.Place{Location: "east", Role: mesh.RoleGateway}
	spoke.Place = registry.Place{Location: "west", Role: mesh.RoleSpoke}
	hidden := registrytest.Record("hidden", 7)
	hidden.Pods, hidden.Hosts, hidden.Place = nil, nil, registry.Place{Via: []string{"b"}, Masqueraded: true}
	copied.PublicKey = registrytest.Record("stolen", 1).PublicKey
	m.publish(registrytest.Record("a", 1), gateway, spoke, hidden, copied, tombstone("left", 5), forgotten(registrytest.Record("stolen", 1), 6))
	return m
}

func TestGraph(t *testing.T) {
	m := threeMachines(t)
	const want = `flowchart LR
    m0["a"]
  subgraph location1["east"]
    m1{{"b<br>gateway"}}
    m2>"hidden<br>peer by b"]
  end
  subgraph location2["west"]
    m3(["c<br>spoke<br>talks to nobody"])
  end
  m0 --- m1
  m1 --- m2
  classDef self stroke:#1f6feb,stroke-width:3px
  classDef fault stroke-dasharray:4 3
  class m0 self
  class m3 fault
`
	out, errs, err := m.run("graph", "--format", "mermaid")
	if diff := cmp.Diff(want, out); diff != "" || errs != "" || err != nil {
		t.Errorf("%q, %v, (-want +got):\n%s", errs, err, diff)
	}
	m.must(os.RemoveAll(filepath.Dir(m.path)))
	out, errs, err = m.run("graph", "--format", "dot")
	if !strings.HasPrefix(out, "graph mesh {") || !strings.Contains(errs, "registry is away") || err != nil {
		t.Errorf("without the registry: %q, %q, %v", out, errs, err)
	}
}

func TestGraphFormats(t *testing.T) {
	m := threeMachines(t)
	dir := t.TempDir()
	for file, begins := range map[string]string{
		"mesh.svg": "<svg ", "mesh.SVG": "<svg ", "mesh": "<svg ", "mesh.dot": "graph mesh {", "mesh.gv": "graph mesh {",
		"mesh.mmd": "flowchart", "mesh.mermaid": "flowchart", "mesh.json": "{\n",
	} {
		path := filepath.Join(dir, file)
		if out, errs, err := m.run("graph", "--output", path); out != "" || errs != "" || err != nil {
			t.Errorf("%s: %q, %q, %v", file, out, errs, err)
		}
		if text, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(text), begins) {
			t.Errorf("%s: %v, %.40q, want %q", file, err, text, begins)
		}
	}
	// What is not a terminal gets SVG; so does a pipe.
	out, _, err := m.run("graph")
	if err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(strings.NewReader(out)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v in %s", err, out)
		}
	}
	_, _, err = m.run("graph", "--format", "png")
	if want := `format "png": want svg, dot, mermaid, json`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if _, _, err = m.run("graph", "--output", filepath.Join(dir, "none", "mesh.svg")); err == nil {
		t.Error("a folder that is not there: no error")
	}
}

// A tunnel is drawn once while keys are replaced, and counts what goes by either interface.
func TestTunnelsOfBothPlanes(t *testing.T) {
	heard := map[wgtypes.Key]kernel.Handshake{keyB: {At: now.Add(-time.Hour), Received: 10, Sent: 20}, {5}: {At: now.Add(-time.Hour), Received: 1, Sent: 2}}
	spare := []mesh.Peer{{PublicKey: wgtypes.Key{7}, LastHandshake: now, ReceiveBytes: 100, TransmitBytes: 200}, {PublicKey: wgtypes.Key{5}, LastHandshake: now, ReceiveBytes: 30, TransmitBytes: 40}}
	v := meshView{records: registry.NewSnapshot(
		registry.Record{Name: "b", PublicKey: keyB, Rotation: registry.Rotation{Next: wgtypes.Key{7}, Stage: mesh.Out}},
		registry.Record{Name: "c", PublicKey: wgtypes.Key{5}, Rotation: registry.Rotation{Stage: mesh.Back}}, // its next is the one in use
		registry.Record{Name: "d", PublicKey: wgtypes.Key{6}},
	)}
	want := map[string]graph.Tunnel{"b": graph.NewTunnel(now, 110, 220, now), "c": graph.NewTunnel(now, 31, 42, now)}
	if diff := cmp.Diff(want, tunnelsOf(heard, spare, v, now), cmp.Comparer(func(a, b graph.Tunnel) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}
