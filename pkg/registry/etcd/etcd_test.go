package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/etcd/etcdtest"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

func TestRegistry(t *testing.T) {
	backend := func(endpoints []string) registrytest.Backend {
		return func(t *testing.T) func() registry.Store {
			cfg := Config{Endpoints: endpoints, Prefix: fmt.Sprintf("/%s-%d", t.Name(), time.Now().UnixNano())}
			return func() registry.Store { return open(t, cfg) }
		}
	}
	t.Run("single", func(t *testing.T) { registrytest.Run(t, backend(sharedServer(t).Endpoints())) })
	t.Run("cluster", func(t *testing.T) {
		registrytest.Run(t, backend(etcdtest.StartCluster(t, 3, etcdtest.Options{}).Endpoints()))
	})
}

func TestString(t *testing.T) {
	for _, c := range []struct {
		cfg          Config
		want, folder string
	}{
		{Config{}, "etcd:/wgcni/", "/wgcni/nodes/"},
		{
			Config{Endpoints: []string{"https://192.0.2.1:2379", "https://192.0.2.2:2379"}, Prefix: "/a/b", Username: "me", PasswordFile: "/p"},
			"etcd:https://192.0.2.1:2379,https://192.0.2.2:2379/a/b/", "/a/b/nodes/",
		},
		{Config{Endpoints: []string{"http://me:secret@192.0.2.1:2379"}, Prefix: "/a//"}, "etcd:http://192.0.2.1:2379/a/", "/a/nodes/"},
		{Config{Endpoints: []string{"me:secret@192.0.2.1:2379"}}, "etcd:192.0.2.1:2379/wgcni/", "/wgcni/nodes/"},
		{Config{Endpoints: []string{"192.0.2.1:2379"}, Prefix: "/"}, "etcd:192.0.2.1:2379/", "/nodes/"},
	} {
		s := New(c.cfg)
		if got := s.String(); got != c.want || s.folder != c.folder {
			t.Errorf("%s, keys below %s; want %s and %s", got, s.folder, c.want, c.folder)
		}
		must(t, s.Close())
	}
}

// An outage is known within 15 s, whatever the jitter.
func TestDefaults(t *testing.T) {
	s := New(Config{})
	defer s.Close()
	if worst := time.Duration(1.1*float64(s.probe)) + s.timeout; worst > 15*time.Second {
		t.Errorf("a silent etcd is noticed after up to %v", worst)
	}
	for range 1000 {
		if d := jitter(time.Second, 0.5); d < 500*time.Millisecond || d > 1500*time.Millisecond {
			t.Fatalf("jitter: %v", d)
		}
	}
}

// What is wrong with the configuration is said by every use, and New touches nothing.
func TestConfigRefused(t *testing.T) {
	for _, c := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, "endpoints: none"},
		{Config{Endpoints: []string{"http://me:secret@192.0.2.1:2379"}}, "want username and passwordFile instead"},
		{Config{Endpoints: []string{"me:secret@192.0.2.1:2379"}}, "want username and passwordFile instead"},
		{Config{Endpoints: []string{"http://192.0.2.1:2379", "https://192.0.2.2:2379"}}, "want https for all or for none"},
		{Config{Endpoints: []string{"http://192.0.2.1:2379"}, CAFile: "/ca"}, "endpoint http://192.0.2.1:2379 is not encrypted, although there is a caFile"},
		{Config{Endpoints: []string{"https://192.0.2.1:2379"}, CertFile: "/cert"}, "certFile and keyFile: one without the other"},
		{Config{Endpoints: []string{"https://192.0.2.1:2379"}, Username: "me"}, "username and passwordFile: one without the other"},
		{Config{Endpoints: []string{"https://192.0.2.1:2379"}, CAFile: "/nowhere/ca.pem"}, "open /nowhere/ca.pem: no such file"},
		{Config{Endpoints: []string{"https://192.0.2.1:2379"}, Username: "me", PasswordFile: "/nowhere/password"}, "passwordFile: open /nowhere/password: no such file"},
	} {
		s := open(t, c.cfg)
		_, err := s.Entries(t.Context())
		says(t, err, c.want)
		says(t, s.Update(t.Context(), "node-a", set("x")), c.want)
		r := watching(t, s)
		r.fails(nil, c.want)
		if strings.Contains(r.errors()[0], "secret") {
			t.Errorf("%q shows a password", r.errors())
		}
	}
}

