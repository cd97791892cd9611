package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
	"github.com/wgcni/wgcni/pkg/store"
)

// testMesh is the mesh of node a, in folders that end with the test.
type testMesh struct {
	t        *testing.T
	trust    registry.Trust
	registry *registry.Registry
	attacker *registry.Registry // can write, and has no secret
	path     string             // of the registry's file
	conf     string             // --config
	config   config.Config
}

// newMesh gives node a that many secrets.
func newMesh(t *testing.T, secrets int, settings ...string) *testMesh {
	t.Helper()
	dir := t.TempDir()
	m := &testMesh{t: t, path: filepath.Join(dir, "shared", "mesh.json"), conf: filepath.Join(dir, "stanza.json")}
	stanza := map[string]any{
		"type": "wgcni", "nodeName": "a", "clusterCIDRs": []string{"10.244.0.0/16", "fd00::/16"}, "podCIDRs": []string{"10.244.1.0/24"},
		"registry": map[string]any{"type": "file", "path": m.path},
		"runDir":   filepath.Join(dir, "run"), "stateDir": filepath.Join(dir, "state"),
	}
	if secrets > 0 {
		m.trust = registrytest.Secrets(t, secrets)
		stanza["clusterSecretFile"] = filepath.Join(dir, "secret")
	}
	for i := 0; i < len(settings); i += 2 {
		stanza[settings[i]] = settings[i+1]
	}
	text, err := json.Marshal(stanza)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(filepath.Dir(m.path), 0o700), os.WriteFile(m.conf, text, 0o600)); err != nil {
		t.Fatal(err)
	}
	m.trust.AcceptUnsealed = stanza["seal"] == "preferred"
	m.registry = registry.New(file.New(m.path), m.trust)
	m.attacker = registry.New(file.New(m.path), registry.Trust{})
	m.writeSecrets()
	if m.config, err = config.Load(m.conf, ""); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *testMesh) secretFile() string { return filepath.Join(filepath.Dir(m.conf), "secret") }

