package etcd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/etcd/etcdtest"
)

// Goroutines and connections end with ctx, and with Close, whatever etcd does.
func TestNothingIsLeft(t *testing.T) {
	server := etcdtest.Start(t, etcdtest.Options{})
	for _, c := range []struct {
		name     string
		endpoint string
		harm     func() error
	}{
		{"etcd is well", server.Endpoints()[0], func() error { return nil }},
		{"etcd is silent", server.Endpoints()[0], server.Pause},
		{"etcd is there again", server.Endpoints()[0], server.Resume},
		{"etcd is gone", server.Endpoints()[0], server.Kill},
		{"etcd never was", "http://127.0.0.1:1", func() error { return nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			s := open(t, Config{Endpoints: []string{c.endpoint}})
			ctx, cancel := context.WithCancel(t.Context())
			one, other := s.Watch(ctx), s.Watch(ctx)
			if c.name == "etcd is well" {
				<-one
			}
			must(t, c.harm())
			cancel()
			for range one {
			}
			for range other {
			}
			if len(s.watches) > 0 {
				t.Error("an ended Watch is still asked what it knows")
			}
		})
	}
}

// A handle that was closed says so, and a Watch goes on until its ctx ends.
func TestClosed(t *testing.T) {
	noLeaks(t)
	s := New(sharedConfig(t), brisk)
	ctx, cancel := context.WithCancel(t.Context())
	r := &reader{t: t, changes: s.Watch(ctx)}
	r.entries()
	must(t, s.Close())
	must(t, s.Close())
	r.fails(errClosed)
	if _, err := s.Entries(t.Context()); !errors.Is(err, errClosed) {
		t.Errorf("error %v", err)
	}
	select {
	case c, more := <-r.changes:
		t.Errorf("a second change: %v, channel open %v", c, more)
	case <-time.After(s.longest):
	}
	cancel()
	for range r.changes {
	}
}

// What was handed out stays as it was, and several Watches of one store get the
// same.
func TestWatchesShare(t *testing.T) {
	s := open(t, sharedConfig(t))
	readers := []*reader{watching(t, s), watching(t, s)}
	var given []registry.Entries
	var want []map[string]string
	for i := range 5 {
		put(t, s, fmt.Sprint("node-", i), "1")
		put(t, s, "node-0", fmt.Sprint(i))
		for _, r := range readers {
			c := r.await("both", func(c registry.Change) bool {
				return len(c.Entries) == i+1 && string(c.Entries["node-0"]) == fmt.Sprint(i)
			})
			given, want = append(given, c.Entries), append(want, texts(c.Entries))
		}
	}
	for i := range given {
		if diff := cmp.Diff(want[i], texts(given[i])); diff != "" {
			t.Error(diff)
		}
	}
}

// What comes while the reader does something else is one change, and none if
// all is as it was.
func TestWatchCoalesces(t *testing.T) {
	s := open(t, sharedConfig(t))
	r, other := watching(t, s), watching(t, s)
	r.entries()
	for i := range 20 {
		put(t, s, "node-a", fmt.Sprint(i))
	}
	other.entries("node-a", "19")
	eventually(t, "the other Watch is as far", func() bool {
		for w := range s.watches {
			if i, _ := w.recall("node-a"); string(i.value) != "19" {
				return false
			}
		}
		return true
	})
	before := len(r.seen)
	r.entries("node-a", "19")
	// deliver may have been about to offer one of the earlier ones.
	if n := len(r.seen) - before; n > 2 {
		t.Errorf("%d changes for a reader that was away", n)
	}
}

