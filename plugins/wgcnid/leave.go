package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

// leaveTimeout bounds the registry, and the wait for a running helper to end.
const leaveTimeout = 30 * time.Second

func leaveCommand(o *options) *cobra.Command {
	var purge, force bool
	cmd := &cobra.Command{
		Use:   "leave",
		Short: "Take this node out of the mesh",
		Long: `Tell the other nodes that this one leaves, end a running wgcnid, and remove the
tunnel, its routes and its filters. Remove the wgcni entry from the network
configuration first: as long as it is there, each new pod is given the filters
again, and cluster traffic that cannot be encrypted is dropped. leave then goes
by the configuration that wgcnid ran with last.

The node's key stays, so that it can join again as the same node; --purge
deletes it too.`,
		Example: "  wgcnid leave\n  wgcnid leave --purge   # delete the key as well",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
			if err := leave(cmd.Context(), c, force, log); err != nil {
				return err
			}
			if purge {
				if err := removeFolder(c.StateDir); err != nil {
					return err
				}
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s has left the mesh; pod traffic of this node is no longer encrypted.\n", c.NodeName)
			return err
		},
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "delete the node's private key as well")
	cmd.Flags().BoolVar(&force, "force", false, "leave even if the registry cannot be told; the other nodes keep this one until it is forgotten")
	return cmd
}

func leave(ctx context.Context, c config.Config, force bool, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	k, err := openKernel(c)
	if err != nil {
		return err
	}
	defer k.Close()
	if err := announceLeave(ctx, c); err != nil {
		if !force {
			return fmt.Errorf("tell the other nodes: %w; mend it, or leave with --force", err)
		}
		log.Warn("the other nodes could not be told", "error", err)
	}
	lock, err := awaitHelperEnd(ctx, c.RunDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	return teardown(ctx, c, k, log)
}

// announceLeave puts a tombstone in the place of our record. A running helper
// takes it as its order to end.
func announceLeave(ctx context.Context, c config.Config) error {
	v, err := viewMesh(ctx, c)
	if err != nil {
		return err
	}
	return v.bury(ctx, c.NodeName, false)
}

func awaitHelperEnd(ctx context.Context, runDir string) (*os.File, error) {
	for {
		lock, err := reconcile.HoldHelperLock(runDir)
		if err == nil || !errors.Is(err, reconcile.ErrRunning) {
			return lock, err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, errors.New("wgcnid still runs on this node: stop it (`systemctl stop wgcnid`) and run `wgcnid leave` again")
		}
	}
}

// removeFolder deletes a folder with all it holds. One that is a mount stays, empty.
func removeFolder(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, syscall.EBUSY) {
		return err
	}
	return nil
}
