package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/identity"
)

const primary = `{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "ptp",
      "ipam": { "type": "host-local", "subnet": "10.244.1.0/24" }
    },
    { "type": "portmap" }
  ]
}
`

// node is a node's files in a folder of its own.
type node struct {
	t    *testing.T
	root string
	Options
	state string
}

func newNode(t *testing.T) *node {
	t.Helper()
	root := t.TempDir()
	n := &node{t: t, root: root, state: filepath.Join(root, "state")}
	n.Options = Options{
		CNIDir: filepath.Join(root, "cni"), BinDir: filepath.Join(root, "opt", "bin"), Plugin: filepath.Join(root, "usr", "wgcni"),
		Entry: n.entry(""), Wait: 50 * time.Millisecond,
	}
	n.write("cni/10-pods.conflist", primary)
	n.write("usr/wgcni", "the plugin")
	n.write("opt/bin/ptp", "the primary")
	return n
}

// entry is an entry with some keys more.
func (n *node) entry(keys string) []byte {
	return fmt.Appendf(nil, `{"type": "wgcni", "clusterCIDRs": ["10.244.0.0/16"], "registry": {"type": "file", "path": "/srv/mesh.json"}, "stateDir": %q%s}`, n.state, keys)
}

func (n *node) path(name string) string { return filepath.Join(n.root, name) }

func (n *node) write(name, content string) {
	n.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(n.path(name)), 0o755), os.WriteFile(n.path(name), []byte(content), 0o644)); err != nil {
		n.t.Fatal(err)
	}
}

// rename writes a file as careful agents do.
func (n *node) rename(name, content string) {
	n.t.Helper()
	n.write(name+".tmp", content)
	n.must(os.Rename(n.path(name+".tmp"), n.path(name)))
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) read(name string) string {
	n.t.Helper()
	data, err := os.ReadFile(n.path(name))
	n.must(err)
	return string(data)
}

func (n *node) install() Plan {
	n.t.Helper()
	p, err := Install(n.t.Context(), n.Options)
	n.must(err)
	return p
}

// files are all files and folders of the node.
func (n *node) files() map[string]string {
	n.t.Helper()
	out := map[string]string{}
	n.must(filepath.WalkDir(n.root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == n.root {
			return err
		}
		name, _ := filepath.Rel(n.root, path)
		info, err := e.Info()
		if err != nil {
			return err
		}
		out[name] = info.Mode().String()
		if e.Type().IsRegular() {
			data, err := os.ReadFile(path)
			out[name] += " " + string(data)
			return err
		}
		return nil
	}))
	return out
}

func (n *node) same(want map[string]string) {
	n.t.Helper()
	if diff := cmp.Diff(want, n.files()); diff != "" {
		n.t.Errorf("files (-want +got):\n%s", diff)
	}
}

