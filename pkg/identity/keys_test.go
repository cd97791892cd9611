package identity

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func mustKeys(t *testing.T, dir string, now time.Time) Keys {
	t.Helper()
	k, err := LoadOrCreateKeys(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// files returns the folder's files by name.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %04o", e.Name(), info.Mode().Perm())
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(text)
	}
	return out
}

// advance does what is next in the life of a key.
func advance(k Keys, dir string, now time.Time) (Keys, error) {
	switch k.Stage {
	case mesh.Out:
		return k.Switch(dir, now)
	case mesh.Back:
		return k.End(dir, now)
	}
	return k.Begin(dir, now)
}

func TestKeys(t *testing.T) {
	defer unix.Umask(unix.Umask(0)) // the modes do not depend on it
	dir := filepath.Join(t.TempDir(), "lib", "wgcni")
	if _, err := LoadKeys(dir); !errors.Is(err, ErrNoKey) {
		t.Fatalf("without a folder: %v", err)
	}
	first := mustKeys(t, dir, noon)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%s: mode %v, %v", dir, info.Mode(), err)
	}
	if first.Current == first.Next || first.Next == (wgtypes.Key{}) || first.Spare() != first.Next {
		t.Errorf("%v", first)
	}
	want := Keys{Current: first.Current, Next: first.Next, Since: noon}
	if diff := cmp.Diff(want, first); diff != "" {
		t.Error(diff)
	}
	begun, order := noon.Add(time.Hour), noon.Add(30*time.Minute)
	out, err := first.Begin(dir, order)
	want.Stage, want.Answered = mesh.Out, order
	if diff := cmp.Diff(want, out); diff != "" || err != nil || out.Spare() != first.Next {
		t.Error(err, diff)
	}
	old := files(t, dir)["private.key"]
	back, err := out.Switch(dir, begun)
	want = Keys{Current: first.Next, Since: begun, Stage: mesh.Back, Answered: order}
	if diff := cmp.Diff(want, back); diff != "" || err != nil || back.Spare() != first.Next {
		t.Error(err, diff)
	}
	for name, text := range files(t, dir) {
		if strings.Contains(text, strings.TrimSpace(old)) || name == nextKeyFile {
			t.Errorf("%s is there, and may hold the key that was replaced", name)
		}
	}
	end, err := back.End(dir, begun)
	want.Stage, want.Next = mesh.Resting, end.Next
	if diff := cmp.Diff(want, end); diff != "" || err != nil || end.Next == (wgtypes.Key{}) || end.Next == end.Current {
		t.Error(err, diff)
	}
	if diff := cmp.Diff([]string{"next.key", "private.key", "rotation.json"}, sortedNames(files(t, dir))); diff != "" {
		t.Error(diff)
	}
	for _, again := range []func() (Keys, error){
		func() (Keys, error) { return LoadKeys(dir) },
		func() (Keys, error) { return LoadOrCreateKeys(dir, begun.Add(time.Hour)) },
	} {
		if got, err := again(); err != nil || got != end {
			t.Errorf("read again: %v, %v, want %v", got, err, end)
		}
	}
}

