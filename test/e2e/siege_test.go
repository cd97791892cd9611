package e2e

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/test/cluster"
)

// entries is a registry as somebody sees it who can write to it: bytes by name.
type entries map[string][]byte

// rawRegistry reads and writes them without any code of ours.
type rawRegistry interface {
	read(t *testing.T) entries
	write(t *testing.T, e entries)
}

// rawFile is the shared file.
type rawFile string

func (f rawFile) read(t *testing.T) entries {
	t.Helper()
	text, err := os.ReadFile(string(f))
	if err != nil {
		t.Fatal(err)
	}
	var doc struct{ Nodes map[string]json.RawMessage }
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	out := entries{}
	for name, data := range doc.Nodes {
		out[name] = data
	}
	return out
}

func (f rawFile) write(t *testing.T, e entries) {
	t.Helper()
	nodes := map[string]json.RawMessage{}
	for name, data := range e {
		if !json.Valid(data) { // the file has no place for it but in quotes
			data, _ = json.Marshal(string(data))
		}
		nodes[name] = data
	}
	text, err := json.Marshal(map[string]any{"version": 1, "nodes": nodes})
	if err != nil {
		t.Fatal(err)
	}
	aside := string(f) + ".attack"
	if err := errors.Join(os.WriteFile(aside, text, 0o644), os.Rename(aside, string(f))); err != nil {
		t.Fatal(err)
	}
}

// rawEtcd is etcd.
type rawEtcd struct{ *cluster.Etcd }

const etcdNodes = etcdPrefix + "nodes/"

func (r rawEtcd) ctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := r.Ctl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (r rawEtcd) read(t *testing.T) entries {
	t.Helper()
	var answer struct {
		KVs []struct{ Key, Value string }
	}
	if err := json.Unmarshal([]byte(r.ctl(t, "get", "--prefix", etcdNodes, "-w", "json")), &answer); err != nil {
		t.Fatal(err)
	}
	out := entries{}
	for _, kv := range answer.KVs {
		key, keyErr := base64.StdEncoding.DecodeString(kv.Key)
		value, valueErr := base64.StdEncoding.DecodeString(kv.Value)
		if err := errors.Join(keyErr, valueErr); err != nil {
			t.Fatal(err)
		}
		out[strings.TrimPrefix(string(key), etcdNodes)] = value
	}
	return out
}

func (r rawEtcd) write(t *testing.T, e entries) {
	t.Helper()
	present := r.read(t)
	for name, data := range e {
		if string(present[name]) != string(data) {
			r.ctl(t, "put", "--", etcdNodes+name, string(data))
		}
	}
	for name := range present {
		if _, stays := e[name]; !stays {
			r.ctl(t, "del", "--", etcdNodes+name)
		}
	}
}

// alter changes fields of a record and leaves all others, its seal too, as they are.
func (e entries) alter(name string, fields map[string]any) {
	record := map[string]json.RawMessage{}
	if json.Unmarshal(e[name], &record) != nil {
		panic(name + " is no record")
	}
	for key, value := range fields {
		text, err := json.Marshal(value)
		if err != nil {
			panic(err)
		}
		record[key] = text
	}
	e[name], _ = json.Marshal(record)
}

// field is a field of a record, as it is stored.
func (e entries) field(name, key string) json.RawMessage {
	record := map[string]json.RawMessage{}
	if json.Unmarshal(e[name], &record) != nil {
		panic(name + " is no record")
	}
	return record[key]
}

// claims are prefixes as a record has them.
func claims(since string, prefixes ...string) (out []map[string]string) {
	for _, p := range prefixes {
		out = append(out, map[string]string{"prefix": p, "since": since})
	}
	return out
}

// An attack is what somebody without the secret does to the registry. All but
// the deletion leave one entry that must be refused.
type attack struct {
	name string
	does func(entries)
	node string // the entry that is refused; "": none is
	kind string
	why  string
}

const aeon = "1970-01-01T00:00:00Z" // older than any claim

// A siege is a sealed mesh whose registry somebody else can write to.
type siege struct {
	*mesh
	registry rawRegistry
}

