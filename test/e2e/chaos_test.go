package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// number reads an environment variable by which a campaign is made longer or repeated.
func number(t *testing.T, name string, fallback uint64) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(os.Getenv(name), 10, 64)
	if err != nil {
		n = fallback
	}
	t.Logf("%s=%d", name, n)
	return n
}

// A sandbox is one whose addresses lie outside of the node's prefix, so that each
// ADD and DEL has something to do in the kernel.
type sandbox struct {
	*cluster.BarePod
	live bool // what the store and the kernel must say in the end
}

const chaosSandboxes = 12

func makeSandboxes(t *testing.T, n *cluster.Node, o cluster.NetworkOptions) []*sandbox {
	t.Helper()
	var out []*sandbox
	for i := range chaosSandboxes {
		s, err := n.AddBarePod(t.Context(), fmt.Sprintf("s%d", i), o)
		if err == nil {
			addresses := cloudAddresses(1 + i)
			err = s.SetAddresses(addresses[:]...)
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, &sandbox{BarePod: s})
	}
	return out
}

// Plugin and helper are killed at random moments; then one pass: the kernel equals
// the plan, nothing is leaked, nothing is lost, nothing went out in the clear.
func TestKillAtRandomMoments(t *testing.T) {
	seed, rounds := number(t, "WGCNI_SEED", uint64(time.Now().UnixNano())), number(t, "WGCNI_ROUNDS", 300)
	r := rand.New(rand.NewPCG(seed, 2))
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	a := m.Nodes[0]
	routeAroundTunnel(t, m.Cluster)
	serve(t, m.pods[1])
	capture := watchUnderlay(t, m.Cluster)
	bystander := stream(t, m.pods[0], m.pods[1].IPv4(), 200)
	flowing(t, bystander)
	warm := bystander.Report().Lost

	sandboxes := makeSandboxes(t, a, cluster.NetworkOptions{})
	helper := m.helpers[0]
	for range rounds {
		s := sandboxes[r.IntN(len(sandboxes))]
		verb := []string{"ADD", "DEL"}[r.IntN(2)]
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(r.IntN(30_000))*time.Microsecond)
		if err := s.Call(ctx, verb); err != nil {
			t.Fatal(err)
		}
		cancel()
		if r.IntN(6) == 0 { // the runtime asks again until it has an answer
			if err := s.Call(t.Context(), verb); err != nil {
				t.Fatal(err)
			}
		}
		if r.IntN(5) == 0 {
			if err := helper.Signal(t.Context(), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			_ = helper.Wait(t.Context()) // it was killed
			helper = startHelper(t, a)
		}
	}
	for i, s := range sandboxes {
		s.live = i%2 == 0
		verb := map[bool]string{true: "ADD", false: "DEL"}[s.live]
		if err := s.Call(t.Context(), verb); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err, helper.Log)
	}
	checkSandboxes(t, a, sandboxes)
	if r := bystander.Stop(); r.Lost > warm {
		t.Errorf("a pod that nobody touched: %s; want no loss after the first handshake, which took %d", r, warm)
	}
	mustBeClean(t, capture)
	leftovers := run(t, a, "sh", "-c", "ls /run/wgcni /var/lib/wgcni | grep -v '^attachments.db\\(.lock\\)\\?$\\|^peers.db\\(.lock\\)\\?$\\|^private.key$\\|^last.conflist$\\|^wgcnid.lock$\\|^helper.json$\\|^announced.json$\\|^tunnel.log$\\|^tunnel.json$\\|^verbs.log$\\|^/\\|^$' || true")
	if got := strings.Fields(leftovers); len(got) > 3 { // a killed write leaves its file aside; they do not pile up
		t.Errorf("left in the folders: %v", got)
	}
}

// checkSandboxes compares throw routes and set elements with the live sandboxes.
func checkSandboxes(t *testing.T, n *cluster.Node, sandboxes []*sandbox) {
	t.Helper()
	routes := run(t, n, "sh", "-c", "ip route show table 30567 type throw; ip -6 route show table 30567 type throw")
	elements := run(t, n, "sh", "-c", "nft list set inet wgcni pods4; nft list set inet wgcni pods6")
	words := strings.FieldsFunc(routes+" "+elements, func(r rune) bool { return strings.ContainsRune(" ,{}\n\t", r) })
	for _, s := range sandboxes {
		for _, addr := range s.Addresses() {
			count := 0
			for _, w := range words {
				if w == addr.String() {
					count++
				}
			}
			if want := map[bool]int{true: 2, false: 0}[s.live]; count != want {
				t.Errorf("%s of sandbox %s (live: %v) stands in %d places, want a throw route and a set element (%d)", addr, s.Name, s.live, count, want)
			}
		}
	}
	status, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	live := 1 // the bystander
	for _, s := range sandboxes {
		if s.live {
			live++
		}
	}
	if status.Pods != live {
		t.Errorf("the store has %d pods, want %d", status.Pods, live)
	}
	if i := slices.IndexFunc(sandboxes, func(s *sandbox) bool { return s.live }); i >= 0 {
		run(t, n, "ip", "netns", "delete", sandboxes[i].Name) // its DEL never comes
		sandboxes[i].live = false
		err := cluster.Poll(t.Context(), "the sweep of a pod that lost its DEL", func() error {
			s, err := n.Status(t.Context())
			if err == nil && s.Pods != live-1 {
				err = fmt.Errorf("%d pods", s.Pods)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}
