package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/identity"
)

// keeperOf is a keeper with a clock and a log of its own.
func keeperOf(n *node) (*keeper, *bytes.Buffer, *time.Time) {
	var log bytes.Buffer
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	k := newKeeper(n.state, n.CNIDir, slog.New(slog.NewTextHandler(&log, nil)))
	k.now, k.beside = func() time.Time { return now }, n.path("usr/wgcni")
	n.t.Cleanup(k.close)
	return k, &log, &now
}

// Whatever is done to an installation: one look mends it, the next finds nothing
// more to do, and each change is a line.
func TestKeep(t *testing.T) {
	inPlace := func(n *node) { n.InPlace = true }
	newer := strings.ReplaceAll(primary, "244.1.0", "244.2.0")
	fewer := strings.Replace(primary, ",\n    { \"type\": \"portmap\" }", "", 1)
	for _, tt := range []struct {
		name    string
		options func(n *node)
		harm    func(n *node)
		target  string // whose content then is
		list    string // with the entry
		lines   int
	}{
		{"nothing", nil, func(*node) {}, copied, primary, 0},
		{"touched", nil, func(n *node) { n.rename("cni/10-pods.conflist", primary) }, copied, primary, 0},
		{"copy deleted", nil, func(n *node) { n.must(os.Remove(n.path(copied))) }, copied, primary, 1},
		{"copy altered", nil, func(n *node) { n.write(copied, primary) }, copied, primary, 1},
		{"copy cut short", nil, func(n *node) { n.write(copied, primary[:30]) }, copied, primary, 1},
		// istio#14327, istio#60882: the primary's agent rewrites its file.
		{"source rewritten", nil, func(n *node) { n.write("cni/10-pods.conflist", newer) }, copied, newer, 1},
		{"source replaced", nil, func(n *node) { n.rename("cni/10-pods.conflist", newer) }, copied, newer, 1},
		{"source half written", nil, func(n *node) { n.write("cni/10-pods.conflist", newer[:40]) }, copied, primary, 0},
		{"source emptied", nil, func(n *node) { n.write("cni/10-pods.conflist", "") }, copied, primary, 0},
		{"source deleted", nil, func(n *node) { n.must(os.Remove(n.path("cni/10-pods.conflist"))) }, copied, primary, 0},
		{"source has no plugin", nil, func(n *node) { n.write("cni/10-pods.conflist", `{"name": "n", "plugins": []}`) }, copied, primary, 0},
		{"another comes behind", nil, func(n *node) { n.write("cni/20-b.conflist", newer) }, copied, primary, 0},
		{"something comes before the copy", nil, func(n *node) { n.write("cni/00-a.conflist", newer) }, "cni/00-00-wgcni.conflist", primary, 2},
		{"and is no network", nil, func(n *node) { n.write("cni/00-a.conflist", "{") }, "cni/00-00-wgcni.conflist", primary, 2},
		{"two copies", nil, func(n *node) { n.write("cni/00-00-wgcni.conflist", n.read(copied)) }, copied, primary, 1},
		{"chained by hand", nil, func(n *node) { n.write("cni/10-pods.conflist", chainedByHand(n)) }, copied, primary, 0},
		// istio-cni and linkerd-cni put their plugin into the first list that there is. To
		// put the copy back each time would be a fight without end.
		{"another plugin in the copy", nil, func(n *node) {
			list := decoded(n, copied)
			list["plugins"] = append(list["plugins"].([]any), map[string]any{"type": "istio-cni"})
			text, err := json.MarshalIndent(list, "", "    ")
			n.must(err)
			n.rename(copied, string(text))
		}, "", "", 0},
		{"and the source loses one", nil, func(n *node) {
			n.write(copied, strings.Replace(n.read(copied), `{ "type": "portmap" }`, `{ "type": "portmap" }, { "type": "istio-cni" }`, 1))
			n.write("cni/10-pods.conflist", fewer)
		}, copied, fewer, 1},
		{"the source loses a plugin", nil, func(n *node) { n.write("cni/10-pods.conflist", fewer) }, copied, fewer, 1},
		{"another plugin in the place of one", nil, func(n *node) {
			n.write(copied, strings.Replace(n.read(copied), `{ "type": "portmap" }`, `{ "type": "istio-cni" }`, 1))
		}, copied, primary, 1},
		{"other keys in the copy", nil, func(n *node) {
			n.write(copied, strings.Replace(n.read(copied), `"name"`, `"disableCheck": true, "name"`, 1))
		}, copied, primary, 1},
		{"two entries in the copy", nil, func(n *node) {
			n.write(copied, strings.Replace(n.read(copied), `{ "type": "portmap" }`, `{ "type": "portmap" }, { "type": "wgcni" }`, 1))
		}, copied, primary, 1},
		{"plugin deleted", nil, func(n *node) { n.must(os.Remove(n.path("opt/bin/wgcni"))) }, copied, primary, 1},
		{"plugin replaced", nil, func(n *node) { n.rename("opt/bin/wgcni", "another") }, copied, primary, 1},
		{"plugin not executable", nil, func(n *node) { n.must(os.Chmod(n.path("opt/bin/wgcni"), 0o600)) }, copied, primary, 1},
		{"entry lost", inPlace, func(n *node) { n.rename("cni/10-pods.conflist", newer) }, "cni/10-pods.conflist", newer, 1},
		{"entry lost, written in place", inPlace, func(n *node) { n.write("cni/10-pods.conflist", newer) }, "cni/10-pods.conflist", newer, 1},
		{"half written, in place", inPlace, func(n *node) { n.write("cni/10-pods.conflist", newer[:40]) }, "", "", 0},
		{"behind ours", inPlace, func(n *node) {
			n.write("cni/10-pods.conflist", strings.Replace(n.read("cni/10-pods.conflist"), "\n  ]", ",\n    {}\n  ]", 1))
		}, "", "", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			if tt.options != nil {
				tt.options(n)
			}
			n.install()
			k, log, _ := keeperOf(n)
			k.look()
			if log.Len() > 0 {
				t.Fatalf("before anything has happened: %s", log)
			}
			tt.harm(n)
			harmed := n.files()
			k.look()
			if lines := strings.Count(log.String(), "\n"); lines != tt.lines {
				t.Errorf("%d lines, want %d: %s", lines, tt.lines, log)
			}
			if tt.target != "" {
				n.chained(tt.target, tt.list)
			}
			if tt.lines == 0 {
				n.same(harmed)
			}
			if n.read("opt/bin/wgcni") != "the plugin" {
				t.Error("the plugin is not what it was")
			}
			if f, err := readFolder(n.CNIDir, nil); err != nil || tt.options == nil && !copies.MatchString(f.networks[0].file) {
				t.Errorf("the runtime takes %s, %v", f.networks[0].file, err)
			}
			mended := n.files()
			log.Reset()
			k.look()
			n.same(mended)
			if log.Len() > 0 {
				t.Errorf("once more: %s", log)
			}
		})
	}
}

