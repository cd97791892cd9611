package main

import (
	"encoding/json"
	"testing"
)

func TestWithNodeName(t *testing.T) {
	for _, tt := range []struct{ entry, name, want string }{
		{`{"type": "wgcni"}`, "ip-10-0-0-1.internal", `{"nodeName": "ip-10-0-0-1.internal", "type": "wgcni"}`},
		{"{\n  \"type\": \"wgcni\"\n}", "a", "{\n  \"nodeName\": \"a\",\n  \"type\": \"wgcni\"\n}"},
		{`{"type":"wgcni","nodeName":"b"}`, "a", `{"type":"wgcni","nodeName":"b"}`},
		{`{"type":"wgcni"}`, "", `{"type":"wgcni"}`},
		{`{"type":"wgcni"}`, `a"b`, `{"nodeName": "a\"b", "type":"wgcni"}`},
	} {
		got, err := withNodeName([]byte(tt.entry), tt.name)
		if err != nil || string(got) != tt.want || !json.Valid(got) {
			t.Errorf("%s: %s, %v; want %s", tt.entry, got, err, tt.want)
		}
	}
	if _, err := withNodeName([]byte("{"), "a"); err == nil {
		t.Error("half an entry is taken")
	}
}
