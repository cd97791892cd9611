package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/vishvananda/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/test/cluster"
)

// witness sees what wgcnid does on a node, and when. Neither a process nor a
// poll of it takes CPU time from what is measured: the kernel tells of the
// routes, inotify of the report that wgcnid leaves after each pass. A peer's
// routes are the last that is set of it and the first that goes; see mesh.Diff.
type witness struct {
	node *cluster.Node
	done chan struct{}

	mu       sync.Mutex
	routes   map[netip.Prefix]bool // into the tunnel
	routed   time.Duration         // when they last changed; see monotonic
	reported time.Duration         // when the last report was written
	lost     error                 // why the routes may be other ones
	changed  chan struct{}         // closed at the next change of the above
}

// routeBuffer has room for the notifications of thousands of routes, in bytes.
const routeBuffer = 64 << 20

// watchNode begins to watch a node where wgcnid does not run yet.
func watchNode(n *cluster.Node, r *reports) (*witness, error) {
	w := &witness{node: n, done: make(chan struct{}), routes: map[netip.Prefix]bool{}, changed: make(chan struct{})}
	updates := make(chan netlink.RouteUpdate, 1024)
	err := n.Do(func() error {
		return netlink.RouteSubscribeWithOptions(updates, w.done, netlink.RouteSubscribeOptions{
			ReceiveBufferSize: routeBuffer, ReceiveBufferForceSize: true,
			ErrorCallback: func(err error) { w.note(func() { w.lost = err }) },
		})
	})
	if err != nil {
		return nil, fmt.Errorf("subscribe to the routes of %s: %w", n, err)
	}
	go func() {
		for u := range updates {
			now := monotonic()
			if u.Protocol != kernel.RouteProtocol || u.Route.Type != unix.RTN_UNICAST {
				continue
			}
			w.note(func() { w.take(u, now) })
		}
	}()
	if err := r.follow(n, w); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// take is for note.
func (w *witness) take(u netlink.RouteUpdate, now time.Duration) {
	prefix, ok := netipx.FromStdIPNet(u.Dst)
	if !ok {
		return
	}
	if w.routed = now; u.Type == unix.RTM_NEWROUTE {
		w.routes[prefix] = true
	} else {
		delete(w.routes, prefix)
	}
}

// note makes a change and wakes those who wait for one.
func (w *witness) note(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *witness) close() { close(w.done) }

// witnessTimeout bounds all that is waited for.
const witnessTimeout = 3 * time.Minute

// await waits until seen, which may look at the witness's fields, holds.
func (w *witness) await(ctx context.Context, what string, seen func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, witnessTimeout)
	defer cancel()
	for {
		w.mu.Lock()
		holds, changed, lost, routes := seen(), w.changed, w.lost, len(w.routes)
		w.mu.Unlock()
		if holds {
			return nil
		}
		if lost != nil {
			return fmt.Errorf("wait for %s on %s: %w", what, w.node, lost)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s on %s: %w; it has %d routes into the tunnel", what, w.node, ctx.Err(), routes)
		}
	}
}

// awaitRoute waits until there is a route to this prefix, or none, and returns
// when that came to be.
func (w *witness) awaitRoute(ctx context.Context, to netip.Prefix, there bool) (at time.Duration, err error) {
	what := fmt.Sprintf("a route to %s", to)
	if !there {
		what = fmt.Sprintf("the end of the route to %s", to)
	}
	err = w.await(ctx, what, func() bool {
		at = w.routed
		return w.routes[to] == there
	})
	return at, err
}

// awaitRoutes waits until there are this many routes and a report of later, and
// returns when both had come.
func (w *witness) awaitRoutes(ctx context.Context, n int) (at time.Duration, err error) {
	err = w.await(ctx, fmt.Sprintf("%d routes", n), func() bool {
		at = w.reported
		return len(w.routes) == n && w.reported > w.routed
	})
	return at, err
}

// awaitReport waits for a report that is younger than since, and returns when it came.
func (w *witness) awaitReport(ctx context.Context, since time.Duration) (at time.Duration, err error) {
	err = w.await(ctx, "a report", func() bool {
		at = w.reported
		return w.reported > since
	})
	return at, err
}

// reports follows the reports of any number of nodes with one instance of
// inotify, of which a user has but few (fs.inotify.max_user_instances) and each
// wgcnid needs one.
type reports struct {
	notify *fsnotify.Watcher

	mu        sync.Mutex
	witnesses map[string]*witness // by the path of the report
}

// reportFile is wgcnid's report, in the folder of the boot.
const reportFile = "helper.json"

func newReports() (*reports, error) {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch the reports of wgcnid: %w", err)
	}
	r := &reports{notify: notify, witnesses: map[string]*witness{}}
	go r.run()
	return r, nil
}

func (r *reports) follow(n *cluster.Node, w *witness) error {
	folder := n.Path(config.DefaultRunDir)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return fmt.Errorf("watch the reports of %s: %w", n, err)
	}
	r.mu.Lock()
	r.witnesses[filepath.Join(folder, reportFile)] = w
	r.mu.Unlock()
	if err := r.notify.Add(folder); err != nil {
		return fmt.Errorf("watch the reports of %s: %w", n, err)
	}
	return nil
}

func (r *reports) run() {
	for {
		select {
		case e, open := <-r.notify.Events:
			if !open {
				return
			}
			now := monotonic()
			r.mu.Lock()
			w := r.witnesses[e.Name]
			r.mu.Unlock()
			if w != nil && e.Has(fsnotify.Create) { // it is renamed into place
				w.note(func() { w.reported = now })
			}
		case err, open := <-r.notify.Errors:
			if !open {
				return
			}
			r.mu.Lock()
			for _, w := range r.witnesses {
				w.note(func() { w.lost = errors.Join(errors.New("watch the reports"), err) })
			}
			r.mu.Unlock()
		}
	}
}

func (r *reports) close() error { return r.notify.Close() }
