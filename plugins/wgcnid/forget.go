package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/agnivade/levenshtein"
	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/registry"
)

func forgetCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "forget NAME",
		Short: "Remove another node from the mesh, and revoke its key",
		Long: `Remove another node from the mesh, one that is lost or was stolen: every node
removes it as a peer, so that it can neither send nor receive. Its key is
revoked: it does not come back by starting again, nor under another name. If its
helper runs, it keeps the filters, so that nothing leaves it in the clear.

To take it in again, stop wgcnid there, run ` + "`wgcnid leave --purge`" + ` and start it:
it joins with a new key. So does whoever holds the machine, as long as it can
write to the registry and has a cluster secret that is in use: if it is in wrong
hands, change the secret too (` + "`wgcnid secret --help`" + `).

A node that you can still log in to leaves by itself, with ` + "`wgcnid leave`" + `.`,
		Example: "  wgcnid nodes\n  wgcnid forget node-7",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return errors.New("name one node to forget: `wgcnid forget NAME`; `wgcnid nodes` lists all")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			return forgetAndTell(cmd, c, args[0], "is forgotten and its key revoked; every node that reads the registry removes it now.")
		},
	}
}

// forgetAndTell prints what has become of the machine, and who will not listen.
func forgetAndTell(cmd *cobra.Command, c config.Config, name, done string) error {
	note, err := forget(cmd.Context(), c, name)
	if err != nil {
		return err
	}
	if note != "" {
		fmt.Fprintln(cmd.ErrOrStderr(), "wgcnid: some nodes may keep it as a peer:", note)
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), name, done)
	return err
}

// forget returns a note about nodes that will not listen, if there are any.
func forget(ctx context.Context, c config.Config, name string) (note string, err error) {
	if name == c.NodeName {
		return "", fmt.Errorf("%s is this node: it goes with `wgcnid leave`", name)
	}
	v, err := viewMesh(ctx, c)
	if err != nil {
		return "", err
	}
	record, known := v.records.Record(name)
	if !known {
		return "", v.unknownNode(name)
	}
	if _, revoked := record.Revoked(); revoked {
		return "", fmt.Errorf("%s is forgotten already", name)
	}
	if record.Left {
		return "", fmt.Errorf("%s has left already: there is nothing to forget", name)
	}
	if err := v.bury(ctx, name, true); err != nil {
		return "", fmt.Errorf("the other nodes cannot be told: %w", err)
	}
	return v.unheard(name), nil
}

// unknownNode says why there is no such node, and which one may be meant.
func (v meshView) unknownNode(name string) error {
	if v.away != nil {
		return fmt.Errorf("this node knows no %q, and the registry is away: %w", name, v.away)
	}
	if err := v.records.Invalid[name]; err != nil {
		return fmt.Errorf("%q is no node of the mesh: what the registry has under this name is refused: %w", name, err)
	}
	if near := v.nearest(name, func(registry.Record) bool { return true }); near != "" {
		return fmt.Errorf("no node %q: did you mean %q?", name, near)
	}
	return fmt.Errorf("no node %q: `wgcnid nodes` lists all", name)
}

// nearest returns the name that may be meant, of the records that are asked for;
// "" if none is near.
func (v meshView) nearest(name string, asked func(registry.Record) bool) (near string) {
	least := 1 + len(name)/3 // farther off, it would not be a slip of the pen
	for _, r := range v.records.Records() {
		if d := levenshtein.ComputeDistance(r.Name, strings.ToLower(name)); !r.Left && asked(r) && d <= least {
			near, least = r.Name, d-1
		}
	}
	return near
}
