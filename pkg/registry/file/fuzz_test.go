package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// FuzzDocument: whatever is in the file, parsing does not panic, and a writer
// that adds its record loses none of the others, not even what it cannot read.
func FuzzDocument(f *testing.F) {
	encode := func(r registry.Record) []byte {
		text, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		return text
	}
	good, err := document{}.with("node-b", encode(registrytest.Record("node-b", 7)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)/2])
	for _, s := range []string{
		"", "null", "{}", `{"version": 1}`, `{"version": 2, "nodes": 3}`, `{"version": 1, "nodes": null}`,
		`{"version": 1, "nodes": {"a": null, "b": [1e999], "": {}, "\ud800": "\u2028<&>"}}`,
	} {
		f.Add([]byte(s))
	}
	record := encode(registrytest.Record("node-a", 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, err := parse(data)
		if err != nil {
			return
		}
		next, err := doc.with("node-a", record)
		if err != nil {
			t.Fatalf("with: %v", err)
		}
		again, err := parse(next)
		if err != nil {
			t.Fatalf("parse what was written: %v\n%s", err, next)
		}
		if !bytes.Equal(compact(t, again.nodes["node-a"]), record) {
			t.Errorf("its own record: %s", again.nodes["node-a"])
		}
		if add := 1 - min(len(doc.nodes["node-a"]), 1); len(again.nodes) != len(doc.nodes)+add {
			t.Errorf("%d records became %d", len(doc.nodes), len(again.nodes))
		}
		for name, raw := range doc.nodes {
			if name != "node-a" && !bytes.Equal(compact(t, raw), compact(t, again.nodes[name])) {
				t.Errorf("node %q: %s became %s", name, raw, again.nodes[name])
			}
		}
		if _, err := parse(next[:len(next)-3]); err == nil || errors.Is(err, ErrVersion) {
			t.Errorf("truncated, but error %v", err)
		}
	})
}

func compact(t *testing.T, raw []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := json.Compact(&buf, raw); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
