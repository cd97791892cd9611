package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

func TestForget(t *testing.T) {
	for secrets := range 2 {
		m := newMesh(t, secrets)
		b := registrytest.Record("node-b", ahead())
		m.publish(b, registrytest.Record("node-c", 1))
		out, errs, err := m.run("forget", "node-b")
		if want := "node-b is forgotten and its key revoked; every node that reads the registry removes it now.\n"; err != nil || out != want || errs != "" {
			t.Errorf("%q, %q, %v; want %q", out, errs, err, want)
		}
		equalTo(t, forgotten(b, b.Revision+1), m.stored("node-b"))
		if m.stored("node-c").Left {
			t.Error("another node is gone too")
		}
		if _, _, err := m.run("forget", "node-b"); err == nil || err.Error() != "node-b is forgotten already" {
			t.Errorf("twice: %v", err)
		}
	}
}

// The registry need not have it: the other nodes know it all the same.
func TestForgetWhatIsKnown(t *testing.T) {
	for name, prep := range map[string]func(m *testMesh){
		"emptied":     func(*testMesh) {},
		"damaged":     func(m *testMesh) { m.must(os.WriteFile(m.path, []byte("{"), 0o600)) },
		"rolled back": func(m *testMesh) { m.publish(registrytest.Record("node-b", 1)) },
		"forged":      func(m *testMesh) { m.forge(registrytest.Record("node-b", 1<<52)) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, 1)
			b := registrytest.Record("node-b", ahead())
			m.cache(b)
			prep(m)
			if _, _, err := m.run("forget", "node-b"); err != nil {
				t.Fatal(err)
			}
			equalTo(t, forgotten(b, b.Revision+1), m.stored("node-b"))
		})
	}
}

func TestForgetRefused(t *testing.T) {
	for _, tt := range []struct {
		args string
		prep func(m *testMesh)
		want string
	}{
		{"forget", nil, "name one node"},
		{"forget node-b node-c", nil, "name one node"},
		{"forget a", nil, "a is this node: it goes with `wgcnid leave`"},
		{"forget node-d", nil, `no node "node-d": did you mean "node-b"?`},
		{"forget Node-C", nil, `no node "Node-C": did you mean "node-c"?`},
		{"forget gone", nil, "gone has left already: there is nothing to forget"},
		{"forget goner", nil, "no node \"goner\": `wgcnid nodes` lists all"}, // only who is there is meant
		{"forget b", nil, "no node \"b\": `wgcnid nodes` lists all"},
		{"forget x\x1b[2J", nil, "no node \"x\\x1b[2J\": `wgcnid nodes` lists all"},
		{"forget bad", nil, `"bad" is no node of the mesh: what the registry has under this name is refused: record bad: ` + identity.ErrUnsealed.Error()},
		{"forget node-b", func(m *testMesh) { m.must(os.RemoveAll(filepath.Dir(m.path))) }, "this node knows no \"node-b\", and the registry is away: registry folder"},
		{"forget node-b", func(m *testMesh) {
			m.cache(registrytest.Record("node-b", 1))
			m.must(os.RemoveAll(filepath.Dir(m.path)))
		}, "the other nodes cannot be told: "},
	} {
		t.Run(tt.args, func(t *testing.T) {
			m := newMesh(t, 1)
			m.publish(registrytest.Record("node-b", 1), registrytest.Record("node-c", 1), tombstone("gone", 1))
			m.forge(registrytest.Record("bad", 1))
			if tt.prep != nil {
				tt.prep(m)
			}
			out, _, err := m.run(strings.Split(tt.args, " ")...)
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("%v, want %s", err, tt.want)
			}
			if out != "" {
				t.Errorf("printed %s", out)
			}
		})
	}
}

// A node without the secret of the others is told that they do not listen.
func TestForgetUnheard(t *testing.T) {
	m := newMesh(t, 0)
	m.forge(registrytest.Record("b", 1), registrytest.Seal(t, registrytest.Secrets(t, 1), registrytest.Record("c", 1)))
	_, errs, err := m.run("forget", "b")
	if err != nil || !strings.Contains(errs, "(1: c)") || !strings.Contains(errs, "clusterSecretFile") {
		t.Errorf("%q, %v", errs, err)
	}
}
