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
	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/install"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

// leaveTimeout bounds all of leave: the registry, and the wait for a running
// helper to end.
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
by the configuration that wgcnid ran with last. Where ` + "`wgcnid install`" + ` put wgcni,
run ` + "`wgcnid uninstall`" + ` instead, which does all of it.

The node's key stays, so that it can join again as the same node; --purge
deletes it too, with all else in "stateDir".

If the others cannot be told (the registry is away, or the secret file cannot be
read) leave changes nothing, but with --force it goes on: they then keep this
node as a peer until ` + "`wgcnid forget`" + ` is run on one of them. A wgcnid that runs
must be stopped by hand in this case, and on a node that was forgotten.`,
		Example: "  wgcnid leave\n  wgcnid leave --purge   # delete the key as well",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.loadLast()
			if errors.Is(err, config.ErrNotChained) && os.Geteuid() == 0 {
				// A leave that was cut short at its very end has left this much.
				return errors.Join(err, o.forgetFolder(config.StateDir(o.cniDir), purge))
			}
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("only root may take the tunnel away: run it as root")
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
			if err := leave(cmd.Context(), c, force, log); err != nil {
				return err
			}
			if err := o.forgetState(c, purge); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s has left the mesh; pod traffic of this node is no longer encrypted.\n", c.NodeName)
			return err
		},
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "delete the node's private key, and all else in \"stateDir\", as well")
	cmd.Flags().BoolVar(&force, "force", false, "leave even if the other nodes cannot be told")
	return cmd
}

func leave(ctx context.Context, c config.Config, force bool, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	told, err := announceLeave(ctx, c, log)
	if err != nil {
		if !force {
			return fmt.Errorf("the other nodes cannot be told: %w; mend it, or leave with --force", err)
		}
		log.Warn("the other nodes could not be told and keep this one as a peer", "error", err, "mend", fmt.Sprintf("run `wgcnid forget %s` on one of them", c.NodeName))
	}
	return takeDown(ctx, c, told, log)
}

// takeDown waits for a helper that runs to end, if that has been told to, and takes
// away what there is of the mesh on this node.
func takeDown(ctx context.Context, c config.Config, told bool, log *slog.Logger) error {
	lock, err := awaitHelperEnd(ctx, c.RunDir, told)
	if err != nil {
		return err
	}
	defer lock.Close()
	k, err := openKernel(c)
	if err != nil {
		return err
	}
	defer k.Close()
	return teardown(ctx, c, k, log)
}

// forgetState deletes what a node that has left goes by when its entry is out of the
// conflist, with purge also all else in the state folder. The last configuration goes
// last: a leave that was cut short is finished by the next one, which needs it.
func (o options) forgetState(c config.Config, purge bool) error {
	if purge {
		if err := removeFolder(c.StateDir, config.LastFile); err != nil {
			return err
		}
	}
	if err := durable.Remove(filepath.Join(c.StateDir, config.LastFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // a folder that is not there has no such file either
	}
	return o.forgetFolder(c.StateDir, purge)
}

// forgetFolder forgets where the state folder is, and with purge deletes it if it is
// empty, unless uninstall is to go by what is in it.
func (o options) forgetFolder(stateDir string, purge bool) error {
	if _, err := os.Stat(filepath.Join(stateDir, install.RecordFile)); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if purge {
		if err := os.Remove(stateDir); err == nil { // one that is a mount stays
			if err := durable.SyncFolder(filepath.Dir(stateDir)); err != nil {
				return err
			}
		}
	}
	return config.ForgetStateDir(o.cniDir, stateDir)
}

// announceLeave puts a tombstone in the place of our record: the one that others
// know, whether the registry has it or not. A running helper takes it as its
// order to end. Told is false where there is nothing that would tell it.
func announceLeave(ctx context.Context, c config.Config, log *slog.Logger) (told bool, err error) {
	v, err := viewMesh(ctx, c)
	if err != nil {
		return false, err
	}
	record, known := v.records.Record(c.NodeName)
	_, refused := v.records.Invalid[c.NodeName]
	_, revoked := record.Revoked()
	switch {
	case revoked:
		return false, nil
	case !known && !refused:
		// Never a member, as far as can be told.
		return false, v.away
	case v.foreign(c):
		// A tombstone would take down that node's tunnel, and its guard with it.
		log.Warn("another node uses this node's name: its record stays", "name", c.NodeName, "mend", "set \"nodeName\" so that each node has its own")
		return false, nil
	}
	if err := v.bury(ctx, c.NodeName, false); err != nil {
		return false, err
	}
	if note := v.unheard(c.NodeName); note != "" {
		log.Warn("some nodes may keep this one as a peer: " + note)
	}
	return true, nil
}

// errHelperRuns is what leave ends with where it cannot end the helper.
var errHelperRuns = errors.New("wgcnid still runs on this node: stop it (`systemctl stop wgcnid`) and run `wgcnid leave` again")

// awaitHelperEnd takes the helper's place. It waits for one that runs to end, if
// that one has been told to.
func awaitHelperEnd(ctx context.Context, runDir string, told bool) (*os.File, error) {
	for {
		lock, err := reconcile.HoldHelperLock(runDir)
		switch {
		case err == nil || !errors.Is(err, reconcile.ErrRunning):
			return lock, err
		case !told:
			return nil, errHelperRuns
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, errHelperRuns
		}
	}
}

// removeFolder deletes a folder with all it holds, or all but the file of that name.
// One that is a mount stays, empty, as in a container, whose root may be read-only.
func removeFolder(dir, but string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == but {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if but != "" {
		return nil
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, syscall.EBUSY) && !errors.Is(err, syscall.EROFS) {
		return err
	}
	return nil
}
