package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestREADMEIsWhatTheCampaignsHaveFound: no figure comes from anywhere else.
func TestREADMEIsWhatTheCampaignsHaveFound(t *testing.T) {
	before, after, err := render("../..")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(after, before); d != "" {
		t.Errorf("README's table is not what the results give; run `go run ./scripts/chaos` (-results +README):\n%s", d)
	}
}
