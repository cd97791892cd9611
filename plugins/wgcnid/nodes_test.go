package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// fullMesh has a node in every state.
func fullMesh(t *testing.T) *testMesh {
	m := newMesh(t, 2)
	second := registry.Trust{Secrets: m.trust.Secrets[1:]}
	b := registrytest.Seal(t, second, registrytest.Record("b", 2))
	behindNAT := registrytest.Record("c", 3)
	behindNAT.Endpoints, behindNAT.Pods = nil, nil
	copied := registrytest.Record("copied", 4)
	copied.PublicKey = registrytest.Record("stolen", 1).PublicKey
	m.publish(registrytest.Record("a", 1), behindNAT, copied, tombstone("left", 5), forgotten(registrytest.Record("stolen", 1), 6))
	m.forge(b)
	m.cache(registrytest.Record("rolled-back", 8))
	m.publish(registrytest.Record("rolled-back", 7))
	m.forge(registrytest.Record("unsealed", 9))
	m.raw("elsewhere", `{"name": "b"}`)
	return m
}

func TestNodes(t *testing.T) {
	m := fullMesh(t)
	const want = `NODE         STATE        ENDPOINTS                                                          PREFIXES                   SEALED BY  JOINED
a            this node    a.example.net:51820 192.0.2.7:51820 [2001:db8::7]:51820            10.244.1.0/24 fd00::7/128  11111111   2026-03-01 12:00:00
b            member       b.example.net:51820 192.0.2.7:51820 [2001:db8::7]:51820            10.244.1.0/24 fd00::7/128  22222222   2026-03-01 12:00:00
c            member       -                                                                  10.244.1.0/24              11111111   2026-03-01 12:00:00
copied       key revoked  copied.example.net:51820 192.0.2.7:51820 [2001:db8::7]:51820       10.244.1.0/24 fd00::7/128  11111111   2026-03-01 12:00:00
left         left         -                                                                  -                          11111111   -
rolled-back  member       rolled-back.example.net:51820 192.0.2.7:51820 [2001:db8::7]:51820  10.244.1.0/24 fd00::7/128  11111111   2026-03-01 12:00:00
stolen       forgotten    -                                                                  -                          11111111   -
refused: record b: revision: 0: want 1 to 9007199254740991 (stored under "elsewhere")
refused: record rolled-back: stale revision: 7 offered, 8 is known; publish with a later revision
refused: record unsealed: not sealed with a cluster secret: set clusterSecretFile on its node too
`
	for range 2 {
		out, errs, err := m.run("nodes")
		if diff := cmp.Diff(want, m.named(out)); diff != "" || errs != "" || err != nil {
			t.Errorf("%q, %v, (-want +got):\n%s", errs, err, diff)
		}
	}
}

func TestNodesJSON(t *testing.T) {
	m := fullMesh(t)
	out, errs, err := m.run("nodes", "--json")
	if err != nil || errs != "" {
		t.Fatalf("%q, %v", errs, err)
	}
	var got NodeList
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Nodes) != 7 || got.Nodes[6].PublicKey != registrytest.Record("stolen", 1).PublicKey.String() {
		t.Errorf("nodes %+v", got.Nodes)
	}
	got.Nodes = got.Nodes[1:5]
	short, err := json.MarshalIndent(got, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want := `{
  "registry": "file:` + m.path + `",
  "nodes": [
    {
      "name": "b",
      "state": "member",
      "publicKey": "YgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
      "endpoints": [
        "b.example.net:51820",
        "192.0.2.7:51820",
        "[2001:db8::7]:51820"
      ],
      "prefixes": [
        "10.244.1.0/24",
        "fd00::7/128"
      ],
      "sealedBy": "22222222",
      "since": "2026-03-01T12:00:00.25Z",
      "revision": 2
    },
    {
      "name": "c",
      "state": "member",
      "publicKey": "YwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
      "prefixes": [
        "10.244.1.0/24"
      ],
      "sealedBy": "11111111",
      "since": "2026-03-01T12:00:00.25Z",
      "revision": 3
    },
    {
      "name": "copied",
      "state": "key revoked",
      "publicKey": "c3RvbGVuAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
      "endpoints": [
        "copied.example.net:51820",
        "192.0.2.7:51820",
        "[2001:db8::7]:51820"
      ],
      "prefixes": [
        "10.244.1.0/24",
        "fd00::7/128"
      ],
      "sealedBy": "11111111",
      "since": "2026-03-01T12:00:00.25Z",
      "revision": 4
    },
    {
      "name": "left",
      "state": "left",
      "sealedBy": "11111111",
      "revision": 5
    }
  ],
  "refused": [
    {
      "node": "elsewhere",
      "reason": "record b: revision: 0: want 1 to 9007199254740991"
    },
    {
      "node": "rolled-back",
      "reason": "record rolled-back: stale revision: 7 offered, 8 is known; publish with a later revision"
    },
    {
      "node": "unsealed",
      "reason": "record unsealed: not sealed with a cluster secret: set clusterSecretFile on its node too"
    }
  ]
}`
	if diff := cmp.Diff(want, m.named(string(short))); diff != "" {
		t.Errorf("JSON (-want +got):\n%s", diff)
	}
}