func sortedNames(files map[string]string) (names []string) {
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// TestKilledAnywhere: whichever change of the disk is the last before a kill, the
// next start has the keys that were in use, and the rotation comes to its end. The
// same without a new start, where the change has failed only.
func TestKilledAnywhere(t *testing.T) {
	defer func() { changing = func() error { return nil } }()
	errKilled := errors.New("killed")
	for _, restarts := range []bool{true, false} {
		for fatal := 0; ; fatal++ {
			dir, count, killed := t.TempDir(), 0, false
			changing = func() error {
				if count++; count == fatal+1 {
					killed = true
					return errKilled
				}
				return nil
			}
			k, err := LoadOrCreateKeys(dir, noon)
			if err != nil {
				k = mustKeys(t, dir, noon)
			}
			first, seen := k, k
			for step := 1; ; step++ {
				at := noon.Add(time.Duration(step) * time.Minute)
				next, err := advance(k, dir, at)
				if err != nil && !errors.Is(err, errKilled) {
					t.Fatalf("change %d: %v", fatal, err)
				}
				if err != nil && next != k {
					t.Errorf("change %d: %v after the error %v, want %v", fatal, next, err, k)
				}
				if err != nil && restarts {
					if read, err := LoadKeys(dir); err != nil || read.Current != seen.Current && read.Current != seen.Next {
						t.Errorf("change %d: looking at it: %v, %v", fatal, read, err)
					}
					next = mustKeys(t, dir, at)
				}
				// What the kernel has on its interfaces is what can be revealed.
				wanted := []wgtypes.Key{next.Spare(), next.Current}
				if err != nil && !restarts {
					wanted = wanted[:1] // Switch goes on from there
				}
				for _, public := range wanted {
					if private, err := Revealer(dir)(public); public != (wgtypes.Key{}) && (err != nil || private.PublicKey() != public) {
						t.Errorf("change %d: %v", fatal, err)
					}
				}
				k, seen = next, next
				if k.Stage == mesh.Resting && k.Current != first.Current {
					break
				}
				if step > 10 {
					t.Fatalf("change %d: no end, at %v", fatal, k)
				}
			}
			want := Keys{Current: first.Next, Next: k.Next, Since: k.Since, Answered: k.Answered}
			if diff := cmp.Diff(want, k); diff != "" || k.Next == (wgtypes.Key{}) || !k.Since.After(first.Since) || !k.Answered.After(noon) {
				t.Errorf("change %d: %v %s", fatal, k, diff)
			}
			if diff := cmp.Diff([]string{"next.key", "private.key", "rotation.json"}, sortedNames(files(t, dir))); diff != "" {
				t.Errorf("change %d: %s", fatal, diff)
			}
			if !killed {
				if fatal < 9 {
					t.Errorf("there are only %d changes to a rotation", fatal)
				}
				break
			}
		}
	}
}

// TestOutOfTurn: a step that is not the next one changes nothing.
func TestOutOfTurn(t *testing.T) {
	dir := t.TempDir()
	k := mustKeys(t, dir, noon)
	for range 3 {
		before := files(t, dir)
		for stage, step := range map[mesh.Stage]func() (Keys, error){
			mesh.Resting: func() (Keys, error) { return k.Begin(dir, noon) },
			mesh.Out:     func() (Keys, error) { return k.Switch(dir, noon) },
			mesh.Back:    func() (Keys, error) { return k.End(dir, noon) },
		} {
			if stage == k.Stage {
				continue
			}
			if got, err := step(); err == nil || got != k {
				t.Errorf("stage %q: the step of %q was taken: %v, %v", k.Stage, stage, got, err)
			}
		}
		if diff := cmp.Diff(before, files(t, dir)); diff != "" {
			t.Errorf("stage %q: %s", k.Stage, diff)
		}
		var err error
		if k, err = advance(k, dir, noon); err != nil {
			t.Fatal(err)
		}
	}
	// Somebody has put other keys there.
	out, err := k.Begin(dir, noon)
	if err != nil {
		t.Fatal(err)
	}
	other := mustKeys(t, t.TempDir(), noon)
	stale := out
	stale.Next = other.Next
	if got, err := stale.Switch(dir, noon); err == nil || got != stale || !strings.Contains(err.Error(), "restart `wgcnid run`") {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := LoadKeys(dir); err != nil || got != out {
		t.Errorf("%v, %v", got, err)
	}
}

func TestDamagedKeys(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps int // 0: at rest, 1: Out, 2: Back
		spoil func(dir string) error
		mend  string // in the error; empty: it is mended, and with what
		want  func(before, after Keys) bool
	}{
		{"next key cut", 0, cut(NextPath), "", newNext},
		{"next key gone", 0, gone(NextPath), "", newNext},
		{"next key open to others", 0, open(NextPath), "", newNext},
		{"next key cut while it is moved to", 1, cut(NextPath), "rotation.json to give the rotation up", nil},
		{"next key gone while it is moved to", 1, gone(NextPath), "rotation.json to give the rotation up", nil},
		{"another next key", 1, func(dir string) error { return createKey(dir, NextPath(dir)) }, "rotation.json to give the rotation up", nil},
		{"next key while there is none", 2, func(dir string) error { return createKey(dir, NextPath(dir)) }, "", same},
		{"state cut", 0, cut(rotationPath), "rotation.json is damaged", nil},
		{"state cut while moving", 1, cut(rotationPath), "delete it", nil},
		{"state open to others", 0, open(rotationPath), "chmod 600", nil},
		{"no such stage", 0, put(`{"since":"2026-03-01T12:00:00Z","stage":"up"}`), `no such stage: "up"`, nil},
		{"stage without a key", 0, put(`{"since":"2026-03-01T12:00:00Z","stage":"out","next":"x"}`), "delete it", nil},
		{"no time", 0, put(`{}`), "no time since when", nil},
		{"of a newer version", 0, put(`{"since":"2026-03-01T12:00:00Z","later":true}`), "", same},
		{"state gone while moving", 1, gone(rotationPath), "", func(before, after Keys) bool {
			return after.Stage == mesh.Resting && after.Current == before.Current && after.Next == before.Next
		}},
		{"state gone while moving back", 2, gone(rotationPath), "", func(before, after Keys) bool {
			return after.Stage == mesh.Resting && after.Current == before.Current && after.Next != (wgtypes.Key{})
		}},
		{"key gone while moving", 1, gone(Path), "", func(before, after Keys) bool {
			return after.Stage == mesh.Resting && after.Current != before.Current && after.Next == before.Next && after.Since.After(before.Since)
		}},
		{"key cut", 0, cut(Path), "private.key", nil},
	} {
		dir := t.TempDir()
		before := mustKeys(t, dir, noon)
		for range tt.steps {
			var err error
			if before, err = advance(before, dir, noon); err != nil {
				t.Fatal(err)
			}
		}
		if err := tt.spoil(dir); err != nil {
			t.Fatal(err)
		}
		broken := files0(t, dir)
		_, lookErr := LoadKeys(dir)
		if diff := cmp.Diff(broken, files0(t, dir)); diff != "" {
			t.Errorf("%s: looking has changed it: %s", tt.name, diff)
		}
		after, err := LoadOrCreateKeys(dir, noon.Add(time.Hour))
		if tt.mend == "" {
			if err != nil || !tt.want(before, after) || lookErr != nil && !errors.Is(lookErr, ErrNoKey) {
				t.Errorf("%s: %v, %v (looking: %v), before %v", tt.name, after, err, lookErr, before)
			}
			if again, err := LoadKeys(dir); err != nil || again != after {
				t.Errorf("%s: read again: %v, %v, want %v", tt.name, again, err, after)
			}
			continue
		}
		for _, err := range []error{err, lookErr} {
			if err == nil || !strings.Contains(err.Error(), tt.mend) || !strings.Contains(err.Error(), dir) {
				t.Errorf("%s: error %v, want %q", tt.name, err, tt.mend)
			}
		}
		if diff := cmp.Diff(broken, files0(t, dir)); diff != "" {
			t.Errorf("%s: it was changed all the same: %s", tt.name, diff)
		}
	}
}

// files0 is files, whatever their modes.
func files0(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, path := range []string{Path(dir), NextPath(dir), rotationPath(dir)} {
		if text, err := os.ReadFile(path); err == nil {
			out[path] = string(text)
		}
	}
	return out
}

func cut(path func(string) string) func(string) error {
	return func(dir string) error { return os.Truncate(path(dir), 9) }
}

func gone(path func(string) string) func(string) error {
	return func(dir string) error { return os.Remove(path(dir)) }
}

func open(path func(string) string) func(string) error {
	return func(dir string) error { return os.Chmod(path(dir), 0o644) }
}

func put(text string) func(string) error {
	return func(dir string) error { return os.WriteFile(rotationPath(dir), []byte(text), 0o600) }
}

func newNext(before, after Keys) bool {
	return after.Current == before.Current && after.Next != before.Next && after.Next != (wgtypes.Key{}) && after.Stage == before.Stage && after.Since.Equal(before.Since)
}

func same(before, after Keys) bool { return before == after }

// TestKeyOfAnOlderVersion: the key's file tells how old it is.
func TestKeyOfAnOlderVersion(t *testing.T) {
	dir := write(t, wgGenkey+"\n", 0o600)
	if err := os.Chtimes(Path(dir), noon, noon); err != nil {
		t.Fatal(err)
	}
	old, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if k, err := LoadKeys(dir); err != nil || k != (Keys{Current: old.Public(), Since: noon}) {
		t.Errorf("%v, %v", k, err)
	}
	k := mustKeys(t, dir, noon.AddDate(1, 0, 0))
	if k != (Keys{Current: old.Public(), Since: noon, Next: k.Next}) || k.Next == (wgtypes.Key{}) {
		t.Errorf("%v", k)
	}
	// A clock that was wrong then makes no key of the future.
	dir = write(t, wgGenkey+"\n", 0o600)
	if err := os.Chtimes(Path(dir), noon.AddDate(9, 0, 0), noon.AddDate(9, 0, 0)); err != nil {
		t.Fatal(err)
	}
	if k := mustKeys(t, dir, noon); !k.Since.Equal(noon) {
		t.Errorf("since %v", k.Since)
	}
}

// TestKeysHidden: no way of printing the keys, or an error about them, shows a
// private one.
func TestKeysHidden(t *testing.T) {
	dir := t.TempDir()
	k := mustKeys(t, dir, noon)
	_, err := Revealer(dir)(wgtypes.Key{1})
	if err == nil || !strings.Contains(err.Error(), "rotated") {
		t.Fatalf("another's key: %v", err)
	}
	for _, path := range []string{Path(dir), NextPath(dir)} {
		private, loadErr := LoadPrivateKey(path)
		if loadErr != nil {
			t.Fatal(loadErr)
		}
		raw := private.Reveal()
		checkHidden(t, raw[:], nil, k, &k, []Keys{k}, err)
	}
	if text := fmt.Sprint(k); !strings.Contains(text, k.Current.String()) || !strings.Contains(text, k.Next.String()) {
		t.Errorf("%s lacks a public key", text)
	}
}

func TestRevealer(t *testing.T) {
	if _, err := Revealer(t.TempDir())(wgtypes.Key{1}); !errors.Is(err, ErrNoKey) {
		t.Errorf("no key: %v", err)
	}
	dir := t.TempDir()
	k := mustKeys(t, dir, noon)
	if err := os.Truncate(NextPath(dir), 9); err != nil {
		t.Fatal(err)
	}
	if got, err := Revealer(dir)(k.Current); err != nil || got.PublicKey() != k.Current {
		t.Errorf("the next key does not matter: %v", err)
	}
	if _, err := Revealer(dir)(k.Next); err == nil || !strings.Contains(err.Error(), NextPath(dir)) {
		t.Errorf("next key damaged: %v", err)
	}
}

// takeOrder is what CarryOutOrder hands over.
func takeOrder(dir string) (order Order, ordered bool, err error) {
	err = CarryOutOrder(dir, func(o Order) error {
		order, ordered = o, true
		return nil
	})
	return order, ordered, err
}

func TestOrder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "lib", "wgcni")
	if o, ok, err := takeOrder(dir); ok || err != nil || o != (Order{}) {
		t.Errorf("no order: %v %v %v", o, ok, err)
	}
	want := Order{At: noon, Cluster: true}
	if err := WriteOrder(dir, want); err != nil {
		t.Fatal(err)
	}
	files(t, dir) // looks at the mode
	if o, ok, err := takeOrder(dir); !ok || err != nil || o != want {
		t.Errorf("%v %v %v", o, ok, err)
	}
	if o, ok, err := takeOrder(dir); ok || err != nil {
		t.Errorf("taken twice: %v %v %v", o, ok, err)
	}
	for i, o := range []Order{{At: noon, Cluster: true}, {At: noon.Add(time.Minute), Force: true}, {At: noon.Add(time.Hour + time.Nanosecond)}} {
		if err := WriteOrder(dir, o); err != nil {
			t.Fatal(i, err)
		}
	}
	if o, ok, err := takeOrder(dir); !ok || err != nil || o != (Order{noon.Add(time.Hour), true, true}) {
		t.Errorf("three orders: %v %v %v", o, ok, err)
	}
	for _, text := range []string{"", "{", "[]", "{}", `{"at":1}`, strings.Repeat(" ", 1<<20)} {
		if err := os.WriteFile(OrderPath(dir), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if o, ok, err := takeOrder(dir); ok || err == nil || !strings.Contains(err.Error(), OrderPath(dir)) {
			t.Errorf("%.9q: %v %v %v", text, o, ok, err)
		}
		if _, ok, err := takeOrder(dir); ok || err != nil {
			t.Errorf("%.9q: is still there: %v", text, err)
		}
		if err := WriteOrder(dir, want); err != nil {
			t.Error(err)
		}
	}
}