// A stream that broke goes on where it broke: nothing is listed again, nothing
// is missed, and a short break is no outage.
func TestWatchResumes(t *testing.T) {
	t.Parallel()
	cfg := sharedConfig(t)
	var count counter
	var gate gate
	r := watching(t, open(t, cfg, count.option, gate.option))
	writer := open(t, cfg)
	put(t, writer, "node-a", "1")
	put(t, writer, "node-b", "1")
	r.entries("node-a", "1", "node-b", "1")
	admin := sharedServer(t).Client(t)
	for i := range 5 {
		gate.close()
		put(t, writer, "node-a", fmt.Sprint("again ", i))
		_, err := admin.Delete(t.Context(), writer.folder+"node-b")
		must(t, err)
		if i%2 == 0 {
			put(t, writer, "node-b", "1") // as it was
		}
		gate.open()
		if i%2 == 0 {
			r.entries("node-a", fmt.Sprint("again ", i), "node-b", "1")
		} else {
			r.entries("node-a", fmt.Sprint("again ", i))
		}
	}
	if got := count.of("page"); got != 1 {
		t.Errorf("listed %d times", got)
	}
	if got := r.errors(); len(got) > 0 {
		t.Errorf("the Watch said %q", got)
	}
}

// What was compacted while the stream was broken can't be heard of any more.
func TestWatchAfterCompaction(t *testing.T) {
	cfg := sharedConfig(t)
	var count counter
	var gate gate
	r := watching(t, open(t, cfg, count.option, gate.option))
	writer := open(t, cfg)
	put(t, writer, "node-a", "1")
	put(t, writer, "node-b", "1")
	r.entries("node-a", "1", "node-b", "1")
	gate.close()
	put(t, writer, "node-a", "2")
	admin := sharedServer(t).Client(t)
	_, err := admin.Delete(t.Context(), writer.folder+"node-b")
	must(t, err)
	compact(t, admin)
	gate.open()
	r.entries("node-a", "2")
	if got := count.of("page"); got != 2 {
		t.Errorf("listed %d times, want one more", got)
	}
	if got := r.errors(); len(got) > 0 {
		t.Errorf("the Watch said %q", got)
	}
}

// wire lets a test look at what streams bring, and break them.
type wire struct {
	mu     sync.Mutex
	refuse func(ctx context.Context) error // before a stream is opened
	seen   func(*etcdserverpb.WatchResponse)
}

func (w *wire) option(s *Store) {
	s.options = append(s.options, grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		w.mu.Lock()
		refuse := w.refuse
		w.mu.Unlock()
		if refuse != nil {
			if err := refuse(ctx); err != nil {
				return nil, err
			}
		}
		stream, err := streamer(ctx, desc, cc, method, opts...)
		return wiredStream{stream, w}, err
	}))
}

func (w *wire) set(refuse func(ctx context.Context) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refuse = refuse
}

type wiredStream struct {
	grpc.ClientStream
	w *wire
}

func (s wiredStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if resp, ok := m.(*etcdserverpb.WatchResponse); ok && err == nil && s.w.seen != nil {
		s.w.seen(resp)
	}
	return err
}

// What was missed may be more than one message holds.
func TestWatchCatchesUp(t *testing.T) {
	cfg := sharedConfig(t)
	var gate gate
	fragments := make(chan bool, 1000)
	wire := wire{seen: func(resp *etcdserverpb.WatchResponse) { fragments <- resp.Fragment }}
	r := watching(t, open(t, cfg, gate.option, wire.option))
	r.entries()
	gate.close()
	var want []string
	writer := open(t, cfg)
	for i := range 6 {
		want = append(want, fmt.Sprint("node-", i), strings.Repeat(fmt.Sprint(i), 1<<20))
		put(t, writer, want[2*i], want[2*i+1])
	}
	gate.open()
	before := len(r.seen)
	r.await("all", func(c registry.Change) bool { return len(c.Entries) == 6 })
	c := r.seen[len(r.seen)-1]
	for i := range 6 {
		if string(c.Entries[want[2*i]]) != want[2*i+1] {
			t.Errorf("%s is not what was stored", want[2*i])
		}
	}
	if n := len(r.seen) - before; n != 1 {
		t.Errorf("caught up in %d changes", n)
	}
	fragmented := false
	for len(fragments) > 0 {
		fragmented = <-fragments || fragmented
	}
	if !fragmented {
		t.Error("the test itself: no message was split")
	}
}

