package chaos

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wgcni/wgcni/test/cluster"
)

// An action is one of the things that may be done to a mesh.
type action struct {
	weight int // how often it is drawn, beside the others
	// do does it, and says what it did: first what is counted, then, behind a
	// colon, the details.
	do func(context.Context, *rand.Rand) (string, error)
}

// A campaign has workers, who each do one action after the other. Which, the seed
// and the worker's name say alone: what they meet depends on the moment.
type campaign struct {
	Result
	t     *testing.T
	parts int // that were begun: each draws anew

	mu  sync.Mutex
	log []string
}

func newCampaign(t *testing.T, name string) *campaign {
	t.Helper()
	r, err := Begin(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s=%d %s=%s", SeedEnv, r.Seed, LengthEnv, time.Duration(r.Length))
	root, err := cluster.RepoRoot()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(root, ".bin", "wgcnid"), "version").Output()
	if err != nil {
		t.Fatal(err)
	}
	r.Version = strings.TrimPrefix(strings.TrimSpace(string(out)), "wgcnid ")
	c := &campaign{Result: r, t: t}
	t.Cleanup(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if t.Failed() {
			t.Logf("%d actions; again with %s=%d\n%s", len(c.log), SeedEnv, c.Seed, strings.Join(c.log, "\n"))
		}
		if dir := os.Getenv(ResultsEnv); dir != "" {
			if err := os.WriteFile(filepath.Join(dir, name+".actions"), []byte(strings.Join(c.log, "\n")+"\n"), 0o644); err != nil {
				t.Error(err)
			}
		}
	})
	return c
}

// random is a source of its own for each name.
func (c *campaign) random(name string) *rand.Rand {
	h := fnv.New64a()
	_, _ = h.Write([]byte(name)) // never fails
	return rand.New(rand.NewPCG(c.Seed, h.Sum64()))
}

// note counts and logs what was done.
func (c *campaign) note(worker, what string, began time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kind, _, _ := strings.Cut(what, ":")
	if kind != "" && err == nil {
		c.Done[kind]++
	}
	line := fmt.Sprintf("%s +%4dms %-8s %s", began.Format("15:04:05.000"), time.Since(began).Milliseconds(), worker, what)
	if err != nil {
		line += ": " + err.Error()
	}
	c.log = append(c.log, line)
}

// actionTimeout is far more than any action needs.
var actionTimeout = cluster.Patience(2 * time.Minute)

// run has all workers at work for a part of the campaign's length.
func (c *campaign) run(part float64, workers map[string][]action) {
	c.t.Helper()
	over := time.Now().Add(time.Duration(part * float64(c.Length)))
	group, ctx := errgroup.WithContext(c.t.Context())
	c.parts++
	for name, actions := range workers {
		r := c.random(fmt.Sprintf("%s, part %d", name, c.parts))
		group.Go(func() error {
			for time.Now().Before(over) && ctx.Err() == nil {
				if err := c.act(ctx, name, actions, r); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		c.t.Fatal(err)
	}
}

// act does one action. Its random numbers are its own, so that how many of them
// it needs changes nothing about the next.
func (c *campaign) act(ctx context.Context, worker string, actions []action, r *rand.Rand) error {
	ctx, cancel := context.WithTimeout(ctx, actionTimeout)
	defer cancel()
	a, own := draw(actions, r), rand.New(rand.NewPCG(r.Uint64(), r.Uint64()))
	began := time.Now()
	what, err := a.do(ctx, own)
	if err != nil && ctx.Err() != nil {
		err = errors.Join(ctx.Err(), err)
	}
	c.note(worker, what, began, err)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", worker, what, err)
	}
	return nil
}

func draw(actions []action, r *rand.Rand) action {
	sum := 0
	for _, a := range actions {
		sum += a.weight
	}
	n := r.IntN(sum)
	return actions[slices.IndexFunc(actions, func(a action) bool { n -= a.weight; return n < 0 })]
}

// finish says how it went, and leaves the result.
func (c *campaign) finish(bad int, what string, of int, unit string) {
	c.t.Helper()
	c.Bad, c.What, c.Of, c.Unit = bad, what, of, unit
	c.t.Logf("%s, %s=%d: %s; %s", c.Campaign, SeedEnv, c.Seed, c.Result, c.done(len(c.Done)))
	if err := c.Save(); err != nil {
		c.t.Error(err)
	}
	if bad > 0 {
		c.t.Errorf("%s; want none", c.Result)
	}
	if of == 0 {
		c.t.Errorf("no %s: it proves nothing", unit)
	}
}

// rest lets some milliseconds pass, fewer than limit, or until the campaign is stopped.
func rest(ctx context.Context, r *rand.Rand, limit int) {
	select {
	case <-time.After(time.Duration(r.IntN(limit)) * time.Millisecond):
	case <-ctx.Done():
	}
}
