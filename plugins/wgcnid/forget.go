package main

import (
	"context"
	"fmt"
	"maps"
	"slices"

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
it joins with a new key. Whoever has the cluster secret from it can do the same:
change the secret if the machine is in wrong hands, see the README.

A node that you can still log in to leaves by itself with ` + "`wgcnid leave`" + `.`,
		Example: "  wgcnid forget node-7",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			if err := forget(cmd.Context(), c, args[0]); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is forgotten and its key revoked; every node that reads the registry removes it now.\n", args[0])
			return err
		},
	}
}

func forget(ctx context.Context, c config.Config, name string) error {
	if name == c.NodeName {
		return fmt.Errorf("%s is this node: use `wgcnid leave`", name)
	}
	v, err := viewMesh(ctx, c)
	if err != nil {
		return err
	}
	if v.away != nil {
		return fmt.Errorf("the other nodes cannot be told: %w", v.away)
	}
	record, there := v.records.Nodes[name]
	if !there {
		return unknownNode(name, v.records)
	}
	if _, revoked := record.Revoked(); revoked {
		return fmt.Errorf("%s is forgotten already", name)
	}
	if record.Left {
		return fmt.Errorf("%s has left already", name)
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	return v.bury(ctx, name, true)
}

func unknownNode(name string, records registry.Snapshot) error {
	if len(records.Nodes) == 0 {
		return fmt.Errorf("no node %q: the registry has none", name)
	}
	nearest := slices.MinFunc(slices.Sorted(maps.Keys(records.Nodes)), func(a, b string) int {
		return levenshtein.ComputeDistance(a, name) - levenshtein.ComputeDistance(b, name)
	})
	return fmt.Errorf("no node %q: did you mean %q? `wgcnid nodes` lists all", name, nearest)
}