// While nothing of ours changes and much of others' does, etcd tells how far it
// has come. So a compaction does not cost a listing.
func TestWatchProgress(t *testing.T) {
	server := etcdtest.Start(t, etcdtest.Options{Args: []string{"--watch-progress-notify-interval", "100ms"}})
	var count counter
	var gate gate
	told := make(chan int64, 1000)
	wire := wire{seen: func(resp *etcdserverpb.WatchResponse) {
		if !resp.Created && len(resp.Events) == 0 {
			told <- resp.Header.Revision
		}
	}}
	r := watching(t, open(t, Config{Endpoints: server.Endpoints()}, gate.option, count.option, wire.option))
	r.entries()
	admin := server.Client(t)
	foreign, err := admin.Put(t.Context(), "elsewhere", "")
	must(t, err)
	for <-told < foreign.Header.Revision {
	}
	gate.close()
	_, err = admin.Compact(t.Context(), foreign.Header.Revision)
	must(t, err)
	put(t, open(t, Config{Endpoints: server.Endpoints()}), "node-a", "1")
	gate.open()
	r.entries("node-a", "1")
	if got := count.of("page"); got != 1 {
		t.Errorf("listed %d times", got)
	}
}

// A stream that can't be had is an outage too, though the probe is answered.
func TestStreamRefused(t *testing.T) {
	var wire wire
	s := open(t, sharedConfig(t), wire.option, WithTimeout(300*time.Millisecond))
	wire.set(func(context.Context) error { return rpctypes.ErrGRPCPermissionDenied })
	r := watching(t, s)
	r.fails(rpctypes.ErrPermissionDenied)
	wire.set(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	r.fails(ErrUnreachable, "no answer within 300ms")
	wire.set(nil)
	r.entries()
}

func TestRefusal(t *testing.T) {
	for _, c := range []struct {
		resp *etcdserverpb.WatchResponse
		want error
		text string
	}{
		{&etcdserverpb.WatchResponse{Created: true}, nil, ""},
		{&etcdserverpb.WatchResponse{Canceled: true, CompactRevision: 7}, rpctypes.ErrCompacted, ""},
		{&etcdserverpb.WatchResponse{Canceled: true, CancelReason: rpctypes.ErrGRPCPermissionDenied.Error()}, rpctypes.ErrPermissionDenied, ""},
		{&etcdserverpb.WatchResponse{Canceled: true, CancelReason: rpctypes.ErrGRPCInvalidAuthToken.Error()}, rpctypes.ErrInvalidAuthToken, ""},
		{&etcdserverpb.WatchResponse{Canceled: true, CancelReason: "tired"}, nil, "the watch was cancelled: tired"},
		{&etcdserverpb.WatchResponse{Canceled: true}, nil, "the watch was cancelled"},
	} {
		err := refusal(c.resp)
		if c.text != "" {
			says(t, err, c.text)
		} else if !errors.Is(err, c.want) {
			t.Errorf("%v: error %v, want %v", c.resp, err, c.want)
		}
	}
}

// An outage is one error, however often it is met and whatever its text says of
// ports; and it is over with the entries, even if they are the same.
func TestOutage(t *testing.T) {
	t.Parallel()
	cfg := sharedConfig(t)
	var count counter
	var gate gate
	s := open(t, cfg, count.option, gate.option, WithTimeout(300*time.Millisecond))
	r, late := watching(t, s), watching(t, s)
	put(t, s, "node-a", "1")
	r.entries("node-a", "1")
	late.entries("node-a", "1")
	listed := count.of("page")
	for range 2 {
		gate.close()
		r.fails(ErrUnreachable, cfg.Endpoints[0], "no way today", "see that it runs")
		gate.awaitDials(t, 10)
		if _, err := s.Entries(t.Context()); !errors.Is(err, ErrUnreachable) {
			t.Errorf("Entries: error %v", err)
		}
		if err := s.Update(t.Context(), "node-a", set("2")); !errors.Is(err, ErrUnreachable) {
			t.Errorf("Update: error %v", err)
		}
		if w := <-late.changes; w.Err == nil {
			t.Errorf("the other Watch, late: %v", w)
		}
		gate.open()
		r.entries("node-a", "1")
		late.entries("node-a", "1")
	}
	if got := r.errors(); len(got) != 2 {
		t.Errorf("%d errors of two outages: %q", len(got), got)
	}
	if got := count.of("page"); got != listed {
		t.Errorf("listed %d times on account of it", got-listed)
	}
}

// A reader that was away during the whole of an outage need not know.
func TestOutageUnseen(t *testing.T) {
	t.Parallel()
	var gate gate
	s := open(t, sharedConfig(t), gate.option, WithTimeout(300*time.Millisecond))
	r, other := watching(t, s), watching(t, s)
	r.entries()
	other.entries()
	gate.close()
	other.fails(ErrUnreachable)
	gate.awaitDials(t, 10)
	gate.open()
	other.entries()
	eventually(t, "both follow again", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for w := range s.watches {
			if _, steady := w.recall(""); !steady {
				return false
			}
		}
		return true
	})
	put(t, s, "node-a", "1")
	r.await("what is new", func(c registry.Change) bool { return c.Err != nil || len(c.Entries) > 0 })
}

