package main

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode"
)

// hostile is what a terminal would obey, or hide: an escape sequence, one of
// C1, text that runs backwards, bytes that are no UTF-8, and a plane above.
const hostile = "\x1b]0;title\x07\u009b2J\u202etxt\x7f\x9b\U000e0041"

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"":                               "",
		"node-b: 10.244.2.0/24 «é 節»":    "node-b: 10.244.2.0/24 «é 節»",
		"two\nlines":                     "two\nlines",
		"a\tb\rc":                        `a\u0009b\u000dc`,
		hostile:                          `\u001b]0;title\u0007\u009b2J\u202etxt\u007f` + "\ufffd" + `\udb40\udc41`,
		"\x1b[31mred\x1b[0m \u2066mixed": `\u001b[31mred\u001b[0m \u2066mixed`,
	} {
		if got := printable(text); got != want {
			t.Errorf("printable(%q) = %q, want %q", text, got, want)
		}
	}
}

// JSON that is made printable is the same value.
func TestPrintJSON(t *testing.T) {
	want := map[string]string{"key": strings.ToValidUTF8(hostile, "\ufffd") + `\u0041 <"> ` + "\n\t"}
	var b strings.Builder
	if err := printJSON(&b, want); err != nil {
		t.Fatal(err)
	}
	for _, r := range b.String() {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("%U is not printable:\n%q", r, b.String())
		}
	}
	var got map[string]string
	if err := json.Unmarshal([]byte(b.String()), &got); err != nil || got["key"] != want["key"] {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

func FuzzPrintable(f *testing.F) {
	f.Add(hostile)
	f.Fuzz(func(t *testing.T, text string) {
		for _, r := range printable(text) {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("%U of %q is not printable", r, text)
			}
		}
		in, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		var want, got string
		if err := json.Unmarshal(in, &want); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(printable(string(in))), &got); err != nil || got != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	})
}

func TestOneLine(t *testing.T) {
	long := strings.Repeat("é", 1<<20)
	for text, want := range map[string]string{
		"": "", "one": "one", "one\ntwo\n": "one; two", "  one\r\n": "one",
		long: long[:2*600] + "...",
	} {
		if got := oneLine(text); got != want {
			t.Errorf("oneLine(%.20q) = %.20q (%d bytes), want %.20q", text, got, len(got), want)
		}
	}
}
