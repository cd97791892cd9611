package etcd

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/wgcni/wgcni/pkg/registry/etcd/etcdtest"
)

func passwordFile(t *testing.T, password string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "password")
	must(t, os.WriteFile(path, []byte(password), 0o600))
	return path
}

func newCA(t *testing.T) *etcdtest.CA {
	t.Helper()
	ca, err := etcdtest.NewCA(t.TempDir())
	must(t, err)
	return ca
}

func TestTLS(t *testing.T) {
	t.Parallel()
	ca, stranger := newCA(t), newCA(t)
	server := etcdtest.Start(t, etcdtest.Options{CA: ca, ClientCerts: true})
	cert, key, err := ca.Issue("node-a", "127.0.0.1")
	must(t, err)
	strangeCert, strangeKey, err := stranger.Issue("node-a", "127.0.0.1")
	must(t, err)
	_, err = x509.SystemCertPool() // which takes a while, once
	must(t, err)
	plain := "http" + strings.TrimPrefix(server.Endpoints()[0], "https")
	for _, c := range []struct {
		name string
		cfg  Config
		want string // "" for success
	}{
		{"with all", Config{Endpoints: server.Endpoints(), CAFile: ca.File, CertFile: cert, KeyFile: key}, ""},
		{"no scheme", Config{Endpoints: []string{strings.TrimPrefix(plain, "http://")}, CAFile: ca.File, CertFile: cert, KeyFile: key}, ""},
		{"no certificate", Config{Endpoints: server.Endpoints(), CAFile: ca.File}, "caFile, certFile and keyFile"},
		{"another's certificate", Config{Endpoints: server.Endpoints(), CAFile: ca.File, CertFile: strangeCert, KeyFile: strangeKey}, "caFile, certFile and keyFile"},
		{"another's CA", Config{Endpoints: server.Endpoints(), CAFile: stranger.File, CertFile: cert, KeyFile: key}, "certificate signed by unknown authority; see the endpoints' https, caFile"},
		{"the system's CAs", Config{Endpoints: server.Endpoints(), CertFile: cert, KeyFile: key}, "certificate signed by unknown authority; see the endpoints' https, caFile"},
		{"unencrypted", Config{Endpoints: []string{plain}}, "and whether it wants https"},
		{"another file as CA", Config{Endpoints: server.Endpoints(), CAFile: passwordFile(t, "no PEM")}, "holds no certificate; want some in PEM form"},
		{"key of another", Config{Endpoints: server.Endpoints(), CAFile: ca.File, CertFile: cert, KeyFile: strangeKey}, "private key does not match public key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t, c.cfg, WithTimeout(500*time.Millisecond))
			if c.want == "" {
				s.timeout = 5 * time.Second
				r := watching(t, s)
				put(t, s, "node-a", c.name)
				r.entries("node-a", c.name)
				return
			}
			_, err := s.Entries(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v; want %q", err, c.want)
			}
		})
	}
}

// Whoever renews certificates need not restart the node: files are read again.
func TestTLSFilesRenewed(t *testing.T) {
	t.Parallel()
	ca, stranger := newCA(t), newCA(t)
	server := etcdtest.Start(t, etcdtest.Options{CA: ca, ClientCerts: true})
	dir := t.TempDir()
	cfg := Config{
		Endpoints: server.Endpoints(),
		CAFile:    filepath.Join(dir, "ca"), CertFile: filepath.Join(dir, "cert"), KeyFile: filepath.Join(dir, "key"),
	}
	install := func(ca *etcdtest.CA) {
		t.Helper()
		cert, key, err := ca.Issue("node-a", "127.0.0.1")
		must(t, err)
		for from, to := range map[string]string{ca.File: cfg.CAFile, cert: cfg.CertFile, key: cfg.KeyFile} {
			text, err := os.ReadFile(from)
			must(t, err)
			must(t, os.WriteFile(to, text, 0o600))
		}
	}
	install(stranger)
	s := open(t, cfg, WithTimeout(500*time.Millisecond))
	r := watching(t, s)
	r.fails(ErrUnreachable)
	must(t, os.Chmod(cfg.KeyFile, 0o640))
	r.fails(nil, "is open to others (mode 0640): run `chmod 600 "+cfg.KeyFile+"`")
	install(ca)
	must(t, os.Chmod(cfg.KeyFile, 0o600))
	r.entries()
}

