package chaos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/test/cluster"
)

const (
	// quiet is how long after the last fault everything may take.
	quiet = time.Second
	// patience is how much longer is waited for what is late, to tell it from what
	// never comes.
	patience = 30 * time.Second
	// pingPatience is a packet's; one that WireGuard holds until a handshake may
	// wait for the next try, 5 s later (REKEY_TIMEOUT).
	pingPatience = time.Second
	// endPatience is how long a helper may take to end.
	endPatience = 10 * time.Second
	// era is how long a mesh lives, before the next one begins anew.
	era = 2 * time.Minute
	// manyFailures end a campaign.
	manyFailures = 3
	// staticNetwork is the one whose pods name their addresses.
	staticNetwork = "static"
)

// TestConverge has random faults happen to a mesh, one after another or at the
// same time. One quiet second later each node's kernel and stores are as its plan
// and the registry have it, and all pods talk.
func TestConverge(t *testing.T) {
	w := &walk{t: t, campaign: newCampaign(t, "convergence")}
	begun, lasts := time.Now(), time.Duration(w.Length)
	for i := 0; (i < 2 || time.Since(begun) < lasts) && w.Bad < manyFailures; i++ { // of both kinds
		end := begun.Add(min(lasts, time.Since(begun)+era))
		if i == 0 && lasts < era { // the last part is etcd's
			end = begun.Add(lasts * 7 / 10)
		}
		kind := []string{onFile, onEtcd}[i%2]
		w.mesh(rand.New(rand.NewPCG(w.Seed, uint64(i))), kind, end)
	}
	w.Note = fmt.Sprintf("longest time to converge %d ms; until all pods talked %d ms", w.longest.Milliseconds(), w.talking.Milliseconds())
	t.Logf("the slowest round: %s", w.slowest)
	w.finish(w.Bad, "diverged", w.Of, "rounds")
}

// walk is the campaign's way through rounds of faults.
type walk struct {
	*campaign
	t       *testing.T
	longest time.Duration // to converge, of the quiet clock
	slowest string        // the round that took it
	talking time.Duration // until all pods had reached each other
}

// mesh is the life of one mesh, with rounds of faults until a time.
func (w *walk) mesh(r *rand.Rand, kind string, end time.Time) {
	w.t.Run(kind, func(t *testing.T) {
		b := newBed(t, r, kind)
		deck := &deck{all: b.possible(kind)}
		for round := 1; round == 1 || time.Now().Before(end); round++ {
			p := newRound(r, deck, b.members)
			t.Logf("round %d: %s", round, p)
			if err := w.round(t, b, p); err != nil {
				w.Bad++
				for _, m := range b.members {
					t.Logf("log of %s:\n%s", m.Name, m.lastWords())
				}
				t.Errorf("seed %d, round %d of this mesh: %s: %v", w.Seed, round, p, err)
				return
			}
		}
	})
}

// lastWords ends what runs of wgcnid on a node. It returns the logs, with where each
// goroutine was.
func (m *member) lastWords() string {
	all, _ := m.FindProcesses("wgcnid") // of one that cannot be asked there are the logs
	for _, p := range all {
		_ = unix.Kill(p.HostPID, unix.SIGQUIT)
	}
	ctx, cancel := context.WithTimeout(context.Background(), cluster.Patience(endPatience))
	defer cancel()
	_ = cluster.Poll(ctx, "wgcnid to end", func() error {
		if left, err := m.FindProcesses("wgcnid"); err != nil || len(left) > 0 {
			return errors.Join(err, fmt.Errorf("%v are left", left))
		}
		return nil
	})
	text := m.helper.Log.String()
	logs, _ := filepath.Glob(m.Path("/run/wgcni/tunnel*.log"))
	for _, path := range logs {
		log, _ := os.ReadFile(path)
		text += fmt.Sprintf("%s:\n%s", filepath.Base(path), log)
	}
	return text
}

// possible are the faults that may happen to this mesh.
func (b *bed) possible(kind string) (out []fault) {
	_, err := b.Nodes[0].Wgcnid(b.t.Context(), "key", "rotate", "--help")
	for _, f := range faults() {
		if f.on != "" && f.on != kind || f.name == "key rotated" && err != nil {
			continue
		}
		out = append(out, f)
	}
	return out
}