func (m *testMesh) writeSecrets() {
	m.t.Helper()
	var text strings.Builder
	for _, s := range m.trust.Secrets {
		text.WriteString(s.Reveal() + "\n")
	}
	if err := os.WriteFile(m.secretFile(), []byte(text.String()), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// publish puts records into the registry, each with the seal that it needs.
func (m *testMesh) publish(records ...registry.Record) {
	m.t.Helper()
	for _, r := range records {
		registrytest.Publish(m.t, m.registry, registrytest.Seal(m.t, m.trust, r))
	}
}

// forge puts records there as they are, over what there is.
func (m *testMesh) forge(records ...registry.Record) {
	m.t.Helper()
	for _, r := range records {
		if err := m.attacker.Publish(m.t.Context(), r, registry.MaxRevision); err != nil {
			m.t.Fatal(err)
		}
	}
}

// raw puts something there that may be no record.
func (m *testMesh) raw(name, text string) {
	m.t.Helper()
	err := file.New(m.path).Update(m.t.Context(), name, func([]byte) ([]byte, error) { return []byte(text), nil })
	if err != nil {
		m.t.Fatal(err)
	}
}

// cache makes these records what node a knows from before.
func (m *testMesh) cache(records ...registry.Record) {
	m.t.Helper()
	for i := range records {
		records[i] = registrytest.Seal(m.t, m.trust, records[i])
	}
	known := store.Known{Records: registry.NewSnapshot(records...)}
	known.Self, _ = known.Records.Record("a")
	if err := store.SaveKnown(m.t.Context(), m.config.StateDir, store.Known{}, known); err != nil {
		m.t.Fatal(err)
	}
}

// stored is what the registry has under a name, if it may be trusted.
func (m *testMesh) stored(name string) registry.Record {
	m.t.Helper()
	s, err := m.registry.Snapshot(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	r, _ := s.Record(name)
	return r
}

// run runs a command of node a, and fails the test if it tells a secret.
func (m *testMesh) run(args ...string) (stdout, stderr string, err error) {
	m.t.Helper()
	var out, errs bytes.Buffer
	root := rootCommand()
	root.SetOut(&out)
	root.SetErr(&errs)
	root.SetArgs(append(args, "--config", m.conf))
	err = root.ExecuteContext(m.t.Context())
	m.tellsNoSecret(out.String() + errs.String())
	if err != nil {
		m.tellsNoSecret(err.Error())
	}
	return out.String(), errs.String(), err
}

// apart runs the program itself in a network namespace that nobody else is in.
func (m *testMesh) apart(args ...string) (stdout, stderr string) {
	m.t.Helper()
	return m.separate(unix.CLONE_NEWNET, func(ctx context.Context) *exec.Cmd { return as(ctx, asHelper, args...) })
}

// inside runs a script in namespaces of its own, with which all ends that it has
// started. It returns what was printed between the lines "--".
func (m *testMesh) inside(script string) []string {
	m.t.Helper()
	program, err := os.Executable()
	m.must(err)
	out, errs := m.separate(unix.CLONE_NEWNET|unix.CLONE_NEWNS|unix.CLONE_NEWPID, func(ctx context.Context) *exec.Cmd {
		cmd := as(ctx, asHelper)
		cmd.Path = "/bin/sh"
		cmd.Args = []string{"sh", "-euc", "mount --make-rprivate /; mount -t proc proc /proc; mount -t tmpfs run /run\n" + script}
		cmd.Env = append(cmd.Env, "wgcnid="+program, "conf="+m.conf, "secret="+m.secretFile())
		return cmd
	})
	m.t.Log(errs)
	return strings.Split(out, "--\n")
}

func (m *testMesh) separate(namespaces uintptr, command func(context.Context) *exec.Cmd) (stdout, stderr string) {
	m.t.Helper()
	if os.Geteuid() != 0 {
		m.t.Fatal("it makes a network namespace: run it as root")
	}
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := command(ctx)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces}
	if err := cmd.Run(); err != nil {
		m.t.Fatalf("%q: %v\n%s%s", cmd.Args, err, &out, &errs)
	}
	m.tellsNoSecret(out.String() + errs.String())
	return out.String(), errs.String()
}

func (m *testMesh) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *testMesh) tellsNoSecret(text string) {
	m.t.Helper()
	for _, s := range m.trust.Secrets {
		_, key, _ := strings.Cut(strings.TrimPrefix(s.Reveal(), "wgcni1_"), "_")
		if strings.Contains(text, key[:8]) {
			m.t.Errorf("a secret is told: %s", text)
		}
	}
}

// named gives secrets names of the same width that do not change.
func (m *testMesh) named(text string) string {
	for i, s := range m.trust.Secrets {
		text = strings.ReplaceAll(text, string(s.ID()), strings.Repeat(string(rune('1'+i)), 8))
	}
	return text
}

// ahead is a revision that is later than any that the clock gives during the test.
func ahead() uint64 { return registry.NextRevision(0, time.Now().Add(time.Hour)) }

func tombstone(name string, revision uint64) registry.Record {
	return registry.Record{Name: name, Left: true, Revision: revision}
}

// forgotten is the tombstone that revokes a record's key.
func forgotten(r registry.Record, revision uint64) registry.Record {
	return registry.Record{Name: r.Name, PublicKey: r.PublicKey, Left: true, Revision: revision}
}

// equalTo compares a record but for its seal.
func equalTo(t *testing.T, want, got registry.Record) {
	t.Helper()
	want.Seal = got.Seal
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
}

// restless lets a later record slip in each time that somebody wants to change
// one: a helper that still publishes, for instance.
type restless struct {
	registry.Store
	slips []func() error
}

func (s *restless) Update(ctx context.Context, name string, change func([]byte) ([]byte, error)) error {
	if len(s.slips) > 0 {
		slip := s.slips[0]
		s.slips = s.slips[1:]
		if err := slip(); err != nil {
			return err
		}
	}
	return s.Store.Update(ctx, name, change)
}

func TestBuryGoesForward(t *testing.T) {
	at := ahead()
	live := func(revision uint64) registry.Record { return registrytest.Record("b", revision) }
	rekeyed := live(at + 5)
	rekeyed.PublicKey[0]++
	for _, tt := range []struct {
		name   string
		slips  []registry.Record // one before each attempt
		revoke bool
		want   registry.Record
	}{
		{"quiet", nil, false, tombstone("b", at+1)},
		{"it still publishes", []registry.Record{live(at + 1), live(at + 5), live(at + 9)}, false, tombstone("b", at+10)},
		{"it leaves by itself", []registry.Record{tombstone("b", at+3)}, false, tombstone("b", at+3)},
		{"quiet, revoked", nil, true, forgotten(live(0), at+1)},
		{"it still publishes, revoked", []registry.Record{live(at + 1), live(at + 5)}, true, forgotten(live(0), at+6)},
		{"it leaves by itself, revoked", []registry.Record{tombstone("b", at+3)}, true, forgotten(live(0), at+4)},
		{"it has another key, revoked", []registry.Record{rekeyed}, true, forgotten(rekeyed, at+6)},
		{"another forgets it, revoked", []registry.Record{forgotten(live(0), at+3)}, true, forgotten(live(0), at+3)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t, 1)
			other := registrytest.Record("c", 1)
			m.publish(live(at), other)
			v, err := viewMesh(t.Context(), m.config)
			if err != nil {
				t.Fatal(err)
			}
			s := &restless{Store: file.New(m.path)}
			for _, r := range tt.slips {
				s.slips = append(s.slips, func() error {
					return m.registry.Publish(t.Context(), registrytest.Seal(t, m.trust, r), registry.MaxRevision)
				})
			}
			v.registry = registry.New(s, m.trust)
			if err := v.bury(t.Context(), "b", tt.revoke); err != nil {
				t.Fatal(err)
			}
			equalTo(t, tt.want, m.stored("b"))
			equalTo(t, other, m.stored("c"))
		})
	}
}