// chained checks that the file is what with the entry is.
func (n *node) chained(file, list string) {
	n.t.Helper()
	want, err := Insert([]byte(list), n.Entry)
	n.must(err)
	if diff := cmp.Diff(string(want), n.read(file)); diff != "" {
		n.t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func (n *node) uninstall(purge bool) {
	n.t.Helper()
	m, err := BeginRemoval(n.t.Context(), n.state)
	n.must(err)
	defer m.Close()
	_, err = m.TakeOut(n.t.Context())
	n.must(err)
	_, err = m.Finish(purge)
	n.must(err)
}

const copied = "cni/00-wgcni.conflist"

// A copy sorts first and is the source with the entry; nothing else is touched; a
// second run has nothing to do; and uninstall leaves what was there before.
func TestInstallCopy(t *testing.T) {
	n := newNode(t)
	before := n.files()
	p, err := n.Prepare()
	n.must(err)
	var out bytes.Buffer
	n.must(p.Print(&out))
	for _, want := range []string{"--- " + n.path("cni/10-pods.conflist"), "+++ " + n.path(copied), `-    { "type": "portmap" }`, `+    {"type": "wgcni"`, "opt/bin/wgcni: is placed"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("want %q in\n%s", want, &out)
		}
	}
	n.same(before)

	n.install()
	n.chained(copied, primary)
	if n.read("cni/10-pods.conflist") != primary || n.read("opt/bin/wgcni") != "the plugin" {
		t.Error("the source or the plugin is not what it should be")
	}
	if info, err := os.Stat(n.path("opt/bin/wgcni")); err != nil || info.Mode() != 0o755 {
		t.Errorf("%v %v", info, err)
	}
	if info, err := os.Stat(n.path("state/install.json")); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	installed := n.files()
	if p := n.install(); len(p.Changes) > 0 {
		t.Errorf("a second time: %+v", p.Changes)
	}
	n.same(installed)
	n.uninstall(true)
	n.same(before)
}

func TestInstallInPlace(t *testing.T) {
	n := newNode(t)
	n.InPlace = true
	n.must(os.Chmod(n.path("cni/10-pods.conflist"), 0o640))
	n.must(os.Chown(n.path("cni/10-pods.conflist"), 7, 8))
	before := n.files()
	n.install()
	n.chained("cni/10-pods.conflist", primary)
	var st unix.Stat_t
	n.must(unix.Stat(n.path("cni/10-pods.conflist"), &st))
	if st.Uid != 7 || st.Gid != 8 || st.Mode&0o7777 != 0o640 {
		t.Errorf("owner %d:%d, mode %o", st.Uid, st.Gid, st.Mode)
	}
	if p := n.install(); len(p.Changes) > 0 {
		t.Errorf("a second time: %+v", p.Changes)
	}
	n.Entry = n.entry(`, "mtu": 1400`)
	n.install()
	n.chained("cni/10-pods.conflist", primary)
	n.uninstall(true)
	n.same(before)
}

// Somebody has edited the file since: only the entry goes.
func TestUninstallKeepsEdits(t *testing.T) {
	n := newNode(t)
	n.InPlace = true
	n.install()
	n.write("cni/10-pods.conflist", strings.Replace(n.read("cni/10-pods.conflist"), `{ "type": "portmap" }`, `{ "type": "portmap", "snat": true }`, 1))
	n.uninstall(false)
	if want := strings.Replace(primary, `{ "type": "portmap" }`, `{ "type": "portmap", "snat": true }`, 1); n.read("cni/10-pods.conflist") != want {
		t.Errorf("%s", n.read("cni/10-pods.conflist"))
	}
}

// Other entries, other modes, another binary: the node is then as if it had been
// installed like this in the first place.
func TestInstallAgain(t *testing.T) {
	for _, tt := range []struct {
		name string
		prep func(n *node)
	}{
		{"entry", func(n *node) { n.Entry = n.entry(`, "mtu": 1400`) }},
		{"plugin", func(n *node) { n.write("usr/wgcni", "a newer plugin") }},
		{"in place", func(n *node) { n.InPlace = true }},
		{"from in place", func(n *node) { n.InPlace = true; n.install(); n.InPlace = false }},
		{"source rewritten", func(n *node) { n.write("cni/10-pods.conflist", strings.ReplaceAll(primary, "244.1.0", "244.2.0")) }},
		{"record lost", func(n *node) { n.must(os.RemoveAll(n.state)); n.must(os.Remove(n.path("opt/bin/wgcni"))) }},
		{"copy altered", func(n *node) { n.write(copied, primary) }},
		{"copy cut short", func(n *node) { n.write(copied, primary[:40]) }},
		{"copy deleted", func(n *node) { n.must(os.Remove(n.path(copied))) }},
		{"removal begun", func(n *node) {
			m, err := BeginRemoval(n.t.Context(), n.state)
			n.must(err)
			defer m.Close()
			_, err = m.TakeOut(n.t.Context())
			n.must(err)
		}},
		{"something comes first", func(n *node) {
			n.rename("cni/10-pods.conflist", primary)
			n.must(os.Rename(n.path("cni/10-pods.conflist"), n.path("cni/00-a.conflist")))
		}},
		{"leftovers", func(n *node) {
			n.write("cni/.00-wgcni.conflist.wgcni-aside-123", "half")
			n.write("opt/bin/.wgcni.wgcni-aside-123", "half")
			n.write("state/.install.json.wgcni-aside-1", "half")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			before := n.files()
			n.install()
			tt.prep(n)
			n.install()
			got := n.files()

			m := newNode(t)
			m.Entry, m.InPlace = bytes.ReplaceAll(n.Entry, []byte(n.root), []byte(m.root)), n.InPlace
			m.must(os.RemoveAll(m.path("cni")))
			for name, text := range before {
				if now, ok := got[name]; ok {
					text = now // of the agent, and of the operator
				}
				if _, content, ok := strings.Cut(text, " "); ok && !strings.HasPrefix(name, "cni/") {
					m.write(name, content)
				}
			}
			for name := range got {
				if strings.HasPrefix(name, "cni/") && filepath.Base(name)[0] != '.' && !copies.MatchString(filepath.Base(name)) {
					rest, err := Remove([]byte(n.read(name)))
					m.must(err)
					m.write(name, string(rest))
				}
			}
			m.install()
			want := m.files()
			for name := range want {
				want[name] = strings.ReplaceAll(want[name], m.root, n.root)
			}
			made := regexp.MustCompile(`"made": "[0-9a-f]{64}"`) // of a text with the folder's name in it
			for _, files := range []map[string]string{want, got} {
				files["state/install.json"] = made.ReplaceAllString(files["state/install.json"], `"made": …`)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-afresh +again):\n%s", diff)
			}
		})
	}
}

