package config

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Once no conflist chains wgcni, the last configuration is found in whichever state
// folder the node had.
func TestLoadLastElsewhere(t *testing.T) {
	dir, stateDir := t.TempDir(), t.TempDir()
	if got := StateDir(dir); got != DefaultStateDir {
		t.Errorf("nothing noted: %s", got)
	}
	for range 2 {
		if err := KeepStateDir(dir, stateDir); err != nil {
			t.Fatal(err)
		}
	}
	if got := StateDir(dir); got != stateDir {
		t.Errorf("noted: %s", got)
	}
	if _, err := LoadLast(dir); !errors.Is(err, ErrNotChained) {
		t.Errorf("nothing was kept: %v", err)
	}
	list := `{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, ` +
		`{"type": "wgcni", "clusterCIDRs": ["10.244.0.0/16"], "registry": {"type": "file", "path": "/srv/mesh.json"}, "stateDir": "` + stateDir + `"}]}`
	if err := os.WriteFile(filepath.Join(stateDir, LastFile), []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := LoadLast(dir); err != nil || c.StateDir != stateDir {
		t.Errorf("%s, %v", c.StateDir, err)
	}
	if err := ForgetStateDir(dir, "/another"); err != nil || StateDir(dir) != stateDir {
		t.Errorf("another's was forgotten: %v", err)
	}
	for range 2 {
		if err := ForgetStateDir(dir, stateDir); err != nil || StateDir(dir) != DefaultStateDir {
			t.Errorf("%s, %v", StateDir(dir), err)
		}
	}
	for _, text := range []string{"", "\n", "relative\n", "\x00"} {
		if err := os.WriteFile(filepath.Join(dir, stateFile), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := StateDir(dir); got != DefaultStateDir {
			t.Errorf("%q: %s", text, got)
		}
	}
	if err := KeepStateDir(dir, DefaultStateDir); err != nil {
		t.Fatal(err)
	}
}