// Whoever reads the keys while the helper rotates them sees a state that there was.
func TestKeysReadWhileTheyChange(t *testing.T) {
	type state struct {
		current, next wgtypes.Key
		stage         mesh.Stage
	}
	dir, now := t.TempDir(), time.Now()
	keys, err := LoadOrCreateKeys(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	were := map[state]bool{}
	done := make(chan error, 1)
	note := func(k Keys) { were[state{k.Current, k.Next, k.Stage}] = true }
	note(keys)
	go func() {
		var err error
		for i := 0; err == nil && i < 100; i++ {
			for _, step := range []func(Keys, string, time.Time) (Keys, error){Keys.Begin, Keys.Switch, Keys.End} {
				if err == nil {
					keys, err = step(keys, dir, now)
					note(keys)
				}
			}
			were[state{current: keys.Current}] = true // End, before it has made the next key
		}
		done <- err
	}()
	seen := map[state]bool{}
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
			k, err := LoadKeys(dir)
			if err != nil {
				t.Error(err)
			}
			seen[state{k.Current, k.Next, k.Stage}] = true
		}
	}
	for s := range seen {
		if !were[s] {
			t.Errorf("read %+v, which never was", s)
		}
	}
	if len(seen) < 10 {
		t.Errorf("%d states seen of %d: this proves nothing", len(seen), len(were))
	}
}
