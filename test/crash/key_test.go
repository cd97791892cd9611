package crash

import (
	"errors"
	"fmt"
	"os/exec"
	"testing"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// rotated reports whether the node has come from one key to the next, and is at rest.
func (w *world) rotated(from identity.Keys) error {
	k, err := identity.LoadKeys(w.state)
	if err == nil && (k.Current != from.Next || k.Stage != mesh.Resting) {
		err = fmt.Errorf("the key is %v at stage %q, want %v at rest", k.Current, k.Stage, from.Next)
	}
	return err
}

// keysSound holds at every moment of a rotation: the node has one of the two keys, and
// the mesh knows that one, at least as the next.
func (w *world) keysSound(from identity.Keys) error {
	k, err := identity.LoadKeys(w.state)
	if err != nil {
		return err
	}
	if k.Current != from.Current && k.Current != from.Next {
		return fmt.Errorf("the key is %v, and was %v or %v", k.Current, from.Current, from.Next)
	}
	s, err := w.records()
	if err != nil {
		return err
	}
	if r := s.Nodes["node-a"]; r == nil || r.PublicKey != k.Current && r.Next != k.Current {
		return fmt.Errorf("the mesh knows this node by %+v, and its key is %v", r, k.Current)
	}
	return errors.Join(w.storesSound(), w.jsonSound("helper.json", "announced.json", "tunnel.json"))
}

// A rotation from its order to its end.
func TestRotation(t *testing.T) {
	var from identity.Keys
	campaign(t, subject{
		name: t.Name(),
		old: func(w *world) {
			w.chained()
			w.run1()
			var err error
			from, err = identity.LoadKeys(w.state)
			w.must(err)
			w.do(w.wgcnid("key", "rotate", "--no-wait"))
		},
		cmd:   func(w *world) *exec.Cmd { return w.wgcnid("run", "--http", "off") },
		ready: func(w *world) bool { return w.rotated(from) == nil && w.keyAnnounced(true) == nil },
		sound: func(w *world) error { return w.keysSound(from) },
		done: func(w *world) error {
			if identity.Ordered(w.state) {
				return errors.New("the order is still there")
			}
			return errors.Join(w.rotated(from), w.keyAnnounced(true))
		},
		lesser: func(string) bool { return true }, // it goes on, and tries again
		points: 1,                                 // a rotation takes seconds
	})
}

// The order itself.
func TestKeyRotate(t *testing.T) {
	campaign(t, subject{
		name:  t.Name(),
		old:   func(w *world) { w.chained(); w.do(w.wgcnid("sync")) },
		cmd:   func(w *world) *exec.Cmd { return w.wgcnid("key", "rotate", "--no-wait") },
		sound: (*world).meshSound,
		done: func(w *world) error {
			if !identity.Ordered(w.state) {
				return errors.New("nothing is ordered")
			}
			return nil
		},
	})
}
