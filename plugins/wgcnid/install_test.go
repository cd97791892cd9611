package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/install"
)

// testInstall is a node's folders, and the flags that name them.
type testInstall struct {
	t     *testing.T
	dir   string
	flags []string
}

func newInstall(t *testing.T) testInstall {
	dir := t.TempDir()
	i := testInstall{t: t, dir: dir}
	i.flags = []string{"--cni-dir", i.path("cni"), "--bin-dir", i.path("bin"), "--plugin", i.path("wgcni")}
	i.write("cni/10-pods.conflist", "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"pods\",\n  \"plugins\": [\n    { \"type\": \"ptp\" }\n  ]\n}\n")
	i.write("wgcni", "the plugin")
	i.write("bin/ptp", "the primary")
	i.write("entry.json", i.entry(""))
	return i
}

func (i testInstall) entry(keys string) string {
	return fmt.Sprintf(`{"clusterCIDRs": ["10.244.0.0/16"], "registry": {"type": "file", "path": "/srv/mesh.json"}, "stateDir": %q%s}`, i.path("state"), keys)
}

func (i testInstall) path(name string) string { return filepath.Join(i.dir, name) }

func (i testInstall) write(name, content string) {
	i.t.Helper()
	if err := os.MkdirAll(filepath.Dir(i.path(name)), 0o755); err != nil {
		i.t.Fatal(err)
	}
	if err := os.WriteFile(i.path(name), []byte(content), 0o644); err != nil {
		i.t.Fatal(err)
	}
}

func (i testInstall) run(args ...string) (string, error) {
	return execute(append([]string{"install"}, slices.Concat(i.flags, args)...)...)
}

// What the command prints, and that a later run goes by what was installed.
func TestInstall(t *testing.T) {
	i := newInstall(t)
	dry, err := i.run("--entry", i.path("entry.json"), "--dry-run")
	if err != nil || !strings.Contains(dry, "+++ "+i.path("cni/00-wgcni.conflist")) || !strings.Contains(dry, `+    {"type": "wgcni"`) {
		t.Errorf("%v\n%s", err, dry)
	}
	if _, err := os.Stat(i.path("state")); err == nil {
		t.Error("--dry-run has made a folder")
	}
	for _, step := range []struct {
		args, want string
		prep       func()
	}{
		{"--entry entry.json", "00-wgcni.conflist is a copy of 10-pods.conflist", nil},
		{"--entry entry.json", "Nothing to do", nil},
		{"", "Nothing to do", nil},
		{"--dry-run", "Nothing would be changed", nil},
		{"", "bin/wgcni is replaced by", func() { i.write("wgcni", "newer") }},
		{"--entry entry.json", "00-wgcni.conflist is made anew", func() { i.write("entry.json", i.entry(`, "mtu": 1400`)) }},
		{"", "Nothing to do", nil},
		{"--entry entry.json", "Note: the cluster secret is not there yet", func() { i.write("entry.json", i.entry(`, "clusterSecretFile": "/nowhere/secret"`)) }},
	} {
		if step.prep != nil {
			step.prep()
		}
		out, err := i.run(strings.Fields(strings.ReplaceAll(step.args, "entry.json", i.path("entry.json")))...)
		if err != nil || !strings.Contains(out, step.want) {
			t.Errorf("install %s: %v: %s; want %q", step.args, err, out, step.want)
		}
	}
	dry, err = execute("uninstall", "--cni-dir", i.path("cni"), "--dry-run", "--purge")
	if err != nil || !strings.Contains(dry, "--- "+i.path("cni/00-wgcni.conflist")) || !strings.Contains(dry, i.path("bin/wgcni")+": is deleted") {
		t.Errorf("%v\n%s", err, dry)
	}
	if r, err := install.Load(i.path("state")); err != nil || r.Stage != install.Installed {
		t.Errorf("%+v, %v", r, err)
	}
}

