package main

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/config"
)

// `wgcnid leave` goes by what a running helper was told last.
func TestKeepLast(t *testing.T) {
	dir := t.TempDir()
	last := filepath.Join(dir, config.LastFile)
	source, failure := "first", error(nil)
	var log bytes.Buffer
	load := keepLast(func() (config.Config, error) { return config.Config{Source: []byte(source)}, failure }, dir, slog.New(slog.NewTextHandler(&log, nil)))
	step := func(what, want string) {
		t.Helper()
		if c, err := load(); !errors.Is(err, failure) || string(c.Source) != source {
			t.Errorf("%s: %s, %v", what, c.Source, err)
		}
		if got, err := os.ReadFile(last); err != nil || string(got) != want {
			t.Errorf("%s: %s is kept, %v; want %s", what, got, err, want)
		}
	}
	step("at the start", "first")
	source = "second"
	step("changed", "second")
	before, err := os.Stat(last)
	if err != nil {
		t.Fatal(err)
	}
	step("unchanged", "second")
	if after, err := os.Stat(last); err != nil || !os.SameFile(before, after) {
		t.Errorf("it was written again, %v", err)
	}
	source, failure = "torn", config.ErrNotChained
	step("no longer there", "second")
	if info, err := os.Stat(last); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if log.Len() > 0 {
		t.Errorf("it says %s", &log)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	source, failure = "third", nil
	for range 2 {
		if c, err := load(); err != nil || string(c.Source) != source {
			t.Errorf("%s, %v", c.Source, err)
		}
	}
	if n := strings.Count(log.String(), "wgcnid leave"); n != 1 {
		t.Errorf("that it cannot be kept is said %d times:\n%s", n, &log)
	}
}