func decoded(n *node, file string) (list map[string]any) {
	n.must(json.Unmarshal([]byte(n.read(file)), &list))
	return list
}

func chainedByHand(n *node) string {
	list, err := Insert([]byte(primary), n.Entry)
	n.must(err)
	return string(list)
}

// What does not mend itself is said once, with what to do, and said when it lasts.
func TestKeepWarns(t *testing.T) {
	for _, tt := range []struct {
		name    string
		inPlace bool
		harm    func(n *node)
		want    string
	}{
		{"source gone", false, func(n *node) { n.must(os.Remove(n.path("cni/10-pods.conflist"))) }, "wgcnid uninstall"},
		{"source broken", false, func(n *node) { n.write("cni/10-pods.conflist", "{") }, "not valid JSON"},
		{"both gone", false, func(n *node) { n.must(os.RemoveAll(n.CNIDir)) }, "is gone"},
		{"gone, in place", true, func(n *node) { n.must(os.Remove(n.path("cni/10-pods.conflist"))) }, "is gone"},
		{"plugin", false, func(n *node) { n.rename("opt/bin/wgcni", "x"); n.write("usr/wgcni", "y") }, "install --plugin"},
		{"no plugin", false, func(n *node) { n.must(os.Remove(n.path("opt/bin/wgcni"))); n.must(os.Remove(n.path("usr/wgcni"))) }, "no pod can start"},
		{"record", false, func(n *node) { n.write("state/install.json", "{") }, "run `wgcnid install --entry FILE` again"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.InPlace = tt.inPlace
			n.install()
			k, log, now := keeperOf(n)
			k.look()
			tt.harm(n)
			for range 10 {
				k.look()
				*now = now.Add(time.Second)
			}
			if strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), tt.want) {
				t.Errorf("want one line with %q:\n%s", tt.want, log)
			}
		})
	}
}