// Only who has a secret is believed by those who have.
func TestUnheard(t *testing.T) {
	m := newMesh(t, 0)
	b := registrytest.Seal(t, registrytest.Secrets(t, 1), registrytest.Record("b", 1))
	m.forge(b, registrytest.Record("c", 1))
	for name, want := range map[string]string{"b": "", "c": "(1: b)", "a": "(1: b)"} {
		v, err := viewMesh(t.Context(), m.config)
		if err != nil {
			t.Fatal(err)
		}
		if got := v.unheard(name); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q in it", name, got, want)
		}
	}
}

// Records of the disk that are no longer trusted do not count.
func TestViewMeshDistrusts(t *testing.T) {
	m := newMesh(t, 1)
	b := registrytest.Record("b", 1)
	if err := store.SaveKnown(t.Context(), m.config.StateDir, store.Known{}, store.Known{Records: registry.NewSnapshot(b)}); err != nil {
		t.Fatal(err)
	}
	v, err := viewMesh(t.Context(), m.config)
	if err != nil || len(v.records.Nodes) != 0 || v.away != nil {
		t.Errorf("%+v, %v", v, err)
	}
}

// A secret that cannot be read is an error that names the file and the mend.
func TestViewMeshWithoutSecret(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(path string) error
		want   string
	}{
		{"missing", os.Remove, "copy it from another node"},
		{"wide", func(path string) error { return os.Chmod(path, 0o644) }, "chmod 600"},
		{"empty", func(path string) error { return os.Truncate(path, 0) }, "wgcnid secret new"},
		{"torn", func(path string) error { return os.Truncate(path, 30) }, "line 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t, 1)
			if err := tt.change(m.secretFile()); err != nil {
				t.Fatal(err)
			}
			for _, command := range []string{"nodes", "secret list", "forget b"} {
				out, _, err := m.run(strings.Fields(command)...)
				if err == nil || !strings.Contains(err.Error(), m.secretFile()) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%s: %v, want an error about %s that says %s", command, err, m.secretFile(), tt.want)
				}
				if out != "" {
					t.Errorf("%s printed %s", command, out)
				}
			}
		})
	}
}
