package etcd

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/wgcni/wgcni/pkg/registry"
)

// Watch implements registry.Store. It hears of changes over a stream:
//
//	list --> stream, from the listing's revision on --> it breaks --> probe --+--> etcd fails: Err; probe until it answers
//	  ^        ^                                                              +--> the history went on: stream, from where it broke
//	  |        +--------------------------------------------------------------+
//	  +------------------------------- compacted, or another history ---------+
//
// The client library has a watcher of its own. It tries again for ever in
// silence, and waits for ever for a revision that etcd, wiped or restored from a
// backup, has yet to reach again. Here a probe follows upon every end of the
// stream, and comes every WithProbeInterval as long as the stream is silent.
func (s *Store) Watch(ctx context.Context) <-chan registry.Change {
	out := make(chan registry.Change)
	w := &watch{s: s, states: make(chan registry.Change), differ: map[string]bool{}}
	s.mu.Lock()
	s.watches[w] = struct{}{}
	s.mu.Unlock()
	go func() {
		defer close(out)
		var following sync.WaitGroup
		following.Go(func() { w.follow(ctx) })
		deliver(ctx, w.states, out)
		following.Wait()
		s.mu.Lock()
		delete(s.watches, w)
		s.mu.Unlock()
	}()
	return out
}

// deliver hands the last of the states to a reader that may be slow, and none
// that the reader has.
func deliver(ctx context.Context, states <-chan registry.Change, out chan<- registry.Change) {
	var latest registry.Latest
	for {
		present, news := latest.News()
		send := out
		if !news {
			send = nil
		}
		select {
		case <-ctx.Done():
			return
		case c := <-states:
			latest.Put(c)
		case send <- present:
			latest.Sent()
		}
	}
}

// watch is one running Watch. Its fields but the first two are those of follow.
type watch struct {
	s      *Store
	states chan registry.Change

	mu     sync.Mutex // held to change the next two, and by recall
	items  map[string]item
	steady bool // no change is missing from items but what is on its way

	bytes   int              // of items
	entries registry.Entries // items as they were handed out, nil if all may have changed
	differ  map[string]bool  // the names by which items differ from entries
	at      int64            // items are those of this revision
	listed  bool             // items go on from at; else etcd must be asked for all of them
	history history

	away  bool            // etcd failed, and has not been followed since
	told  map[string]bool // the causes that were reported since
	pause time.Duration   // before the next round
}

// recall returns what etcd holds under that name, unless that is in doubt.
func (w *watch) recall(name string) (item, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.items[name], w.steady
}

// shortest is the pause after a stream that broke, and the first of a growing
// row: enough to keep the nodes of a mesh from coming at once.
const shortest = 200 * time.Millisecond

// follow keeps the states coming until ctx ends.
func (w *watch) follow(ctx context.Context) {
	for w.pause = shortest; ctx.Err() == nil; {
		err := w.round(ctx)
		pause := w.pause
		w.pause = min(2*w.pause, w.s.longest)
		if err != nil && w.report(ctx, err).costly {
			pause = w.s.costly
		}
		sleep(ctx, jitter(pause, 0.5))
	}
}

// round catches up with etcd and follows it. It returns an error if etcd fails,
// and nil when another round is due.
func (w *watch) round(ctx context.Context) error {
	if w.listed || w.away {
		header, err := w.probe(ctx)
		if err != nil {
			return err
		}
		if !w.history.goesOn(header) {
			w.listed = false
		}
	}
	if !w.listed {
		if _, err := w.list(ctx); err != nil {
			return err
		}
	}
	return w.stream(ctx)
}

// report tells the reader of a failure unless its cause is known since etcd
// went away.
func (w *watch) report(ctx context.Context, err error) *failure {
	f := fail(err.Error(), err)
	errors.As(err, &f)
	if !w.away {
		w.away, w.told = true, map[string]bool{}
	}
	if !w.told[f.key] {
		w.told[f.key] = true
		w.tell(ctx, registry.Change{Err: err})
	}
	return f
}

func (w *watch) tell(ctx context.Context, c registry.Change) {
	select {
	case w.states <- c:
	case <-ctx.Done():
	}
}