// withstand does the attack, and looks at everything that must not change by it.
func (s siege) withstand(t *testing.T, a attack) {
	before, counted := map[string][]string{}, map[string]uint64{}
	for _, n := range s.Nodes {
		before[n.Name] = peersOf(t, n)
		counted[n.Name] = awaitStatus(t, n, "no refused record", func(st cluster.Status) bool { return len(st.Report.Refused) == 0 }).Report.RefusedTotal[a.kind]
	}
	mustBeAsBefore := func(when string) {
		t.Helper()
		for _, n := range s.Nodes {
			if diff := cmp.Diff(before[n.Name], peersOf(t, n)); diff != "" {
				t.Errorf("%s: the peers of %s (-before +after):\n%s", when, n.Name, diff)
			}
		}
	}
	capture := watchUnderlay(t, s.Cluster)
	traffic := flowAll(t, s.pods)

	// A victim would put its record right before the others had read the false one.
	victim := s.Node(a.node)
	resume := func() {}
	if victim != nil {
		resume = pauseHelper(t, victim)
	}
	honest := s.registry.read(t)
	attacked := maps.Clone(honest)
	a.does(attacked)
	s.registry.write(t, attacked)
	for _, n := range s.Nodes {
		if a.node != "" && n != victim {
			s.mustShow(t, n, a, counted[n.Name]+1)
		}
	}
	mustBeAsBefore("under attack")
	resume()
	if victim != nil && a.kind != reconcile.KindReplayed { // its own record of before is no news to it
		awaitStatus(t, victim, "the refusal to be counted", func(st cluster.Status) bool { return st.Report.RefusedTotal[a.kind] == counted[victim.Name]+1 })
	}
	s.awaitRecords(t, honest)
	if _, newcomer := honest[a.node]; !newcomer && a.node != "" {
		s.registry.write(t, honest)
	}
	for _, n := range s.Nodes {
		awaitStatus(t, n, "the refusal to end with its cause", func(st cluster.Status) bool { return st.OK && len(st.Report.Refused) == 0 })
	}
	mustBeAsBefore("after the attack")
	traffic.lossless(t)
	mustBeClean(t, capture)
}

