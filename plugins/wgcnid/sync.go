package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

func syncCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "sync",
		Short: "Do once what `run` does all the time, and print what was changed",
		Long: `Ask the registry once, publish this node's record, and make the kernel hold the
plan. While wgcnid runs, sync leaves that to it, and waits until the kernel holds
the plan: wgcnid knows more than what is on the disk, while it replaces a key.`,
		Example: "  wgcnid sync\n  wgcnid sync --config /etc/cni/net.d/10-pods.conflist",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.load()
			if err != nil {
				return err
			}
			lock, err := reconcile.HoldHelperLock(c.RunDir)
			if err != nil {
				if !reconcile.HelperAlive(c.RunDir) {
					return err
				}
				k, err := openKernel(c)
				if err != nil {
					return err
				}
				defer k.Close()
				if err := awaitPlan(cmd.Context(), c, k); err != nil {
					return err
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), holdsPlan)
				return err
			}
			defer lock.Close()
			k, err := openKernel(c)
			if err != nil {
				return err
			}
			defer k.Close()
			warnings := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
			loop, err := newLoop(*o, c, k, warnings)
			if err != nil {
				return err
			}
			loop.Report = nil
			outcome, err := loop.Once(cmd.Context())
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if len(outcome.Ops) == 0 {
				_, err = fmt.Fprintln(out, holdsPlan)
			} else {
				_, err = fmt.Fprint(out, mesh.Text(outcome.Ops))
			}
			return err
		},
	}
}

const holdsPlan = "The kernel holds the plan already."

// helperPatience is how long a running helper may take: it looks at everything every
// 10 s at least.
const helperPatience = 15 * time.Second

// awaitPlan waits until a running helper has made the kernel hold the plan.
func awaitPlan(ctx context.Context, c config.Config, k *kernel.Kernel) error {
	for give := time.Now().Add(helperPatience); ; {
		v, err := viewNode(ctx, c, k, time.Now())
		if err != nil {
			return err
		}
		if len(v.outcome.Ops) == 0 {
			return nil
		}
		if time.Now().After(give) {
			return fmt.Errorf("wgcnid runs, and has not mended this within %s; its log says why:\n%s", helperPatience, mesh.Text(v.outcome.Ops))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
