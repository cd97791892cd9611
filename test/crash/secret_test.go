package crash

import (
	"errors"
	"io/fs"
	"os/exec"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/identity"
)

func TestSecretNew(t *testing.T) {
	loaded := func(w *world) error {
		_, err := identity.LoadSecrets(w.path("etc/secret"))
		return err
	}
	campaign(t, subject{
		name: t.Name(),
		old:  func(*world) {},
		cmd:  func(w *world) *exec.Cmd { return w.wgcnid("secret", "new", "--file", w.path("etc/secret")) },
		sound: func(w *world) error {
			if err := loaded(w); !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		},
		done: loaded,
		again: func(w *world) error {
			e := w.trace(w.wgcnid("secret", "new", "--file", w.path("etc/secret")), patience, goOn)
			if e.Code != 0 && !strings.Contains(e.err, "file exists") { // what was made counts
				return errors.New(e.err)
			}
			return nil
		},
	})
}