// What a stranger meets: each error says what to do.
func TestInstallErrors(t *testing.T) {
	for _, tt := range []struct {
		name  string
		entry string
		args  string
		want  []string
	}{
		{"no entry", "", "", []string{"--entry FILE", "clusterCIDRs", "registry"}},
		{"no file", "", "--entry nothing.json", []string{"nothing.json", "no such file"}},
		{"not JSON", "{", "--entry entry.json", []string{"entry.json", "not valid JSON"}},
		{"a conflist", `{"name": "n", "plugins": []}`, "--entry entry.json", []string{"whole conflist"}},
		{"a typo", `{"clusterCIDR": []}`, "--entry entry.json", []string{`did you mean "clusterCIDRs"?`}},
		{"a secret in it", `{"clusterSecret": "x"}`, "--entry entry.json", []string{"clusterSecretFile"}},
		{"in place elsewhere", "", "--entry entry.json --in-place", []string{"stateDir", "/var/lib/wgcni"}},
		{"a secret without its place", "", "--entry entry.json --secret entry.json", []string{"clusterSecretFile"}},
		{"no binary", "", "--entry entry.json --plugin nothing", []string{"--plugin", "nothing"}},
		{"no network", "", "--entry entry.json --cni-dir nowhere --wait 1ms", []string{"nowhere", "no network configuration yet", "waited"}},
		{"too much", "", "entry.json", []string{"entry.json"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := newInstall(t)
			if tt.entry != "" {
				i.write("entry.json", tt.entry)
			}
			args := strings.Fields(tt.args)
			for n, arg := range args {
				if strings.HasSuffix(arg, ".json") || strings.HasPrefix(arg, "no") {
					args[n] = i.path(arg)
				}
			}
			_, err := i.run(args...)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v: want %q in it", err, want)
				}
			}
			if _, err := os.Stat(i.path("state")); err == nil {
				t.Error("it has changed something")
			}
		})
	}
}

func TestUninstallWithoutInstall(t *testing.T) {
	i := newInstall(t)
	out, err := execute("uninstall", "--cni-dir", i.path("cni"))
	if err != nil || !strings.HasPrefix(out, "Nothing to do") || !strings.Contains(out, "wgcnid leave") {
		t.Errorf("%v: %s", err, out)
	}
	i.write("cni/10-pods.conflist", `{"name": "pods", "plugins": [{"type": "ptp"}, {"type": "wgcni", `+i.entry("")[1:]+`]}`)
	if out, err := execute("uninstall", "--cni-dir", i.path("cni")); err == nil || !strings.Contains(err.Error(), "wgcnid leave") {
		t.Errorf("%v: %s", err, out)
	}
}

// The unit is one that systemd takes, and starts a command line that there is.
func TestSystemdUnit(t *testing.T) {
	data, err := os.ReadFile("../../conflist/systemd/wgcnid.service")
	if err != nil {
		t.Fatal(err)
	}
	unit := string(data)
	known := map[string]string{
		"Unit":    "Description Documentation After Wants Before StartLimitIntervalSec",
		"Service": "ExecStart Restart RestartSec KillMode NoNewPrivileges LockPersonality MemoryDenyWriteExecute RestrictAddressFamilies RestrictRealtime RestrictSUIDSGID SystemCallArchitectures SystemCallFilter",
		"Install": "WantedBy",
	}
	section := ""
	for line := range strings.Lines(unit) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "["); ok {
			section = strings.TrimSuffix(name, "]")
		} else if key, value, ok := strings.Cut(line, "="); line != "" && line[0] != '#' &&
			(!ok || value == "" || !slices.Contains(strings.Fields(known[section]), key)) {
			t.Errorf("[%s] %q", section, line)
		}
	}
	start := regexp.MustCompile(`(?m)^ExecStart=(\S+) (.+)$`).FindStringSubmatch(unit)
	if start == nil || filepath.Base(start[1]) != "wgcnid" {
		t.Fatalf("ExecStart: %q", start)
	}
	if _, err := execute(append(strings.Fields(start[2]), "--help")...); err != nil {
		t.Errorf("wgcnid %s: %v", start[2], err)
	}
	// Its own parser, where the machine has it.
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		return
	}
	self, err := os.Executable() // the one that the unit names is not installed here
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "wgcnid.service")
	if err := os.WriteFile(path, []byte(strings.Replace(unit, start[1], self, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
}
