package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const passing = `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"chatter\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.1}
{"Action":"pass","Package":"p","Test":"TestB","Elapsed":0.1}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"pass","Package":"p","Elapsed":1.25}
`

func TestSummarize(t *testing.T) {
	for _, tt := range []struct {
		name, in, want, err string
	}{
		{"nothing", "", "\n0 passed, 0 failed, 0 skipped\n", ""},
		{"all pass", passing, "pass     1.2s  p\n\n2 passed, 0 failed, 0 skipped\n", ""},
		{
			"a package without tests is no skipped test",
			`{"Action":"skip","Package":"q","Elapsed":0}` + "\n" + passing,
			"skip     0.0s  q\npass     1.2s  p\n\n2 passed, 0 failed, 0 skipped\n", "",
		},
		{
			"a skipped test is a failure",
			`{"Action":"output","Package":"q","Test":"TestRoot","Output":"not root\n"}
{"Action":"skip","Package":"q","Test":"TestRoot","Elapsed":0}
{"Action":"pass","Package":"q","Elapsed":2}
`, "pass     2.0s  q\n\n0 passed, 0 failed, 1 skipped\n", "failed: \nskipped: q TestRoot",
		},
		{
			"a failure prints its own output",
			`{"Action":"output","Package":"q","Test":"TestBad","Output":"    bad_test.go:7: "}
{"Action":"output","Package":"q","Test":"TestGood","Output":"chatter\n"}
{"Action":"output","Package":"q","Test":"TestBad","Output":"want 1\n"}
{"Action":"fail","Package":"q","Test":"TestBad","Elapsed":0.5}
{"Action":"pass","Package":"q","Test":"TestGood","Elapsed":0}
{"Action":"output","Package":"q","Output":"FAIL\n"}
{"Action":"fail","Package":"q","Elapsed":3}
` + passing,
			`--- q TestBad
    bad_test.go:7: want 1
fail     3.0s  q
--- q
FAIL
pass     1.2s  p

3 passed, 1 failed, 0 skipped
`, "failed: q, q TestBad\nskipped: ",
		},
		{
			"a test that did not end is a failure",
			`{"Action":"run","Package":"q","Test":"TestHangs"}
{"Action":"output","Package":"q","Test":"TestHangs","Output":"panic: test timed out\n"}
` + passing,
			`pass     1.2s  p
--- q TestHangs (did not end)
panic: test timed out

2 passed, 1 failed, 0 skipped
`, "failed: q TestHangs (did not end)\nskipped: ",
		},
		{
			"one name in two packages",
			`{"Action":"output","Package":"q","Test":"TestX","Output":"of q\n"}
{"Action":"output","Package":"r","Test":"TestX","Output":"of r\n"}
{"Action":"fail","Package":"r","Test":"TestX","Elapsed":0}
{"Action":"pass","Package":"q","Test":"TestX","Elapsed":0}
`, "--- r TestX\nof r\n\n1 passed, 1 failed, 0 skipped\n", "failed: r TestX\nskipped: ",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			text := ""
			if err := summarize(strings.NewReader(tt.in), &out); err != nil {
				text = err.Error()
			}
			if diff := cmp.Diff(tt.want, out.String()); diff != "" {
				t.Errorf("summary (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.err, text); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSummarizeNoJSON(t *testing.T) {
	err := summarize(strings.NewReader(passing+"go: cannot find main module\n"), new(strings.Builder))
	if err == nil || !strings.Contains(err.Error(), "go test -json") {
		t.Errorf("error %v, want one that says what was expected", err)
	}
}
