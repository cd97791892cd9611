package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

// An arena is a mesh in which each node has a pod that answers, and that is left
// alone. Around the tunnels ordinary routes lead to all pods.
type arena struct {
	*cluster.Cluster
	t       *testing.T
	c       *campaign
	options cluster.NetworkOptions
	trust   registry.Trust
	etcd    *cluster.Etcd // nil: the registry is the shared file
	helpers []*cluster.Process
	logs    [][]*cluster.Log // of all helpers that each node had
	pods    []*cluster.Pod
	servers []*cluster.Server
	rogues  []*rogue
}

// newArena makes a mesh, sealed or not, on etcd or on a shared file.
func newArena(c *campaign, nodes int, sealed, onEtcd bool) *arena {
	t := c.t
	t.Helper()
	a := &arena{Cluster: cluster.NewT(t, nodes), t: t, c: c, options: cluster.NetworkOptions{Stanza: map[string]any{}}}
	if sealed {
		secret, err := identity.NewSecret(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		a.options.Secrets, a.trust.Secrets = []string{strings.TrimSpace(secret.Reveal())}, identity.Secrets{secret}
	}
	if onEtcd {
		etcd, err := a.StartEtcd(t.Context(), cluster.EtcdOptions{})
		if err != nil {
			t.Fatal(err)
		}
		a.etcd, a.options.Stanza["registry"] = etcd, etcd.Registry(nil)
	}
	var err error
	if a.helpers, err = a.JoinAll(t.Context(), a.options); err != nil {
		t.Fatal(err)
	}
	for _, h := range a.helpers {
		a.logs = append(a.logs, []*cluster.Log{h.Log})
	}
	if err := a.RouteAround(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, n := range a.Nodes {
		// Pods beyond all prefixes lead round in a ring: for nobody it is the right way.
		next := a.Nodes[(i+1)%len(a.Nodes)]
		for _, args := range [][]string{{beyond4.String(), "via", next.IPv4.String()}, {beyond6.String(), "via", next.IPv6.String()}} {
			if _, err := n.Run(t.Context(), "ip", append([]string{"route", "replace"}, args...)...); err != nil {
				t.Fatal(err)
			}
		}
		p, err := n.AddPod(t.Context(), cluster.NetworkName, n.Name+"-pod", cluster.PodOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s, err := cluster.StartServer(p, cluster.EchoPort)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		a.pods, a.servers = append(a.pods, p), append(a.servers, s)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for i, h := range a.helpers {
				t.Logf("the end of the log of %s:\n%s", a.Nodes[i], tail(h.Log.String(), 40))
				a.show(a.Nodes[i])
			}
			a.keepLogs()
		}
	})
	return a
}

// keepLogs leaves what all helpers have said beside the result.
func (a *arena) keepLogs() {
	dir := os.Getenv(ResultsEnv)
	if dir == "" {
		return
	}
	for i, n := range a.Nodes {
		var all strings.Builder
		for _, l := range a.logs[i] {
			all.WriteString(l.String())
		}
		if err := os.WriteFile(filepath.Join(dir, a.c.Campaign+"."+n.Name+".log"), []byte(all.String()), 0o644); err != nil {
			a.t.Error(err)
		}
	}
}

// show prints what a node that runs says of itself, and where its kernel leads packets.
func (a *arena) show(n *cluster.Node) {
	if n.PID() == 0 {
		return
	}
	// The test's own context has ended.
	ctx, cancel := context.WithTimeout(context.Background(), cluster.Patience(20*time.Second))
	defer cancel()
	commands := [][]string{{"status"}}
	if a.knowsRotation(ctx) {
		commands = append(commands, []string{"key", "show"})
	}
	for _, args := range commands {
		out, err := n.Wgcnid(ctx, args...)
		a.t.Logf("%s: wgcnid %v: %v\n%s", n, args, err, out)
	}
	out, err := n.Run(ctx, "sh", "-c", "ip route show table 30567; ip -6 route show table 30567; ps -eo pid,lstart,args | grep '[w]gcnid'")
	a.t.Logf("%s: its routes and processes: %v\n%s", n, err, out)
}

// Where pods are whose addresses each node announces one by one.
var (
	beyond4 = netip.MustParsePrefix("10.244.99.0/24")
	beyond6 = netip.MustParsePrefix("fd00:244:99::/64")
)

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// anyNode is the number of one of the nodes.
func (a *arena) anyNode(r *rand.Rand) int { return r.IntN(len(a.Nodes)) }

// endHelper ends a helper by a signal. It must have run: a helper that has ended by
// itself is a fault. One that was refused since the one before had not let go of the
// lock is to be started again, as init does.
func (a *arena) endHelper(ctx context.Context, i int, sig unix.Signal) error {
	h := a.helpers[i]
	select {
	case <-h.Done():
		if refused(h) {
			return nil
		}
		return fmt.Errorf("the helper of %s has ended by itself: %w\n%s", a.Nodes[i], h.Wait(ctx), tail(h.Log.String(), 20))
	default:
	}
	if err := h.Signal(ctx, sig); err != nil && !refused(h) {
		return err
	}
	_ = h.Wait(ctx) // of the signal, maybe
	return ctx.Err()
}

func refused(h *cluster.Process) bool { return strings.Contains(h.Log.String(), "wgcnid runs already") }

func (a *arena) startHelper(i int) (err error) {
	h, err := a.Nodes[i].StartHelper()
	if err != nil {
		return err
	}
	a.helpers[i], a.logs[i] = h, append(a.logs[i], h.Log)
	go func() {
		<-h.Done()
		if refused(h) {
			a.c.note("init", "start of the helper refused: "+a.Nodes[i].Name, time.Now(), errors.New(a.lockHolders(i)))
		}
	}()
	return nil
}

// lockHolders are the processes of a node that have the helper's lock open.
func (a *arena) lockHolders(i int) string {
	all, err := a.Nodes[i].Processes()
	if err != nil {
		return err.Error()
	}
	var holders []string
	for _, p := range all {
		dir := fmt.Sprintf("/proc/%d/fd/", p.HostPID)
		files, _ := os.ReadDir(dir) // it may be gone
		for _, f := range files {
			if to, _ := os.Readlink(dir + f.Name()); strings.HasSuffix(to, "wgcnid.lock") {
				holders = append(holders, fmt.Sprint(p))
			}
		}
	}
	return fmt.Sprintf("the lock is open in %v", holders)
}

// restartHelper ends a helper, and starts another one a moment later.
func (a *arena) restartHelper(sig unix.Signal, name string) func(context.Context, *rand.Rand) (string, error) {
	return func(ctx context.Context, r *rand.Rand) (string, error) {
		i := a.anyNode(r)
		what := fmt.Sprintf("helpers %s: %s", name, a.Nodes[i])
		if err := a.endHelper(ctx, i, sig); err != nil {
			return what, err
		}
		rest(ctx, r, 400)
		err := a.startHelper(i)
		rest(ctx, r, 600)
		return what, err
	}
}

// loseTunnel kills what there is of a node's tunnels. Nobody may have made the one
// of before again yet.
func (a *arena) loseTunnel(ctx context.Context, i int) (lost bool, err error) {
	killed, err := a.Nodes[i].Kill9(ctx, "wgcnid tunnel ")
	if err != nil || killed > 0 {
		return killed > 0, err
	}
	_, err = a.Nodes[i].Run(ctx, "ip", "link", "delete", cluster.Interface)
	if err != nil && strings.Contains(err.Error(), "Cannot find device") {
		return false, nil
	}
	return err == nil, err
}

// tunnelLost is the tunnel's end while the helper looks on.
func (a *arena) tunnelLost(ctx context.Context, r *rand.Rand) (string, error) {
	i := a.anyNode(r)
	lost, err := a.loseTunnel(ctx, i)
	rest(ctx, r, 1000)
	if err == nil && !lost {
		return "", nil
	}
	return fmt.Sprintf("tunnels killed: %s", a.Nodes[i]), err
}

// bothLost is the tunnel's end while no helper runs.
func (a *arena) bothLost(ctx context.Context, r *rand.Rand) (string, error) {
	i := a.anyNode(r)
	what := fmt.Sprintf("helpers and tunnels killed: %s", a.Nodes[i])
	if err := a.endHelper(ctx, i, unix.SIGKILL); err != nil {
		return what, err
	}
	if _, err := a.loseTunnel(ctx, i); err != nil {
		return what, err
	}
	rest(ctx, r, 1000)
	err := a.startHelper(i)
	rest(ctx, r, 1000)
	return what, err
}

// sync has everything done that there is to do.
func (a *arena) sync(ctx context.Context, r *rand.Rand) (string, error) {
	i := a.anyNode(r)
	_, err := a.Nodes[i].Wgcnid(ctx, "sync")
	what := fmt.Sprintf("syncs: %s", a.Nodes[i])
	if err != nil { // it says how the registry is, too
		return "", nil //nolint:nilerr // an outage of the registry is somebody else's action
	}
	rest(ctx, r, 300)
	return what, nil
}

// knowsRotation says whether the binary can rotate keys.
func (a *arena) knowsRotation(ctx context.Context) bool {
	out, err := a.Nodes[0].Wgcnid(ctx, "key", "--help")
	return err == nil && strings.Contains(out, "rotate")
}

// rotate orders new keys, of one node or of all, with more arguments.
func (a *arena) rotate(ctx context.Context, r *rand.Rand, more ...string) (string, error) {
	n := a.Nodes[a.anyNode(r)]
	args, what := append([]string{"key", "rotate", "--no-wait"}, more...), fmt.Sprintf("rotations ordered: of %s %v", n, more)
	if r.IntN(3) == 0 {
		args, what = append(args, "--cluster"), fmt.Sprintf("rotations ordered: of all, by %s %v", n, more)
	}
	out, err := n.Wgcnid(ctx, args...)
	rest(ctx, r, 4000)
	if err != nil { // one may be under way
		return "rotations refused: " + tail(out, 1), nil
	}
	return what, nil
}

// rotations orders new keys all the time. With force the order may give up nodes that
// lag, and their traffic with them.
func (a *arena) rotations(force int) []action {
	actions := []action{{3, func(ctx context.Context, r *rand.Rand) (string, error) { return a.rotate(ctx, r) }}}
	if force > 0 {
		actions = append(actions, action{force, func(ctx context.Context, r *rand.Rand) (string, error) { return a.rotate(ctx, r, "--force") }})
	}
	return actions
}

// publicKey is the one that belongs to the node's private key.
func publicKey(n *cluster.Node) (wgtypes.Key, error) {
	text, err := n.ReadFile("/var/lib/wgcni/private.key")
	if err != nil {
		return wgtypes.Key{}, err
	}
	key, err := wgtypes.ParseKey(strings.TrimSpace(text))
	return key.PublicKey(), err
}

// keyWitness counts the keys that nodes have had after their first, until the
// returned function is called.
func (a *arena) keyWitness() (changes func() int) {
	ctx, cancel := context.WithCancel(a.t.Context())
	done, n, last := make(chan struct{}), 0, map[string]wgtypes.Key{}
	go func() {
		defer close(done)
		for {
			for _, node := range a.Nodes {
				key, err := publicKey(node)
				if err != nil {
					continue // it is being replaced
				}
				if was, known := last[node.Name]; known && was != key {
					n++
				}
				last[node.Name] = key
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return func() int {
		cancel()
		<-done
		return n
	}
}

// settle ends all that is going on, and waits until every kernel equals its plan and
// all pods that were left alone reach each other: the mesh has lived through it.
func (a *arena) settle() {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), cluster.Patience(90*time.Second))
	defer cancel()
	if err := a.withdrawAll(ctx); err != nil {
		a.t.Fatal(err)
	}
	for i, n := range a.Nodes {
		select {
		case <-a.helpers[i].Done():
			if err := a.startHelper(i); err != nil {
				a.t.Fatal(err)
			}
		default:
		}
		err := cluster.Poll(ctx, n.Name+" to have converged", func() error {
			s, err := n.Status(ctx)
			switch {
			case err != nil:
				return err
			case !s.OK || !s.Helper:
				return fmt.Errorf("helper: %v; %s %v", s.Helper, s.Verdict, s.Pending)
			}
			return nil
		})
		if err != nil {
			a.t.Fatal(err)
		}
	}
	for i, from := range a.pods {
		to := a.pods[(i+1)%len(a.pods)]
		err := cluster.Poll(ctx, fmt.Sprintf("%s to talk to %s", from, to), func() error { return cluster.Talk(ctx, from, to, []byte("x")) })
		if err != nil {
			a.t.Fatal(err)
		}
	}
}

// withdrawAll takes the made-up nodes out of the registry again, which is there.
func (a *arena) withdrawAll(ctx context.Context) error {
	var errs []error
	for _, g := range a.rogues {
		errs = append(errs, a.publish(ctx, g, registry.Record{Name: g.name, Left: true}, true))
	}
	return errors.Join(errs...)
}

// replace puts another text into the place of the registry's file, as a whole.
func (a *arena) replace(text []byte) error {
	aside := a.RegistryFile() + ".aside"
	return errors.Join(os.WriteFile(aside, text, 0o644), os.Rename(aside, a.RegistryFile()))
}