// pauseHelper stops a helper, and returns what lets it go on. The nsenter in front
// of it stops by itself when it sees that, and when it goes on wakes the helper
// (util-linux, sys-utils/nsenter.c, continue_as_child): each is waited for, lest
// a wake-up that is late ends the next pause.
func pauseHelper(t *testing.T, n *cluster.Node) (resume func()) {
	t.Helper()
	helpers, err := n.FindProcesses("wgcnid run")
	if err != nil || len(helpers) != 1 {
		t.Fatalf("helpers of %s: %v, %v", n.Name, helpers, err)
	}
	helper := helpers[0].HostPID
	_, parent := processState(t, helper)
	await := func(what string, right func(helper, nsenter string) bool) {
		t.Helper()
		err := cluster.Poll(t.Context(), "the helper of "+n.Name+" to "+what, func() error {
			h, _ := processState(t, helper)
			p, _ := processState(t, parent)
			if !right(h, p) {
				return fmt.Errorf("it is in state %s, nsenter in %s", h, p)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Kill(helper, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	paused := true
	t.Cleanup(func() { // else the node could not be stopped: its init waits for all to be reaped
		if paused {
			_ = unix.Kill(parent, unix.SIGCONT)
		}
	})
	await("stop", func(h, p string) bool { return h == "T" && p == "T" })
	return func() {
		t.Helper()
		if err := unix.Kill(parent, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		paused = false
		await("go on", func(h, p string) bool { return h != "T" && p == "S" })
	}
}

// processState is cluster.ProcessState of a process that must be there.
func processState(t *testing.T, pid int) (state string, parent int) {
	t.Helper()
	state, parent, err := cluster.ProcessState(pid)
	if err != nil {
		t.Fatal(err)
	}
	return state, parent
}

// mustShow waits until a node's helper, and its commands, tell of the refused record.
func (s siege) mustShow(t *testing.T, n *cluster.Node, a attack, total uint64) {
	t.Helper()
	st := awaitStatus(t, n, "the refusal", func(st cluster.Status) bool {
		return slices.ContainsFunc(st.Report.Refused, func(r reconcile.Refusal) bool {
			return r.Node == a.node && r.Kind == a.kind && strings.Contains(r.Reason, a.why)
		})
	})
	if got := st.Report.RefusedTotal[a.kind]; got != total || len(st.Report.Refused) != 1 {
		t.Errorf("%s counts %d %s; want %d. It refuses %+v", n.Name, got, a.kind, total, st.Report.Refused)
	}
	if !st.OK {
		t.Errorf("%s: %s %v", n.Name, st.Verdict, st.Pending)
	}
	for _, look := range []struct {
		command string
		want    []string
	}{
		{"status", []string{"refused since 2", a.why, fmt.Sprintf("%d %s", total, a.kind)}},
		{"nodes", []string{"refused: record ", a.why}},
	} {
		out, err := n.Wgcnid(t.Context(), look.command)
		if err != nil {
			t.Error(err)
		}
		for _, want := range look.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: wgcnid %s does not say %q:\n%s", n.Name, look.command, want, out)
			}
		}
		mustBePrintable(t, out)
	}
	mustBePrintable(t, s.helper(n).Log.String())
}

// mustBePrintable fails if a text could steer the terminal that shows it.
func mustBePrintable(t *testing.T, text string) {
	t.Helper()
	if i := strings.IndexFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 {
		t.Errorf("not printable: %q", text[i:min(len(text), i+40)])
	}
}

// awaitRecords waits until the nodes have put their records right by themselves.
func (s siege) awaitRecords(t *testing.T, want entries) {
	t.Helper()
	err := cluster.Poll(t.Context(), "the records to come back", func() error {
		have := s.registry.read(t)
		for name := range want {
			var was, is any
			_ = json.Unmarshal(want[name], &was)
			_ = json.Unmarshal(have[name], &is)
			if !reflect.DeepEqual(was, is) {
				return fmt.Errorf("%s was %s and is %s", name, want[name], have[name])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// newSiege is a sealed mesh of three nodes that has proven itself.
func newSiege(t *testing.T, secret string, o cluster.NetworkOptions, r func(*cluster.Cluster) rawRegistry) siege {
	t.Helper()
	o.Secrets = []string{secret}
	c := cluster.NewT(t, 3)
	raw := r(c)
	if etcd, ok := raw.(rawEtcd); ok {
		o.Stanza = map[string]any{"registry": etcd.Registry(nil)}
	}
	m := join(t, c, o)
	routeAroundTunnel(t, m.Cluster)
	serveAll(t, m.pods)
	keys, err := pairKeys(t, m.Nodes)
	if err != nil {
		t.Fatal(err)
	}
	mustDiffer(t, keys)
	for pair, psk := range keys {
		if psk == noKey {
			t.Errorf("no preshared key between %v", pair)
		}
	}
	return siege{m, raw}
}

// change gives a node one more address, and waits until all know its new record.
func (s siege) change(t *testing.T, n *cluster.Node) {
	t.Helper()
	before := s.registry.read(t)[n.Name]
	run(t, n, "ip", "address", "add", "192.0.2.77/24", "dev", cluster.Uplink)
	var record registry.Record
	err := cluster.Poll(t.Context(), "a new record of "+n.Name, func() error {
		now := s.registry.read(t)[n.Name]
		if string(now) == string(before) {
			return errors.New("it is the one of before")
		}
		return json.Unmarshal(now, &record)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range s.Nodes {
		err := cluster.Poll(t.Context(), other.Name+" to know it", func() error {
			return s.knows(t, other, record)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// knows looks at what a helper has saved, since `wgcnid nodes` asks the registry too.
func (s siege) knows(t *testing.T, n *cluster.Node, r registry.Record) error {
	t.Helper()
	known, _, err := store.LoadKnown(t.Context(), n.Path("/var/lib/wgcni"))
	if got, _ := known.Records.Record(r.Name); err == nil && got.Revision != r.Revision {
		err = fmt.Errorf("revision %d of %s; want %d", got.Revision, r.Name, r.Revision)
	}
	return err
}
