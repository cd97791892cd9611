package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// secretFile makes a file of that mode, whatever the umask.
func secretFile(t *testing.T, text string, mode os.FileMode) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "secret")
	if err := errors.Join(os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReadSecretFile(t *testing.T) {
	const limit = 16
	folder := t.TempDir()
	pipe := filepath.Join(folder, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	// As kubelet mounts a secret: PATH -> ..data/secret, ..data -> a folder.
	mounted := func(mode os.FileMode) string {
		dir := t.TempDir()
		real := secretFile(t, "text", mode)
		path := filepath.Join(dir, "secret")
		if err := errors.Join(os.Symlink(filepath.Dir(real), filepath.Join(dir, "..data")), os.Symlink("..data/secret", path)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, tt := range []struct {
		name, path string
		want       string
		says       string // in place of want
	}{
		{"of the owner", secretFile(t, "text", 0o600), "text", ""},
		{"to be read only", secretFile(t, "text", 0o400), "text", ""},
		{"empty", secretFile(t, "", 0o600), "", ""},
		{"just small enough", secretFile(t, strings.Repeat("x", limit), 0o600), strings.Repeat("x", limit), ""},
		{"too large", secretFile(t, strings.Repeat("x", limit+1), 0o600), "", "more than 16 bytes"},
		{"of the group too", secretFile(t, "text", 0o640), "", "mode 0640"},
		{"of everybody", secretFile(t, "text", 0o644), "", "mode 0644"},
		{"to be written by others", secretFile(t, "text", 0o602), "", "mode 0602"},
		{"executable", secretFile(t, "text", 0o700), "", "mode 0700"},
		{"mounted by kubelet", mounted(0o400), "text", ""},
		{"mounted by kubelet for everybody", mounted(0o644), "", "`defaultMode: 0400`"},
		{"a folder", folder, "", "no regular file"},
		{"a pipe", pipe, "", "no regular file"},
		{"a device", "/dev/zero", "", "no regular file"},
		{"missing", filepath.Join(folder, "none"), "", "no such file"},
	} {
		got, err := ReadSecretFile(tt.path, limit)
		if tt.says == "" {
			if err != nil || string(got) != tt.want {
				t.Errorf("%s: %q, %v", tt.name, got, err)
			}
			continue
		}
		if err == nil || got != nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), tt.path) {
			t.Errorf("%s: %q, %v, want an error about %s that says %s", tt.name, got, err, tt.path, tt.says)
			continue
		}
		if strings.Contains(tt.says, "ode") != strings.Contains(err.Error(), fmt.Sprintf("`chmod 600 %s`", tt.path)) {
			t.Errorf("%s: has a command that mends it, or has none: %v", tt.name, err)
		}
		if errors.Is(err, fs.ErrNotExist) != (tt.name == "missing") {
			t.Errorf("%s: is fs.ErrNotExist, or is not: %v", tt.name, err)
		}
	}
}
