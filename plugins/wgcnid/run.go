package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/pkg/page"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

func runCommand(o *options) *cobra.Command {
	var listen string
	var logs logFlags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Keep this node in the mesh",
		Long: `Keep this node in the mesh, until SIGTERM or SIGINT. The node's traffic does not
depend on this process: when it ends, everything stays as it is.

It logs to standard error, one line for each change, and nothing while nothing
changes.

By HTTP it serves a page that shows the node's state (/), the mesh as a picture
(/graph.svg), metrics for Prometheus (/metrics), whether this process is alive
(/healthz), and whether the kernel is as planned (/readyz). All of it can be read
only, and by this machine only, unless --http says otherwise: whoever can connect
sees the names and addresses of the mesh, but no key.`,
		Example: "  wgcnid run\n  wgcnid run --config /etc/cni/net.d/10-pods.conflist --log json\n  wgcnid run --log-level debug\n  wgcnid run --http 192.0.2.1:51822",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if listen, err = parseListen(listen); err != nil {
				return err
			}
			return run(cmd.Context(), *o, listen, log)
		},
	}
	cmd.Flags().StringVar(&listen, "http", defaultHTTP, `where to serve the status page, metrics and probes; "off": nowhere`)
	logs.register(cmd.Flags())
	// Several resyncs, in which nothing may be logged, would take a test minutes.
	cmd.Flags().DurationVar(&o.resync, "resync", 0, "how often to look at everything although nothing has told of a change")
	_ = cmd.Flags().MarkHidden("resync") // it is there
	return cmd
}

func run(ctx context.Context, o options, listen string, log *slog.Logger) error {
	// It shares the node with what earns the money: memory counts for more than
	// the little time that collecting it earlier takes.
	debug.SetGCPercent(50)
	events := page.NewEvents(manyEvents)
	log = slog.New(events.Handler(log.Handler()))
	c, err := o.awaitEntry(ctx, log)
	if err != nil || ctx.Err() != nil {
		return err
	}
	lock, err := reconcile.HoldHelperLock(c.RunDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	defer keepInstalled(ctx, c.StateDir, o.cniDir, log)()
	k, err := openKernel(c)
	if err != nil {
		return err
	}
	defer k.Close()
	loop, err := newLoop(o, c, k, log)
	if err != nil {
		return err
	}
	loop.Lock = lock
	defer func() { loop.Lock.Close() }() // it may be another by then
	loop.Load = keepLast(o.loadInstalled, c, log)
	if o.configFile == "" {
		if err := config.KeepStateDir(o.cniDir, c.StateDir); err != nil {
			log.Warn("cannot note where \"stateDir\" is; once the entry is taken out, `wgcnid leave` will need --config", "error", err)
		}
	}
	web := newWeb(o, c, listen, events, log)
	loop.Passed = web.passed
	go web.run(ctx)
	behind, ranges := "podCIDRs", c.PodCIDRs
	if c.Bare {
		behind, ranges = "subnets", c.Subnets
	}
	log.Info("starting", "node", c.NodeName, "publicKey", loop.Keys.Current.String(), "interface", c.Interface,
		"clusterCIDRs", c.ClusterCIDRs, behind, ranges, "registry", loop.Registry.String())
	err = loop.Run(ctx)
	if errors.Is(err, reconcile.ErrLeft) {
		log.Info("this node was removed from the mesh; taking down the tunnel", "mend", "start wgcnid again to join")
		return teardown(ctx, c, k, log)
	}
	if err == nil {
		log.Info("stopping; traffic goes on")
	}
	return err
}

// keepLast is load, and keeps a copy of what was loaded: once the entry is out of
// the conflist, `wgcnid leave` goes by it. A configuration that changes under a
// running helper counts, too: without the secret that it was given, for one, this
// node's farewell would be believed by nobody. Another network's does not take the
// place of the one that the helper runs by.
func keepLast(load func() (config.Config, error), running config.Config, log *slog.Logger) func() (config.Config, error) {
	var kept []byte
	path := filepath.Join(running.StateDir, config.LastFile)
	return func() (config.Config, error) {
		c, err := load()
		if err == nil {
			err = c.InPlaceOf(running)
		}
		if err != nil || bytes.Equal(c.Source, kept) {
			return c, err
		}
		running, kept = c, c.Source // a copy that fails is not tried again until there is another
		if err := durable.Replace(path, c.Source, 0o600); err != nil {
			log.Warn("cannot keep a copy of the configuration; `wgcnid leave` will need --config", "error", err)
		}
		return c, nil
	}
}

// tunnelCommand is the process of a userspace WireGuard interface.
func tunnelCommand() *cobra.Command {
	return &cobra.Command{
		Use:    userspace.Command + " NAME MTU",
		Short:  "Be a userspace WireGuard interface",
		Hidden: true,
		Args:   cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			mtu, err := strconv.Atoi(args[1])
			if err != nil {
				return fmt.Errorf("MTU %q: %w", args[1], err)
			}
			// A terminal's Ctrl-C and hang-up are meant for the helper.
			signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
			defer stop()
			return userspace.Run(ctx, args[0], mtu, log.New(&boundedFile{f: os.Stderr}, "", log.LstdFlags))
		},
	}
}

// boundedFile empties its file before it grows beyond a megabyte: the process may run for years.
type boundedFile struct {
	f *os.File
	n int
}

func (b *boundedFile) Write(p []byte) (int, error) {
	if b.n += len(p); b.n > 1<<20 {
		b.n = len(p)
		_ = b.f.Truncate(0) // fails on a terminal, which needs no bound
		_, _ = b.f.Seek(0, io.SeekStart)
	}
	return b.f.Write(p)
}