// Whatever name and value: it is stored to the byte, or refused with a reason.
func TestOddEntries(t *testing.T) {
	s := open(t, sharedConfig(t))
	want := map[string]string{}
	for _, c := range []struct {
		name, value string
		refusal     string
	}{
		{"empty", "", ""},
		{"not-utf-8", "\xff\xfe\x00\x80", ""},
		{"newline", "\n", ""},
		{"large", strings.Repeat("x", 1_400_000), ""},
		{"larger", strings.Repeat("x", 1_600_000), "larger than what etcd takes"},  // than etcd takes
		{"largest", strings.Repeat("x", 3_000_000), "larger than what etcd takes"}, // than gRPC takes
		{"", "x", "not a node's name"},
		{"a/b", "x", "not a node's name"},
		{"\xff\x00 ☃", "x", ""},
		{"..", "x", ""},
		{strings.Repeat("n", 10_000), "x", ""},
	} {
		err := s.Update(t.Context(), c.name, set(c.value))
		if c.refusal == "" {
			must(t, err)
			want[c.name] = c.value
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.refusal) || len(err.Error()) > 1000 {
			t.Errorf("%.20q: error %v, want %q", c.name, err, c.refusal)
		}
	}
	got, err := s.Entries(t.Context())
	must(t, err)
	if !equalEntries(got, want) {
		t.Errorf("entries %.300v", texts(got))
	}
	if got["empty"] == nil {
		t.Error("an empty entry reads as nil")
	}
	var stored []byte
	must(t, s.Update(t.Context(), "empty", func(b []byte) ([]byte, error) { stored = b; return nil, nil }))
	if stored == nil {
		t.Error("an empty entry is given to change as nil, for nothing")
	}
}

func FuzzEntry(f *testing.F) {
	f.Add("node-a", []byte(`{"a":1}`))
	f.Add("", []byte(nil))
	f.Add("a/b", []byte("\xff"))
	f.Add("nodes/\x00", bytes.Repeat([]byte("x"), 1000))
	cfg := sharedConfig(f)
	s := open(f, cfg)
	admin := sharedServer(f).Client(f)
	beside := open(f, Config{Endpoints: cfg.Endpoints, Prefix: strings.TrimSuffix(cfg.Prefix, "/") + "2"})
	f.Fuzz(func(t *testing.T, name string, value []byte) {
		if value == nil {
			value = []byte{}
		}
		err := s.Update(t.Context(), name, func([]byte) ([]byte, error) { return value, nil })
		entries, err2 := s.Entries(t.Context())
		must(t, err2)
		got, there := entries[name]
		if err == nil && (!there || !bytes.Equal(got, value)) {
			t.Errorf("stored %q, read %q", value, got)
		}
		if err != nil && there {
			t.Errorf("refused and stored all the same: %v", err)
		}
		if err == nil {
			_, err = admin.Delete(t.Context(), s.folder+name)
			must(t, err)
		}
		if entries, err := beside.Entries(t.Context()); err != nil || len(entries) > 0 {
			t.Errorf("beside: %v, error %v", entries, err)
		}
	})
}

// Keys below and beside the prefix are not ours, to Entries and to Watch.
func TestForeignKeys(t *testing.T) {
	cfg := sharedConfig(t)
	s := open(t, cfg)
	r := watching(t, s)
	c := sharedServer(t).Client(t)
	base := strings.TrimSuffix(cfg.Prefix, "/")
	for _, key := range []string{
		base, base + "/", base + "/nodes", base + "/nodes/", base + "/nodes/a/b", base + "/nodes//", base + "/nodes0",
		base + "2/nodes/node-b", base + "/other", "nodes/node-c",
	} {
		_, err := c.Put(t.Context(), key, "foreign")
		must(t, err)
	}
	put(t, s, "node-a", "1")
	got, err := s.Entries(t.Context())
	must(t, err)
	if diff := cmp.Diff(map[string]string{"node-a": "1"}, texts(got)); diff != "" {
		t.Error(diff)
	}
	r.entries("node-a", "1")
	_, err = c.Delete(t.Context(), base+"/nodes/a/b")
	must(t, err)
	_, err = c.Delete(t.Context(), base+"/nodes/node-a")
	must(t, err)
	r.entries()
	for _, change := range r.seen {
		if len(change.Entries) > 1 {
			t.Errorf("a foreign key was delivered: %v", texts(change.Entries))
		}
	}
	if len(r.seen) > 3 {
		t.Errorf("foreign keys made changes: %v", r.seen)
	}
}

// With a Watch an Update asks nothing before it writes.
func TestUpdateRemembers(t *testing.T) {
	var count counter
	s := open(t, sharedConfig(t), count.option, WithProbeInterval(time.Hour))
	r := watching(t, s)
	r.entries()
	for i := range 3 {
		before := count.of("Range")
		put(t, s, "node-a", strconv.Itoa(i))
		r.entries("node-a", strconv.Itoa(i))
		if got := count.of("Range") - before; got != 0 || count.of("Txn") != i+1 {
			t.Errorf("update %d read %d times, and there were %d transactions", i, got, count.of("Txn"))
		}
	}
}