// A file that comes to be the first network is followed when it stays, and an agent
// that deletes its own and writes it anew moves nothing.
func TestKeepFollows(t *testing.T) {
	other := strings.ReplaceAll(primary, "244.1.0", "244.2.0")
	for _, tt := range []struct {
		name   string
		keep   bool // the old source
		file   string
		pinned bool
		list   string // followed in the end
	}{
		{"before it", true, "05-a.conflist", false, other},
		{"in its place", false, "20-b.conflist", false, other},
		{"behind it", true, "20-b.conflist", false, primary},
		{"before it, pinned", true, "05-a.conflist", true, primary},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			if tt.pinned {
				n.Conflist = n.path("cni/10-pods.conflist")
			}
			n.install()
			k, log, now := keeperOf(n)
			k.look()
			n.write("cni/"+tt.file, other)
			if !tt.keep {
				n.must(os.Remove(n.path("cni/10-pods.conflist")))
			}
			k.look()
			n.chained(copied, primary)
			*now = now.Add(keepGrace - time.Second)
			k.look()
			n.chained(copied, primary)
			*now = now.Add(time.Second)
			k.look()
			n.chained(copied, tt.list)
			if r, err := Load(n.state); err != nil || (r.Source == tt.file) != (tt.list == other) {
				t.Errorf("the source is %s, %v", r.Source, err)
			}
			if tt.list == primary && log.Len() > 0 {
				t.Errorf("it says %s", log)
			}
		})
	}
	n := newNode(t)
	n.write("cni/87-podman.conflist", other)
	n.install()
	k, log, now := keeperOf(n)
	for range 20 { // delete, and create a second later
		n.must(os.Remove(n.path("cni/10-pods.conflist")))
		k.look()
		n.write("cni/10-pods.conflist", "")
		k.look()
		*now = now.Add(time.Second)
		n.write("cni/10-pods.conflist", primary)
		k.look()
	}
	n.chained(copied, primary)
	if log.Len() > 0 {
		t.Errorf("it says %s", log)
	}
}

// In place, the entry in the file is the configuration: what the operator edits
// there stays, and comes back when the agent rewrites the file.
func TestKeepTakesEdits(t *testing.T) {
	n := newNode(t)
	n.InPlace = true
	n.install()
	k, log, _ := keeperOf(n)
	n.Entry = n.entry(`, "mtu": 1400`)
	n.write("cni/10-pods.conflist", chainedByHand(n))
	k.look()
	if !strings.Contains(log.String(), "kept as it is") {
		t.Errorf("it says %s", log)
	}
	n.rename("cni/10-pods.conflist", primary)
	k.look()
	n.chained("cni/10-pods.conflist", primary)
}

// An agent that had its file open while the entry was put in writes into a file
// that is no more: what it wrote counts.
func TestKeepLateWrite(t *testing.T) {
	n := newNode(t)
	n.InPlace = true
	n.install()
	k, log, now := keeperOf(n)
	n.rename("cni/10-pods.conflist", primary)
	agent, err := os.OpenFile(n.path("cni/10-pods.conflist"), os.O_WRONLY, 0)
	n.must(err)
	defer agent.Close()
	k.look()
	n.chained("cni/10-pods.conflist", primary)
	newer := strings.ReplaceAll(primary, "244.1.0", "244.2.0")
	_, err = agent.WriteString(newer[:100])
	n.must(err)
	k.look()
	_, err = agent.WriteString(newer[100:])
	n.must(err)
	k.look()
	n.chained("cni/10-pods.conflist", newer)
	*now = now.Add(2 * keepGrace)
	k.look()
	if len(k.late) > 0 {
		t.Errorf("files still open: %v", k.late)
	}
	if lines := strings.Count(log.String(), "\n"); lines != 2 {
		t.Errorf("%s", log)
	}
}

// An edit that somebody gets in between of changes nothing.
func TestEditRaced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "10-a.conflist")
	if err := os.WriteFile(path, []byte("theirs"), 0o644); err != nil {
		t.Fatal(err)
	}
	before, _ := os.Stat(path)
	if _, err := edit(path, []byte("what was read"), []byte("ours")); !errors.Is(err, errRaced) {
		t.Errorf("%v", err)
	}
	data, err := os.ReadFile(path)
	after, _ := os.Stat(path)
	if err != nil || string(data) != "theirs" || !os.SameFile(before, after) {
		t.Errorf("%q, %v: not the same file", data, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left over: %v", entries)
	}
	// The way of file systems that cannot exchange two files.
	temp := filepath.Join(dir, "aside")
	for _, old := range []string{"what was read", "theirs"} {
		if err := os.WriteFile(temp, []byte("ours"), 0o644); err != nil {
			t.Fatal(err)
		}
		err := editByRename(path, temp, []byte(old))
		data, rerr := os.ReadFile(path)
		if raced := old != "theirs"; errors.Is(err, errRaced) != raced || (string(data) == "ours") == raced || rerr != nil {
			t.Errorf("%q, %v", data, errors.Join(err, rerr))
		}
	}
}

