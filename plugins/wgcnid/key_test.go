package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// keyMesh is a mesh in which node a has had its keys for 30 days, b too, c runs an
// older version, and laptop enters by a.
func keyMesh(t *testing.T, settings ...string) (*testMesh, identity.Keys) {
	t.Helper()
	m := newMesh(t, 0, settings...)
	keys, err := identity.LoadOrCreateKeys(m.config.StateDir, now.AddDate(0, 0, -30))
	m.must(err)
	a, b := rotating("a", 51821), rotating("b", 51821)
	a.PublicKey = keys.Current
	laptop := registrytest.Record("laptop", 4)
	laptop.Via = []string{"a"}
	m.cache(a, b, registrytest.Record("c", 3), laptop, tombstone("gone", 9))
	m.must(os.MkdirAll(m.config.RunDir, 0o700))
	return m, keys
}

// rotating is the record of a node that can rotate its key, which is from noon on
// the day before now.
func rotating(name string, port uint16) registry.Record {
	r := registrytest.Record(name, 5)
	r.Rotation = registry.Rotation{Next: wgtypes.Key{name[0], 1}, SparePort: port, KeySince: time.Date(2026, 1, 1, 3, 4, 5, 0, time.UTC)}
	return r
}

// helper takes the place of `wgcnid run`, until the function that is returned is called.
func (m *testMesh) helper() (end func()) {
	m.t.Helper()
	lock, err := reconcile.HoldHelperLock(m.config.RunDir)
	m.must(err)
	return func() { _ = lock.Close() }
}

func (m *testMesh) report(r *reconcile.RotationReport) {
	writeReport(m.config.RunDir, reconcile.Report{At: now, Rotation: r}, slog.New(slog.DiscardHandler))
}

// takeOrder is what the helper would be told.
func takeOrder(dir string) (order identity.Order, ordered bool, err error) {
	err = identity.CarryOutOrder(dir, func(o identity.Order) error {
		order, ordered = o, true
		return nil
	})
	return order, ordered, err
}

func TestKeyShow(t *testing.T) {
	m, keys := keyMesh(t, "keyRotation", "2160h")
	shown := func() (KeyStatus, string) {
		t.Helper()
		s, err := readKeys(t.Context(), m.config, now)
		m.must(err)
		var b bytes.Buffer
		m.must(printKeys(&b, s, false))
		m.tellsNoPrivateKey(b.String())
		return s, strings.NewReplacer(keys.Current.String(), "CURRENT", keys.Next.String(), "NEXT").Replace(b.String())
	}
	table := `
NODE  KEY                                           IN USE SINCE         AGE       ROTATION
b     YgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=  2026-01-01 03:04:05  24 hours  none
c     YwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=  -                    -         its version rotates no keys
`
	s, text := shown()
	want := `key       CURRENT, in use since 2025-12-03 03:04:05 (30 days)
next key  NEXT, to be used by wgcni0x on UDP port 51821 first
rotation  none is going on; "keyRotation" begins the next after 2026-03-03 03:04:05
` + table
	if diff := cmp.Diff(want, text); diff != "" {
		t.Errorf("at rest: %s", diff)
	}
	if s.PublicKey != keys.Current.String() || s.NextPublicKey != keys.Next.String() || s.Every != "2160h0m0s" || s.Rotation != nil {
		t.Errorf("%+v", s)
	}

	m.must(identity.WriteOrder(m.config.StateDir, identity.Order{At: now}))
	if _, text := shown(); !strings.Contains(text, "one is ordered; wgcnid does not run, and begins when it does\n") {
		t.Error(text)
	}
	end := m.helper()
	if _, text := shown(); !strings.Contains(text, "one is ordered; wgcnid begins within seconds\n") {
		t.Error(text)
	}
	_, _, err := takeOrder(m.config.StateDir)
	m.must(err)
	out, err := keys.Begin(m.config.StateDir, now)
	m.must(err)
	m.report(&reconcile.RotationReport{Stage: mesh.Out, Pairs: 3, Moved: 1, Waiting: []reconcile.RotationWait{
		{Node: "b", Why: "no handshake on\nUDP port 51821"}, {Node: "c", Why: "an older version"},
	}})
	if _, text = shown(); !strings.Contains(text, `rotation  moving to the new key: 1 of 3 pairs moved
          waits for b: no handshake on; UDP port 51821
          waits for c: an older version
`) {
		t.Error(text)
	}
	end()
	if _, text = shown(); !strings.Contains(text, "1 of 3 pairs moved (as wgcnid saw it last: it does not run") {
		t.Error(text)
	}
	back, err := out.Switch(m.config.StateDir, now)
	m.must(err)
	m.report(&reconcile.RotationReport{Stage: mesh.Back, Pairs: 3, Moved: 1})
	if s, text := shown(); s.NextPublicKey != "" || !strings.HasPrefix(text, "key       NEXT, in use since 2026-01-02 03:04:05 (0 seconds)\nrotation  the new key is in use, moving back to the first interface: 1 of 3 pairs moved") {
		t.Error(text)
	}
	if _, err = back.End(m.config.StateDir, now); err != nil {
		t.Error(err)
	}
	// A report that was not written anew is no rotation.
	if s, _ := shown(); s.Rotation != nil || s.Stage != mesh.Resting {
		t.Errorf("%+v", s)
	}
	stdout, _, err := m.run("key", "show", "--json")
	m.must(err)
	m.tellsNoPrivateKey(stdout)
	var got KeyStatus
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || got.PublicKey != keys.Next.String() || len(got.Nodes) != 2 || got.Nodes[0].Since.IsZero() || !got.Nodes[1].Since.IsZero() {
		t.Errorf("%s, %v", stdout, err)
	}
}

