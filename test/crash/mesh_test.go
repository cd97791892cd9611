package crash

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
)

// joined makes a node that is in the mesh, beside another one.
func (w *world) joined() {
	w.t.Helper()
	w.chained()
	w.do(w.wgcnid("sync"))
	w.must(w.otherNode())
}

// The record of a machine is there before its file is printed: a kill between leaves
// a machine that nobody has the key of, and the message says how to give it another.
func TestPeerAdd(t *testing.T) {
	add := func(w *world, args ...string) *exec.Cmd {
		return w.wgcnid(append([]string{"peer", "add", "laptop"}, args...)...)
	}
	added := func(w *world) error {
		s, err := w.records()
		if err == nil && s.Nodes["laptop"] == nil {
			err = errors.New("the machine is not there")
		}
		return err
	}
	campaign(t, subject{
		name:  t.Name(),
		old:   (*world).joined,
		cmd:   func(w *world) *exec.Cmd { return add(w) },
		sound: (*world).meshSound,
		done:  added,
		again: func(w *world) error {
			e := w.trace(add(w), patience, goOn)
			if e.Code != 0 && strings.Contains(e.err, "--replace") {
				e = w.trace(add(w, "--replace"), patience, goOn)
			}
			if e.Code != 0 || !strings.Contains(e.out, "PrivateKey = ") {
				return fmt.Errorf("no file is printed: %s", e.err)
			}
			return nil
		},
	})
}

func TestForget(t *testing.T) {
	campaign(t, subject{
		name:  t.Name(),
		old:   (*world).joined,
		cmd:   func(w *world) *exec.Cmd { return w.wgcnid("forget", "node-b") },
		sound: (*world).meshSound,
		done: func(w *world) error {
			s, err := w.records()
			if err == nil && (s.Nodes["node-b"] == nil || !s.Nodes["node-b"].Left) {
				err = errors.New("the mesh still knows the node")
			}
			return err
		},
		again: func(w *world) error {
			e := w.trace(w.wgcnid("forget", "node-b"), patience, goOn)
			if e.Code != 0 && !strings.Contains(e.err, "node-b") {
				return errors.New(e.err)
			}
			return nil
		},
	})
}

// A writer of the shared file that is killed keeps no other from writing, and what
// others have written in between stays.
func TestChangedRecord(t *testing.T) {
	campaign(t, subject{
		name: t.Name(),
		old: func(w *world) {
			w.joined()
			w.stanza["segments"] = []string{"red"}
			w.chained()
		},
		cmd: func(w *world) *exec.Cmd { return w.wgcnid("sync") },
		sound: func(w *world) error {
			s, err := w.records()
			if err == nil && (s.Nodes["node-a"] == nil || s.Nodes["node-b"] == nil) {
				err = errors.New("a record is lost")
			}
			return errors.Join(err, w.meshSound())
		},
		done: func(w *world) error {
			s, err := w.records()
			if err == nil && len(s.Nodes["node-a"].Segments) != 1 {
				err = errors.New("the change is lost")
			}
			return err
		},
		again: func(w *world) error {
			key, err := identity.NewPrivateKey()
			if err != nil {
				return err
			}
			if err := w.publish(registry.Record{Name: "node-c", PublicKey: key.Public(), Revision: uint64(time.Now().UnixMilli()), Since: time.Now()}); err != nil {
				return err
			}
			if e := w.trace(w.wgcnid("sync"), patience, goOn); e.Code != 0 {
				return errors.New(e.err)
			}
			s, err := w.records()
			if err == nil && s.Nodes["node-c"] == nil {
				err = errors.New("the record of another node is lost")
			}
			return err
		},
	})
}
