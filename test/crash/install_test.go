package crash

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/install"
)

// podsStart is what holds on a node at every moment: the configuration that the
// runtime takes is whole, and each of its plugins is there, whole.
func (w *world) podsStart() error {
	entries, err := os.ReadDir(w.path("net.d"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name())) {
			continue
		}
		data, err := os.ReadFile(w.path("net.d/" + e.Name()))
		if err != nil {
			return err
		}
		var list struct {
			Plugins []struct {
				Type string `json:"type"`
			} `json:"plugins"`
		}
		if err := json.Unmarshal(data, &list); err != nil || len(list.Plugins) == 0 {
			return fmt.Errorf("%s is no configuration: %q, %w", e.Name(), data, err)
		}
		for _, p := range list.Plugins {
			there, err := os.ReadFile(w.path("bin/" + p.Type))
			if err != nil {
				return fmt.Errorf("no pod starts: %w", err)
			}
			if p.Type == "wgcni" && !bytes.Equal(there, binary) {
				return fmt.Errorf("no pod starts: the plugin has %d bytes", len(there))
			}
		}
	}
	return nil
}

// install is the command; its entry is in etc/entry.json.
func (w *world) install(args ...string) *exec.Cmd {
	return w.wgcnid(append([]string{"install", "--entry", w.path("etc/entry.json"), "--plugin", w.path("usr/wgcni"), "--bin-dir", w.path("bin")}, args...)...)
}

// installable makes what an install needs: the primary's file, an entry, a secret.
func (w *world) installable() {
	w.plain()
	w.stanza["clusterSecretFile"] = w.path("etc/wgcni/secret")
	w.write("usr/wgcni", binary, 0o755)
	w.write("etc/entry.json", w.entry(), 0o644)
	s, err := identity.ParseSecret("wgcni1_20261121T050000Z_" + strings.Repeat("A", 42) + "E")
	w.must(err)
	w.must(identity.WriteSecret(w.path("usr/secret"), s))
}

func (w *world) installed(stateDir string) error {
	r, err := install.Load(w.real(stateDir))
	if err == nil && r.Stage != install.Installed {
		err = fmt.Errorf("the record says %s", r.Stage)
	}
	c, cerr := config.Load("", w.path("net.d"))
	if cerr == nil && c.StateDir != stateDir {
		cerr = fmt.Errorf("the entry has the state folder %s", c.StateDir)
	}
	return errors.Join(err, cerr, w.podsStart())
}

func (w *world) gone(paths ...string) (err error) {
	for _, path := range paths {
		if _, lerr := os.Lstat(w.real(path)); lerr == nil {
			err = errors.Join(err, fmt.Errorf("%s is there", path))
		} else if !errors.Is(lerr, fs.ErrNotExist) {
			err = errors.Join(err, lerr)
		}
	}
	return err
}

func TestInstall(t *testing.T) {
	campaign(t, subject{
		name:  t.Name(),
		old:   (*world).installable,
		cmd:   func(w *world) *exec.Cmd { return w.install("--secret", w.path("usr/secret")) },
		sound: (*world).podsStart,
		done: func(w *world) error {
			_, err := identity.LoadSecrets(w.path("etc/wgcni/secret"))
			return errors.Join(err, w.installed(w.state))
		},
	})
}

// An uninstall takes the node out of the mesh as well, and knows where its state is
// although the entry is gone.
func TestUninstall(t *testing.T) {
	uninstall := func(w *world) *exec.Cmd { return w.wgcnid("uninstall", "--purge") }
	campaign(t, subject{
		name: t.Name(),
		old: func(w *world) {
			w.installable()
			w.do(w.install("--secret", w.path("usr/secret")))
			w.do(w.wgcnid("sync"))
		},
		cmd:   uninstall,
		sound: func(w *world) error { return errors.Join(w.podsStart(), w.keyKept()) },
		done: func(w *world) error {
			s, err := w.sealedRecords()
			if err == nil && (s.Nodes["node-a"] == nil || !s.Nodes["node-a"].Left) {
				err = errors.New("the others still know this node")
			}
			return errors.Join(err, w.podsStart(), w.gone(w.path("net.d/00-wgcni.conflist"), w.path("bin/wgcni")))
		},
	})
}

func inPlace(name string) subject {
	return subject{
		name: name,
		old: func(w *world) {
			delete(w.stanza, "stateDir")
			w.state = config.DefaultStateDir
			w.installable()
		},
		cmd:   func(w *world) *exec.Cmd { return w.install("--secret", w.path("usr/secret"), "--in-place") },
		sound: (*world).podsStart,
		done:  func(w *world) error { return w.installed(config.DefaultStateDir) },
	}
}

func TestInstallInPlace(t *testing.T) { campaign(t, inPlace(t.Name())) }

// The primary's agent writes its file at the very moment of the exchange.
func TestInstallRaced(t *testing.T) {
	const theirs = "the agent's latest"
	var wrote bool
	s := inPlace(t.Name())
	s.powered = true
	cmd := s.cmd
	s.cmd = func(w *world) *exec.Cmd {
		wrote = false // this begins from the old state
		return cmd(w)
	}
	s.again = func(w *world) error {
		if e := w.trace(cmd(w), patience, goOn); e.Code != 0 {
			return errors.New(e.err)
		}
		return nil
	}
	s.meanwhile = func(w *world, c Call) {
		if wrote || c.Name != "rename" || c.Flags&unix.RENAME_EXCHANGE == 0 {
			return
		}
		wrote = true
		text, err := os.ReadFile(c.To)
		w.must(err)
		// In place, as agents do.
		w.must(os.WriteFile(c.To, bytes.Replace(text, []byte(`"name": "pods"`), []byte(`"name": "pods", "by": "`+theirs+`"`), 1), 0o644))
	}
	done := s.done
	s.done = func(w *world) error {
		text, err := os.ReadFile(w.path("net.d/10-pods.conflist"))
		if err == nil && wrote && !bytes.Contains(text, []byte(theirs)) {
			err = fmt.Errorf("what the agent wrote is lost: %s", text)
		}
		return errors.Join(err, done(w))
	}
	campaign(t, s)
}

func TestLeave(t *testing.T) {
	campaign(t, subject{
		name: t.Name(),
		old: func(w *world) {
			w.chained()
			w.run1()
			w.plain()
		},
		cmd:   func(w *world) *exec.Cmd { return w.wgcnid("leave", "--purge") },
		sound: (*world).keyKept,
		done: func(w *world) error {
			s, err := w.records()
			if err == nil && (s.Nodes["node-a"] == nil || !s.Nodes["node-a"].Left) {
				err = errors.New("the others still know this node")
			}
			return err
		},
		again: func(w *world) error {
			e := w.trace(w.wgcnid("leave", "--purge"), patience, goOn)
			if e.Code != 0 && strings.Contains(e.err, "no network configuration chains wgcni") {
				return w.gone(w.state, w.run) // it has left
			}
			if e.Code != 0 {
				return errors.New(e.err)
			}
			return nil
		},
	})
}