// What a Watch saw last may be the past: nothing is decided upon it but what
// etcd confirms.
func TestUpdateMemoryIsStale(t *testing.T) {
	refusal := errors.New("no")
	for _, c := range []struct {
		name     string
		stored   string // "" for nothing
		change   func(stored string) (string, error)
		asked    []string
		want     string
		wantFail error
	}{
		{
			"declines what is past", "new", func(stored string) (string, error) {
				return map[string]string{"old": "", "new": "mine"}[stored], nil
			},
			[]string{"old", "new"},
			"mine", nil,
		},
		{
			"refuses what is past", "new", func(stored string) (string, error) {
				if stored == "old" {
					return "", refusal
				}
				return stored + " mine", nil
			},
			[]string{"old", "new"},
			"new mine", nil,
		},
		{"adds to what is past", "new", func(stored string) (string, error) { return stored + " mine", nil }, []string{"old", "new"}, "new mine", nil},
		{"adds to what is gone", "", func(stored string) (string, error) { return stored + " mine", nil }, []string{"old", ""}, " mine", nil},
		{"refuses", "new", func(string) (string, error) { return "", refusal }, []string{"old", "new"}, "new", refusal},
		{"declines", "new", func(string) (string, error) { return "", nil }, []string{"old", "new"}, "new", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t, sharedConfig(t))
			if c.stored != "" {
				put(t, s, "node-a", c.stored)
			}
			past := []byte("old")
			s.watches[&watch{steady: true, items: map[string]item{"node-a": {value: past, mod: 1}}}] = struct{}{}
			var asked []string
			err := s.Update(t.Context(), "node-a", func(stored []byte) ([]byte, error) {
				asked = append(asked, string(stored))
				value, err := c.change(string(stored))
				if len(stored) > 0 {
					stored[0] = '!' // its own to scribble on
				}
				if value == "" {
					return nil, err
				}
				return []byte(value), err
			})
			if !errors.Is(err, c.wantFail) {
				t.Errorf("error %v, want %v", err, c.wantFail)
			}
			if diff := cmp.Diff(c.asked, asked); diff != "" {
				t.Error(diff)
			}
			if got, err := s.Entries(t.Context()); err != nil || string(got["node-a"]) != c.want {
				t.Errorf("stored %q, error %v; want %q", got["node-a"], err, c.want)
			}
			if string(past) != "old" {
				t.Errorf("what the Watch handed out was changed to %q", past)
			}
		})
	}
}

