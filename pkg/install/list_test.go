package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const entry = `{"type": "wgcni", "clusterCIDRs": ["10.244.0.0/16"], "registry": {"type": "file", "path": "/srv/shared/mesh.json"}}`

// The entry is laid out as what stands before it, and every other byte stays.
func TestInsert(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"compact", `{"name":"n","plugins":[{"type":"ptp"}]}`, `{"name":"n","plugins":[{"type":"ptp"},{"type":"wgcni"}]}`},
		{"one line", `{ "name": "n", "plugins": [ { "type": "ptp" } ] }`, `{ "name": "n", "plugins": [ { "type": "ptp" }, {"type":"wgcni"} ] }`},
		{"indented", "{\n  \"name\": \"n\",\n  \"plugins\": [\n    {\n      \"type\": \"ptp\"\n    }\n  ]\n}\n", "{\n  \"name\": \"n\",\n  \"plugins\": [\n    {\n      \"type\": \"ptp\"\n    },\n    {\n      \"type\": \"wgcni\"\n    }\n  ]\n}\n"},
		{"four spaces", "{\n    \"name\": \"n\",\n    \"plugins\": [\n        {\n            \"type\": \"ptp\"\n        }\n    ]\n}", "{\n    \"name\": \"n\",\n    \"plugins\": [\n        {\n            \"type\": \"ptp\"\n        },\n        {\n            \"type\": \"wgcni\"\n        }\n    ]\n}"},
		{"tabs", "{\n\t\"name\": \"n\",\n\t\"plugins\": [\n\t\t{\n\t\t\t\"type\": \"ptp\"\n\t\t}\n\t]\n}\n", "{\n\t\"name\": \"n\",\n\t\"plugins\": [\n\t\t{\n\t\t\t\"type\": \"ptp\"\n\t\t},\n\t\t{\n\t\t\t\"type\": \"wgcni\"\n\t\t}\n\t]\n}\n"},
		{"CRLF", "{\r\n  \"name\": \"n\",\r\n  \"plugins\": [\r\n    {\r\n      \"type\": \"ptp\"\r\n    }\r\n  ]\r\n}\r\n", "{\r\n  \"name\": \"n\",\r\n  \"plugins\": [\r\n    {\r\n      \"type\": \"ptp\"\r\n    },\r\n    {\r\n      \"type\": \"wgcni\"\r\n    }\r\n  ]\r\n}\r\n"},
		{"a line each", "{\"name\":\"n\",\"plugins\":[\n  { \"type\": \"ptp\" },\n  { \"type\": \"portmap\" }\n]}", "{\"name\":\"n\",\"plugins\":[\n  { \"type\": \"ptp\" },\n  { \"type\": \"portmap\" },\n  {\"type\":\"wgcni\"}\n]}"},
		{"empty lines", "{\"name\":\"n\",\"plugins\":[\n\n  { \"type\": \"ptp\" }\n\n]}", "{\"name\":\"n\",\"plugins\":[\n\n  { \"type\": \"ptp\" },\n  {\"type\":\"wgcni\"}\n\n]}"},
		{"bracket and brace on one line", "{ \"name\": \"n\", \"plugins\": [{\n    \"type\": \"ptp\"\n  }] }", "{ \"name\": \"n\", \"plugins\": [{\n    \"type\": \"ptp\"\n  }, {\n    \"type\": \"wgcni\"\n  }] }"},
		{"brace behind the last key", "{\n  \"name\": \"n\",\n  \"plugins\": [\n    { \"type\": \"ptp\",\n      \"mtu\": 1400 }\n  ]\n}\n", "{\n  \"name\": \"n\",\n  \"plugins\": [\n    { \"type\": \"ptp\",\n      \"mtu\": 1400 },\n    {\n      \"type\": \"wgcni\"\n    }\n  ]\n}\n"},
		{"keys behind", `{"plugins":[{"type":"ptp"}],"name":"n","x":[1,2]}`, `{"plugins":[{"type":"ptp"},{"type":"wgcni"}],"name":"n","x":[1,2]}`},
		{"the last of two", `{"name":"n","plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}`, `{"name":"n","plugins":[{"type":"a"}],"plugins":[{"type":"b"},{"type":"wgcni"}]}`},
		{"escaped key", `{"name":"n","plug\u0069ns":[{"type":"ptp"}]}`, `{"name":"n","plug\u0069ns":[{"type":"ptp"},{"type":"wgcni"}]}`},
		{"nested", `{"name":"n","x":{"plugins":[]},"plugins":[{"type":"ptp","plugins":[{"type":"wgcni"}]}]}`, `{"name":"n","x":{"plugins":[]},"plugins":[{"type":"ptp","plugins":[{"type":"wgcni"}]},{"type":"wgcni"}]}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Insert([]byte(tt.in), []byte(`{"type":"wgcni"}`))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			back, err := Remove(got)
			if err != nil || string(back) != tt.in {
				t.Errorf("Remove gives %q, %v; want what it was", back, err)
			}
		})
	}
}

// A second Insert exchanges the entry where it stands.
func TestInsertAgain(t *testing.T) {
	in := "{\n  \"name\": \"n\",\n  \"plugins\": [\n    { \"type\": \"ptp\" },\n    { \"type\": \"wgcni\", \"mtu\": 1400 },\n    { \"type\": \"tuning\" }\n  ]\n}"
	got, err := Insert([]byte(in), []byte(`{"type": "wgcni"}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Replace(in, `{ "type": "wgcni", "mtu": 1400 }`, `{"type": "wgcni"}`, 1); string(got) != want {
		t.Errorf("%s", got)
	}
	rest, err := Remove(got)
	if want := "{\n  \"name\": \"n\",\n  \"plugins\": [\n    { \"type\": \"ptp\" },\n    { \"type\": \"tuning\" }\n  ]\n}"; err != nil || string(rest) != want {
		t.Errorf("%v\n%s", err, rest)
	}
}