// What there is to chain to, by the order in which runtimes look.
func TestSources(t *testing.T) {
	second := strings.Replace(primary, `"pods"`, `"second"`, 1)
	single := `{ "cniVersion": "0.3.1", "name": "pods", "type": "ptp" }`
	for _, tt := range []struct {
		name    string
		files   map[string]string
		options func(n *node)
		target  string // the file with the entry
		list    string // of which it is made
		fault   string
	}{
		{"the first", map[string]string{"10-a.conflist": primary, "20-b.conflist": second}, nil, "00-wgcni.conflist", primary, ""},
		{"of a single plugin", map[string]string{"10-a.conf": single}, nil, "00-wgcni.conflist", "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"pods\",\n  \"plugins\": [\n" + single + "\n  ]\n}\n", ""},
		{"json", map[string]string{"10-a.json": single}, nil, "00-wgcni.conflist", "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"pods\",\n  \"plugins\": [\n" + single + "\n  ]\n}\n", ""},
		{"not the loopback", map[string]string{"05-lo.conf": `{"name": "lo", "type": "loopback"}`, "10-a.conflist": primary}, nil, "00-wgcni.conflist", primary, ""},
		{"no other files", map[string]string{"05-a.conflist.bak": second, "06-readme": "x", "10-a.conflist": primary}, nil, "00-wgcni.conflist", primary, ""},
		{"00-a", map[string]string{"00-a.conflist": primary}, nil, "00-00-wgcni.conflist", primary, ""},
		{"00-00-a", map[string]string{"00-00-a.conflist": primary}, nil, "00-00-00-wgcni.conflist", primary, ""},
		{"000", map[string]string{"000.conflist": primary}, nil, "00-wgcni.conflist", primary, ""},
		{"hidden", map[string]string{".a.conflist": primary}, nil, "", "", "rename"},
		{"none", nil, nil, "", "", "no network configuration yet"},
		{"lo alone", map[string]string{"99-loopback.conf": `{"name": "lo", "type": "loopback"}`}, nil, "", "", "no network configuration yet"},
		{"half", map[string]string{"10-a.conflist": primary[:50], "20-b.conflist": second}, nil, "", "", "not valid JSON"},
		{"empty", map[string]string{"10-a.conflist": ""}, nil, "", "", "empty"},
		{"no plugins", map[string]string{"10-a.conflist": `{"name": "n", "plugins": []}`}, nil, "", "", "no primary plugin"},
		{"macvlan", map[string]string{"10-a.conflist": strings.Replace(primary, `"ptp"`, `"macvlan"`, 1)}, nil, "", "", "past the node's routing"},
		{"named", map[string]string{"10-a.conflist": primary, "20-b.conflist": second}, func(n *node) { n.InPlace, n.Conflist = true, n.path("cni/20-b.conflist") }, "20-b.conflist", second, ""},
		{"named, not the first", map[string]string{"10-a.conflist": primary, "20-b.conflist": second}, func(n *node) { n.Conflist = n.path("cni/20-b.conflist") }, "", "", "--in-place"},
		{"named, not there", map[string]string{"10-a.conflist": primary}, func(n *node) { n.Conflist = n.path("cni/20-b.conflist") }, "", "", "not there"},
		{"named, elsewhere", map[string]string{"10-a.conflist": primary}, func(n *node) { n.Conflist = "/tmp/20-b.conflist" }, "", "", "--cni-dir"},
		{"single in place", map[string]string{"10-a.conf": single}, func(n *node) { n.InPlace = true }, "", "", "without --in-place"},
		{"a list as .conf", map[string]string{"10-a.conf": primary}, nil, "", "", ".conflist"},
		{"bad ranges", map[string]string{"10-a.conflist": strings.Replace(primary, "10.244.1.0/24", "here", 1)}, nil, "", "", "host-local subnet"},
		{"bad entry", map[string]string{"10-a.conflist": primary}, func(n *node) { n.Entry = n.entry(`, "mut": 1400`) }, "", "", `did you mean "mtu"?`},
		{"no plugin", map[string]string{"10-a.conflist": primary}, func(n *node) { n.Plugin = n.path("usr/nothing") }, "", "", "--plugin"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.must(os.Remove(n.path("cni/10-pods.conflist")))
			for name, text := range tt.files {
				n.write("cni/"+name, text)
			}
			if tt.options != nil {
				tt.options(n)
			}
			before := n.files()
			_, err := Install(t.Context(), n.Options)
			if tt.fault != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fault) {
					t.Errorf("%v, want %q in it", err, tt.fault)
				}
				n.same(before)
				return
			}
			n.must(err)
			n.chained("cni/"+tt.target, tt.list)
			if f, err := readFolder(n.CNIDir, nil); err != nil || !n.InPlace && f.networks[0].file != tt.target {
				t.Errorf("the runtime takes %s first, %v", f.networks[0].file, err)
			}
			n.uninstall(true)
			n.same(before)
		})
	}
}

