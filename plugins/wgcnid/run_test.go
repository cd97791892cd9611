package main

import (
	"bytes"
	"errors"
	"fmt"
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
	load := keepLast(func() (config.Config, error) { return config.Config{Source: []byte(source)}, failure }, config.Config{StateDir: dir}, slog.New(slog.NewTextHandler(&log, nil)))
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

// While the conflist of the node's network is damaged, the next one by name, of another
// network, does not take its place, neither for a helper that runs nor for one that
// starts: the others would lose the way to this node's pods.
func TestDamagedConflistIsNotTheNextOne(t *testing.T) {
	o := options{cniDir: t.TempDir()}
	stateDir := t.TempDir()
	own := filepath.Join(o.cniDir, "10-pods.conflist")
	list := func(network, podCIDR string) []byte {
		return fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": %q, "plugins": [{"type": "bridge"}, {"type": "wgcni",
			"clusterCIDRs": ["10.244.0.0/16"], "podCIDRs": [%q], "stateDir": %q, "registry": {"type": "file", "path": "/srv/mesh.json"}}]}`, network, podCIDR, stateDir)
	}
	write := func(path string, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(own, list("pods", "10.244.1.0/24"))
	write(filepath.Join(o.cniDir, "20-others.conflist"), list("others", "10.244.9.0/24"))
	if err := config.KeepStateDir(o.cniDir, stateDir); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	start := func() config.Config {
		t.Helper()
		c, err := o.awaitEntry(t.Context(), log)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	must := func(what, network, podCIDR string, load func() (config.Config, error)) {
		t.Helper()
		c, err := load()
		if err != nil || c.Name != network || fmt.Sprint(c.PodCIDRs) != "["+podCIDR+"]" {
			t.Errorf("%s: network %s, %v, %v; want %s of %s", what, c.Name, c.PodCIDRs, err, podCIDR, network)
		}
	}
	starting := func() (config.Config, error) { return start(), nil }
	running := keepLast(o.loadInstalled, start(), log)
	must("at first", "pods", "10.244.1.0/24", running)

	write(own, list("pods", "10.244.1.0/24")[:100])
	for range 2 {
		if c, err := running(); err == nil || !strings.Contains(err.Error(), own) || !strings.Contains(err.Error(), "others") {
			t.Errorf("damaged: %v, %v", c, err)
		}
	}
	must("started", "pods", "10.244.1.0/24", starting)
	running = keepLast(o.loadInstalled, start(), log)
	if c, err := running(); err == nil {
		t.Errorf("damaged, after a start: %v", c)
	}
	must("`wgcnid leave`", "pods", "10.244.1.0/24", func() (config.Config, error) { return config.LoadLast(o.cniDir) })

	write(own, list("pods", "10.244.1.0/25"))
	must("mended", "pods", "10.244.1.0/25", running)
	must("mended, started", "pods", "10.244.1.0/25", starting)
	if err := os.Remove(own); err != nil {
		t.Fatal(err)
	}
	must("taken away", "others", "10.244.9.0/24", running)
	must("taken away, started", "others", "10.244.9.0/24", starting)
}
