package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/wgcni/wgcni/pkg/config"
)

var (
	// ErrUnready is the fault of a network configuration that may be whole in a
	// moment: it is not there, empty, or half written.
	ErrUnready = errors.New("not ready")
	// ErrNoPrimary is the fault of a list that has no plugin but wgcni.
	ErrNoPrimary = errors.New("its \"plugins\" have no primary plugin that wgcni could be chained to")
)

// span is a part of a text, from the offset start up to end.
type span struct{ start, end int }

// list is a network configuration list with the places of its plugins.
type list struct {
	name    string
	plugins []span
}

// scan finds the plugins of a list. Of a key that is there twice the last one
// counts, as it does for the runtimes.
func scan(data []byte) (l list, err error) {
	if err := whole(data); err != nil {
		return l, err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return l, errors.New("no JSON object")
	}
	found := false
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return l, err
		}
		switch key {
		case "plugins":
			if l.plugins, err = scanArray(dec); err != nil {
				return l, err
			}
			found = true
			continue
		case "name":
			l.name = ""
			var name json.RawMessage
			if err := dec.Decode(&name); err != nil {
				return l, err
			}
			_ = json.Unmarshal(name, &l.name) // what is no string is no name
			continue
		}
		if strings.EqualFold(fmt.Sprint(key), "plugins") {
			// libcni knows the one spelling, and other readers take any.
			return l, fmt.Errorf("its key %q has to be \"plugins\"", key)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return l, err
		}
	}
	switch {
	case !found:
		return l, errors.New("it has no \"plugins\": it is no network configuration list")
	case l.name == "":
		return l, errors.New("its network has no \"name\": no runtime takes it")
	}
	return l, nil
}

// whole tells a text that may still be being written from one that is JSON.
func whole(data []byte) error {
	switch {
	case len(bytes.TrimSpace(data)) == 0:
		return fmt.Errorf("%w: it is empty", ErrUnready)
	case bytes.HasPrefix(data, []byte("\xef\xbb\xbf")):
		return errors.New("it begins with a byte order mark, which no runtime reads: save it without")
	}
	var any json.RawMessage
	if err := json.Unmarshal(data, &any); err != nil {
		return fmt.Errorf("%w: it is not valid JSON: %w", ErrUnready, err)
	}
	return nil
}

func scanArray(dec *json.Decoder) ([]span, error) {
	if t, err := dec.Token(); err != nil || t != json.Delim('[') {
		return nil, errors.New("its \"plugins\" are no list")
	}
	var out []span
	for dec.More() {
		var plugin json.RawMessage
		if err := dec.Decode(&plugin); err != nil {
			return nil, err
		}
		if plugin[0] != '{' {
			return nil, fmt.Errorf("plugin %d of its list is no object", len(out)+1)
		}
		end := int(dec.InputOffset())
		out = append(out, span{end - len(plugin), end})
	}
	_, err := dec.Token()
	return out, err
}

func (s span) of(data []byte) []byte { return data[s.start:s.end] }

func typeOf(plugin []byte) string {
	var head struct {
		Type string `json:"type"`
	}
	_ = json.Unmarshal(plugin, &head) // a type that is no string is none
	return head.Type
}

// ours returns which of the plugins are wgcni's entries.
func (l list) ours(data []byte) (at []int) {
	for i, p := range l.plugins {
		if typeOf(p.of(data)) == config.PluginType {
			at = append(at, i)
		}
	}
	return at
}

// Chains reports whether a network configuration list has an entry of wgcni. What
// cannot be read has none.
func Chains(data []byte) bool {
	l, err := scan(data)
	return err == nil && len(l.ours(data)) > 0
}