func TestUsers(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t, etcdtest.Options{})
	must(t, server.AddUser(t.Context(), "writer", "w password", "/wgcni/", true))
	must(t, server.AddUser(t.Context(), "reader", "r password", "/wgcni/", false))
	must(t, server.AddUser(t.Context(), "stranger", "s password", "/elsewhere/", true))
	must(t, server.EnableAuth(t.Context(), "root password"))
	as := func(user, password string) Config {
		return Config{Endpoints: server.Endpoints(), Username: user, PasswordFile: passwordFile(t, password)}
	}

	// A line end is none of the password's.
	writer := open(t, as("writer", "w password\n"))
	r := watching(t, writer)
	put(t, writer, "node-a", "1")
	r.entries("node-a", "1")

	s := open(t, as("reader", "r password"))
	r = watching(t, s)
	r.entries("node-a", "1")
	err := s.Update(t.Context(), "node-a", set("2"))
	says(t, err, "user \"reader\" may not do this: grant it with `etcdctl role grant-permission ROLE readwrite /wgcni/ --prefix`")
	if !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("a reader's update: error %v", err)
	}
	put(t, writer, "node-a", "2")
	r.entries("node-a", "2")

	s = open(t, as("stranger", "s password"))
	watching(t, s).fails(rpctypes.ErrPermissionDenied, `user "stranger"`)

	s = open(t, Config{Endpoints: server.Endpoints()})
	if _, err := s.Entries(t.Context()); !errors.Is(err, rpctypes.ErrUserEmpty) || !strings.Contains(err.Error(), "asks for a user: set username and passwordFile") {
		t.Errorf("without a user: error %v", err)
	}

	cfg := as("writer", "wrong password")
	s = open(t, cfg)
	r = watching(t, s)
	r.fails(rpctypes.ErrAuthFailed, `refuses user "writer": the name is wrong, or the password in `+cfg.PasswordFile)
	if got := r.errors(); strings.Contains(strings.Join(got, ""), "wrong password") {
		t.Errorf("%q shows a password", got)
	}
	must(t, os.WriteFile(cfg.PasswordFile, []byte("w password"), 0o600))
	r.entries("node-a", "2")
}

// A password that is changed while the node runs: the connection lives as long
// as its token, and then the file is read again.
func TestPasswordChanges(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t, etcdtest.Options{})
	must(t, server.AddUser(t.Context(), "writer", "first", "/wgcni/", true))
	must(t, server.EnableAuth(t.Context(), "root password"))
	cfg := Config{Endpoints: server.Endpoints(), Username: "writer", PasswordFile: passwordFile(t, "first")}
	s := open(t, cfg)
	r := watching(t, s)
	put(t, s, "node-a", "1")
	r.entries("node-a", "1")

	// File first, then etcd: nobody notices.
	must(t, os.WriteFile(cfg.PasswordFile, []byte("second"), 0o600))
	must(t, server.SetPassword(t.Context(), "writer", "second"))
	put(t, s, "node-a", "2")
	r.entries("node-a", "2")
	if got := r.errors(); len(got) > 0 {
		t.Errorf("the Watch said %q", got)
	}

	// The other way round it is an outage until the file follows.
	must(t, server.SetPassword(t.Context(), "writer", "third"))
	r.fails(rpctypes.ErrAuthFailed)
	must(t, os.WriteFile(cfg.PasswordFile, []byte("third"), 0o600))
	r.entries("node-a", "2")
	put(t, s, "node-a", "3")
	r.entries("node-a", "3")
}

func TestSecretsLieOpen(t *testing.T) {
	for _, c := range []struct {
		mode os.FileMode
		text string
		want string
	}{
		{0o644, "secret", "%s is open to others (mode 0644): run `chmod 600 %[1]s`"},
		{0o640, "secret", "%s is open to others (mode 0640): run `chmod 600 %[1]s`"},
		{0o604, "secret", "%s is open to others (mode 0604): run `chmod 600 %[1]s`"},
		{0o600, "", "%s is empty; want the password of user me"},
		{0o600, "\n", "%s is empty; want the password of user me"},
	} {
		path := passwordFile(t, c.text)
		must(t, os.Chmod(path, c.mode))
		cfg := sharedConfig(t)
		cfg.Username, cfg.PasswordFile = "me", path
		s := open(t, cfg)
		_, err := s.Entries(t.Context())
		if want := fmt.Sprintf("passwordFile: "+c.want, path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("mode %o: error %v, want %q", c.mode, err, want)
		}
		must(t, os.WriteFile(path, []byte("mended"), 0o600)) // no authentication there: any user will do
		must(t, os.Chmod(path, 0o400))
		if _, err := s.Entries(t.Context()); err != nil {
			t.Errorf("after mending: %v", err)
		}
	}
}