// tellItems hands out a map of its own for every state, since readers keep them. To
// copy one takes a tenth of the time in which one of thousands is made.
func (w *watch) tellItems(ctx context.Context) {
	c := registry.Change{Changed: slices.Collect(maps.Keys(w.differ))}
	switch {
	case w.entries == nil:
		w.entries, c.Changed = entriesOf(w.items), nil
	case len(w.differ) > 0:
		w.entries = maps.Clone(w.entries)
		for name := range w.differ {
			if now, there := w.items[name]; there {
				w.entries[name] = now.value
			} else {
				delete(w.entries, name)
			}
		}
	}
	clear(w.differ)
	c.Entries = w.entries
	w.tell(ctx, c)
}

// probe is a linearizable read of a key that need not exist, within what a node
// may read. While etcd is away it is one attempt, since the pauses between them
// are follow's.
func (w *watch) probe(ctx context.Context) (header *etcdserverpb.ResponseHeader, err error) {
	get := func(ctx context.Context, c *clientv3.Client) error {
		resp, err := c.Get(ctx, w.s.folder, clientv3.WithKeysOnly())
		if err == nil {
			header = resp.Header
		}
		return err
	}
	if w.away {
		if err = w.s.askOnce(ctx, w.s.timeout, get); err != nil {
			err = w.s.explain(err)
		}
	} else {
		err = w.s.ask(ctx, get)
	}
	return header, err
}

// history is how far one etcd had come: it only ever grows.
type history struct {
	cluster  uint64
	term     uint64
	revision int64
}

// goesOn reports whether an answer belongs to the history known so far, and
// notes it. If not, etcd was wiped, restored from a backup, or is another one:
// its revisions mean something else. That is not noticed where it has gone
// further since than the one before; for this there is WithRelistInterval.
func (h *history) goesOn(now *etcdserverpb.ResponseHeader) bool {
	before := *h
	*h = history{cluster: now.ClusterId, term: now.RaftTerm, revision: now.Revision}
	return h.cluster == before.cluster && h.term >= before.term && h.revision >= before.revision
}

// list takes over all entries as they are now, and reports whether the history
// goes on.
func (w *watch) list(ctx context.Context) (goesOn bool, err error) {
	l, err := w.s.list(ctx)
	if err != nil {
		return false, err
	}
	w.mu.Lock()
	w.items = l.items
	w.mu.Unlock()
	w.bytes, w.entries, w.at, w.listed = l.bytes, nil, l.header.Revision, true
	return w.history.goesOn(l.header), nil
}

// relist is how long until all entries are read once more: longer where there
// are many, since then there also are many who read them.
func (w *watch) relist() time.Duration {
	return jitter(w.s.relist*time.Duration(1+w.bytes>>20), 0.1)
}

func (w *watch) setSteady(steady bool) {
	w.mu.Lock()
	w.steady = steady
	w.mu.Unlock()
}

// received is what the stream brings: a response or its end.
type received struct {
	resp *etcdserverpb.WatchResponse
	err  error
}

// stream follows etcd from revision at on. What it returns is as for round.
func (w *watch) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var receiving sync.WaitGroup
	defer receiving.Wait()
	defer cancel()
	defer w.setSteady(false)

	opening := time.AfterFunc(w.s.timeout, cancel)
	messages, err := w.open(ctx, &receiving)
	if err == nil {
		err = w.created(ctx, messages)
	}
	if !opening.Stop() {
		err = context.DeadlineExceeded
	}
	if err != nil {
		if errors.Is(err, rpctypes.ErrCompacted) {
			w.listed = false
			return nil
		}
		return w.s.explain(err)
	}
	w.setSteady(true)
	w.away = false
	w.tellItems(ctx)

	probing := time.NewTimer(jitter(w.s.probe, 0.1))
	defer probing.Stop()
	listing := time.NewTimer(w.relist())
	defer listing.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-messages:
			if m.err != nil { // the probe of the next round tells whether that means anything
				return nil
			}
			if err := w.take(ctx, m.resp); err != nil {
				return err
			}
			if !w.listed {
				return nil
			}
		case <-probing.C:
			header, err := w.probe(ctx)
			if err != nil {
				return err
			}
			if !w.history.goesOn(header) {
				w.listed = false
				return nil
			}
			w.pause = shortest
			probing.Reset(jitter(w.s.probe, 0.1))
		case <-listing.C:
			goesOn, err := w.list(ctx)
			if err != nil || !goesOn { // the stream is that of the history before
				return err
			}
			w.tellItems(ctx)
			listing.Reset(w.relist())
		}
	}
}