// tellsNoPrivateKey fails the test where a text has one of node a's private keys.
func (m *testMesh) tellsNoPrivateKey(text string) {
	m.t.Helper()
	for _, path := range []string{identity.Path(m.config.StateDir), identity.NextPath(m.config.StateDir)} {
		if private, err := os.ReadFile(path); err == nil && strings.Contains(text, strings.TrimSpace(string(private))) {
			m.t.Errorf("it tells %s:\n%s", path, text)
		}
	}
}

func TestKeyBeforeThereIsOne(t *testing.T) {
	m := newMesh(t, 0)
	for _, args := range [][]string{{"key", "show"}, {"key", "rotate"}} {
		if out, _, err := m.run(args...); !errors.Is(err, identity.ErrNoKey) || out != "" {
			t.Errorf("%q: %q, %v", args, out, err)
		}
	}
	if identity.Ordered(m.config.StateDir) {
		t.Error("a rotation of no key is ordered")
	}
}

func TestKeyRotateWithoutHelper(t *testing.T) {
	m, _ := keyMesh(t)
	for _, tt := range []struct {
		args []string
		want identity.Order
		says []string // in the output
		err  string
	}{
		{[]string{"--no-wait"}, identity.Order{}, []string{"Ordered; wgcnid does not run", "Plain machines know this node's key from their files, and hold the rotation until `wgcnid key rotate --force`: 1: laptop.", "`wgcnid peer config laptop`"}, ""},
		{nil, identity.Order{}, []string{"hold the rotation"}, "carried out when it runs: `systemctl start wgcnid`"},
		{[]string{"--cluster"}, identity.Order{Cluster: true}, []string{"know nodes' keys"}, "the order is kept"},
		{[]string{"--force", "--no-wait"}, identity.Order{Force: true}, []string{"cut off by this until they have new ones: 1: laptop. Afterwards: `wgcnid peer config laptop`"}, ""},
	} {
		out, _, err := m.run(append([]string{"key", "rotate"}, tt.args...)...)
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %v", tt.args, err)
		}
		for _, want := range tt.says {
			if !strings.Contains(out, want) {
				t.Errorf("%q: %q lacks %q", tt.args, out, want)
			}
		}
		o, ok, err := takeOrder(m.config.StateDir)
		if !ok || err != nil || time.Since(o.At).Abs() > time.Minute {
			t.Errorf("%q: %v %v %v", tt.args, o, ok, err)
		}
		if o.At = (time.Time{}); o != tt.want {
			t.Errorf("%q: ordered is %v", tt.args, o)
		}
	}
}

// live is a rotation as the helper carries it out; between the steps it waits for
// what the command has printed.
func (m *testMesh) live(printed func(string)) error {
	dir := m.config.StateDir
	for {
		o, ok, err := takeOrder(dir)
		if err != nil {
			return err
		}
		if !ok {
			time.Sleep(time.Millisecond)
			continue
		}
		keys, err := identity.LoadKeys(dir)
		if err != nil {
			return err
		}
		m.report(&reconcile.RotationReport{Stage: mesh.Out, Pairs: 2, Moved: 1, Waiting: []reconcile.RotationWait{{Node: "b", Why: "no handshake"}}})
		if keys, err = keys.Begin(dir, o.At); err != nil {
			return err
		}
		printed("Moving to the new key: 1 of 2 pairs moved; waits for b: no handshake.\n")
		m.report(&reconcile.RotationReport{Stage: mesh.Back, Pairs: 2})
		if keys, err = keys.Switch(dir, o.At); err != nil {
			return err
		}
		printed("The new key is in use, moving back to the first interface: 0 of 2 pairs moved.\n")
		_, err = keys.End(dir, o.At)
		return err
	}
}

// lines is an output that another goroutine looks at.
type lines struct {
	text chan string // one text: all that was written
}

func newLines() lines {
	l := lines{make(chan string, 1)}
	l.text <- ""
	return l
}

func (l lines) Write(p []byte) (int, error) {
	l.text <- <-l.text + string(p)
	return len(p), nil
}

func (l lines) String() string {
	text := <-l.text
	l.text <- text
	return text
}

// await waits until the text has been written; a test that fails hangs until its deadline.
func (l lines) await(text string) {
	for !strings.Contains(l.String(), text) {
		time.Sleep(time.Millisecond)
	}
}

