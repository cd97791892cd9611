package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/version"
)

// execute runs a command line and returns what it prints.
func execute(args ...string) (string, error) {
	var out bytes.Buffer
	root := rootCommand()
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.ExecuteContext(context.Background())
	return out.String(), err
}

// commands calls f with every command that is shown and its full name.
func commands(parent *cobra.Command, f func(name []string, cmd *cobra.Command)) {
	for _, cmd := range parent.Commands() {
		if !cmd.Hidden {
			f(strings.Fields(cmd.CommandPath())[1:], cmd)
			commands(cmd, f)
		}
	}
}

func TestHelp(t *testing.T) {
	text, err := execute("--help")
	if err != nil {
		t.Fatal(err)
	}
	for _, cmd := range rootCommand().Commands() {
		if cmd.Hidden && strings.Contains(text, cmd.Short) {
			t.Errorf("the hidden command %s is shown", cmd.Name())
		}
	}
	var names []string
	commands(rootCommand(), func(name []string, cmd *cobra.Command) {
		path := strings.Join(name, " ")
		names = append(names, path)
		above, err := execute(append(name[:len(name)-1:len(name)-1], "--help")...)
		if err != nil || !strings.Contains(above, cmd.Name()) || !strings.Contains(above, cmd.Short) {
			t.Errorf("%s is not mentioned, or %v", path, err)
		}
		help, err := execute(append(name, "--help")...)
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if example := "  wgcnid " + path; !strings.Contains(help, "Examples:\n") || !strings.Contains(help, example) {
			t.Errorf("the help of %s has no example:\n%s", path, help)
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if strings.Contains(f.Usage, "`") { // cobra takes what is quoted so for the value's name
				t.Errorf("%s --%s: %s", path, f.Name, f.Usage)
			}
		})
		for line := range strings.Lines(cmd.Long) {
			if len(line) > 85 {
				t.Errorf("%s: more than 84 columns: %s", path, line)
			}
		}
	})
	if want := []string{
		"completion", "doctor", "endpoint", "explain", "forget", "graph", "install", "key", "key rotate", "key show", "leave", "nodes", "peer", "peer add", "peer config", "peer list", "peer remove", "run",
		"secret", "secret list", "secret new", "status", "sync", "uninstall", "verify", "version",
	}; !slices.Equal(names, want) {
		t.Errorf("commands %q, want %q", names, want)
	}
	for _, flag := range []string{"--config", "--cni-dir", config.DefaultDir} {
		if !strings.Contains(text, flag) {
			t.Errorf("%s is not mentioned", flag)
		}
	}
}

// A group of commands alone is its help.
func TestGroup(t *testing.T) {
	group, err := execute("secret")
	help, _ := execute("secret", "--help")
	if err != nil || group != help {
		t.Errorf("%s, %v", group, err)
	}
}