// Insert makes entry the last plugin of a network configuration list. All other
// bytes stay, and entry is laid out as its neighbours are. A list that has an
// entry already gets the new one in its place.
func Insert(data, entry []byte) ([]byte, error) {
	l, err := scan(data)
	if err != nil {
		return nil, err
	}
	own := l.ours(data)
	if len(own) == len(l.plugins) {
		return nil, ErrNoPrimary
	}
	if len(own) > 0 {
		at := l.plugins[own[0]]
		text, err := layout(data, l.plugins[own[0]], entry)
		if err != nil {
			return nil, err
		}
		return slices.Concat(data[:at.start], text, data[at.end:]), nil
	}
	last := l.plugins[len(l.plugins)-1]
	text, err := layout(data, last, entry)
	if err != nil {
		return nil, err
	}
	return slices.Concat(data[:last.end], []byte{','}, gap(data, last), text, data[last.end:]), nil
}

// gap is the white space in front of a plugin, which its successor gets as well.
func gap(data []byte, plugin span) []byte {
	before := len(bytes.TrimRight(data[:plugin.start], " \t\r\n"))
	space := data[before:plugin.start]
	if len(space) == 0 && bytes.ContainsRune(plugin.of(data), '\n') {
		return []byte{' '}
	}
	if i := bytes.LastIndexByte(space, '\n'); i > 0 && space[i-1] != '\r' {
		return space[i:] // an empty line above the first plugin is not repeated
	}
	return space
}

// layout writes an entry as the given plugin is written: on one line, or indented
// with what it is indented with.
func layout(data []byte, neighbour span, entry []byte) ([]byte, error) {
	entry = bytes.TrimSpace(entry)
	text := neighbour.of(data)
	first := bytes.IndexByte(text, '\n')
	if first < 0 {
		if !bytes.ContainsAny(entry, "\r\n") {
			return entry, nil
		}
		var out bytes.Buffer
		err := json.Compact(&out, entry)
		return out.Bytes(), err
	}
	// A plugin that begins a line says how deep plugins are; else the last line of one
	// does, with its closing brace. The second line is deeper.
	line := data[bytes.LastIndexByte(data[:neighbour.start], '\n')+1 : neighbour.start]
	if len(bytes.TrimLeft(line, " \t")) > 0 {
		line = data[bytes.LastIndexByte(data[:neighbour.end], '\n')+1 : neighbour.end]
	}
	prefix := indentation(line)
	step, deeper := strings.CutPrefix(indentation(text[first+1:]), prefix)
	if !deeper || step == "" {
		step = "  "
	}
	var out bytes.Buffer
	if err := json.Indent(&out, entry, prefix, step); err != nil {
		return nil, err
	}
	if text[max(first-1, 0)] == '\r' {
		return bytes.ReplaceAll(out.Bytes(), []byte("\n"), []byte("\r\n")), nil
	}
	return out.Bytes(), nil
}

// indentation is the white space that a line begins with.
func indentation(line []byte) string {
	return string(line[:len(line)-len(bytes.TrimLeft(line, " \t"))])
}

// Remove takes all entries of wgcni out of a network configuration list, and
// nothing else: Remove after Insert gives the bytes of before. The error Is
// ErrNoPrimary if nothing would be left.
func Remove(data []byte) ([]byte, error) {
	for {
		l, err := scan(data)
		if err != nil {
			return nil, err
		}
		own := l.ours(data)
		if len(own) == 0 {
			return data, nil
		}
		if len(own) == len(l.plugins) {
			return nil, ErrNoPrimary
		}
		i := own[len(own)-1]
		cut := span{l.plugins[i].start, l.plugins[min(i+1, len(l.plugins)-1)].start}
		if i > 0 {
			cut = span{l.plugins[i-1].end, l.plugins[i].end}
		}
		data = slices.Concat(data[:cut.start], data[cut.end:])
	}
}