// newBed makes a mesh with two pods on each node, one with an address outside of
// the node's prefix.
func newBed(t *testing.T, r *rand.Rand, kind string) *bed {
	t.Helper()
	b := &bed{Cluster: cluster.NewT(t, 3), t: t}
	b.options.Stanza = map[string]any{}
	if kind == onEtcd {
		var err error
		if b.etcd, err = b.StartEtcd(t.Context(), cluster.EtcdOptions{}); err != nil {
			t.Fatal(err)
		}
		b.options.Stanza["registry"] = b.etcd.Registry(nil)
	}
	sealed := r.IntN(2) == 0
	if sealed {
		secret, err := identity.NewSecret(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		b.options.Secrets = []string{secret.Reveal()}
	}
	for _, n := range b.Nodes {
		b.static(n)
	}
	helpers, err := b.JoinAll(t.Context(), b.options)
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range b.Nodes {
		m := &member{Node: n, helper: helpers[i], sealed: sealed}
		b.members = append(b.members, m)
		for _, outside := range []bool{false, true} {
			p, err := b.newPod(t.Context(), m, outside)
			if err != nil {
				t.Fatal(err)
			}
			m.pods = append(m.pods, p)
		}
	}
	if kind == onFile {
		if b.oldFile, err = os.ReadFile(b.RegistryFile()); err != nil {
			t.Fatal(err)
		}
	}
	err = cluster.Poll(t.Context(), "the mesh to be as it should", func() error { return errors.Join(b.judge(t.Context()), b.talk(t.Context())) })
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// static gives a node the network whose pods have the addresses that they ask for.
func (b *bed) static(n *cluster.Node) {
	b.t.Helper()
	o := b.options
	o.Example = "ptp.conflist"
	o.Primary = map[string]any{
		"ipMasq": false, "ipam": map[string]any{"type": "static", "routes": []any{map[string]any{"dst": "0.0.0.0/0"}, map[string]any{"dst": "::/0"}}},
	}
	text, err := n.Conflist(o)
	if err == nil {
		err = n.WriteConflist("20-static.conflist", strings.Replace(text, `"name": "pods"`, `"name": "`+staticNetwork+`"`, 1))
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// round is what is going to happen: all of it is drawn before anything does, so
// that a seed means the same however fast things are.
type round struct {
	steps  []step
	at     bool  // at the same time: all begin before the first one ends
	ending []int // the order in which they then end
}

type step struct {
	fault
	on    *member
	seed  uint64
	pause time.Duration // before it, and between its begin and its end
}

// deck deals each fault once before it deals one again.
type deck struct{ all, left []fault }

func (d *deck) deal(r *rand.Rand) fault {
	if len(d.left) == 0 {
		d.left = slices.Clone(d.all)
		r.Shuffle(len(d.left), func(i, j int) { d.left[i], d.left[j] = d.left[j], d.left[i] })
	}
	f := d.left[0]
	d.left = d.left[1:]
	return f
}

func newRound(r *rand.Rand, deck *deck, members []*member) (p round) {
	p.at = r.IntN(2) == 0
	for range 1 + r.IntN(8) {
		p.steps = append(p.steps, step{fault: deck.deal(r), on: members[r.IntN(len(members))], seed: r.Uint64(), pause: pause(r)})
	}
	p.ending = r.Perm(len(p.steps))
	return p
}

func (p round) String() string {
	var words []string
	for _, s := range p.steps {
		words = append(words, s.name+" on "+s.on.Name)
	}
	return strings.Join(words, map[bool]string{true: " & ", false: ", "}[p.at])
}

// round carries out one and judges what is left of it.
func (w *walk) round(t *testing.T, b *bed, p round) error {
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(2*time.Minute))
	defer cancel()
	if err := w.happen(ctx, b, p); err != nil {
		return err
	}
	for _, m := range b.members { // init starts again what has ended
		if err := m.startHelper(ctx); err != nil {
			return err
		}
	}
	clock := startQuietClock(b)
	defer clock.stop()
	w.Of++
	took, err := clock.await(ctx, func() error { return b.judge(ctx) })
	if took > w.longest {
		w.longest, w.slowest = took, p.String()
	}
	if err != nil {
		return err
	}
	t.Logf("  converged within %v", took.Round(time.Millisecond))
	if most := cluster.Patience(quiet); took > most {
		return fmt.Errorf("it took %v of quiet to converge, more than %v", took, most)
	}
	if err := b.talk(ctx); err != nil {
		return err
	}
	w.talking = max(w.talking, clock.now())
	return b.judge(ctx)
}

// happen has the faults happen.
func (w *walk) happen(ctx context.Context, b *bed, p round) error {
	var errs []error
	ends := map[int]func(context.Context) error{}
	finish := func(i int) {
		if end := ends[i]; end != nil {
			if err := end(ctx); err != nil {
				errs = append(errs, fmt.Errorf("end of %s on %s: %w", p.steps[i].name, p.steps[i].on, err))
			}
		}
		delete(ends, i)
	}
	for i, s := range p.steps {
		if s.alone { // what has begun ends before
			for _, j := range slices.Sorted(maps.Keys(ends)) {
				finish(j)
			}
			for _, m := range b.members {
				errs = append(errs, m.startHelper(ctx))
			}
		}
		time.Sleep(s.pause) // part of the plan
		end, err := s.begin(ctx, b, s.on, rand.New(rand.NewPCG(s.seed, 0)))
		switch {
		case errors.Is(err, errStuck):
			errs = append(errs, fmt.Errorf("%s on %s: %w", s.name, s.on, err))
		case err != nil:
			w.t.Logf("  %s on %s did not happen: %v", s.name, s.on, err)
		default:
			w.Done[s.name]++
		}
		ends[i] = end
		if !p.at || s.alone {
			time.Sleep(s.pause) // part of the plan
			finish(i)
		}
	}
	for _, i := range p.ending {
		finish(i)
	}
	return errors.Join(errs...)
}

func mapsJoined(a, b map[string]any) map[string]any {
	out := maps.Clone(a)
	maps.Copy(out, b)
	return out
}
