package crash

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// subject is a command that changes files, in a node's old state.
type subject struct {
	name string
	// old makes the state in which the command is run. The folders are empty before,
	// but for the primary plugin's binary.
	old func(*world)
	// cmd is the command.
	cmd func(*world) *exec.Cmd
	// ready tells of the helper, which does not end by itself, that it may be told to.
	ready func(*world) bool
	// meanwhile is what somebody else does before a call; optional.
	meanwhile func(*world, Call)
	// sound is what holds at every moment, for whoever reads then.
	sound func(*world) error
	// done is what holds once the command has succeeded, also after a power cut.
	done func(*world) error
	// again runs the command once more, after it was cut short; nil: just that. It
	// returns what is wrong.
	again func(*world) error
	// left are names that may stay behind.
	left func(name string) bool
	// lesser are files of which nobody is promised anything: a command may succeed
	// without having written them.
	lesser func(path string) bool
	// mustPass says that the command may not fail, whatever it cannot write.
	mustPass bool
	// powered says that no power cut is to be looked at: what is written is gone with
	// the boot, or somebody writes whom the tracer does not see.
	powered bool
	// points are taken of each kind; 0: as usual.
	points int
}

// seed is that of this run.
var seed = func() uint64 {
	if n, err := strconv.ParseUint(os.Getenv("WGCNI_CRASH_SEED"), 10, 64); err == nil {
		return n
	}
	return uint64(time.Now().UnixNano())
}()

// usualPoints is how many points of a command are taken, of each kind, unless all are.
const usualPoints = 3

// campaign is the whole test of a subject.
func campaign(t *testing.T, s subject) {
	t.Parallel()
	w := newWorld(t)
	s.old(w)
	t.Logf("WGCNI_CRASH_SEED=%d", seed)
	h := fnv.New64a()
	_, _ = h.Write([]byte(s.name))
	c := &course{world: w, s: s, rng: rand.New(rand.NewPCG(seed, h.Sum64())), old: w.tree()}
	c.whole()
	if t.Failed() {
		return
	}
	c.kills()
	if !s.powered {
		c.powerCuts()
	}
	c.failures(unix.ENOSPC)
	c.failures(unix.EROFS)
	t.Logf("%s: %d calls that change files", s.name, len(c.calls))
}

// course is a campaign under way.
type course struct {
	*world
	s   subject
	rng *rand.Rand
	// old and end are the trees before and after the whole command.
	old, end Tree
	calls    []Call
}

// decide completes what a point says: a helper, which does not end by itself, is told
// to when it is ready and has made a report, and has so come to all files that it writes.
func (c *course) decide(at func(n int, call Call) Fate) func(Call) Fate {
	n, reports := 0, false
	return func(call Call) Fate {
		n++
		reports = reports || call.Name == "rename" && call.To == c.helperReport()
		if c.s.meanwhile != nil {
			c.s.meanwhile(c.world, call)
		}
		f := at(n, call)
		f.Term = c.s.ready != nil && reports && c.s.ready(c.world)
		return f
	}
}

// long bounds a command that cannot write: one that does not end by itself may never
// be ready.
func (c *course) long() time.Duration {
	if c.s.ready != nil {
		return 2 * time.Second
	}
	return patience
}

// patience is far more than any command takes.
const patience = 40 * time.Second

// whole runs the command to its end. At each call somebody else reads.
func (c *course) whole() {
	c.t.Helper()
	e := c.trace(c.s.cmd(c.world), patience, c.decide(func(n int, call Call) Fate {
		if err := c.s.sound(c.world); err != nil {
			c.t.Errorf("read while it runs, before call %d, %v: %v", n, call, err)
		}
		return Fate{}
	}))
	if e.Code != 0 {
		c.t.Fatalf("it fails: %s%s", e.out, e.err)
	}
	if err := c.s.done(c.world); err != nil {
		c.t.Errorf("at the end: %v", err)
	}
	c.end, c.calls = c.tree(), e.Calls
	if left := litter(c.end, c.old); len(c.calls) == 0 {
		c.t.Errorf("it changes no file: this proves nothing: %v", left)
	}
	disk, err := c.disk()
	c.must(err)
	for _, call := range c.calls {
		if err := disk.Apply(call); err != nil {
			c.t.Error(err)
		}
	}
	// Who writes in a way that the tracer does not see proves nothing either.
	now := disk.Now()
	for p, f := range c.end {
		if f.Mode.IsRegular() && now[p].Data != f.Data && p != filepath.Join(c.run, "tunnel.json") { // that is the tunnel's
			c.t.Errorf("%s was changed in a way that was not seen", p)
		}
	}
	if c.t.Failed() {
		c.log(c.calls)
	}
}

func (c *course) disk() (*Disk, error) {
	c.restore(c.old)
	d, err := ReadDisk(c.real, c.roots)
	if err == nil {
		d.Far, d.Boot = []string{c.path("shared")}, []string{c.path("run")}
	}
	return d, err
}

func (c *course) log(calls []Call) {
	var lines []string
	for i, call := range calls {
		lines = append(lines, fmt.Sprintf("%3d %s", i+1, strings.ReplaceAll(call.String(), c.dir, "")))
	}
	c.t.Logf("the calls:\n%s", strings.Join(lines, "\n"))
}

// choose takes some of n points, numbered from 1.
func (c *course) choose(n int) []int {
	all := c.rng.Perm(n)
	if os.Getenv("WGCNI_CRASH") != "all" {
		all = all[:min(n, cmp.Or(c.s.points, usualPoints))]
	}
	for i := range all {
		all[i]++
	}
	slices.Sort(all)
	return all
}