// The entry is there already, by hand: only the binary is placed, and uninstall
// deletes it once the entry is out.
func TestInstallByHand(t *testing.T) {
	n := newNode(t)
	list, err := Insert([]byte(primary), n.entry(`, "mtu": 1400`))
	n.must(err)
	n.write("cni/10-pods.conflist", string(list))
	before := n.files()
	p := n.install()
	if len(p.Notes) != 1 || !strings.Contains(p.Notes[0], "already") || !strings.Contains(p.Notes[0], "differs") {
		t.Errorf("%q", p.Notes)
	}
	if n.read("cni/10-pods.conflist") != string(list) {
		t.Error("the conflist was changed")
	}
	if p := n.install(); len(p.Changes) > 0 {
		t.Errorf("a second time: %+v", p.Changes)
	}
	// No pod would start (linkerd2-proxy-init d213597).
	m, err := BeginRemoval(t.Context(), n.state)
	n.must(err)
	if _, err := m.Plan(true); err == nil || !strings.Contains(err.Error(), "take it out") {
		t.Errorf("%v", err)
	}
	if _, err := m.Finish(true); err == nil {
		t.Error("the binary was deleted while an entry names it")
	}
	n.must(m.Close())
	n.write("cni/10-pods.conflist", primary)
	n.uninstall(true)
	before["cni/10-pods.conflist"] = strings.Replace(before["cni/10-pods.conflist"], string(list), primary, 1)
	n.same(before)
}

