package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/etcd/etcdtest"
	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/test/cluster"
)

// etcdPrefix is the default of a stanza's registry.
const etcdPrefix = "/wgcni/"

func startEtcd(t *testing.T, c *cluster.Cluster, o cluster.EtcdOptions) *cluster.Etcd {
	t.Helper()
	e, err := c.StartEtcd(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// join is newMesh, with a pod on each node, for a cluster that is there already.
func join(t *testing.T, c *cluster.Cluster, o cluster.NetworkOptions) *mesh {
	t.Helper()
	m := &mesh{Cluster: c}
	t.Cleanup(func() {
		if t.Failed() {
			for i, h := range m.helpers {
				t.Logf("log of the helper started as number %d:\n%s", i+1, h.Log)
			}
		}
	})
	var err error
	if m.helpers, err = c.JoinAll(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		m.pods = append(m.pods, addPod(t, n, cluster.NetworkName, n.Name+"-pod", cluster.PodOptions{}))
	}
	return m
}

func withRegistry(r map[string]any) cluster.NetworkOptions {
	return cluster.NetworkOptions{Stanza: map[string]any{"registry": r}}
}

// etcdRecords are those that etcd holds.
func etcdRecords(ctx context.Context, e *cluster.Etcd) (registry.Snapshot, error) {
	out, err := e.Ctl(ctx, "get", etcdPrefix+"nodes/", "--prefix", "--write-out", "json")
	if err != nil {
		return registry.Snapshot{}, err
	}
	var response struct {
		KVs []struct {
			Key, Value []byte
			Lease      int64
		}
	}
	if err := json.Unmarshal([]byte(out), &response); err != nil {
		return registry.Snapshot{}, fmt.Errorf("etcdctl printed %s: %w", out, err)
	}
	var records []registry.Record
	for _, kv := range response.KVs {
		if kv.Lease != 0 {
			return registry.Snapshot{}, fmt.Errorf("%s has a lease: it would go away with its node's connection", kv.Key)
		}
		r, err := registry.Decode(strings.TrimPrefix(string(kv.Key), etcdPrefix+"nodes/"), kv.Value)
		if err != nil {
			return registry.Snapshot{}, err
		}
		records = append(records, r)
	}
	return registry.NewSnapshot(records...), nil
}

// awaitAgreement waits until every node knows the very records that the registry has.
func awaitAgreement(t *testing.T, c *cluster.Cluster, present func(context.Context) (registry.Snapshot, error)) registry.Snapshot {
	t.Helper()
	var records registry.Snapshot
	err := cluster.Poll(t.Context(), "the records to agree", func() (err error) {
		if records, err = present(t.Context()); err != nil {
			return err
		}
		for _, n := range c.Nodes {
			known, _, err := store.LoadKnown(t.Context(), n.Path("/var/lib/wgcni"))
			if err != nil {
				return err
			}
			if !known.Records.Equal(registry.Snapshot{Nodes: records.Nodes}) {
				return fmt.Errorf("%s knows\n%+v\nand the registry has\n%+v", n, known.Records.Records(), records.Records())
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return records
}

// registryLine is what `wgcnid status` says of the registry.
func registryLine(ctx context.Context, n *cluster.Node) (string, error) {
	out, err := n.Wgcnid(ctx, "status")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(line, "registry "); ok {
			return strings.TrimSpace(rest), nil
		}
	}
	return "", fmt.Errorf("status of %s has no line about the registry:\n%s", n, out)
}

// awaitRegistryLine waits until `wgcnid status` of a node says all of that.
func awaitRegistryLine(t *testing.T, n *cluster.Node, want ...string) string {
	t.Helper()
	var line string
	err := cluster.Poll(t.Context(), fmt.Sprintf("%s to say %q", n, want), func() (err error) {
		if line, err = registryLine(t.Context(), n); err != nil {
			return err
		}
		for _, w := range want {
			if !strings.Contains(line, w) {
				return errors.New(line)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return line
}

func TestEtcd(t *testing.T) {
	for name, members := range map[string]int{"one member": 1, "three members": 3} {
		t.Run(name, func(t *testing.T) {
			c := cluster.NewT(t, 3)
			e := startEtcd(t, c, cluster.EtcdOptions{Members: members})
			m := join(t, c, withRegistry(e.Registry(nil)))
			capture := watchUnderlay(t, c)
			for _, p := range m.pods {
				serve(t, p)
			}
			for _, from := range m.pods {
				for _, to := range m.pods {
					if from != to {
						if err := talk(t.Context(), from, to, []byte("x")); err != nil {
							t.Error(err)
						}
					}
				}
			}
			mustBeClean(t, capture)
			for _, n := range c.Nodes {
				line, err := registryLine(t.Context(), n)
				if want := "etcd:" + strings.Join(e.Endpoints(), ",") + etcdPrefix; err != nil || line != want {
					t.Errorf("status of %s says %q of the registry (%v), want %q", n, line, err, want)
				}
			}
			if got := awaitAgreement(t, c, func(ctx context.Context) (registry.Snapshot, error) { return etcdRecords(ctx, e) }); len(got.Nodes) != 3 {
				t.Errorf("etcd has %d records: %+v", len(got.Nodes), got.Records())
			}
		})
	}
}

// What etcd loses it is given again, and no peer goes away for it (kilo's
// Node.Ready: the API away for a minute emptied the mesh).
func TestEtcdLosesRecords(t *testing.T) {
	c := cluster.NewT(t, 2)
	e := startEtcd(t, c, cluster.EtcdOptions{})
	m := join(t, c, withRegistry(e.Registry(nil)))
	serve(t, m.pods[1])
	s := stream(t, m.pods[0], m.pods[1].IPv4(), streamRate)
	flowing(t, s)
	warm := s.Report().Lost
	ctl := func(args ...string) func() error {
		return func() error {
			_, err := e.Ctl(t.Context(), args...)
			return err
		}
	}
	for _, tt := range []struct {
		name string
		lose func() error
	}{
		{"one record deleted", ctl("del", etcdPrefix+"nodes/node-a")},
		{"all records deleted", ctl("del", etcdPrefix, "--prefix")},
		{"a record that is nonsense", ctl("put", etcdPrefix+"nodes/node-b", "nonsense")},
		{"a record that is empty", ctl("put", etcdPrefix+"nodes/node-b", "")},
		{"replaced by an empty one in a moment", func() error { return errors.Join(e.Kill(), e.Wipe(), e.Start(t.Context())) }},
	} {
		if err := tt.lose(); err != nil {
			t.Fatal(err)
		}
		err := cluster.Poll(t.Context(), "etcd to have all records again: "+tt.name, func() error {
			records, err := etcdRecords(t.Context(), e)
			if err == nil && len(records.Nodes) != len(c.Nodes) {
				err = fmt.Errorf("%d records", len(records.Nodes))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		awaitAgreement(t, c, func(ctx context.Context) (registry.Snapshot, error) { return etcdRecords(ctx, e) })
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Error(err)
	}
	checkPeersKept(t, m.helpers)
	if r := s.Stop(); r.Lost > warm {
		t.Errorf("%s; want no loss after the first handshake, which took %d", r, warm)
	}
}

// A mesh whose nodes must show a certificate, and have a user that may touch
// nothing but the mesh's own keys.
func TestEtcdAsksWhoYouAre(t *testing.T) {
	const password, wrong = "the node's password", "not the node's password"
	c := cluster.NewT(t, 2)
	dir := t.TempDir() // the nodes see it too
	ca, err := etcdtest.NewCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	serverCert, serverKey := issue(t, ca, "etcd", cluster.Gateway4.String())
	cert, key := issue(t, ca, "node", "127.0.0.1")
	e := startEtcd(t, c, cluster.EtcdOptions{CAFile: ca.File, CertFile: serverCert, KeyFile: serverKey})
	if err := errors.Join(e.AddUser(t.Context(), "mesh", password), e.Grant(t.Context(), "mesh", "readwrite", etcdPrefix), e.EnableAuth(t.Context())); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"right": password + "\n", "wrong": wrong + "\n", "secret": newSecret(t) + "\n"}
	for name, text := range files {
		files[name] = filepath.Join(dir, name)
		if err := os.WriteFile(files[name], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	with := func(keys map[string]any) cluster.NetworkOptions {
		r := e.Registry(map[string]any{"caFile": ca.File, "certFile": cert, "keyFile": key, "username": "mesh", "passwordFile": files["right"]})
		for k, v := range keys {
			if r[k] = v; v == nil {
				delete(r, k)
			}
		}
		return cluster.NetworkOptions{Example: "etcd.conflist", Stanza: map[string]any{"registry": r, "clusterSecretFile": files["secret"]}}
	}
	m := join(t, c, with(nil))
	serve(t, m.pods[1])
	if err := talk(t.Context(), m.pods[0], m.pods[1], []byte("x")); err != nil {
		t.Error(err)
	}

	late, err := c.AddNode(t.Context(), "node-c")
	if err != nil {
		t.Fatal(err)
	}
	for i, tt := range []struct {
		name string
		keys map[string]any
		says string
	}{
		{"a wrong password", map[string]any{"passwordFile": files["wrong"]}, `refuses user "mesh": the name is wrong, or the password in ` + files["wrong"]},
		{"no user", map[string]any{"username": nil, "passwordFile": nil}, "the user that " + cert + " names may not do this"},
		{"no certificate", map[string]any{"certFile": nil, "keyFile": nil}, "see the endpoints' https, caFile, certFile and keyFile"},
	} {
		if err := late.Configure(with(tt.keys)); err != nil {
			t.Fatal(err)
		}
		h := startHelper(t, late)
		line := awaitRegistryLine(t, late, ", away since ", tt.says)
		pod := addPod(t, late, cluster.NetworkName, fmt.Sprintf("pod%d", i), cluster.PodOptions{})
		deletePod(t, pod)
		stopHelper(t, h)
		// slog quotes what it prints.
		if said := strings.ReplaceAll(h.Log.String(), `\"`, `"`); !strings.Contains(said, tt.says) {
			t.Errorf("%s: the log does not say %q:\n%s", tt.name, tt.says, said)
		}
		for _, secret := range []string{password, wrong} {
			if strings.Contains(h.Log.String()+line, secret) {
				t.Errorf("%s: log or status has the password %q in it:\n%s\n%s", tt.name, secret, h.Log, line)
			}
		}
	}
	if err := late.Configure(with(nil)); err != nil {
		t.Fatal(err)
	}
	m.helpers = append(m.helpers, startHelper(t, late))
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func issue(t *testing.T, ca *etcdtest.CA, name, address string) (certFile, keyFile string) {
	t.Helper()
	certFile, keyFile, err := ca.Issue(name, address)
	if err != nil {
		t.Fatal(err)
	}
	return certFile, keyFile
}

func TestManyJoinEtcdAtOnce(t *testing.T) {
	c := cluster.NewT(t, 10)
	e := startEtcd(t, c, cluster.EtcdOptions{Members: 3})
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(time.Minute))
	defer cancel()
	if _, err := c.JoinAll(ctx, withRegistry(e.Registry(nil))); err != nil {
		t.Fatal(err)
	}
	awaitAgreement(t, c, func(ctx context.Context) (registry.Snapshot, error) { return etcdRecords(ctx, e) })
}

// Members of etcd end and start while pods outside of the nodes' prefixes come,
// go and move: then every kernel equals its plan, and the records agree.
func TestEtcdMembersKilledAtRandomMoments(t *testing.T) {
	seed, rounds := number(t, "WGCNI_SEED", uint64(time.Now().UnixNano())), number(t, "WGCNI_ETCD_ROUNDS", 60)
	r := rand.New(rand.NewPCG(seed, 3))
	c := cluster.NewT(t, 3)
	e := startEtcd(t, c, cluster.EtcdOptions{Members: 3})
	options := withRegistry(e.Registry(nil))
	m := join(t, c, options)
	serve(t, m.pods[1])
	bystander := stream(t, m.pods[0], m.pods[1].IPv4(), streamRate)
	flowing(t, bystander)
	warm := bystander.Report().Lost

	// The same addresses on two nodes: a pod may move, even before its old node
	// has noticed.
	homes := [][]*sandbox{makeSandboxes(t, c.Nodes[0], options), makeSandboxes(t, c.Nodes[1], options)}
	for range rounds {
		at := r.IntN(len(homes))
		s := homes[at][r.IntN(chaosSandboxes)]
		if err := s.Call(t.Context(), []string{"ADD", "DEL"}[r.IntN(2)]); err != nil {
			t.Fatal(err)
		}
		member := e.Members[r.IntN(len(e.Members))]
		var err error
		if member.Process == nil {
			err = member.Start()
		} else if r.IntN(3) == 0 {
			err = member.Kill()
		}
		if err != nil {
			t.Fatal(err)
		}
		// The stream is the clock: what was begun shall get further than its first request.
		sent(t, bystander, r.IntN(streamRate/5))
	}
	for _, verb := range []string{"DEL", "ADD"} {
		for at, sandboxes := range homes {
			for i, s := range sandboxes {
				if s.live = i%3 == at; s.live == (verb == "ADD") {
					if err := s.Call(t.Context(), verb); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := cluster.Poll(t.Context(), "everybody to know where the pods are", func() error { return placed(t.Context(), c, homes) })
	if err != nil {
		t.Fatal(err)
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitAgreement(t, c, func(ctx context.Context) (registry.Snapshot, error) { return etcdRecords(ctx, e) })
	for _, n := range c.Nodes {
		synced(t, n)
	}
	checkPeersKept(t, m.helpers)
	if r := bystander.Stop(); r.Lost > warm {
		t.Errorf("pods that nobody touched: %s; want no loss after the first handshake, which took %d", r, warm)
	}
}

// sent waits until a stream has sent so many more datagrams.
func sent(t *testing.T, s *cluster.Stream, more int) {
	t.Helper()
	want := s.Report().Sent + more
	err := cluster.Poll(t.Context(), "the stream to send", func() error {
		if r := s.Report(); r.Sent < want {
			return errors.New(r.String())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// placed compares every node's allowed IPs with where the sandboxes live.
func placed(ctx context.Context, c *cluster.Cluster, homes [][]*sandbox) error {
	var errs []error
	for _, n := range c.Nodes {
		status, err := n.Status(ctx)
		if err != nil {
			return err
		}
		for at, sandboxes := range homes {
			home := c.Nodes[at].Name
			for _, p := range status.Peers {
				if p.Name != home {
					continue
				}
				for _, s := range sandboxes {
					for _, addr := range s.Addresses() {
						if got := slices.ContainsFunc(p.AllowedIPs, func(q netip.Prefix) bool { return q.Contains(addr) }); got != s.live {
							errs = append(errs, fmt.Errorf("%s: %s is allowed to %s: %v, want %v", n, addr, home, got, s.live))
						}
					}
				}
			}
		}
	}
	return errors.Join(errs...)
}

// checkPeersKept looks for a peer that was removed by one of the helpers.
func checkPeersKept(t *testing.T, helpers []*cluster.Process) {
	t.Helper()
	for _, h := range helpers {
		for line := range strings.Lines(h.Log.String()) {
			// As mesh.RemovePeer, mesh.RemoveLink and the summary of many ops print.
			if strings.Contains(line, ` remove"`) || strings.Contains(line, "ip link delete") || strings.Contains(line, "RemovePeer") || strings.Contains(line, "RemoveLink") {
				t.Errorf("a peer was removed: %s", line)
			}
		}
	}
}
