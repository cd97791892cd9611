package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/endpoint"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

// followEvery is how often the records and the tunnel are looked at.
const followEvery = 2 * time.Second

// follower runs an endpoint, and tells it who is who: by the records that this
// node's helper has accepted last.
type follower struct {
	config config.Config
	log    *slog.Logger

	server    *endpoint.Server
	addresses []netip.Addr
	given     []netip.Addr // the tunnel addresses that were found; nil where --address chose
	iface     string

	read        fileState // of the file, when it was last read
	unreachable atomic.Pointer[string]
}

// fileState tells one version of a file from the next.
type fileState struct {
	modified time.Time
	size     int64
}

// known reads the records if they have changed. It is nil if they have not, or
// if there are none: the helper, not this command, makes the file.
func (f *follower) known(ctx context.Context) (*store.Known, error) {
	info, err := os.Stat(store.KnownPath(f.config.StateDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	now := fileState{info.ModTime(), info.Size()}
	if now == f.read {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	known, damaged, err := store.LoadKnown(ctx, f.config.StateDir)
	if damaged != nil {
		err = errors.Join(err, damaged)
	}
	if err != nil {
		return nil, fmt.Errorf("read the records that this node knows: %w", err)
	}
	f.read = now
	return &known, nil
}

// tunnelAddresses are those that the plan gives to the tunnel.
func tunnelAddresses(c config.Config, known store.Known) []netip.Addr {
	b := c.Bounds()
	self := mesh.Node{}
	for _, claim := range known.Self.Prefixes {
		inside := func(p netip.Prefix) bool { return p.Bits() <= claim.Prefix.Bits() && p.Contains(claim.Prefix.Addr()) }
		if slices.ContainsFunc(b.Claimable(), inside) {
			self.Prefixes = append(self.Prefixes, claim)
		}
	}
	return self.TunnelAddresses()
}

// awaitAddresses waits until this node has joined, and so has tunnel addresses.
func (f *follower) awaitAddresses(ctx context.Context) ([]netip.Addr, error) {
	for told := false; ; {
		known, err := f.known(ctx)
		if err != nil {
			f.log.Warn("cannot tell this node's tunnel address", "error", err)
		}
		if known != nil {
			if a := tunnelAddresses(f.config, *known); len(a) > 0 {
				f.read = fileState{} // for who is who it has not been read
				return a, nil
			}
		}
		if !told {
			f.log.Info("waiting for this node to join the mesh, which gives it a tunnel address", "mend", "if it takes long, see whether `wgcnid run` runs; or name an --address")
			told = true
		}
		select {
		case <-ctx.Done():
			return nil, errors.New("ended before this node had a tunnel address")
		case <-time.After(followEvery / 4):
		}
	}
}

// sourcesOf says which addresses are whose: as decided between all claims, and so
// as WireGuard lets them in.
func sourcesOf(c config.Config, known store.Known) *endpoint.Sources {
	f := reconcile.Facts(c, known.Self.PublicKey, nil, known, nil)
	b := f.Bounds()
	owners := mesh.Owners(append(f.Nodes, f.Self), b, f.Revoked)
	machines := maps.Clone(owners.Prefixes)
	for name, hosts := range owners.Hosts {
		for _, h := range hosts {
			machines[name] = append(slices.Clone(machines[name]), h.Prefix)
		}
	}
	for _, n := range f.Nodes {
		// Of a machine that is masqueraded here the true address is seen.
		if n.Masqueraded && slices.Contains(n.Via, f.Self.Name) {
			for _, claim := range n.Prefixes {
				machines[n.Name] = append(slices.Clone(machines[n.Name]), claim.Prefix)
			}
		}
	}
	return endpoint.NewSources(b.All(), machines)
}

// run serves until ctx ends and the connections have.
func (f *follower) run(ctx context.Context, health string, registry *prometheus.Registry) error {
	if err := f.follow(ctx); err != nil {
		return err
	}
	closeHealth, err := f.serveHealth(ctx, health, registry)
	if err != nil {
		return err
	}
	defer closeHealth()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	moved := make(chan error, 1)
	go func() {
		select {
		case <-ctx.Done():
			return
		case <-f.server.Ready():
		}
		f.log.Info("listening", "endpoint", f.server.String(), "interface", f.iface)
		for {
			f.look()
			select {
			case <-ctx.Done():
				return
			case <-time.After(followEvery):
			}
			if err := f.follow(ctx); err != nil {
				moved <- err
				stop()
				return
			}
		}
	}()
	if err := f.server.Run(ctx); err != nil {
		return err
	}
	select {
	case err := <-moved:
		return err
	default:
		f.log.Info("ended")
		return nil
	}
}

// follow takes the records in, if they have changed. Its error is that this node
// now has another address.
func (f *follower) follow(ctx context.Context) error {
	known, err := f.known(ctx)
	if err != nil {
		f.log.Warn("cannot read who is who; what was known stays", "error", err)
		return nil
	}
	if known == nil {
		return nil
	}
	f.server.SetSources(sourcesOf(f.config, *known))
	if now := tunnelAddresses(f.config, *known); f.given != nil && !slices.Equal(now, f.given) {
		return fmt.Errorf("this node's tunnel addresses were %v and now are %v: start the endpoint again", f.given, now)
	}
	return nil
}

// look sees whether callers can reach the addresses, and says so when that changes.
func (f *follower) look() {
	missing := missingAddresses(f.iface, f.addresses)
	why := ""
	if len(missing) > 0 {
		where := f.iface
		if where == "" {
			where = "this machine"
		}
		why = fmt.Sprintf("waiting for %s to have %v", where, missing)
	}
	before := f.unreachable.Swap(&why)
	switch {
	case before != nil && *before == why, before == nil && why == "":
	case why != "":
		f.log.Warn(why, "mend", "see `wgcnid status`; an --address of the mesh must be among \"subnets\" of this node")
	default:
		f.log.Info("reachable again", "interface", f.iface)
	}
}

// missingAddresses are those that the interface does not have; "" is any interface.
func missingAddresses(iface string, wanted []netip.Addr) []netip.Addr {
	var have []net.Addr
	if iface == "" {
		have, _ = net.InterfaceAddrs()
	} else if i, err := net.InterfaceByName(iface); err == nil && i.Flags&net.FlagUp != 0 {
		have, _ = i.Addrs()
	}
	return slices.DeleteFunc(slices.Clone(wanted), func(a netip.Addr) bool {
		return slices.ContainsFunc(have, func(h net.Addr) bool {
			n, ok := h.(*net.IPNet)
			return ok && n.IP.Equal(a.AsSlice())
		})
	})
}

// health is nil while callers are served.
func (f *follower) health() error {
	if err := f.server.Health(); err != nil {
		return err
	}
	if why := f.unreachable.Load(); why != nil && *why != "" {
		return errors.New(*why)
	}
	return nil
}

// serveHealth serves /healthz and /metrics until it is told to close.
func (f *follower) serveHealth(ctx context.Context, at string, registry *prometheus.Registry) (func(), error) {
	if at == "off" {
		return func() {}, nil
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", at)
	if err != nil {
		return nil, fmt.Errorf("--health: %w: name another address and port, or \"off\"", err)
	}
	server := &http.Server{Handler: f.handler(registry), ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l) // until it is closed
	}()
	return func() { _ = server.Close(); <-done }, nil
}

func (f *follower) handler(registry *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := f.health(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	return mux
}