// The copied secret follows its source, and what is no secret is not copied.
func TestKeepSecret(t *testing.T) {
	n := newNode(t)
	secrets := make([]string, 2)
	for i := range secrets {
		s, err := identity.NewSecret(time.Date(2026, 1, 1+i, 0, 0, 0, 0, time.UTC))
		n.must(err)
		secrets[i] = s.Reveal() + "\n"
	}
	put := func(text string) {
		n.must(os.MkdirAll(n.path("mnt"), 0o755))
		n.must(os.WriteFile(n.path("mnt/new"), []byte(text), 0o400))
		n.must(os.Rename(n.path("mnt/new"), n.path("mnt/secret")))
	}
	put(secrets[0])
	to := n.path("etc/wgcni/secret")
	before := n.files()
	n.Entry = n.entry(fmt.Sprintf(`, "clusterSecretFile": %q`, to))
	n.Secret = n.path("mnt/secret")
	n.install()
	if info, err := os.Stat(filepath.Dir(to)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	k, log, now := keeperOf(n)
	look := func(want string, lines int) {
		t.Helper()
		log.Reset()
		for range 5 {
			k.look()
			*now = now.Add(time.Second)
		}
		info, err := os.Stat(to)
		if err != nil || info.Mode() != 0o600 || n.read("etc/wgcni/secret") != want {
			t.Errorf("%v, %v: not as it should be", info, err)
		}
		if strings.Count(log.String(), "\n") != lines {
			t.Errorf("want %d lines: %s", lines, log)
		}
		for _, s := range secrets {
			if strings.Contains(log.String(), strings.TrimSpace(s)) || strings.Contains(n.read("state/install.json"), strings.TrimSpace(s)) {
				t.Error("the secret is in the log, or in the record")
			}
		}
	}
	look(secrets[0], 0)
	put(secrets[0] + secrets[1])
	look(secrets[0]+secrets[1], 1)
	put("rubbish")
	look(secrets[0]+secrets[1], 1)
	n.must(os.Remove(n.path("mnt/secret")))
	look(secrets[0]+secrets[1], 1)
	put(secrets[1])
	look(secrets[1], 1)
	n.must(os.Remove(to))
	look(secrets[1], 1)
	put(secrets[0])
	n.uninstall(true)
	n.same(before)
}

// The keeper itself, by what tells it: inotify alone, the poll alone where there is
// no inotify or it has died (linkerd2 9215ddf: IN_MOVED_TO; e2eeeb1: the limit).
func TestKeepWatches(t *testing.T) {
	for _, tt := range []struct {
		name string
		open func() (*fsnotify.Watcher, error)
		poll time.Duration
	}{
		{"inotify", fsnotify.NewWatcher, time.Hour},
		{"no inotify", func() (*fsnotify.Watcher, error) { return nil, errors.New("too many open files") }, 10 * time.Millisecond},
		{"dead", func() (*fsnotify.Watcher, error) {
			w, err := fsnotify.NewWatcher()
			if err == nil {
				err = w.Close()
			}
			return w, err
		}, 10 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.install()
			k, _, _ := keeperOf(n)
			k.now, k.poll, k.watch.open = time.Now, tt.poll, tt.open
			k.log = slog.New(slog.DiscardHandler)
			run(t, k)
			for i := range 5 {
				list := strings.ReplaceAll(primary, "244.1.0", fmt.Sprintf("244.%d.0", i+2))
				switch i % 3 {
				case 0:
					n.rename("cni/10-pods.conflist", list)
				case 1:
					n.write("cni/10-pods.conflist", list)
				case 2:
					n.must(os.Remove(n.path("cni/10-pods.conflist")))
					n.write("cni/10-pods.conflist", list)
				}
				n.await(copied, list)
			}
			if tt.poll > time.Minute {
				return
			}
			n.must(os.RemoveAll(n.CNIDir)) // and made anew
			n.write("cni/10-pods.conflist", primary)
			n.await(copied, primary)
		})
	}
}

func run(t *testing.T, k *keeper) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); k.run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

