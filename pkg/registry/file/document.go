package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/wgcni/wgcni/pkg/registry"
)

// version of the document's outer form. What is added to a record needs no new
// version; what is added beside "nodes" does, since a writer drops it.
const version = 1

// document is the file, parsed as far as a writer needs: it must carry records
// that it doesn't understand, of newer versions or with mistakes, to the next
// document as they are.
type document struct {
	nodes map[string]json.RawMessage
}

// parse returns an ErrVersion for a document of a later version, and any other
// error for what is no document at all.
func parse(data []byte) (document, error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return document{}, errors.New("it is empty")
	}
	var d struct {
		Version int                        `json:"version"`
		Nodes   map[string]json.RawMessage `json:"nodes"`
	}
	err := json.Unmarshal(data, &d)
	// A later version may have other types below; Unmarshal goes on after those.
	if wrongType := (*json.UnmarshalTypeError)(nil); d.Version > version && (err == nil || errors.As(err, &wrongType)) {
		return document{}, fmt.Errorf("%w %d: this wgcni reads %d", ErrVersion, d.Version, version)
	}
	if err != nil {
		return document{}, fmt.Errorf("no JSON document of ours: %w", err)
	}
	if d.Version != version {
		return document{}, fmt.Errorf("version %d: want %d", d.Version, version)
	}
	return document{d.Nodes}, nil
}

// entries are the records as the document holds them.
func (d document) entries() registry.Entries {
	entries := make(registry.Entries, len(d.nodes))
	for name, raw := range d.nodes {
		entries[name] = raw
	}
	return entries
}

// with returns the document with this record put in, indented as the rest.
func (d document) with(name string, record []byte) ([]byte, error) {
	var raw bytes.Buffer
	if err := json.Indent(&raw, record, "    ", "  "); err != nil {
		return nil, fmt.Errorf("record %s is not JSON: %w", name, err)
	}
	nodes := maps.Clone(d.nodes)
	if nodes == nil {
		nodes = map[string]json.RawMessage{}
	}
	nodes[name] = raw.Bytes()
	return document{nodes}.encode()
}

// encode writes the document, sorted by name. The records are copied as they
// are: what they hold stays, whoever wrote them, and a hostile one is not
// blown up by indenting it.
func (d document) encode() ([]byte, error) {
	var buf bytes.Buffer
	fmt.Fprintf(&buf, "{\n  \"version\": %d,\n  \"nodes\": {", version)
	for i, name := range slices.Sorted(maps.Keys(d.nodes)) {
		key, err := json.Marshal(name)
		if err != nil {
			return nil, fmt.Errorf("encode name %q: %w", name, err)
		}
		if i > 0 {
			buf.WriteByte(',')
		}
		buf.WriteString("\n    ")
		buf.Write(key)
		buf.WriteString(": ")
		buf.Write(d.nodes[name])
	}
	buf.WriteString("\n  }\n}\n")
	return buf.Bytes(), nil
}