// Scripts iterate over .nodes and .refused: they are lists even where there are none.
func TestNodesOfNothing(t *testing.T) {
	m := newMesh(t, 0)
	if out, _, err := m.run("nodes"); err != nil || out != "No node has joined yet.\n" {
		t.Errorf("%q, %v", out, err)
	}
	out, _, err := m.run("nodes", "--json")
	if want := fmt.Sprintf("{\n  \"registry\": \"file:%s\",\n  \"nodes\": [],\n  \"refused\": []\n}\n", m.path); err != nil || out != want {
		t.Errorf("%q, %v; want %q", out, err, want)
	}
}

func TestNodesWhileAway(t *testing.T) {
	m := newMesh(t, 1)
	m.cache(registrytest.Record("b", 1))
	m.must(os.RemoveAll(filepath.Dir(m.path)))
	out, errs, err := m.run("nodes")
	want := "The registry is away; this is what this node knows: registry folder " + filepath.Dir(m.path) + ` is missing: create it or mount it

NODE  STATE   ENDPOINTS                                                PREFIXES                   SEALED BY  JOINED
b     member  b.example.net:51820 192.0.2.7:51820 [2001:db8::7]:51820  10.244.1.0/24 fd00::7/128  11111111   2026-03-01 12:00:00
`
	if diff := cmp.Diff(want, m.named(out)); diff != "" || errs != "" || err != nil {
		t.Errorf("%q, %v, (-want +got):\n%s", errs, err, diff)
	}
	out, _, err = m.run("nodes", "--json")
	var got NodeList
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if err != nil || !strings.Contains(got.RegistryError, "create it or mount it") || len(got.Nodes) != 1 {
		t.Errorf("%s, %v", out, err)
	}
}

// Whoever can write to the registry does not write to the operator's terminal.
func TestNodesHostile(t *testing.T) {
	m := newMesh(t, 1)
	m.publish(registrytest.Record("b", 1))
	valid := strings.ToValidUTF8(hostile, "")
	name, err := json.Marshal(valid)
	m.must(err)
	m.raw(valid, `{"name": "b"}`)
	m.raw(valid+"\nrefused: nothing", `{}`)
	m.raw("c", fmt.Sprintf(`{"name": %s}`, name))
	m.raw("d", fmt.Sprintf(`{"name": "d", %s: 1, "Name": 2}`, name))
	m.raw("e", fmt.Sprintf(`{"name": "e", "revision": 1, "endpoints": [%s], "publicKey": %s, "since": %s}`, name, name, name))
	m.raw("f", fmt.Sprintf(`{"name": "f", "revision": 1, "prefixes": [{"prefix": %s}]}`, name))
	m.raw("g", fmt.Sprintf(`{"name": "g", "revision": 1, "addresses": [%s]}`, name))
	m.raw("h", fmt.Sprintf(`{"name": "h", "revision": %s}`, strings.Repeat("9", 1<<16)))
	m.raw("i", fmt.Sprintf(`{"name": "i", "seal": %s}`, name))
	m.raw("k", fmt.Sprintf(`{"name": "k", "prefixes": [{"prefix": "%s"}]}`, strings.Repeat("x", 1<<16)))
	for _, args := range []string{"nodes", "nodes --json", "secret list", "forget b"} {
		out, errs, err := m.run(strings.Fields(args)...)
		if err != nil {
			t.Fatalf("%s: %v", args, err)
		}
		for _, r := range out + errs {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("%s prints %U", args, r)
			}
		}
		if args == "nodes" {
			if lines := strings.Count(out, "\n"); lines != 2+10 || len(out) > 10_000 {
				t.Errorf("%d lines, %d bytes:\n%.10000s", lines, len(out), out)
			}
		}
	}
}