// A node starts while etcd is down.
func TestDownAtFirst(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t, etcdtest.Options{})
	must(t, server.Stop())
	s := open(t, Config{Endpoints: server.Endpoints()}, WithTimeout(300*time.Millisecond))
	r := watching(t, s)
	r.fails(ErrUnreachable, "connection refused")
	if err := s.Update(t.Context(), "node-a", set("1")); !errors.Is(err, ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	must(t, server.Restart(t.Context()))
	r.entries()
	put(t, s, "node-a", "1")
	r.entries("node-a", "1")
}

// With a username, too: the client then can't be made while etcd is down.
func TestDownAtFirstWithUser(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t, etcdtest.Options{})
	must(t, server.EnableAuth(t.Context(), "root password"))
	must(t, server.Stop())
	cfg := Config{Endpoints: server.Endpoints(), Username: "root", PasswordFile: passwordFile(t, "root password")}
	s := open(t, cfg, WithTimeout(300*time.Millisecond))
	r := watching(t, s)
	r.fails(ErrUnreachable)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Entries(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	must(t, server.Restart(t.Context()))
	r.entries()
}

// The other way round: what runs is stopped, and comes back.
func TestRestart(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t, etcdtest.Options{})
	s := open(t, Config{Endpoints: server.Endpoints()}, WithTimeout(500*time.Millisecond))
	r := watching(t, s)
	put(t, s, "node-a", "1")
	r.entries("node-a", "1")
	for _, end := range []func() error{server.Stop, server.Kill} {
		must(t, end())
		r.fails(ErrUnreachable)
		must(t, server.Restart(t.Context()))
		r.entries("node-a", "1")
	}
}

// A server that is stopped, a machine that hangs, a firewall that swallows: the
// connection stays and nothing comes.
func TestSilence(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t, etcdtest.Options{})
	s := open(t, Config{Endpoints: server.Endpoints()}, WithTimeout(500*time.Millisecond))
	r := watching(t, s)
	put(t, s, "node-a", "1")
	r.entries("node-a", "1")
	must(t, server.Pause())
	r.fails(ErrUnreachable, "no answer within 500ms")
	err := s.Update(t.Context(), "node-b", set("1"))
	if !errors.Is(err, ErrUnreachable) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v; want ErrUnreachable, and not the caller's deadline, which there is not", err)
	}
	must(t, server.Resume())
	r.await("the entries", func(c registry.Change) bool { return c.Err == nil && string(c.Entries["node-a"]) == "1" })
}

