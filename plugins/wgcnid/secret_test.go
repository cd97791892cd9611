package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// What is printed is a line of a file of secrets, and nothing else.
func TestSecretNew(t *testing.T) {
	out, err := execute("secret", "new")
	if err != nil {
		t.Fatal(err)
	}
	line, rest, ended := strings.Cut(out, "\n")
	s, err := identity.ParseSecret(line)
	if err != nil || rest != "" || !ended {
		t.Fatalf("%d lines more, %v", strings.Count(rest, "\n"), err)
	}
	if age := time.Since(s.Made()); age < 0 || age > time.Minute {
		t.Errorf("made %v ago", age)
	}
	if again, err := execute("secret", "new"); err != nil || again == out {
		t.Errorf("the second is the same, or %v", err)
	}
}

func TestSecretNewFile(t *testing.T) {
	defer unix.Umask(unix.Umask(0)) // the mode does not depend on it
	dir := t.TempDir()
	t.Chdir(dir)
	path := filepath.Join(dir, "secret")
	out, err := execute("secret", "new", "--file", "secret")
	if err != nil {
		t.Fatal(err)
	}
	secrets, err := identity.LoadSecrets(path) // which refuses a file for others
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := `Secret ` + string(secrets.Current()) + ` is in ` + path + `. Copy the file to every node, and name it there: "clusterSecretFile": "` + path + "\"\n"
	if out != want {
		t.Errorf("printed %q, want %q", out, want)
	}
	_, err = execute("secret", "new", "--file", path)
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "last line") {
		t.Errorf("a file that is there: %v", err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(text) {
		t.Errorf("it was altered: %v", err)
	}
	none := filepath.Join(dir, "none", "secret")
	if _, err := execute("secret", "new", "--file", none); err == nil || !strings.Contains(err.Error(), "mkdir -m 700 "+filepath.Dir(none)) {
		t.Errorf("no folder: %v", err)
	}
}

// `wgcnid secret new >> FILE`.
func TestSecretNewAppended(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if _, err := execute("secret", "new", "--file", path); err != nil {
		t.Fatal(err)
	}
	first, err := identity.LoadSecrets(path)
	if err != nil {
		t.Fatal(err)
	}
	appendNew := func() error {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		root := rootCommand()
		root.SetOut(f)
		root.SetArgs([]string{"secret", "new"})
		return root.ExecuteContext(t.Context())
	}
	if err := appendNew(); err != nil {
		t.Fatal(err)
	}
	both, err := identity.LoadSecrets(path)
	if err != nil || len(both) != 2 || both.Current() != first.Current() {
		t.Fatalf("%d secrets, %v", len(both), err)
	}
	for _, mode := range []fs.FileMode{0o644, 0o640, 0o602} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := appendNew(); err == nil || !strings.Contains(err.Error(), "--file") || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("%04o: %v", mode, err)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if after, err := identity.LoadSecrets(path); err != nil || len(after) != 2 {
		t.Errorf("%d secrets, %v: one was written for others to read", len(after), err)
	}
}

func TestSecretList(t *testing.T) {
	m := newMesh(t, 2, "seal", "preferred")
	by := func(i int) registry.Trust { return registry.Trust{Secrets: m.trust.Secrets[i : i+1]} }
	for _, name := range []string{"g", "f", "e", "d", "c", "b"} {
		m.forge(registrytest.Seal(t, by(1), registrytest.Record(name, 1)))
	}
	m.forge(registrytest.Seal(t, by(0), registrytest.Record("a", 1)), registrytest.Record("h", 1), tombstone("i", 1))
	m.forge(registrytest.Seal(t, registrytest.Secrets(t, 1), registrytest.Record("k", 1)))
	const want = `SECRET    MADE        USE                               NODES
11111111  2026-03-01  seals this node's record          1: a
22222222  2026-03-02  accepted                          6: b c d e f and 1 more
none      -           accepted ("seal" is "preferred")  1: h
refused: 1 of the records in the registry; ` + "`wgcnid nodes` says why\n"
	for range 2 {
		out, errs, err := m.run("secret", "list")
		if diff := cmp.Diff(want, m.named(out)); diff != "" || errs != "" || err != nil {
			t.Errorf("%q, %v, (-want +got):\n%s", errs, err, diff)
		}
	}
}

func TestSecretListRequired(t *testing.T) {
	m := newMesh(t, 1)
	m.cache(registrytest.Record("b", 1))
	m.must(os.RemoveAll(filepath.Dir(m.path)))
	out, errs, err := m.run("secret", "list")
	want := "The registry is away; this is what this node knows: registry folder " + filepath.Dir(m.path) + ` is missing: create it or mount it

SECRET    MADE        USE                       NODES
11111111  2026-03-01  seals this node's record  1: b
`
	if diff := cmp.Diff(want, m.named(out)); diff != "" || errs != "" || err != nil {
		t.Errorf("%q, %v, (-want +got):\n%s", errs, err, diff)
	}
}

func TestSecretListWithout(t *testing.T) {
	out, _, err := newMesh(t, 0).run("secret", "list")
	if err != nil || !strings.Contains(out, "clusterSecretFile") {
		t.Errorf("%q, %v", out, err)
	}
}
