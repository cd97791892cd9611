package durable

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func content(t *testing.T, path, want string, mode fs.FileMode) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil || string(data) != want {
		t.Errorf("%s: %.40q, %v, want %.40q", path, data, err, want)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != mode {
		t.Errorf("%s: mode %v, %v, want %v", path, info.Mode(), err, mode)
	}
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	defer unix.Umask(unix.Umask(0o777)) // the mode does not depend on it
	for _, text := range []string{"first", "", "second"} {
		if err := Replace(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		content(t, path, text, 0o640)
	}
	if err := Replace(dir, nil, 0o600); err == nil {
		t.Error("a folder was replaced")
	}
	if err := Replace(filepath.Join(dir, "no", "folder"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	if diff := cmp.Diff([]string{"file"}, names(t, dir)); diff != "" {
		t.Error(diff)
	}
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := Create(path, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, filepath.Join(dir, "link"), dir} {
		if err := Create(path, []byte("second"), 0o644); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s is there: %v", path, err)
		}
	}
	content(t, path, "first", 0o600)
	if diff := cmp.Diff([]string{"file", "link"}, names(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// Of many that create one file at once, one succeeds.
func TestCreateAtOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	var all sync.WaitGroup
	made := make(chan string, 16)
	for i := range cap(made) {
		all.Go(func() {
			text := string(rune('a' + i))
			if err := Create(path, []byte(text), 0o600); err == nil {
				made <- text
			} else if !errors.Is(err, fs.ErrExist) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if len(made) != 1 {
		t.Fatalf("%d succeeded", len(made))
	}
	content(t, path, <-made, 0o600)
	if diff := cmp.Diff([]string{"file"}, names(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// Writers of one file do not sweep each other's, and a reader sees whole files only.
func TestReplaceAtOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	text := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i)}, 100_000) }
	if err := Replace(path, text(0), 0o600); err != nil {
		t.Fatal(err)
	}
	var writers, reader sync.WaitGroup
	done := make(chan struct{})
	for i := range 4 {
		writers.Go(func() {
			for range 20 {
				if err := Replace(path, text(i), 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	reader.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if data, err := os.ReadFile(path); err != nil || len(data) != 100_000 || len(bytes.Trim(data, string(data[:1]))) > 0 {
				t.Errorf("read %d bytes, %v", len(data), err)
				return
			}
		}
	})
	writers.Wait()
	close(done)
	reader.Wait()
	if diff := cmp.Diff([]string{"file"}, names(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// What a dead writer left is swept by the next write of the same file; what a living
// one holds, and what is none of ours, stays.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	living, err := WriteAside(path, []byte("half"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer living.Close()
	foreign := []string{".file.wgcni-aside-", ".file.wgcni-aside-1x", "file.wgcni-aside-1", ".wgcni-aside-1"}
	dead, elsewhere := ".file.wgcni-aside-123", ".other.wgcni-aside-123"
	for _, name := range append([]string{dead, elsewhere}, foreign...) {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, ".file.wgcni-aside-9"), 0o600); err != nil {
		t.Fatal(err)
	}
	gone := func(name string) bool {
		_, err := os.Lstat(filepath.Join(dir, name))
		return errors.Is(err, fs.ErrNotExist)
	}
	if err := Replace(path, []byte("whole"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !gone(dead) || gone(elsewhere) {
		t.Errorf("after a write of the file: %q", names(t, dir))
	}
	Sweep(dir, filepath.Join(dir, "nowhere"))
	if !gone(elsewhere) || gone(filepath.Base(living.Path)) || gone(".file.wgcni-aside-9") {
		t.Errorf("after a sweep: %q", names(t, dir))
	}
	for _, name := range foreign {
		if gone(name) {
			t.Errorf("%s is gone", name)
		}
	}
	if err := os.Rename(living.Path, path); err != nil {
		t.Fatal(err)
	}
	content(t, path, "half", 0o600)
}

func TestMkdirAll(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b")
	for range 2 {
		if err := MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := MkdirAll(filepath.Join(file, "c"), 0o700); err == nil {
		t.Error("a folder in a file")
	}
}

func TestRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Remove(path); err != nil {
			t.Error(err)
		}
	}
	if err := Remove(filepath.Join(path, "nowhere", "file")); err != nil {
		t.Error(err)
	}
}