// None of two stores' updates of one key is lost, with a Watch and without.
func TestUpdatesRace(t *testing.T) {
	for name, watched := range map[string]bool{"asking": false, "remembering": true} {
		t.Run(name, func(t *testing.T) {
			cfg := sharedConfig(t)
			const each = 50
			var wg sync.WaitGroup
			for range 2 {
				s := open(t, cfg)
				if watched {
					go func() {
						for range s.Watch(t.Context()) {
						}
					}()
				}
				wg.Go(func() {
					for range each {
						err := s.Update(t.Context(), "counter", func(stored []byte) ([]byte, error) {
							n, _ := strconv.Atoi(string(stored))
							return strconv.AppendInt(nil, int64(n+1), 10), nil
						})
						if err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if got, err := open(t, cfg).Entries(t.Context()); err != nil || string(got["counter"]) != strconv.Itoa(2*each) {
				t.Errorf("counted to %s, error %v; want %d", got["counter"], err, 2*each)
			}
		})
	}
}

// A transaction that took place and whose answer was lost counts once.
func TestUpdateAnswerLost(t *testing.T) {
	count := counter{after: func(kind string, n int) error {
		if kind == "Txn" && n == 1 {
			return status.Error(codes.Unavailable, "the answer was lost")
		}
		return nil
	}}
	s := open(t, sharedConfig(t), count.option)
	asked := 0
	must(t, s.Update(t.Context(), "node-a", func(stored []byte) ([]byte, error) {
		asked++
		return append(stored, '.'), nil
	}))
	if got, err := s.Entries(t.Context()); err != nil || string(got["node-a"]) != "." || asked != 1 {
		t.Errorf("stored %q after asking %d times, error %v; want one", got["node-a"], asked, err)
	}
}

func TestCtxEnds(t *testing.T) {
	s := open(t, sharedConfig(t))
	dead := open(t, Config{Endpoints: []string{"http://127.0.0.1:1"}}, WithTimeout(time.Hour))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	for _, c := range []struct {
		s    *Store
		ctx  context.Context
		want error
	}{{s, cancelled, context.Canceled}, {dead, cancelled, context.Canceled}, {dead, short, context.DeadlineExceeded}} {
		_, err := c.s.Entries(c.ctx)
		for _, err := range []error{err, c.s.Update(c.ctx, "node-a", set("x"))} {
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.s.String()) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		}
		for range c.s.Watch(c.ctx) { // until it is closed
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := dead.Entries(ctx); !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("error %v, want what it was waiting for", err)
	}
}

// A listing of many pages is that of one revision, even where that revision is
// compacted midway.
func TestPages(t *testing.T) {
	cfg := sharedConfig(t)
	admin := sharedServer(t).Client(t)
	writer := open(t, cfg)
	want := map[string]string{}
	for i := range 10 {
		name := fmt.Sprintf("node-%d", i)
		put(t, writer, name, "1")
		want[name] = "1"
	}
	for _, c := range []struct {
		name   string
		midway func()
		change map[string]string
		pages  int
	}{
		{"undisturbed", func() {}, nil, 4},
		// Written behind the page that was read and before it: neither is seen.
		{"written to", func() { put(t, writer, "node-9", "2"); put(t, writer, "node-0", "2") }, nil, 4},
		{"compacted", func() { put(t, writer, "node-0", "3"); compact(t, admin) }, map[string]string{"node-9": "2", "node-0": "3"}, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			count := counter{after: func(kind string, n int) error {
				if kind == "page" && n == 1 {
					c.midway()
				}
				return nil
			}}
			s := open(t, cfg, count.option, func(s *Store) { s.page = 3 })
			got, err := s.Entries(t.Context())
			must(t, err)
			maps.Copy(want, c.change)
			if diff := cmp.Diff(want, texts(got)); diff != "" {
				t.Error(diff)
			}
			if count.of("page") != c.pages {
				t.Errorf("%d pages read, want %d", count.of("page"), c.pages)
			}
		})
	}
}

// More than fits into memory is refused, be it in one page or in many, listed or
// heard of; and it is taken up again once it has shrunk.
func TestOversized(t *testing.T) {
	cfg := sharedConfig(t)
	writer := open(t, cfg)
	admin := sharedServer(t).Client(t)
	bound := func(page int64) Option { return func(s *Store) { s.limit, s.page = 1<<20, page } }
	r := watching(t, open(t, cfg, bound(1000)))
	r.entries()
	half := strings.Repeat("x", 1<<19)
	put(t, writer, "node-a", half)
	r.entries("node-a", half)
	put(t, writer, "node-b", half)
	r.fails(errOversized)
	for _, page := range []int64{1, 1000} {
		_, err := open(t, cfg, bound(page)).Entries(t.Context())
		if !errors.Is(err, errOversized) || !strings.Contains(err.Error(), "holds more than 1 MiB, which is the most that is read") {
			t.Errorf("pages of %d: error %v", page, err)
		}
	}
	_, err := admin.Delete(t.Context(), writer.folder+"node-a")
	must(t, err)
	r.entries("node-b", half)
	if got := r.errors(); len(got) != 1 {
		t.Errorf("%d errors: %q", len(got), got)
	}
}

// A cluster without space is read as before, and says how to get some.
func TestOutOfSpace(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t, etcdtest.Options{QuotaBytes: 2 << 20})
	s := open(t, Config{Endpoints: server.Endpoints()})
	r := watching(t, s)
	put(t, s, "node-a", "1")
	r.entries("node-a", "1")
	admin := server.Client(t)
	var err error
	for i := 0; err == nil; i++ {
		_, err = admin.Put(t.Context(), fmt.Sprint("ballast", i), strings.Repeat("x", 1<<19))
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatal(err)
	}
	err = s.Update(t.Context(), "node-a", set("2"))
	if !errors.Is(err, rpctypes.ErrNoSpace) || !strings.Contains(err.Error(), "`etcdctl alarm disarm`") {
		t.Errorf("error %v", err)
	}
	if got, err := s.Entries(t.Context()); err != nil || string(got["node-a"]) != "1" {
		t.Errorf("entries %v, error %v", texts(got), err)
	}

	// The way out that the error names.
	_, err = admin.Delete(t.Context(), "ballast", clientv3.WithPrefix())
	must(t, err)
	resp, err := admin.Get(t.Context(), "ballast")
	must(t, err)
	_, err = admin.Compact(t.Context(), resp.Header.Revision, clientv3.WithCompactPhysical())
	must(t, err)
	_, err = admin.Defragment(t.Context(), server.Endpoints()[0])
	must(t, err)
	_, err = admin.AlarmDisarm(t.Context(), &clientv3.AlarmMember{})
	must(t, err)
	put(t, s, "node-a", "2")
	r.entries("node-a", "2")
	if got := r.errors(); len(got) != 0 {
		t.Errorf("the Watch said %q", got)
	}
}