// Wrap makes a list around the configuration of a single plugin (a .conf file),
// with its own bytes, as libcni does for a runtime (libcni.ConfListFromConf).
func Wrap(data []byte) ([]byte, error) {
	if err := whole(data); err != nil {
		return nil, err
	}
	var conf struct {
		CNIVersion *string         `json:"cniVersion"`
		Name       string          `json:"name"`
		Type       string          `json:"type"`
		Plugins    json.RawMessage `json:"plugins"`
	}
	switch err := json.Unmarshal(data, &conf); {
	case err != nil:
		return nil, fmt.Errorf("it is no network configuration: %w", err)
	case conf.Type == "" && conf.Plugins != nil:
		return nil, errors.New("it has a list of plugins: runtimes take that from a file whose name ends in .conflist")
	case conf.Type == "":
		return nil, errors.New("its plugin has no \"type\": no runtime takes it")
	}
	head := ""
	if conf.CNIVersion != nil {
		version, err := json.Marshal(*conf.CNIVersion)
		if err != nil {
			return nil, err
		}
		head = fmt.Sprintf("  \"cniVersion\": %s,\n", version)
	}
	name, err := json.Marshal(conf.Name)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "{\n%s  \"name\": %s,\n  \"plugins\": [\n%s\n  ]\n}\n", head, name, bytes.TrimSpace(data)), nil
}

// Entry is the text of an entry as it stands in a list: the given object, with
// its type. It does not judge the other keys; see config.Parse.
func Entry(text []byte) ([]byte, error) {
	if err := whole(text); err != nil {
		return nil, err
	}
	text = bytes.TrimSpace(text)
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(text, &keys); err != nil || keys == nil {
		return nil, errors.New("it is no JSON object: write it as it stands in a conflist, {\"clusterCIDRs\": …}")
	}
	if _, ok := keys["plugins"]; ok {
		return nil, errors.New("it is a whole conflist: give the wgcni entry alone")
	}
	for key := range keys {
		if key != "type" && strings.EqualFold(key, "type") { // which libcni takes for it
			return nil, fmt.Errorf("its key %q has to be \"type\"", key)
		}
	}
	if _, ok := keys["type"]; !ok {
		rest := bytes.TrimLeft(text[1:], " \t\r\n")
		comma := ", "
		if rest[0] == '}' {
			comma = ""
		}
		space := text[1 : len(text)-len(rest)]
		if len(space) > 0 && comma != "" && bytes.ContainsRune(space, '\n') {
			comma = "," + string(space)
		}
		return slices.Concat([]byte{'{'}, space, fmt.Appendf(nil, "\"type\": %q%s", config.PluginType, comma), rest), nil
	}
	if t := typeOf(text); t != config.PluginType {
		return nil, fmt.Errorf("its type is %q, want %q", t, config.PluginType)
	}
	return text, nil
}

// SameJSON reports whether two texts are the same value, however they are laid out.
func SameJSON(a, b []byte) bool {
	x, err := decode(a)
	if err != nil {
		return false
	}
	y, err := decode(b)
	return err == nil && reflect.DeepEqual(x, y)
}

func decode(text []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	err = d.Decode(&v)
	return v, err
}

// extends reports whether a list is another one with more plugins in it, wherever
// they stand, and none of wgcni among these. Programs that chain a plugin of their
// own (istio-cni, linkerd-cni) put it into the first list, which is our copy.
func extends(list, base []byte) bool {
	var l, b map[string]json.RawMessage
	var plugins, wanted []json.RawMessage
	if json.Unmarshal(list, &l) != nil || json.Unmarshal(base, &b) != nil ||
		json.Unmarshal(l["plugins"], &plugins) != nil || json.Unmarshal(b["plugins"], &wanted) != nil {
		return false
	}
	delete(l, "plugins")
	delete(b, "plugins")
	if !maps.EqualFunc(l, b, func(x, y json.RawMessage) bool { return SameJSON(x, y) }) {
		return false
	}
	for _, p := range plugins {
		switch {
		case len(wanted) > 0 && SameJSON(p, wanted[0]):
			wanted = wanted[1:]
		case typeOf(p) == config.PluginType:
			return false
		}
	}
	return len(wanted) == 0
}
