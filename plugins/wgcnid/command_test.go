package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

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

func TestHelp(t *testing.T) {
	text, err := execute("--help")
	if err != nil {
		t.Fatal(err)
	}
	for _, cmd := range rootCommand().Commands() {
		if cmd.Hidden {
			if strings.Contains(text, cmd.Short) {
				t.Errorf("the hidden command %s is shown", cmd.Name())
			}
			continue
		}
		if !strings.Contains(text, cmd.Name()) || !strings.Contains(text, cmd.Short) {
			t.Errorf("%s is not mentioned", cmd.Name())
		}
		help, err := execute(cmd.Name(), "--help")
		if err != nil {
			t.Errorf("%s: %v", cmd.Name(), err)
		}
		if example := "Examples:\n  wgcnid " + cmd.Name(); cmd.Name() != "version" && !strings.Contains(help, example) {
			t.Errorf("the help of %s has no example:\n%s", cmd.Name(), help)
		}
	}
	for _, flag := range []string{"--config", "--cni-dir", config.DefaultDir} {
		if !strings.Contains(text, flag) {
			t.Errorf("%s is not mentioned", flag)
		}
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
		{"run --log xml", []string{"--log", `"xml"`, "text", "json"}},
		// The folder that was looked into, and how to mend it.
		{"run --cni-dir " + empty, []string{empty, "wgcni", "--config"}},
		{"sync --cni-dir " + empty, []string{empty, "wgcni", "--config"}},
		{"run --config " + empty + "/missing.conflist", []string{empty + "/missing.conflist", "no such file"}},
		{"status --config " + typo, []string{typo, "clusterCIDR", "clusterCIDRs"}},
		{"leave --config " + typo, []string{typo, "clusterCIDR", "clusterCIDRs"}},
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

func TestPermission(t *testing.T) {
	_, err := asRoot(config.Config{}, &os.PathError{Op: "open", Path: "/etc/cni/net.d", Err: os.ErrPermission})
	if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "run it as root") {
		t.Errorf("error %v", err)
	}
}

func TestLogFormats(t *testing.T) {
	for format, want := range map[string]string{"text": `msg=starting node=a`, "json": `"msg":"starting","node":"a"`} {
		var b bytes.Buffer
		log, err := newLogger(&b, format)
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
