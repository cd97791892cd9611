package e2e

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"html"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/registry/etcd/etcdtest"
	"github.com/wgcni/wgcni/test/cluster"
)

const (
	privateKeyFile = "/var/lib/wgcni/private.key"
	passwordFile   = "/etc/wgcni/password"
	clientKeyFile  = "/etc/wgcni/client-key.pem"
)

// A keeper is a mesh with secrets of every kind, and all that it has told anybody.
type keeper struct {
	*cluster.Cluster
	etcd     *cluster.Etcd
	data     string // etcd's folder
	options  cluster.NetworkOptions
	password string
	helpers  map[string]*cluster.Process // the one that runs, by node
	logs     map[string]*cluster.Log     // of every helper that ever ran
	told     haystack
	needles  map[string]needle
	publics  []wgtypes.Key // of every private key that there was
}

// newKeeper is a cluster for a sealed mesh, on an etcd that asks for a certificate
// and for a password. No helper runs yet.
func newKeeper(t *testing.T, nodes int) *keeper {
	t.Helper()
	k := &keeper{
		Cluster: cluster.NewT(t, nodes), password: "pass word/" + rand.Text(),
		helpers: map[string]*cluster.Process{}, logs: map[string]*cluster.Log{}, told: haystack{}, needles: map[string]needle{},
	}
	ca, err := etcdtest.NewCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	serverCert, serverKey := issue(t, ca, "etcd", cluster.Gateway4.String())
	cert, key := issue(t, ca, "node", "127.0.0.1")
	k.etcd = startEtcd(t, k.Cluster, cluster.EtcdOptions{CAFile: ca.File, CertFile: serverCert, KeyFile: serverKey})
	if err := errors.Join(k.etcd.AddUser(t.Context(), "mesh", k.password), k.etcd.Grant(t.Context(), "mesh", "readwrite", etcdPrefix), k.etcd.EnableAuth(t.Context())); err != nil {
		t.Fatal(err)
	}
	servers, err := k.Underlay.FindProcesses("--data-dir")
	if err != nil || len(servers) == 0 {
		t.Fatalf("etcd's processes: %v, %v", servers, err)
	}
	k.data = servers[0].Args[slices.Index(servers[0].Args, "--data-dir")+1]
	pemText, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range k.Nodes {
		if err := errors.Join(n.WriteFile(passwordFile, k.password+"\n", 0o600), n.WriteFile(clientKeyFile, string(pemText), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	older := newSecret(t)
	k.options = cluster.NetworkOptions{
		Secrets: []string{older, newerSecret(t, older)},
		Stanza: map[string]any{"registry": k.etcd.Registry(map[string]any{
			"caFile": ca.File, "certFile": cert, "keyFile": clientKeyFile, "username": "mesh", "passwordFile": passwordFile,
		})},
	}
	k.keep("etcd's password", []byte(k.password), passwordFile)
	block, _ := pem.Decode(pemText)
	k.keep("the certificate's key", block.Bytes, clientKeyFile)
	for line := range strings.Lines(string(pemText)) {
		if !strings.HasPrefix(line, "-----") {
			k.keep("a line of the certificate's key: "+line, []byte(strings.TrimSpace(line)), clientKeyFile)
		}
	}
	for i, secret := range k.options.Secrets {
		parts := strings.SplitN(secret, "_", 3) // the last is base64, which may have one too
		raw, err := base64.RawURLEncoding.DecodeString(parts[2])
		if err != nil {
			t.Fatal(err)
		}
		seal, err := hkdf.Key(sha256.New, raw, []byte(parts[0]+"_"+parts[1]), "wgcni seal", 32)
		if err != nil {
			t.Fatal(err)
		}
		const message = "a record"
		mac := hmac.New(sha256.New, seal)
		mac.Write([]byte(message))
		if want := trusting(t, secret).Secrets.Seal([]byte(message)); !hmac.Equal(mac.Sum(nil), want.MAC[:]) {
			t.Fatal("the seals have another key than the one that is looked for")
		}
		k.keep(fmt.Sprintf("cluster secret %d", i+1), raw, cluster.SecretFile)
		k.keep(fmt.Sprintf("the key of the seals of secret %d", i+1), seal)
	}
	return k
}

// keep adds something that may stand in its homes only.
func (k *keeper) keep(name string, raw []byte, homes ...string) {
	k.needles[name] = needle{name, raw, homes}
}

// keepKeys adds the nodes' present private keys.
func (k *keeper) keepKeys(t *testing.T) {
	t.Helper()
	for _, n := range k.Nodes {
		text, err := n.ReadFile(privateKeyFile)
		if err != nil {
			t.Fatal(err)
		}
		key, err := wgtypes.ParseKey(strings.TrimSpace(text))
		if err != nil {
			t.Fatal(err)
		}
		if public := key.PublicKey(); !slices.Contains(k.publics, public) {
			k.publics = append(k.publics, public)
			k.keep("the private key of "+public.String(), key[:], n.Name+":"+privateKeyFile)
		}
	}
}

// keepPairs adds the preshared keys of all pairs that there were.
func (k *keeper) keepPairs(t *testing.T) {
	t.Helper()
	for i, s := range trusting(t, k.options.Secrets...).Secrets {
		for j, a := range k.publics {
			for _, b := range k.publics[:j] {
				psk := s.PresharedKey(a, b)
				k.keep(fmt.Sprintf("the preshared key of %s and %s by secret %d", a, b, i+1), psk[:])
			}
		}
	}
	keys, err := pairKeys(t, k.Nodes)
	if err != nil {
		t.Fatal(err)
	}
	for pair, psk := range keys {
		raw, err := base64.StdEncoding.DecodeString(psk)
		known := slices.ContainsFunc(slices.Collect(maps.Values(k.needles)), func(n needle) bool { return bytes.Equal(n.raw, raw) })
		if err != nil || !known {
			t.Errorf("the preshared key between %v is none of those that are looked for", pair)
		}
	}
}

// say keeps what was printed.
func (k *keeper) say(what, text string) string {
	k.told[fmt.Sprintf("%s (%d)", what, len(k.told))] = []byte(text)
	return text
}

// command runs one of the helper's commands, which may fail.
func (k *keeper) command(t *testing.T, n *cluster.Node, args ...string) (string, error) {
	t.Helper()
	out, err := n.Wgcnid(t.Context(), args...)
	return k.say(n.Name+": wgcnid "+strings.Join(args, " "), out), err
}

func (k *keeper) must(t *testing.T, n *cluster.Node, args ...string) {
	t.Helper()
	if out, err := k.command(t, n, args...); err != nil {
		t.Fatal(err, out)
	}
}

func (k *keeper) start(t *testing.T, n *cluster.Node, args ...string) *cluster.Process {
	t.Helper()
	p, err := n.Start(bin("wgcnid"), append([]string{"run"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	k.helpers[n.Name], k.logs[fmt.Sprintf("%s: log (%d)", n.Name, len(k.logs))] = p, p.Log
	return p
}

func (k *keeper) end(t *testing.T, n *cluster.Node, sig unix.Signal) {
	t.Helper()
	if err := k.helpers[n.Name].Signal(t.Context(), sig); err != nil {
		t.Fatal(err)
	}
	_ = k.helpers[n.Name].Wait(t.Context()) // of the signal, maybe
}

// look takes in all that is stored, and that processes show.
func (k *keeper) look(t *testing.T, stage string) {
	t.Helper()
	for _, n := range k.Nodes {
		k.told.addFiles(t, n.Machine, stage, "/run", "/var/lib/wgcni", "/var/lib/cni", "/etc/cni", "/etc/wgcni")
		k.told.addProcesses(t, n.Machine, stage)
		for _, path := range []string{"/", "/metrics", "/graph.svg", "/healthz", "/readyz"} {
			if _, text, err := n.Get(t.Context(), path); err == nil { // else the helper does not run
				k.told[fmt.Sprintf("%s, %s: HTTP %s", stage, n.Name, path)] = []byte(html.UnescapeString(text))
			}
		}
	}
	k.told.addFiles(t, k.Underlay, stage, k.data)
	k.told[stage+", etcd: get"] = []byte(rawEtcd{k.etcd}.ctl(t, "get", "", "--prefix"))
}

// failingAdds are stanzas with a secret in the wrong place. The error must not repeat it.
func (k *keeper) failingAdds(t *testing.T, n *cluster.Node) {
	t.Helper()
	misplaced := newSecret(t)
	k.keep("a misplaced secret", []byte(misplaced))
	etcd := func(key string, value any) map[string]any {
		r := maps.Clone(k.options.Stanza["registry"].(map[string]any))
		r[key] = value
		return r
	}
	for i, wrong := range []map[string]any{
		{"clusterSecret": misplaced},
		{"clusterSecretFile": misplaced},
		{"registry": etcd("password", k.password)},
		{"registry": etcd("passwordFile", k.password)},
		{"registry": etcd("keyFile", k.password)},
		{"registry": etcd("endpoints", []string{"https://mesh:" + misplaced + "@192.0.2.1:2379"})},
	} {
		o := k.options
		o.Stanza = maps.Clone(o.Stanza)
		maps.Copy(o.Stanza, wrong)
		text, err := n.Conflist(o)
		if err == nil {
			err = n.WriteConflist("20-bad.conflist", strings.Replace(text, `"name": "pods"`, `"name": "bad"`, 1))
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err = n.AddPod(t.Context(), "bad", fmt.Sprintf("bad%d", i), cluster.PodOptions{}); err == nil {
			t.Fatalf("ADD with %v succeeded", slices.Collect(maps.Keys(wrong)))
		}
		k.say(n.Name+": a failing ADD", err.Error())
		if out, err := k.command(t, n, "status", "--config", "/etc/cni/net.d/20-bad.conflist"); err == nil {
			t.Errorf("status with %v succeeded: %s", slices.Collect(maps.Keys(wrong)), out)
		}
		if err := os.Remove(n.Path("/etc/cni/net.d/20-bad.conflist")); err != nil {
			t.Fatal(err)
		}
	}
}

// spoil puts something else in the place of a secret file, and calls do with it.
func spoil(t *testing.T, n *cluster.Node, file, content string, mode os.FileMode, do func()) {
	t.Helper()
	before, err := n.ReadFile(file)
	if err == nil {
		err = errors.Join(os.WriteFile(n.Path(file), []byte(content), 0o600), os.Chmod(n.Path(file), mode))
	}
	if err != nil {
		t.Fatal(err)
	}
	do()
	if err := errors.Join(os.WriteFile(n.Path(file), []byte(before), 0o600), os.Chmod(n.Path(file), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// faults has every file of secrets spoilt in every way, while commands look at it
// and the helper starts with it.
func (k *keeper) faults(t *testing.T, n *cluster.Node) {
	t.Helper()
	look := func() {
		t.Helper()
		for _, command := range [][]string{{"status"}, {"status", "--json"}, {"nodes"}, {"secret", "list"}, {"sync"}, {"forget", "node-z"}} {
			_, _ = k.command(t, n, command...) // what is said is of interest
		}
		h := k.start(t, n)
		awaitEnd := func() error {
			select {
			case <-h.Done():
				return nil
			default:
			}
			if !strings.Contains(h.Log.String(), "registry cannot be read") {
				return fmt.Errorf("it goes on; log:\n%s", h.Log)
			}
			return nil
		}
		if err := cluster.Poll(t.Context(), "the helper to complain", awaitEnd); err != nil {
			t.Fatal(err)
		}
		_, _ = k.command(t, n, "status")
		_ = h.Signal(t.Context(), unix.SIGTERM) // it may have ended
		_ = h.Wait(t.Context())
		// The plugin's whole plan, as after a boot, needs the key and the secret.
		if err := os.Remove(n.Path("/run/wgcni/attachments.db")); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		p, err := n.AddPod(t.Context(), cluster.NetworkName, "spoilt", cluster.PodOptions{})
		if err != nil {
			k.say(n.Name+": ADD", err.Error())
			return
		}
		k.say(n.Name+": ADD", p.Raw)
		deletePod(t, p)
	}
	for _, file := range []string{privateKeyFile, cluster.SecretFile, passwordFile, clientKeyFile} {
		content, err := n.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		cut := strings.TrimSpace(content)
		cut = cut[:len(cut)-2]
		// Of a key or secret it is enough to guess the rest; of PEM it is all needles.
		if file != clientKeyFile {
			k.keep("a part of "+file, []byte(cut[len(cut)-20:]), file)
		}
		spoil(t, n, file, content, 0o644, look)
		spoil(t, n, file, cut, 0o600, look)
		spoil(t, n, file, cut+"\n"+cut+"\n", 0o600, look)
	}
}