func TestKeyRotate(t *testing.T) {
	m, keys := keyMesh(t)
	defer m.helper()()
	out := newLines()
	lived := make(chan error, 1)
	go func() { lived <- m.live(out.await) }()
	m.must(rotate(t.Context(), out, m.config, identity.Order{At: time.Now()}, false))
	m.must(<-lived)
	after, err := identity.LoadKeys(m.config.StateDir)
	m.must(err)
	if after.Current != keys.Next || !strings.Contains(out.String(), "Done: this node's key is "+keys.Next.String()+" now, after ") {
		t.Error(out.String())
	}
	m.tellsNoPrivateKey(out.String())
	if n := strings.Count(out.String(), "\n"); n != 4 {
		t.Errorf("%d lines:\n%s", n, out.String())
	}
	if out, _, err := m.run("key", "rotate", "--no-wait"); err != nil || !strings.Contains(out, "Ordered; `wgcnid key show` tells") {
		t.Errorf("%q, %v", out, err)
	}
}

// Ctrl-C ends the command alone.
func TestKeyRotateInterrupted(t *testing.T) {
	m, _ := keyMesh(t)
	defer m.helper()()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	err := rotate(ctx, &out, m.config, identity.Order{At: time.Now()}, false)
	if err == nil || !strings.Contains(err.Error(), "the rotation goes on") || !identity.Ordered(m.config.StateDir) {
		t.Errorf("%s%v", &out, err)
	}
}

// What is going on is followed, and not ordered again.
func TestKeyRotateJoins(t *testing.T) {
	for _, stage := range []mesh.Stage{mesh.Out, mesh.Back} {
		m, keys := keyMesh(t)
		end := m.helper()
		dir := m.config.StateDir
		keys, err := keys.Begin(dir, now)
		m.must(err)
		if stage == mesh.Back {
			keys, err = keys.Switch(dir, now)
			m.must(err)
		}
		out := newLines()
		finished := make(chan error, 1)
		go func() {
			out.await("A rotation is going on already, ordered at 2026-01-02 03:04:05.")
			var err error
			if keys.Stage == mesh.Out {
				keys, err = keys.Switch(dir, now)
			}
			if err == nil {
				_, err = keys.End(dir, now)
			}
			finished <- err
		}()
		m.must(rotate(t.Context(), out, m.config, identity.Order{At: now}, false))
		m.must(<-finished)
		if identity.Ordered(dir) || !strings.Contains(out.String(), "Done: ") {
			t.Errorf("%q: %s", stage, out.String())
		}
		end()
	}
}

func TestKeyRotateLooks(t *testing.T) {
	m, keys := keyMesh(t)
	var out bytes.Buffer
	p := progress{config: m.config, before: keys, order: identity.Order{At: now}, started: now, say: func(string, ...any) { out.WriteString("said\n") }}
	p.say = func(_ string, args ...any) { out.WriteString(args[0].(string) + "\n") }
	if done, err := p.look(t.Context(), now); done || err != nil {
		t.Errorf("%v, %v", done, err)
	}
	end := m.helper()
	for range 2 {
		if done, err := p.look(t.Context(), now.Add(11*time.Second)); done || err != nil {
			t.Errorf("%v, %v", done, err)
		}
	}
	if out.String() != "wgcnid has taken the order, and has not begun yet: its log says why.\n" {
		t.Error(out.String())
	}
	end()
	if done, err := p.look(t.Context(), now.Add(20*time.Second)); done || err != nil { // it may be started anew
		t.Errorf("%v, %v", done, err)
	}
	if _, err := p.look(t.Context(), now.Add(31*time.Second)); err == nil || !strings.Contains(err.Error(), "has ended on this node") {
		t.Errorf("%v", err)
	}
}

func TestKeyRotateCluster(t *testing.T) {
	m, keys := keyMesh(t)
	defer m.helper()()
	keys, err := keys.Begin(m.config.StateDir, now)
	m.must(err)
	keys, err = keys.Switch(m.config.StateDir, now)
	m.must(err)
	b := rotating("b", 51821)
	out := newLines()
	finished := make(chan error, 1)
	go func() {
		out.await("A rotation is going on already, ordered at ") // one that has ended would not be its own
		_, err := keys.End(m.config.StateDir, now)
		out.await("0 of 1 other nodes have a new key; not yet: b; their version rotates no keys: c.\n")
		b.Revision++
		b.PublicKey, b.Next = b.Next, wgtypes.Key{77}
		m.cache(b, registrytest.Record("c", 3))
		finished <- err
	}()
	m.must(rotate(t.Context(), out, m.config, identity.Order{At: now, Cluster: true}, false))
	m.must(<-finished)
	if !strings.HasSuffix(out.String(), "1 of 1 other nodes have a new key; their version rotates no keys: c.\n") {
		t.Error(out.String())
	}
	if o, ok, err := takeOrder(m.config.StateDir); !ok || err != nil || !o.Cluster {
		t.Errorf("%v %v %v", o, ok, err)
	}
}
