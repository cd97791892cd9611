package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

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

// FuzzParseAgain: whatever the file held before, and holds now, comparing the two
// finds the same as reading it anew.
func FuzzParseAgain(f *testing.F) {
	write := func(nodes registry.Entries) []byte {
		text, err := document{nodes: nodes}.encode()
		if err != nil {
			f.Fatal(err)
		}
		return text
	}
	three := registry.Entries{"a": []byte(`{"revision": 1}`), "b": []byte(`1`), "c": []byte(`"x"`)}
	before := write(three)
	f.Add(before, before)
	for name, value := range map[string]string{"b": `12`, "a": `{"revision": 2}`, "d": `[]`, "a.b": `null`, "\u00e9\"": `{}`} {
		next := maps.Clone(three)
		next[name] = []byte(value)
		f.Add(before, write(next))
		f.Add(write(next), before)
		f.Add(before, write(next)[:60])
		f.Add(before, append(write(next), ' '))
	}
	f.Add(before, []byte(opening+indent+`"a": 1,`+indent+`"a": {"revision": 1}`+closing))
	f.Add(before, []byte(opening+indent+`"a": 1 `+closing))
	f.Add(before, []byte(opening+closing))
	f.Add(before, []byte(opening+indent+`"d": `+closing))
	f.Fuzz(func(t *testing.T, before, now []byte) {
		old, err := parse(before)
		if err != nil {
			return
		}
		got, ok := compareAgain(now, old.nodes)
		if !ok {
			return // it is left to parse
		}
		want, err := parse(now)
		if err != nil {
			t.Fatalf("compared, but it cannot be parsed: %v", err)
		}
		if diff := cmp.Diff(want.nodes, got.nodes); diff != "" {
			t.Errorf("compared (-parsed +compared):\n%s", diff)
		}
		differ := registry.Differing(old.nodes, want.nodes, bytes.Equal)
		if diff := cmp.Diff(slices.Sorted(slices.Values(differ)), slices.Sorted(slices.Values(got.changed))); diff != "" {
			t.Errorf("changed (-in fact +as told):\n%s", diff)
		}
	})
}

// A change of one record is one that is compared, and shares all others.
func TestCompareAgain(t *testing.T) {
	doc := document{nodes: registry.Entries{}}
	for i := range 50 {
		doc.nodes[fmt.Sprintf("node-%02d", i)] = fmt.Appendf(nil, "{\n      \"revision\": %d\n    }", i)
	}
	text, err := doc.with("node-20", []byte(`{"revision":100}`))
	if err != nil {
		t.Fatal(err)
	}
	got, ok := compareAgain(text, doc.nodes)
	if !ok {
		t.Fatalf("not compared:\n%s", text)
	}
	for name, raw := range got.nodes {
		if same := &raw[0] == &doc.nodes[name][0]; same == (name == "node-20") {
			t.Errorf("%s is the same bytes: %v", name, same)
		}
	}
	if want, err := parse(text); err != nil || cmp.Diff(want.nodes, got.nodes) != "" {
		t.Errorf("error %v; (-parsed +compared):\n%s", err, cmp.Diff(want.nodes, got.nodes))
	}
	if !slices.Equal(got.changed, []string{"node-20"}) {
		t.Errorf("changed %v, want node-20", got.changed)
	}
}

func compact(t *testing.T, raw []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := json.Compact(&buf, raw); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
