package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

// newSecret makes a cluster secret as an operator does.
func newSecret(t *testing.T) string {
	t.Helper()
	out, err := exec.Command(bin("wgcnid"), "secret", "new").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// trusting is who seals with the first of these secrets and accepts all of them.
func trusting(t *testing.T, secrets ...string) (trust registry.Trust) {
	t.Helper()
	for _, text := range secrets {
		s, err := identity.ParseSecret(text)
		if err != nil {
			t.Fatal(err)
		}
		trust.Secrets = append(trust.Secrets, s)
	}
	return trust
}

// secretID names a secret as `wgcnid secret list` does.
func secretID(t *testing.T, secret string) string {
	t.Helper()
	return string(trusting(t, secret).Secrets.Current())
}

func (m *mesh) helper(n *cluster.Node) *cluster.Process { return m.helpers[slices.Index(m.Nodes, n)] }

// flows are steady streams that must lose nothing.
type flows struct {
	streams []*cluster.Stream
	dropped uint64 // by the machine before they began
}

// newFlows begins to watch over streams. Every tunnel has had its handshake by then.
func newFlows(t *testing.T, start func() []*cluster.Stream) flows {
	t.Helper()
	f := flows{dropped: backlogDrops(t)}
	f.streams = start()
	allFlowing(t, f.streams)
	return f
}

// flowAll has a stream from each pod to each other.
func flowAll(t *testing.T, pods []*cluster.Pod) flows {
	t.Helper()
	return newFlows(t, func() (all []*cluster.Stream) {
		for _, from := range pods {
			for _, to := range pods {
				if from != to {
					all = append(all, stream(t, from, to.IPv4(), 50))
				}
			}
		}
		return all
	})
}

// lossless ends the streams, once they have gone on for a little.
func (f flows) lossless(t *testing.T) {
	t.Helper()
	allFlowing(t, f.streams)
	lost := 0
	var reports []string
	for _, s := range f.streams {
		r := s.Stop()
		lost += r.Lost
		reports = append(reports, r.String())
	}
	switch dropped := backlogDrops(t) - f.dropped; {
	case lost == 0:
	case uint64(lost) <= dropped:
		t.Logf("%d datagrams were lost, and %d packets by this machine, which is busy: that proves nothing", lost, dropped)
	default:
		t.Errorf("want no loss:\n%s", strings.Join(reports, "\n"))
	}
}

// backlogDrops is how many packets the machine's CPUs have dropped because too many
// waited: on their way through a veth, of whatever namespace (the second column,
// see net/core/net-procfs.c, softnet_seq_show).
func backlogDrops(t *testing.T) (total uint64) {
	t.Helper()
	text, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		n, err := strconv.ParseUint(strings.Fields(line)[1], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		total += n
	}
	return total
}

// allFlowing waits until some more datagrams of each stream have come back.
func allFlowing(t *testing.T, all []*cluster.Stream) {
	t.Helper()
	var before []int
	for _, s := range all {
		before = append(before, s.Report().Received)
	}
	err := cluster.Poll(t.Context(), "the streams to flow", func() error {
		for i, s := range all {
			if got := s.Report().Received - before[i]; got < 10 {
				return fmt.Errorf("%d datagrams of stream %d came back", got, i)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// serveAll starts a server in each pod, and lets each pod talk with each other.
func serveAll(t *testing.T, pods []*cluster.Pod) {
	t.Helper()
	for _, p := range pods {
		serve(t, p)
	}
	talkAll(t, pods)
}

func talkAll(t *testing.T, pods []*cluster.Pod) {
	t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			if from == to {
				continue
			}
			if err := talk(t.Context(), from, to, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// awaitStatus polls a node's status.
func awaitStatus(t *testing.T, n *cluster.Node, what string, done func(cluster.Status) bool) cluster.Status {
	t.Helper()
	var s cluster.Status
	err := cluster.Poll(t.Context(), n.Name+": "+what, func() (err error) {
		if s, err = n.Status(t.Context()); err == nil && (s.Report == nil || !done(s)) {
			text, _ := json.Marshal(s)
			err = fmt.Errorf("status is %s", text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// peersOf is what the kernel of a node knows of its peers, as `wg show` tells it.
func peersOf(t *testing.T, n *cluster.Node) []string {
	t.Helper()
	out := run(t, n, "sh", "-c", "for what in allowed-ips endpoints preshared-keys; do wg show wgcni0 $what; done")
	var lines []string
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		slices.Sort(words[1:])
		lines = append(lines, strings.Join(words, " "))
	}
	slices.Sort(lines)
	return lines
}

// pairKeys returns the preshared key of each pair of nodes, by their names. It
// fails if the two ends of a pair do not have the same.
func pairKeys(t *testing.T, nodes []*cluster.Node) (map[[2]string]string, error) {
	t.Helper()
	names := map[string]string{}
	for _, n := range nodes {
		names[strings.TrimSpace(run(t, n, "wg", "show", "wgcni0", "public-key"))] = n.Name
	}
	keys := map[[2]string]string{}
	for _, n := range nodes {
		for line := range strings.Lines(run(t, n, "wg", "show", "wgcni0", "preshared-keys")) {
			peer, psk, _ := strings.Cut(strings.TrimSpace(line), "\t")
			pair := [2]string{n.Name, names[peer]}
			slices.Sort(pair[:])
			if other, seen := keys[pair]; seen && other != psk {
				return keys, fmt.Errorf("the ends of %v have different preshared keys", pair)
			}
			keys[pair] = psk
		}
	}
	if want := len(nodes) * (len(nodes) - 1) / 2; len(keys) != want {
		return keys, fmt.Errorf("%d pairs of peers; want %d", len(keys), want)
	}
	return keys, nil
}

// noKey is how `wg show` writes that a peer has no preshared key.
const noKey = "(none)"

// awaitKeys waits until the preshared keys are as wanted.
func awaitKeys(t *testing.T, what string, nodes []*cluster.Node, right func(pair [2]string, psk string) bool) map[[2]string]string {
	t.Helper()
	var keys map[[2]string]string
	err := cluster.Poll(t.Context(), what, func() (err error) {
		keys, err = pairKeys(t, nodes)
		for pair, psk := range keys {
			if err == nil && !right(pair, psk) {
				err = fmt.Errorf("not so between %v", pair)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func hasKey(_ [2]string, psk string) bool { return psk != noKey }

// mustDiffer fails if two pairs share a key.
func mustDiffer(t *testing.T, keys map[[2]string]string) {
	t.Helper()
	if distinct := slices.Compact(slices.Sorted(maps.Values(keys))); len(distinct) != len(keys) {
		t.Errorf("%d pairs of nodes have %d preshared keys", len(keys), len(distinct))
	}
}

// awaitTalk waits until each pod talks with each other.
func awaitTalk(t *testing.T, pods []*cluster.Pod) {
	t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			if from == to {
				continue
			}
			err := cluster.Poll(t.Context(), fmt.Sprintf("%s to talk with %s", from, to), func() error {
				return talk(t.Context(), from, to, []byte("x"))
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// newerSecret makes secrets until one is of a later second than another: the older
// of two keys a tunnel, and of two from one second that may be either.
func newerSecret(t *testing.T, than string) (secret string) {
	t.Helper()
	err := cluster.Poll(t.Context(), "the clock's next second", func() error {
		secret = newSecret(t)
		if a, b := trusting(t, secret).Secrets[0], trusting(t, than).Secrets[0]; !a.Made().After(b.Made()) {
			return fmt.Errorf("both are of %s", b.Made())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

// newRecord is of a node that nobody has seen yet.
func newRecord(t *testing.T, name string) registry.Record {
	t.Helper()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return registry.Record{
		Name: name, PublicKey: key.PublicKey(), Endpoints: []string{"192.0.2.66:51820"},
		Since: time.Now(), Revision: registry.NextRevision(0, time.Now()),
	}
}
