package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestREADMEIsWhatTheTestsHaveSeen: no mark comes from anywhere else.
func TestREADMEIsWhatTheTestsHaveSeen(t *testing.T) {
	before, after, err := render("../..")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(after, before); d != "" {
		t.Errorf("README's section is not what the results give; run `go run ./scripts/matrix` (-results +README):\n%s", d)
	}
}
