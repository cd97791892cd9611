package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
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

// routeWatch follows the routes into a node's tunnel as the kernel tells of them:
// a poll, or a process that asks, would take CPU time from what is measured. The
// routes are the last that is set of a peer and the first that goes; see mesh.Diff.
type routeWatch struct {
	node *cluster.Node
	done chan struct{}

	mu      sync.Mutex
	there   map[netip.Prefix]bool
	at      time.Duration // when they last changed; see monotonic
	lost    error         // why they may be other ones
	changed chan struct{} // closed at the next change of the above
}

// routeBuffer has room for the notifications of thousands of routes, in bytes.
const routeBuffer = 64 << 20

// watchRoutes begins to watch a node that has no such routes yet.
func watchRoutes(n *cluster.Node) (*routeWatch, error) {
	r := &routeWatch{node: n, done: make(chan struct{}), there: map[netip.Prefix]bool{}, changed: make(chan struct{})}
	updates := make(chan netlink.RouteUpdate, 1024)
	err := n.Do(func() error {
		return netlink.RouteSubscribeWithOptions(updates, r.done, netlink.RouteSubscribeOptions{
			ReceiveBufferSize: routeBuffer, ReceiveBufferForceSize: true,
			ErrorCallback: func(err error) { r.note(func() { r.lost = err }) },
		})
	})
	if err != nil {
		return nil, fmt.Errorf("subscribe to the routes of %s: %w", n, err)
	}
	go func() {
		for u := range updates {
			now := monotonic()
			prefix, ok := netipx.FromStdIPNet(u.Dst)
			if !ok || u.Protocol != kernel.RouteProtocol || u.Route.Type != unix.RTN_UNICAST {
				continue
			}
			r.note(func() {
				r.at = now
				if u.Type == unix.RTM_NEWROUTE {
					r.there[prefix] = true
				} else {
					delete(r.there, prefix)
				}
			})
		}
	}()
	return r, nil
}

// note makes a change and wakes those who wait for one.
func (r *routeWatch) note(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *routeWatch) close() { close(r.done) }

// eventTimeout bounds the wait for what must come, on a busy machine.
const eventTimeout = 3 * time.Minute

// await waits until the routes are as wanted, and returns when they came to be.
func (r *routeWatch) await(ctx context.Context, what string, wanted func(there map[netip.Prefix]bool) bool) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	for {
		r.mu.Lock()
		holds, at, n, lost, changed := wanted(r.there), r.at, len(r.there), r.lost, r.changed
		r.mu.Unlock()
		switch {
		case holds:
			return at, nil
		case lost != nil:
			return 0, fmt.Errorf("wait for %s on %s: %w", what, r.node, lost)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for %s on %s: %w; %d routes lead into the tunnel", what, r.node, ctx.Err(), n)
		}
	}
}

// awaitOne waits until there is a route to this prefix, or none.
func (r *routeWatch) awaitOne(ctx context.Context, to netip.Prefix, there bool) (at time.Duration, err error) {
	what := fmt.Sprintf("a route to %s", to)
	if !there {
		what = fmt.Sprintf("the end of the route to %s", to)
	}
	return r.await(ctx, what, func(now map[netip.Prefix]bool) bool { return now[to] == there })
}

// awaitAll waits until there are this many.
func (r *routeWatch) awaitAll(ctx context.Context, n int) (at time.Duration, err error) {
	return r.await(ctx, fmt.Sprintf("%d routes", n), func(now map[netip.Prefix]bool) bool { return len(now) == n })
}

// reportFile is what wgcnid leaves after each pass, in the folder of the boot.
const reportFile = "helper.json"

// untilReport does something that makes wgcnid do a pass, and returns how long
// it took until that was done.
func untilReport(ctx context.Context, n *cluster.Node, do func() error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return 0, fmt.Errorf("watch the reports of %s: %w", n, err)
	}
	defer notify.Close()
	if err := notify.Add(n.Path(config.DefaultRunDir)); err != nil {
		return 0, fmt.Errorf("watch the reports of %s: %w", n, err)
	}
	begun := monotonic()
	if err := do(); err != nil {
		return 0, err
	}
	for {
		select {
		case e := <-notify.Events:
			if filepath.Base(e.Name) == reportFile && e.Has(fsnotify.Create) { // it is renamed into place
				return monotonic() - begun, nil
			}
		case err := <-notify.Errors:
			return 0, errors.Join(fmt.Errorf("watch the reports of %s", n), err)
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for a report of %s: %w", n, ctx.Err())
		}
	}
}
