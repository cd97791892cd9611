package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"unicode/utf8"

	"github.com/wgcni/wgcni/pkg/registry"
)

// version of the document's outer form. What is added to a record needs no new
// version; what is added beside "nodes" does, since a writer drops it.
const version = 1

// The form in which a writer of ours leaves the document.
const (
	indent  = "\n    "
	closing = "\n  }\n}\n"
)

var opening = fmt.Sprintf("{\n  \"version\": %d,\n  \"nodes\": {", version)

// document is the file, parsed as far as a writer needs: it must carry records
// that it doesn't understand, of newer versions or with mistakes, to the next
// document as they are.
type document struct {
	nodes registry.Entries // as the document holds them
	// changed are the names by which nodes differ from those of the document that was
	// read before it, where there was one.
	changed []string
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
	nodes := make(registry.Entries, len(d.Nodes))
	for name, raw := range d.Nodes {
		nodes[name] = raw
	}
	return document{nodes: nodes}, nil
}

// with returns the document with this record put in, indented as the rest.
func (d document) with(name string, record []byte) ([]byte, error) {
	var raw bytes.Buffer
	if err := json.Indent(&raw, record, "    ", "  "); err != nil {
		return nil, fmt.Errorf("record %s is not JSON: %w", name, err)
	}
	nodes := maps.Clone(d.nodes)
	if nodes == nil {
		nodes = registry.Entries{}
	}
	nodes[name] = raw.Bytes()
	return document{nodes: nodes}.encode()
}

// encode writes the document, sorted by name. The records are copied as they
// are: what they hold stays, whoever wrote them, and a hostile one is not
// blown up by indenting it.
func (d document) encode() ([]byte, error) {
	var buf bytes.Buffer
	buf.WriteString(opening)
	for i, name := range slices.Sorted(maps.Keys(d.nodes)) {
		key, err := json.Marshal(name)
		if err != nil {
			return nil, fmt.Errorf("encode name %q: %w", name, err)
		}
		if i > 0 {
			buf.WriteByte(',')
		}
		buf.WriteString(indent)
		buf.Write(key)
		buf.WriteString(": ")
		buf.Write(d.nodes[name])
	}
	buf.WriteString(closing)
	return buf.Bytes(), nil
}

// parseAgain is parse for a reader who has seen an earlier document. Of thousands
// of records nearly all are the same bytes as there: those are compared, which costs
// less than a tenth of what parsing them costs, and shared with the earlier one.
func parseAgain(data []byte, before registry.Entries) (document, error) {
	if len(before) > 0 {
		if doc, ok := compareAgain(data, before); ok {
			return doc, nil
		}
	}
	doc, err := parse(data)
	if err == nil {
		doc.changed = registry.Differing(before, doc.nodes, bytes.Equal)
	}
	return doc, err
}

// compareAgain understands documents in the form that encode gives them, with all
// the names that were there before. Whatever looks different it leaves to parse.
func compareAgain(data []byte, before registry.Entries) (doc document, ok bool) {
	rest, ok := bytes.CutPrefix(data, []byte(opening))
	var last []byte // name
	news := registry.Entries{}
	for met := 0; ok; {
		var name []byte
		if name, rest, ok = cutName(rest); !ok || bytes.Compare(name, last) <= 0 { // or one comes twice
			return document{}, false
		}
		last = name
		value, known := before[string(name)]
		if known {
			met++
		}
		if !known || !bytes.HasPrefix(rest, value) || !valueEnds(rest[len(value):]) {
			var raw json.RawMessage
			d := json.NewDecoder(bytes.NewReader(rest))
			if d.Decode(&raw) != nil {
				return document{}, false
			}
			value = raw
			if !bytes.HasPrefix(rest, value) { // there is a space before it
				return document{}, false
			}
			news[string(name)] = value
		}
		rest = rest[len(value):]
		if string(rest) == closing {
			return after(before, news), met == len(before)
		}
		rest, ok = bytes.CutPrefix(rest, []byte(","))
	}
	return document{}, false
}

// after is the document in which these entries, and no others, are not as before. To
// copy a map of thousands takes a tenth of the time in which it is made.
func after(before, news registry.Entries) document {
	if len(news) == 0 {
		return document{nodes: before}
	}
	doc := document{nodes: maps.Clone(before), changed: slices.Collect(maps.Keys(news))}
	maps.Copy(doc.nodes, news)
	return doc
}

// valueEnds reports whether what follows a value is not more of it: a number may go on.
func valueEnds(rest []byte) bool { return len(rest) > 0 && (rest[0] == ',' || rest[0] == '\n') }

// cutName takes the next name off, if it stands there as encode writes most names.
func cutName(rest []byte) (name, after []byte, ok bool) {
	if rest, ok = bytes.CutPrefix(rest, []byte(indent+`"`)); !ok {
		return nil, nil, false
	}
	end := bytes.IndexByte(rest, '"')
	if end < 0 {
		return nil, nil, false
	}
	for _, c := range rest[:end] {
		if c < ' ' || c == '\\' || c >= utf8.RuneSelf {
			return nil, nil, false
		}
	}
	after, ok = bytes.CutPrefix(rest[end:], []byte(`": `))
	return rest[:end], after, ok
}