// await waits until the file is list with the entry.
func (n *node) await(file, list string) {
	n.t.Helper()
	want, err := Insert([]byte(list), n.Entry)
	n.must(err)
	var got []byte
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if got, _ = os.ReadFile(n.path(file)); bytes.Equal(got, want) {
			return
		}
	}
	n.t.Fatalf("%s (-want +got):\n%s", file, cmp.Diff(string(want), string(got)))
}

// A keeper that begins before the installation, and goes on through many of them
// and their removals, neither gets in their way nor puts anything back.
func TestKeepAndUninstall(t *testing.T) {
	for _, inPlace := range []bool{false, true} {
		t.Run(fmt.Sprintf("in place %v", inPlace), func(t *testing.T) {
			n := newNode(t)
			n.InPlace = inPlace
			before := n.files()
			k, _, _ := keeperOf(n)
			k.now, k.poll, k.log = time.Now, time.Millisecond, slog.New(slog.DiscardHandler)
			run(t, k)
			for range 20 {
				n.install()
				n.uninstall(true)
				n.same(before)
			}
		})
	}
}

// Agents that write as they like while the keeper is at work: in the end the entry
// is in what they wrote last, and no reader ever saw a copy that is not whole.
func TestKeepAgainstAgents(t *testing.T) {
	write := map[string]func(n *node, list string){
		"in place": func(n *node, list string) { n.write("cni/10-pods.conflist", list) },
		"in pieces": func(n *node, list string) {
			f, err := os.Create(n.path("cni/10-pods.conflist"))
			n.must(err)
			for len(list) > 0 {
				piece := min(len(list), 64)
				_, err := f.WriteString(list[:piece])
				n.must(err)
				list = list[piece:]
				time.Sleep(time.Millisecond)
			}
			n.must(f.Close())
		},
		"by rename": func(n *node, list string) { n.rename("cni/10-pods.conflist", list) },
		"delete and create": func(n *node, list string) {
			if err := os.Remove(n.path("cni/10-pods.conflist")); err != nil {
				n.t.Error(err)
			}
			n.write("cni/10-pods.conflist", list)
		},
	}
	for _, inPlace := range []bool{false, true} {
		for name, write := range write {
			t.Run(fmt.Sprintf("%s, in place %v", name, inPlace), func(t *testing.T) {
				t.Parallel()
				n := newNode(t)
				n.InPlace = inPlace
				n.install()
				target := copied
				if inPlace {
					target = "cni/10-pods.conflist"
				}
				k, _, _ := keeperOf(n)
				k.now, k.poll, k.log = time.Now, 10*time.Millisecond, slog.New(slog.DiscardHandler)
				run(t, k)
				var readers sync.WaitGroup
				stop := make(chan struct{})
				if !inPlace {
					readers.Go(func() {
						for {
							select {
							case <-stop:
								return
							case <-time.After(200 * time.Microsecond):
							}
							if data, err := os.ReadFile(n.path(target)); err != nil || !Chains(data) {
								t.Errorf("the runtime would read %q, %v", data, err)
								return
							}
						}
					})
				}
				var list string
				for i := range 40 {
					list = strings.ReplaceAll(primary, "244.1.0", fmt.Sprintf("244.%d.0", i))
					write(n, list)
					time.Sleep(time.Duration(i%7) * 3 * time.Millisecond)
				}
				n.await(target, list)
				close(stop)
				readers.Wait()
			})
		}
	}
}

// An agent that never stops writing does not keep anybody from installing in place,
// nor from uninstalling; what it wrote last is there, whole.
func TestAgainstAgentsInPlace(t *testing.T) {
	n := newNode(t)
	n.InPlace, n.Wait = true, 0
	n.install()
	stop, done := make(chan struct{}), make(chan string, 1)
	go func() {
		for i := 0; ; i++ {
			list := strings.ReplaceAll(primary, "244.1.0", fmt.Sprintf("244.%d.0", i%200))
			if i%2 == 0 {
				half := len(list) / 2
				n.write("cni/10-pods.conflist", list[:half])
				time.Sleep(time.Millisecond)
			}
			n.write("cni/10-pods.conflist", list)
			select {
			case <-stop:
				done <- list
				return
			case <-time.After(time.Duration(i%5) * 4 * time.Millisecond):
			}
		}
	}()
	for range 15 {
		n.install()
		m, err := BeginRemoval(t.Context(), n.state)
		n.must(err)
		_, err = m.TakeOut(t.Context())
		n.must(err)
		n.must(m.Close())
	}
	close(stop)
	last := <-done
	n.uninstall(true)
	if got := n.read("cni/10-pods.conflist"); got != last {
		t.Errorf("%s", got)
	}
}
