package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/install"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry/file"
)

func uninstallCommand(o *options) *cobra.Command {
	var purge, force, dryRun bool
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take wgcni off this node again: the entry, the mesh, the binary",
		Long: `Undo what ` + "`wgcnid install`" + ` did, in an order in which pods start at any time: the
entry leaves the network configuration; this node leaves the mesh as with
` + "`wgcnid leave`" + `, which ends a running wgcnid and removes tunnel, routes and
filters; the plugin's binary goes last. Pods that run go on running; their traffic
is no longer encrypted.

The node's key stays, so that it can join again as the same node; --purge deletes
it too, with all else in "stateDir" and the cluster secret that install has copied.

If the other nodes cannot be told, nothing is changed, but with --force it goes on:
they then keep this node as a peer until ` + "`wgcnid forget`" + ` is run on one of them. An
uninstall that was cut short is finished by the next one.`,
		Example: "  wgcnid uninstall --dry-run\n  wgcnid uninstall\n  wgcnid uninstall --purge   # delete the key as well",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			m, err := install.BeginRemoval(cmd.Context(), o.installedIn())
			if errors.Is(err, fs.ErrNotExist) {
				if !dryRun && os.Geteuid() == 0 {
					if err := install.FinishRemoval(o.installedIn(), o.cniDir, purge); err != nil {
						return err
					}
				}
				return o.notInstalled(cmd)
			}
			if err != nil {
				return err
			}
			defer m.Close()
			if dryRun {
				p, err := m.Plan(purge)
				if err != nil {
					return err
				}
				return printDryRun(out, p, "No file would be changed; the node would leave the mesh.")
			}
			if os.Geteuid() != 0 {
				return errors.New("only root may uninstall: run it as root, or look at what it would do with --dry-run")
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
			return uninstall(cmd, m, purge, force, log)
		},
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "delete the node's private key, all else in \"stateDir\", and the copied secret as well")
	cmd.Flags().BoolVar(&force, "force", false, "uninstall even if the other nodes cannot be told")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would be changed, as a diff, and change nothing")
	return cmd
}

// notInstalled ends an uninstall that has no record to go by: nothing to do, or an
// installation that was made by hand.
func (o options) notInstalled(cmd *cobra.Command) error {
	if c, err := o.load(); err == nil || !errors.Is(err, config.ErrNotChained) {
		if err != nil {
			return err
		}
		return fmt.Errorf("there is no record of `wgcnid install` in %s: take the wgcni entry out of the conflist by hand, run `wgcnid leave`, and then delete the plugin's binary", c.StateDir)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "Nothing to do: there is no record of `wgcnid install` in %s, and no conflist in %s chains wgcni. A node that is in the mesh all the same leaves it by `wgcnid leave`.\n", o.installedIn(), o.cniDir)
	return err
}

func uninstall(cmd *cobra.Command, m *install.Removal, purge, force bool, log *slog.Logger) error {
	c, err := m.Config()
	if err != nil {
		return fmt.Errorf("the installed entry: %w", err)
	}
	if _, err := m.Plan(purge); err != nil && !errors.Is(err, install.ErrUnready) {
		return err
	}
	out := cmd.OutOrStdout()
	// One that was cut short after the node had left may have deleted what it takes
	// to tell the others so.
	cannot := canLeave(cmd.Context(), c, force)
	left := cannot != nil && m.Record.Left && !reconcile.HelperAlive(c.RunDir)
	if cannot != nil && !left {
		return cannot
	}
	say := func(changes []install.Change) {
		for _, c := range changes {
			fmt.Fprintln(out, printable(c.Path+" "+c.Text))
		}
	}
	changes, err := m.TakeOut(cmd.Context())
	say(changes)
	if err != nil {
		return err
	}
	if left {
		err = takeDown(cmd.Context(), c, false, log)
	} else {
		err = leave(cmd.Context(), c, force, log)
	}
	if err == nil {
		err = m.SaveLeft()
	}
	if err != nil {
		return fmt.Errorf("the entry is out of the network configuration, but the node is still in the mesh: %w; then run `wgcnid uninstall` again", err)
	}
	fmt.Fprintln(out, printable(c.NodeName+" has left the mesh; pod traffic of this node is no longer encrypted"))
	if err := durable.Remove(filepath.Join(c.StateDir, config.LastFile)); err != nil {
		return err
	}
	p, err := m.Finish(purge)
	if err != nil {
		return err
	}
	say(p.Changes)
	for _, note := range p.Notes {
		fmt.Fprintln(out, printable("Note: "+note+"."))
	}
	return nil
}

// canLeave finds out before anything is changed whether leave will do its part.
func canLeave(ctx context.Context, c config.Config, force bool) error {
	v, err := viewMesh(ctx, c)
	if err == nil && !writable(c, v.away) {
		err = v.away
	}
	switch {
	case err != nil && !force:
		return fmt.Errorf("the other nodes cannot be told: %w; mend it, or uninstall with --force", err)
	case err != nil && reconcile.HelperAlive(c.RunDir):
		return errors.New("the other nodes cannot be told, nor can wgcnid, which runs on this node: stop it (`systemctl stop wgcnid`) and run `wgcnid uninstall --force` again")
	}
	return nil
}

// writable reports whether a registry that cannot be read takes a record all the
// same: one in a file is begun anew where it is damaged or gone, if its folder is there.
func writable(c config.Config, away error) bool {
	if errors.Is(away, file.ErrMissing) {
		_, err := os.Stat(filepath.Dir(c.Registry.Path))
		return err == nil
	}
	return away == nil || errors.Is(away, file.ErrDamaged)
}