// open begins the stream. Its messages end with an error, or with ctx.
func (w *watch) open(ctx context.Context, receiving *sync.WaitGroup) (<-chan received, error) {
	var stream etcdserverpb.Watch_WatchClient
	err := w.s.attempt(ctx, func(ctx context.Context, c *clientv3.Client) (err error) {
		stream, err = etcdserverpb.NewWatchClient(c.ActiveConnection()).Watch(ctx, grpc.MaxCallRecvMsgSize(w.s.limit))
		return rpctypes.Error(err)
	})
	if err != nil {
		return nil, err
	}
	// An error of Send's is io.EOF; Recv returns the one behind it (grpc.ClientStream).
	_ = stream.Send(&etcdserverpb.WatchRequest{RequestUnion: &etcdserverpb.WatchRequest_CreateRequest{
		CreateRequest: &etcdserverpb.WatchCreateRequest{
			Key:            []byte(w.s.folder),
			RangeEnd:       []byte(clientv3.GetPrefixRangeEnd(w.s.folder)),
			StartRevision:  w.at + 1,
			ProgressNotify: true, // moves at on while nothing of ours changes, ahead of compactions
			Fragment:       true, // bounds a message
		},
	}})
	messages := make(chan received)
	receiving.Go(func() {
		for {
			resp, err := stream.Recv()
			select {
			case messages <- received{resp, rpctypes.Error(err)}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	})
	return messages, nil
}

// created waits until etcd has accepted the watch.
func (w *watch) created(ctx context.Context, messages <-chan received) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case m := <-messages:
		if m.err != nil {
			return m.err
		}
		return refusal(m.resp)
	}
}

// refusal returns why etcd ended the watch, or nil if it did not.
func refusal(resp *etcdserverpb.WatchResponse) error {
	switch {
	case resp.CompactRevision != 0:
		return rpctypes.ErrCompacted
	case resp.Canceled:
		// A gRPC error's text: "rpc error: code = PermissionDenied desc = etcdserver: permission denied".
		_, reason, found := strings.Cut(resp.CancelReason, " desc = ")
		if !found {
			reason = "the watch was cancelled: " + resp.CancelReason
		}
		return rpctypes.Error(errors.New(reason))
	default:
		return nil
	}
}

// take applies what a response tells and hands out what has come of it.
func (w *watch) take(ctx context.Context, resp *etcdserverpb.WatchResponse) error {
	if err := refusal(resp); err != nil {
		w.listed = !errors.Is(err, rpctypes.ErrCompacted)
		if w.listed {
			return w.s.explain(err)
		}
		return nil
	}
	w.mu.Lock()
	for _, event := range resp.Events {
		w.apply(event)
	}
	w.mu.Unlock()
	if w.bytes > w.s.limit {
		w.listed = false // so that it is measured again
		return w.s.explain(errOversized)
	}
	if resp.Fragment { // more of the same revisions follows
		return nil
	}
	if n := len(resp.Events); n > 0 {
		w.at = max(w.at, resp.Events[n-1].Kv.ModRevision)
	} else {
		w.at = max(w.at, resp.Header.GetRevision()) // a progress notification
	}
	w.history.revision = max(w.history.revision, resp.Header.GetRevision())
	if w.entries == nil || len(w.differ) > 0 {
		w.tellItems(ctx)
	}
	return nil
}

func (w *watch) apply(event *mvccpb.Event) {
	name, ours := w.s.nodeName(event.Kv.Key)
	if !ours || event.Kv.ModRevision <= w.at {
		return
	}
	before, known := w.items[name]
	if known {
		w.bytes -= len(name) + len(before.value)
	}
	if event.Type == mvccpb.Event_DELETE {
		delete(w.items, name)
		if known {
			w.differ[name] = true
		}
		return
	}
	now := item{value: present(event.Kv.Value), mod: event.Kv.ModRevision}
	w.items[name] = now
	w.bytes += len(name) + len(now.value)
	if !known || !bytes.Equal(before.value, now.value) {
		w.differ[name] = true
	}
}