// History goes on elsewhere: etcd is empty, or as it was some time ago. The
// revisions that a Watch waits for come later or never.
func TestHistoryGoesBack(t *testing.T) {
	before := []string{"node-a", "1", "gone", "1"}
	for _, c := range []struct {
		name string
		harm func(ctx context.Context, s *etcdtest.Server, backup string) error
		want []string
	}{
		{"wiped", func(ctx context.Context, s *etcdtest.Server, _ string) error { return s.Wipe(ctx) }, nil},
		{"restored", func(ctx context.Context, s *etcdtest.Server, backup string) error { return s.Restore(ctx, backup) }, before},
		// As etcd advises (https://etcd.io/docs/v3.6/op-guide/recovery).
		{"restored with a bump", func(ctx context.Context, s *etcdtest.Server, backup string) error {
			return s.Restore(ctx, backup, "--bump-revision", "1000000", "--mark-compacted")
		}, before},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			backup := filepath.Join(t.TempDir(), "backup")
			server := etcdtest.Start(t, etcdtest.Options{})
			s := open(t, Config{Endpoints: server.Endpoints()})
			r := watching(t, s)
			put(t, s, "node-a", "1")
			put(t, s, "gone", "1")
			must(t, server.Snapshot(t.Context(), backup))
			for i := range 10 {
				put(t, s, "node-a", fmt.Sprint("later ", i))
			}
			put(t, s, "node-b", "1")
			_, err := server.Client(t).Delete(t.Context(), s.folder+"gone")
			must(t, err)
			r.entries("node-a", "later 9", "node-b", "1")
			must(t, c.harm(t.Context(), server, backup))
			r.entries(c.want...)
			put(t, s, "node-c", "1")
			r.entries(append([]string{"node-c", "1"}, c.want...)...)
		})
	}
}

func header(h history) *etcdserverpb.ResponseHeader {
	return &etcdserverpb.ResponseHeader{ClusterId: h.cluster, RaftTerm: h.term, Revision: h.revision}
}

func TestHistory(t *testing.T) {
	at := history{cluster: 1, term: 2, revision: 3}
	for _, c := range []struct {
		name string
		now  history
		want bool
	}{
		{"as before", at, true},
		{"further", history{1, 2, 4}, true},
		{"another leader", history{1, 3, 3}, true},
		{"another cluster", history{2, 2, 4}, false},
		{"another term before", history{1, 1, 4}, false},
		{"back", history{1, 2, 2}, false},
	} {
		h := at
		if got := h.goesOn(header(c.now)); got != c.want || h != c.now {
			t.Errorf("%s: goes on %v, noted %+v", c.name, got, h)
		}
	}
}

// What a Watch takes for true and is not, by whatever way, lasts until the next
// listing.
func TestRelist(t *testing.T) {
	s := open(t, sharedConfig(t), WithRelistInterval(100*time.Millisecond))
	r := watching(t, s)
	put(t, s, "node-a", "1")
	put(t, s, "node-b", "1")
	r.entries("node-a", "1", "node-b", "1")
	s.mu.Lock()
	for w := range s.watches {
		w.mu.Lock()
		w.items = maps.Clone(w.items)
		w.items["node-a"] = item{value: []byte("false"), mod: 1}
		w.mu.Unlock()
	}
	s.mu.Unlock()
	eventually(t, "the truth", func() bool {
		stored, _ := s.recall("node-a")
		return string(stored.value) == "1"
	})
	put(t, s, "node-c", "1")
	r.entries("node-a", "1", "node-b", "1", "node-c", "1")
	if got := r.errors(); len(got) > 0 {
		t.Errorf("the Watch said %q", got)
	}
}

