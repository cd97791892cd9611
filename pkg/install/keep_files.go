package install

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/identity"
)

// stamp tells whether a file may be another one than it was: replaced, written to,
// or given another mode.
type stamp struct {
	dev, ino    uint64
	size        int64
	mtime, ctim syscall.Timespec
}

// stampOf follows symbolic links. It is the zero value for no file.
func stampOf(path string) stamp {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{}
	}
	return stamp{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctim: st.Ctim}
}

func hashOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// keepPlugin sees to the plugin's binary. Without it no pod starts, since the
// entry names it.
func (k *keeper) keepPlugin(r *Record) {
	path := r.Plugin.Path
	now := stampOf(path)
	if now == k.plugin && now != (stamp{}) {
		return
	}
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.warn("plugin", err)
		return
	}
	missing := err != nil
	info, err := os.Stat(path)
	if !missing && hashOf(data) == r.Plugin.SHA256 && err == nil && info.Mode().Perm() == 0o755 {
		k.plugin = now
		k.warn("plugin", nil)
		return
	}
	text := "the plugin's binary was altered, and is put back"
	if missing {
		text = "the plugin's binary was deleted, and is put back"
	}
	for _, from := range []string{r.Plugin.From, k.beside} {
		mine, err := os.ReadFile(from)
		if err != nil || len(mine) == 0 {
			continue
		}
		switch sum := hashOf(mine); {
		case sum == r.Plugin.SHA256, missing && from == k.beside:
			if err := durable.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				k.warn("plugin", err)
				return
			}
			if err := durable.Replace(path, mine, 0o755); err != nil {
				k.warn("plugin", err)
				return
			}
			r.Plugin.SHA256, r.Plugin.From, r.Plugin.Found = sum, from, false
			k.log.Info("installation: "+text, "file", path, "from", from)
		case from == k.beside && bytes.Equal(mine, data):
			r.Plugin.SHA256, r.Plugin.From, r.Plugin.Found = sum, from, false
			k.log.Info("installation: the plugin's binary was replaced by the one that came with wgcnid, and is kept", "file", path)
		default:
			continue
		}
		k.plugin = stampOf(path)
		k.warn("plugin", nil)
		return
	}
	what := "is not the one that was installed"
	if missing {
		what = "is gone, and no pod can start"
	}
	k.plugin = now
	k.fail("plugin", fmt.Errorf("the plugin's binary %s %s, and there is none to put in its place: run `wgcnid install --plugin FILE`", path, what))
}

// fail is warn for what keeps pods from starting, or from being encrypted.
func (k *keeper) fail(about string, err error) {
	if text := err.Error(); k.said[about] != text {
		k.said[about] = text
		k.log.Error("cannot keep the installation", "error", err)
	}
}

// keepSecret copies the cluster secret anew where it has changed. A file that is no
// secret is not copied. What it returns has nothing of a secret in it.
func (k *keeper) keepSecret(r Record) error {
	s := r.Secret
	if s == nil {
		return nil
	}
	now := [2]stamp{stampOf(s.From), stampOf(s.Path)}
	if now == k.secret && now[1] != (stamp{}) {
		return nil
	}
	if _, err := identity.LoadSecrets(s.From); err != nil {
		return err
	}
	data, err := os.ReadFile(s.From)
	if err != nil {
		return err
	}
	there, err := os.ReadFile(s.Path)
	if info, serr := os.Stat(s.Path); err != nil || serr != nil || !bytes.Equal(there, data) || info.Mode().Perm() != 0o600 {
		if err := durable.MkdirAll(filepath.Dir(s.Path), 0o700); err != nil {
			return err
		}
		if err := durable.Replace(s.Path, data, 0o600); err != nil {
			return err
		}
		k.log.Info("installation: the cluster secret has changed, and is copied anew", "file", s.Path, "from", s.From)
	}
	k.secret = [2]stamp{now[0], stampOf(s.Path)}
	return nil
}

// takeLate looks at the files that edits have displaced. An agent that had one open
// at that moment has written into a file that nobody sees: what it wrote counts.
func (k *keeper) takeLate(f folder, entry string) {
	kept := k.late[:0]
	for _, l := range k.late {
		data, err := l.read()
		switch {
		case err != nil || k.now().After(l.until):
			l.close()
			continue
		case bytes.Equal(data, l.was) || judge(l.name, data).fault != nil:
		default:
			if err := k.restore(f, l.name, data, entry); err == nil || !errors.Is(err, errRaced) {
				l.was = data
			}
		}
		kept = append(kept, l)
	}
	k.late = kept
}

// restore makes what was written into a displaced file the content of the file,
// with the entry.
func (k *keeper) restore(f folder, name string, data []byte, entry string) error {
	n, ok := f.find(name)
	if !ok {
		return nil
	}
	path := filepath.Join(f.path, name)
	if !Chains(data) {
		var err error
		if data, err = Insert(data, []byte(entry)); err != nil {
			return err
		}
	}
	d, err := edit(path, n.data, data)
	d.close()
	if err == nil {
		k.log.Info("installation: what was being written while the entry was put in counts", "file", path)
	}
	return err
}