func TestRemoveFirst(t *testing.T) {
	got, err := Remove([]byte(`{"name":"n","plugins":[{"type":"wgcni"}, {"type":"ptp"} , {"type":"wgcni"}]}`))
	if want := `{"name":"n","plugins":[{"type":"ptp"}]}`; err != nil || string(got) != want {
		t.Errorf("%s, %v", got, err)
	}
}

// What cannot be chained to is refused with its fault; what may be whole in a
// moment is told apart.
func TestInsertRefuses(t *testing.T) {
	for _, tt := range []struct {
		name, in, want string
		unready        bool
	}{
		{"empty", "", "empty", true},
		{"blank", " \n", "empty", true},
		{"half", `{"name":"n","plugins":[{"type":"ptp"`, "not valid JSON", true},
		{"trailing", `{"name":"n","plugins":[{"type":"ptp"}]} {`, "not valid JSON", true},
		{"byte order mark", "\xef\xbb\xbf" + `{"name":"n","plugins":[{"type":"ptp"}]}`, "byte order mark", false},
		{"no primary", `{"name":"n","plugins":[]}`, "no primary plugin", false},
		{"no primary but us", `{"name":"n","plugins":[{"type":"wgcni"}]}`, "no primary plugin", false},
		{"no list", `{"name":"n","type":"ptp"}`, `no "plugins"`, false},
		{"plugins of another kind", `{"name":"n","plugins":{"type":"ptp"}}`, "no list", false},
		{"null", `{"name":"n","plugins":null}`, "no list", false},
		{"a plugin of another kind", `{"name":"n","plugins":[{"type":"ptp"}, 7]}`, "plugin 2", false},
		{"another spelling", `{"name":"n","Plugins":[{"type":"ptp"}]}`, `"Plugins" has to be "plugins"`, false},
		{"no name", `{"plugins":[{"type":"ptp"}]}`, `no "name"`, false},
		{"no object", `[]`, "no JSON object", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Insert([]byte(tt.in), []byte(entry))
			if err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, ErrUnready) != tt.unready {
				t.Errorf("%v, want %q in it, unready %v", err, tt.want, tt.unready)
			}
		})
	}
}