// silentEndpoint takes connections and says nothing.
func silentEndpoint(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return "http://" + l.Addr().String()
}

// Who knows several endpoints does not depend on one, be it the first.
func TestDeadEndpoints(t *testing.T) {
	t.Parallel()
	alive := sharedServer(t).Endpoints()[0]
	silent := silentEndpoint(t)
	cfg := sharedConfig(t)
	for name, endpoints := range map[string][]string{
		"refuses":  {"http://127.0.0.1:1", alive},
		"silent":   {silent, alive},
		"last":     {alive, "http://127.0.0.1:1"},
		"no name":  {"http://no-such-host.invalid:2379", alive},
		"no route": {"http://[100::1]:2379", alive},
	} {
		t.Run(name, func(t *testing.T) {
			cfg.Endpoints = endpoints
			s := open(t, cfg)
			r := watching(t, s)
			put(t, s, "node-a", name)
			r.entries("node-a", name)
			if got := r.errors(); len(got) > 0 {
				t.Errorf("the Watch said %q", got)
			}
		})
	}
}

// A cluster lives as long as most of its members do.
func TestCluster(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.StartCluster(t, 3, etcdtest.Options{})
	s := open(t, Config{Endpoints: cluster.Endpoints()}, WithTimeout(5*time.Second), WithProbeInterval(200*time.Millisecond))
	r := watching(t, s)
	put(t, s, "node-a", "0")
	r.entries("node-a", "0")
	// One after the other is gone for a while, the leader and the one of the
	// stream among them.
	for i, member := range cluster.Members {
		must(t, member.Kill())
		put(t, s, "node-a", fmt.Sprint("without ", i))
		r.entries("node-a", fmt.Sprint("without ", i))
		must(t, member.Restart(t.Context()))
		must(t, member.Await(t.Context()))
		put(t, s, "node-a", fmt.Sprint("with ", i))
		r.entries("node-a", fmt.Sprint("with ", i))
	}
	if got := r.errors(); len(got) > 0 {
		t.Errorf("without one of three the Watch said %q", got)
	}
	must(t, cluster.Members[0].Kill())
	must(t, cluster.Members[1].Kill())
	r.fails(rpctypes.ErrNoLeader, "has no leader: more than half of its members must run")
	if err := s.Update(t.Context(), "node-a", set("lost")); err == nil {
		t.Error("one of three accepted an update")
	}
	must(t, cluster.Members[1].Restart(t.Context()))
	r.await("the entries", func(c registry.Change) bool { return c.Err == nil && len(c.Entries) == 1 })
	put(t, s, "node-a", "two")
	r.entries("node-a", "two")
}

func putOps(s *Store, from, n int, value string) []clientv3.Op {
	var ops []clientv3.Op
	for i := range n {
		ops = append(ops, clientv3.OpPut(fmt.Sprint(s.folder, "node-", from+i), value))
	}
	return ops
}

// Thousands of nodes, many changes in one batch.
func TestManyNodes(t *testing.T) {
	const nodes = 5000
	s := open(t, sharedConfig(t))
	admin := sharedServer(t).Client(t)
	record := strings.Repeat("x", 100)
	for from := 0; from < nodes; from += 100 {
		_, err := admin.Txn(t.Context()).Then(putOps(s, from, 100, record)...).Commit()
		must(t, err)
	}
	r := watching(t, s)
	first := r.await("all", func(c registry.Change) bool { return len(c.Entries) == nodes })
	_, err := admin.Txn(t.Context()).Then(putOps(s, 0, 100, "changed")...).Commit()
	must(t, err)
	before := len(r.seen)
	r.await("the batch", func(c registry.Change) bool { return string(c.Entries["node-99"]) == "changed" })
	if n := len(r.seen) - before; n != 1 {
		t.Errorf("%d changes for one transaction", n)
	}
	if string(first.Entries["node-99"]) != record {
		t.Error("what was handed out has changed")
	}
}