// kills kills the command before a call.
func (c *course) kills() {
	for _, at := range c.choose(len(c.calls)) {
		c.restore(c.old)
		var before Call
		e := c.trace(c.s.cmd(c.world), patience, c.decide(func(n int, call Call) Fate {
			if n == at {
				before = call
			}
			return Fate{Kill: n == at}
		}))
		c.afterwards(fmt.Sprintf("killed before call %d, %v", at, before), e.Calls, c.old, c.end)
	}
}

// afterwards is what everybody does who comes after an accident.
func (c *course) afterwards(what string, calls []Call, proper ...Tree) {
	failed := c.t.Failed()
	begun := c.tree()
	if err := c.s.sound(c.world); err != nil {
		c.t.Errorf("%s: %v", what, err)
	}
	if err := c.repeat(); err != nil {
		c.t.Errorf("%s: then run again: %v", what, err)
	} else if err := c.s.done(c.world); err != nil {
		c.t.Errorf("%s: then run again: at the end: %v", what, err)
	}
	for _, name := range litter(c.tree(), proper...) {
		if c.s.left == nil || !c.s.left(name) {
			c.t.Errorf("%s: then run again: %s is left behind", what, name)
		}
	}
	if c.t.Failed() && !failed {
		c.log(calls)
		c.t.Logf("there was %s", strings.ReplaceAll(strings.Join(begun.Names(), "\n"), c.dir, ""))
	}
}

func (c *course) repeat() error {
	if c.s.again != nil {
		return c.s.again(c.world)
	}
	return c.runs(c.s.cmd(c.world))
}

// runs runs a command that is to succeed.
func (c *course) runs(cmd *exec.Cmd) error {
	e := c.trace(cmd, patience, c.decide(func(int, Call) Fate { return Fate{} }))
	if e.Code != 0 {
		return fmt.Errorf("exit status %d: %s%s", e.Code, e.out, e.err)
	}
	return nil
}

// powerCuts takes the power away after some call.
func (c *course) powerCuts() {
	disk, err := c.disk()
	c.must(err)
	seen := map[string]bool{}
	type outage struct {
		what string
		tree Tree
		last bool
	}
	var outages []outage
	for i := 0; i <= len(c.calls); i++ {
		what := "power cut at the end"
		if i < len(c.calls) {
			what = fmt.Sprintf("power cut before call %d, %v", i+1, c.calls[i])
		}
		cuts := Cuts(c.rng)
		for _, kind := range slices.Sorted(maps.Keys(cuts)) {
			tree := disk.After(cuts[kind])
			print := fmt.Sprint(i == len(c.calls), tree)
			if !seen[print] {
				seen[print] = true
				outages = append(outages, outage{what + ": " + kind, tree, i == len(c.calls)})
			}
		}
		if i < len(c.calls) {
			_ = disk.Apply(c.calls[i]) // whole has looked at the error
		}
	}
	again := map[int]bool{}
	for _, i := range c.choose(len(outages)) {
		again[i-1] = true
	}
	for i, o := range outages {
		c.restore(o.tree)
		if err := c.s.sound(c.world); err != nil {
			c.t.Errorf("%s: %v\n%s", o.what, err, strings.ReplaceAll(strings.Join(o.tree.Names(), "\n"), c.dir, ""))
			continue
		}
		if o.last {
			if err := c.s.done(c.world); err != nil {
				c.t.Errorf("%s: what was done is lost: %v\n%s", o.what, err, strings.ReplaceAll(strings.Join(o.tree.Names(), "\n"), c.dir, ""))
			}
		}
		if again[i] {
			c.afterwards(o.what, c.calls, c.old, c.end, o.tree)
		}
	}
}

// failures has all calls fail from one on: those that need room, or all.
func (c *course) failures(with syscall.Errno) {
	for _, at := range c.choose(len(c.calls)) {
		c.restore(c.old)
		e := c.trace(c.s.cmd(c.world), c.long(), c.decide(func(n int, call Call) Fate {
			if n >= at && (with == unix.EROFS && call.ofFile() || call.needsRoom()) {
				return Fate{Fail: with}
			}
			return Fate{}
		}))
		what := fmt.Sprintf("%q from call %d on, %v", with.Error(), at, c.calls[at-1])
		failed := c.t.Failed()
		hit := slices.ContainsFunc(e.Calls, func(call Call) bool {
			return call.Result == -int64(with) && (c.s.lesser == nil || !c.s.lesser(call.Path))
		})
		switch {
		case e.Code == 0 && hit:
			if err := c.s.done(c.world); err != nil {
				c.t.Errorf("%s: it succeeds all the same: %v", what, err)
			}
		case e.Code != 0 && c.s.mustPass:
			c.t.Errorf("%s: it fails: %s%s", what, e.out, e.err)
		case e.Code != 0 && !strings.Contains(e.out+e.err, with.Error()): // a plugin has its error in stdout
			c.t.Errorf("%s: it does not say so: %s%s", what, e.out, e.err)
		}
		if with != unix.EROFS {
			for _, name := range litter(c.tree(), c.old, c.end) {
				if c.s.left == nil || !c.s.left(name) {
					c.t.Errorf("%s: %s is left behind", what, name)
				}
			}
		}
		if c.t.Failed() && !failed {
			c.log(e.Calls)
		}
		c.afterwards(what, e.Calls, c.old, c.end)
	}
}

// needsRoom is true of the calls that a full disk refuses.
func (c Call) needsRoom() bool {
	switch c.Name {
	case "openat":
		return c.Flags&unix.O_CREAT != 0
	case "write", "pwrite", "mkdir", "link", "symlink", "fsync":
		return true
	}
	return false
}