// What was there before is not deleted, nor what somebody has put there since.
func TestUninstallLeavesOthersFiles(t *testing.T) {
	for _, tt := range []struct {
		name          string
		before, after func(n *node)
		stays         bool
	}{
		{"ours", func(*node) {}, func(*node) {}, false},
		{"found", func(n *node) { n.write("opt/bin/wgcni", "the plugin") }, func(*node) {}, true},
		{"replaced", func(*node) {}, func(n *node) { n.write("opt/bin/wgcni", "another") }, true},
		{"found, and upgraded", func(n *node) { n.write("opt/bin/wgcni", "the plugin") }, func(n *node) { n.write("usr/wgcni", "newer"); n.install() }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			tt.before(n)
			n.install()
			tt.after(n)
			n.uninstall(true)
			if _, err := os.Stat(n.path("opt/bin/wgcni")); (err == nil) != tt.stays {
				t.Errorf("stays %v: %v", tt.stays, err)
			}
		})
	}
}

// The binary is one that is being executed ("text file busy", cp's way).
func TestBinaryInUse(t *testing.T) {
	n := newNode(t)
	sleep, err := os.ReadFile("/bin/sleep")
	n.must(err)
	n.write("usr/wgcni", string(sleep))
	n.install()
	attr := &os.ProcAttr{}
	p, err := os.StartProcess(n.path("opt/bin/wgcni"), []string{"wgcni", "60"}, attr)
	n.must(err)
	t.Cleanup(func() { _ = p.Kill(); _, _ = p.Wait() })
	for { // until it executes
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.Pid)); err == nil && exe == n.path("opt/bin/wgcni") {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := os.WriteFile(n.path("opt/bin/wgcni"), []byte("x"), 0o755); !errors.Is(err, unix.ETXTBSY) {
		t.Fatalf("it is not busy, this test proves nothing: %v", err)
	}
	n.write("usr/wgcni", "newer")
	n.install()
	if n.read("opt/bin/wgcni") != "newer" {
		t.Error("the binary is the old one")
	}
}

// The runtime may look for plugins elsewhere: then the primary is not there either.
func TestInstallNotesFolder(t *testing.T) {
	n := newNode(t)
	before := n.files()
	n.BinDir = n.path("elsewhere/bin")
	p := n.install()
	if len(p.Notes) != 1 || !strings.Contains(p.Notes[0], `no "ptp"`) || !strings.Contains(p.Notes[0], "--bin-dir") {
		t.Errorf("%q", p.Notes)
	}
	n.uninstall(true)
	n.same(before) // the folders that were made are gone as well
}

// The first try was with the wrong folder: the second moves the binary. So it is
// with the place of the secret.
func TestInstallMoves(t *testing.T) {
	n := newNode(t)
	secret, err := identity.NewSecret(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	n.must(err)
	n.write("mnt/secret", secret.Reveal()+"\n")
	n.must(os.Chmod(n.path("mnt/secret"), 0o600))
	before := n.files()
	n.BinDir, n.Secret = n.path("elsewhere/bin"), n.path("mnt/secret")
	n.Entry = n.entry(fmt.Sprintf(`, "clusterSecretFile": %q`, n.path("etc/old")))
	n.install()
	n.BinDir = n.path("opt/bin")
	n.Entry = n.entry(fmt.Sprintf(`, "clusterSecretFile": %q`, n.path("etc/new")))
	n.install()
	n.chained(copied, primary)
	for name, there := range map[string]bool{"elsewhere/bin/wgcni": false, "opt/bin/wgcni": true, "etc/old": false, "etc/new": true} {
		if _, err := os.Stat(n.path(name)); (err == nil) != there {
			t.Errorf("%s: want it there: %v: %v", name, there, err)
		}
	}
	n.Entry, n.Secret = n.entry(""), ""
	n.install()
	if _, err := os.Stat(n.path("etc/new")); err == nil {
		t.Error("a secret that nobody names is still there")
	}
	n.uninstall(true)
	n.same(before)
}

// Two installations at once, and an uninstall: they take turns.
func TestInstallTakesTurns(t *testing.T) {
	n := newNode(t)
	before := n.files()
	failures := make(chan error, 4)
	for range cap(failures) {
		go func() { _, err := Install(t.Context(), n.Options); failures <- err }()
	}
	for range cap(failures) {
		n.must(<-failures)
	}
	n.chained(copied, primary)
	n.uninstall(true)
	n.same(before)
}