func TestVersion(t *testing.T) {
	got, err := execute("version")
	if want := "wgcnid " + version.String() + "\n"; err != nil || got != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

func TestCommandLineErrors(t *testing.T) {
	empty := t.TempDir()
	typo := filepath.Join(t.TempDir(), "10-pods.conflist")
	if err := os.WriteFile(typo, []byte(`{"name": "pods", "plugins": [{"type": "wgcni", "clusterCIDR": ["10.244.0.0/16"]}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		want []string // in the error
	}{
		{"frobnicate", []string{"frobnicate"}},
		{"--frobnicate", []string{"--frobnicate"}},
		{"status --frobnicate", []string{"--frobnicate"}},
		{"status b", []string{"b"}},
		{"secret nwe", []string{`"nwe"`, "wgcnid secret"}},
		{"secret new b", []string{"b"}},
		{"forget", []string{"forget NAME", "wgcnid nodes"}},
		{"run --log xml", []string{"--log", `"xml"`, "text", "json"}},
		{"run --log-level verbose", []string{"--log-level", `"verbose"`, "debug, info, warn, error"}},
		{"run --log-level info+1", []string{"--log-level", `"info+1"`}},
		{"endpoint --log-level all", []string{"--log-level", `"all"`}},
		{"completion tcsh", []string{`"tcsh"`, "wgcnid completion"}},
		{"completion", []string{"bash", "zsh", "fish"}},
		// The folder that was looked into, and how to mend it.
		{"run --cni-dir " + empty, []string{empty, "wgcni", "--config"}},
		{"sync --cni-dir " + empty, []string{empty, "wgcni", "--config"}},
		{"run --config " + empty + "/missing.conflist", []string{empty + "/missing.conflist", "no such file"}},
		{"status --config " + typo, []string{typo, "clusterCIDR", "clusterCIDRs"}},
		{"leave --config " + typo, []string{typo, "clusterCIDR", "clusterCIDRs"}},
		{"nodes --config " + typo, []string{typo, "clusterCIDR", "clusterCIDRs"}},
		{"forget b --config " + typo, []string{typo, "clusterCIDR", "clusterCIDRs"}},
		{"secret list --config " + typo, []string{typo, "clusterCIDR", "clusterCIDRs"}},
	} {
		t.Run(tt.args, func(t *testing.T) {
			out, err := execute(strings.Fields(tt.args)...)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not name %s", err, want)
				}
			}
			if out != "" { // main prints the error, and a usage text would hide it
				t.Errorf("printed\n%s", out)
			}
		})
	}
}

func TestAsRoot(t *testing.T) {
	denied := fmt.Errorf("read the folder: %w", &os.PathError{Op: "open", Path: "/etc/cni/net.d", Err: unix.EACCES})
	for _, tt := range []struct {
		err  error
		euid int
		want string
	}{
		{denied, 1000, denied.Error() + ": run it as root"},
		{denied, 0, denied.Error()}, // a share that is root_squash, for one
		{fs.ErrNotExist, 1000, fs.ErrNotExist.Error()},
	} {
		if got := asRoot(tt.err, tt.euid); got.Error() != tt.want || !errors.Is(got, tt.err) {
			t.Errorf("uid %d: %v, want %s", tt.euid, got, tt.want)
		}
	}
}

// An ordinary user, with the process that main makes of itself.
func TestPermission(t *testing.T) {
	m := newMesh(t, 1)
	for _, tt := range []struct {
		args   []string
		stdout bool
		stderr string
	}{
		{[]string{"nodes", "--config", m.conf}, false, "permission denied: run it as root\n"},
		{[]string{"leave", "--config", m.conf}, false, "permission denied: run it as root\n"},
		{[]string{"status", "--config", "/\x1b[2J\u202e"}, false, `open /\u001b[2J\u202e: no such file or directory` + "\n"},
		{[]string{"secret", "new"}, true, ""},
		{[]string{"version"}, true, ""},
	} {
		t.Run(tt.args[0], func(t *testing.T) {
			if err := os.Chmod(filepath.Dir(m.conf), 0); err != nil {
				t.Fatal(err)
			}
			var stdout, stderr bytes.Buffer
			cmd := as(t.Context(), asHelper, tt.args...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if os.Geteuid() == 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
			err := cmd.Run()
			if (err == nil) != (tt.stderr == "") || !strings.HasSuffix(stderr.String(), tt.stderr) || (stderr.Len() == 0) != (tt.stderr == "") {
				t.Errorf("%v, %q; want %q", err, &stderr, tt.stderr)
			}
			if (stdout.Len() > 0) != tt.stdout {
				t.Errorf("%d bytes are printed", stdout.Len())
			}
		})
	}
}

func TestLogFormats(t *testing.T) {
	for format, want := range map[string]string{"text": `msg=starting node=a`, "json": `"msg":"starting","node":"a"`} {
		var b bytes.Buffer
		log, err := logFlags{format, "info"}.logger(&b)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("starting", slog.String("node", "a"))
		if !strings.Contains(b.String(), want) {
			t.Errorf("%s: %s", format, &b)
		}
	}
}

func TestBoundedFile(t *testing.T) {
	const limit = 1 << 20
	f, err := os.Create(filepath.Join(t.TempDir(), "tunnel.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, line := &boundedFile{f: f}, []byte(strings.Repeat("x", 999)+"\n")
	var most int64
	for i := range 3 * limit / len(line) {
		if n, err := b.Write(line); err != nil || n != len(line) {
			t.Fatalf("write %d: %d bytes, %v", i, n, err)
		}
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, info.Size())
	}
	if _, err := b.Write([]byte("the last line\n")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	if most > limit || most < limit-int64(len(line)) {
		t.Errorf("it grew to %d bytes, want %d at most, and near that", most, limit)
	}
	if !strings.HasPrefix(string(text), "xxx") || !strings.HasSuffix(string(text), "\nthe last line\n") {
		t.Errorf("it begins %q and ends %q", text[:10], text[len(text)-20:])
	}
}
