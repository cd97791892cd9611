package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// FuzzDocument: whatever is in the file, parsing does not panic, and a writer
// that adds its record loses none of the others, not even what it cannot read.
func FuzzDocument(f *testing.F) {
	good, err := document{}.with(registrytest.Record("node-b", 7))
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
	record := registrytest.Record("node-a", 1)
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, err := parse(data)
		if err != nil {
			return
		}
		before := doc.snapshot()
		next, err := doc.with(record)
		if err != nil {
			t.Fatalf("with: %v", err)
		}
		again, err := parse(next)
		if err != nil {
			t.Fatalf("parse what was written: %v\n%s", err, next)
		}
		after := again.snapshot()
		if !after.Nodes["node-a"].Equal(record) {
			t.Errorf("its own record: %+v", after.Nodes["node-a"])
		}
		delete(before.Nodes, "node-a")
		delete(before.Invalid, "node-a")
		delete(after.Nodes, "node-a")
		delete(after.Invalid, "node-a")
		if !before.Equal(after) {
			t.Errorf("snapshots (-before +after):\n%s", cmp.Diff(before.Nodes, after.Nodes))
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
