package crash

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/identity"
)

// A disk that is really full, and one that is really read-only: it is said, nothing
// is half written, and the same works when there is room again.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const disk = "/run/disk"
	on := func(args ...string) (string, error) { return w.node.Run(t.Context(), args[0], args[1:]...) }
	must := func(args ...string) {
		t.Helper()
		if out, err := on(args...); err != nil {
			t.Fatal(out, err)
		}
	}
	must("mkdir", disk)
	must("mount", "-t", "tmpfs", "-o", "size=256k", "disk", disk)
	w.state = disk + "/lib/wgcni"
	w.stanza["stateDir"] = w.state
	w.chained()
	secret := []string{w.bin("wgcnid"), "secret", "new", "--file", disk + "/secret"}
	sync := []string{w.bin("wgcnid"), "--cni-dir", w.path("net.d"), "sync"}
	faults := []struct {
		text         string
		befall, mend []string
	}{
		{"no space left on device", []string{"sh", "-c", "! cat /dev/zero > " + disk + "/filler"}, []string{"rm", disk + "/filler"}},
		{"read-only file system", []string{"mount", "-o", "remount,ro", disk}, []string{"mount", "-o", "remount,rw", disk}},
	}
	for _, f := range faults {
		must(f.befall...)
		for _, args := range [][]string{secret, sync} {
			if out, err := on(args...); err == nil || !strings.Contains(out, f.text) {
				t.Errorf("%s: %s: %q, %v", f.text, args[1:], out, err)
			}
		}
		if _, err := os.Stat(w.real(disk + "/secret")); !os.IsNotExist(err) {
			t.Errorf("%s: half a secret is there: %v", f.text, err)
		}
		if _, err := os.Stat(w.real(identity.Path(w.state))); !os.IsNotExist(err) {
			t.Errorf("%s: half a key is there: %v", f.text, err)
		}
		must(f.mend...)
		must(secret...)
		must(sync...)
		if _, err := identity.LoadSecrets(w.real(disk + "/secret")); err != nil {
			t.Error(err)
		}
		if _, err := identity.Load(w.real(w.state)); err != nil {
			t.Error(err)
		}
		left, err := filepath.Glob(w.real(disk) + "/*/*/.*wgcni-aside-*")
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %q, %v", f.text, left, err)
		}
		must("sh", "-c", "rm -r "+disk+"/*")
	}
}
