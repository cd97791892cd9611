package main

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

func syncCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "sync",
		Short: "Do once what `run` does all the time, and print what was changed",
		Long: `Ask the registry once, publish this node's record, and make the kernel hold the
plan. While wgcnid runs, sync leaves the registry to it and looks at the kernel only.`,
		Example: "  wgcnid sync\n  wgcnid sync --config /etc/cni/net.d/10-pods.conflist",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.load()
			if err != nil {
				return err
			}
			alone := true
			lock, err := reconcile.HoldHelperLock(c.RunDir)
			if err != nil {
				if !reconcile.HelperAlive(c.RunDir) {
					return err
				}
				alone = false
			} else {
				defer lock.Close()
			}
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
			outcome, err := loop.Once(cmd.Context(), alone)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if len(outcome.Ops) == 0 {
				_, err = fmt.Fprintln(out, "The kernel holds the plan already.")
			} else {
				_, err = fmt.Fprint(out, mesh.Text(outcome.Ops))
			}
			return err
		},
	}
}