func TestWrap(t *testing.T) {
	got, err := Wrap([]byte("{\n  \"cniVersion\": \"0.3.1\", \"name\": \"n\",\n  \"type\": \"ptp\"\n}\n"))
	want := "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"n\",\n  \"plugins\": [\n{\n  \"cniVersion\": \"0.3.1\", \"name\": \"n\",\n  \"type\": \"ptp\"\n}\n  ]\n}\n"
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, err := Insert(got, []byte(entry)); err != nil {
		t.Error(err)
	}
	for in, want := range map[string]string{
		`{"name":"n","plugins":[]}`: ".conflist", `{"name":"n"}`: "no \"type\"", `{"name":7}`: "no network configuration", `{"na`: "not ready",
	} {
		if _, err := Wrap([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q in it", in, err, want)
		}
	}
}

func TestEntry(t *testing.T) {
	for in, want := range map[string]string{
		`{"clusterCIDRs": []}`:                   `{"type": "wgcni", "clusterCIDRs": []}`,
		"{\n  \"clusterCIDRs\": []\n}\n":         "{\n  \"type\": \"wgcni\",\n  \"clusterCIDRs\": []\n}",
		`{}`:                                     `{"type": "wgcni"}`,
		` {"clusterCIDRs": [], "type": "wgcni"}`: `{"clusterCIDRs": [], "type": "wgcni"}`,
	} {
		got, err := Entry([]byte(in))
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v; want %s", in, got, err, want)
		}
		if !json.Valid(got) {
			t.Errorf("%s: not valid: %s", in, got)
		}
	}
	for in, want := range map[string]string{
		`{"type": "bridge"}`: `"bridge"`, `[]`: "no JSON object", `null`: "no JSON object", `{"plugins": []}`: "whole conflist", ``: "empty", `{"a`: "not valid JSON",
	} {
		if _, err := Entry([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q in it", in, err, want)
		}
	}
}

// Whatever the list looks like: what Insert gives is the same value with the entry
// at its end, and Remove gives the same bytes again.
func FuzzInsert(f *testing.F) {
	examples, err := filepath.Glob("../../conflist/*.conflist")
	if err != nil || len(examples) == 0 {
		f.Fatal(err, examples)
	}
	for _, path := range examples {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		rest, err := Remove(data)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(rest)
		f.Add(bytes.ReplaceAll(rest, []byte("\n"), []byte("\r\n")))
	}
	for _, seed := range []string{
		`{"name":"n","plugins":[{"type":"ptp"}]}`, `{"name":"n","plugins":[ {} ] }`, "{\"name\":\"n\",\"plugins\":[\n\n\t{\r\n\t\"type\":\"ptp\"} ]}",
		`{"name":"n","plugins":[{"type":"a"}],"plugins":[{"type":"b"},{"type":"c"}]}`, "{\"name\":\"n\",\"plugins\":[{\n}]}", `{"name":"\ud800","plugins":[{"type":"wgcni"},{}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, x []byte) {
		y, err := Insert(x, []byte(entry))
		if err != nil {
			if _, err := Remove(x); err == nil && !Chains(x) {
				if l, err := scan(x); err != nil || len(l.plugins) > 0 {
					t.Fatalf("%q cannot be inserted into, and can be removed from", x)
				}
			}
			return
		}
		if !Chains(y) {
			t.Fatalf("%q has no entry", y)
		}
		had := Chains(x)
		z, err := Remove(y)
		if err != nil {
			t.Fatal(err)
		}
		if !had && !bytes.Equal(x, z) {
			t.Fatalf("%q came back as %q", x, z)
		}
		if Chains(z) {
			t.Fatalf("%q still has an entry", z)
		}
		if !had {
			if diff := cmp.Diff(with(t, x, entry), value(t, y)); diff != "" {
				t.Fatalf("(-want +got):\n%s", diff)
			}
		}
		again, err := Insert(y, []byte(entry))
		if err != nil || (!had && !bytes.Equal(again, y)) {
			t.Fatalf("a second time: %q, %v", again, err)
		}
	})
}

// The list around a single plugin has the plugin as it is, its name and version.
func FuzzWrap(f *testing.F) {
	for _, seed := range []string{
		`{"cniVersion":"0.3.1","name":"n","type":"ptp"}`, " {\n\"name\": \"\\u0000\", \"type\": \"x\"}\n", `{"name":"a","NAME":"b","type":"x","name":"c"}`, `{"type":"x","cniVersion":null}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, x []byte) {
		y, err := Wrap(x)
		if err != nil {
			return
		}
		l, err := scan(y)
		if err != nil {
			if bytes.Contains([]byte(err.Error()), []byte(`no "name"`)) {
				return
			}
			t.Fatalf("%q became %q: %v", x, y, err)
		}
		if len(l.plugins) != 1 || !bytes.Equal(l.plugins[0].of(y), bytes.TrimSpace(x)) {
			t.Fatalf("%q became %q", x, y)
		}
	})
}

// An entry is the object that was given, of the type wgcni.
func FuzzEntry(f *testing.F) {
	for _, seed := range []string{`{}`, "{\n}", `{"mtu":1400}`, "{\r\n\t\"mtu\": 1400\r\n}\n", `{"type":"wgcni"}`, `{"Type":"x"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, x []byte) {
		y, err := Entry(x)
		if err != nil {
			return
		}
		if typeOf(y) != "wgcni" {
			t.Fatalf("%q became %q", x, y)
		}
		want := value(t, x)
		want["type"] = "wgcni"
		if diff := cmp.Diff(want, value(t, y)); diff != "" {
			t.Fatalf("%q (-want +got):\n%s", x, diff)
		}
	})
}

func value(t *testing.T, text []byte) (v map[string]any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func with(t *testing.T, list []byte, entry string) map[string]any {
	v := value(t, list)
	plugins, _ := v["plugins"].([]any)
	v["plugins"] = append(plugins, any(value(t, []byte(entry))))
	return v
}
