package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

func peerCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "peer",
		Short: "Let machines in that run nothing but WireGuard",
		Long: `Let machines in that run nothing but WireGuard: laptops, phones, virtual machines.
Each is a record in the registry, and a file for wg-quick(8) or the WireGuard app.
It enters the mesh by one of its entry nodes, which the others reach it by, and has
an address of "peerCIDRs" of its own.`,
		Example: "  wgcnid peer add laptop > laptop.conf\n  wgcnid peer add phone --qr\n  wgcnid peer list\n  wgcnid peer remove laptop",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(peerAddCommand(o), peerConfigCommand(o), peerListCommand(o), peerRemoveCommand(o))
	return cmd
}

// onePeer is the Args of the commands that are about one.
func onePeer(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("name one peer: `wgcnid peer %s NAME`; `wgcnid peer list` lists all", cmd.Name())
	}
	return nil
}

func peerRemoveCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME",
		Short: "Shut a peer out, and revoke its key",
		Long: `Shut a peer out, and revoke its key: every node removes it within a second. Its
address is free again. To let the machine in again, add it anew: it gets a new key.`,
		Example: "  wgcnid peer remove laptop",
		Args:    onePeer,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			v, err := viewMesh(cmd.Context(), c)
			if err != nil {
				return err
			}
			if _, err := v.peer(args[0]); err != nil {
				return err
			}
			return forgetAndTell(cmd, c, args[0], "is removed and its key revoked; every node that reads the registry shuts it out now.")
		},
	}
}

// peer returns the record of a machine that was added, by its name.
func (v meshView) peer(name string) (registry.Record, error) {
	r, known := v.records.Record(name)
	switch {
	case known && !r.Left && len(r.Via) > 0:
		return r, nil
	case known && !r.Left:
		return r, fmt.Errorf("%s is a node, which runs wgcnid: `wgcnid nodes` lists them, and `wgcnid forget` removes one", name)
	case known:
		return r, fmt.Errorf("%s is no peer any more: `wgcnid peer list` lists those there are", name)
	case v.away != nil || v.records.Invalid[name] != nil:
		return r, v.unknownNode(name)
	}
	if near := v.nearest(name, func(r registry.Record) bool { return len(r.Via) > 0 }); near != "" {
		return r, fmt.Errorf("no peer %q: did you mean %q?", name, near)
	}
	return r, fmt.Errorf("no peer %q: `wgcnid peer list` lists all", name)
}

// entries returns the nodes by which a machine is to enter. Without names they are
// the mesh's gateways, else this node. callable says that they can call the
// machine, so that they need not be in reach of it themselves.
func (v meshView) entries(c config.Config, names []string, callable bool) (out []registry.Record, err error) {
	if len(names) == 0 {
		for _, r := range v.records.Records() {
			if !r.Left && r.Role == mesh.RoleGateway && (callable || len(r.Endpoints) > 0 && !r.CalledInside) {
				names = append(names, r.Name)
			}
		}
	}
	if len(names) == 0 {
		names = []string{c.NodeName}
	}
	for _, name := range names {
		r, known := v.records.Record(name)
		switch {
		case !known && name == c.NodeName:
			return nil, errors.New("this node has not joined the mesh: start `wgcnid run`, or name another entry node with --via")
		case !known:
			return nil, fmt.Errorf("--via: %w", v.unknownNode(name))
		case r.Left:
			return nil, fmt.Errorf("--via: %s has left the mesh", name)
		case len(r.Via) > 0:
			return nil, fmt.Errorf("--via: %s is a peer itself: name nodes that run wgcnid", name)
		case len(r.Endpoints) == 0 && !callable:
			return nil, fmt.Errorf("--via: %s has no endpoint (its \"endpoint\" is \"none\"): nobody can call it; name another node, or give the machine's own --endpoint", name)
		case r.CalledInside && !callable:
			return nil, fmt.Errorf("--via: %s can be called inside its location only (its \"endpoint\" is \"location\"): name another node, or give the machine's own --endpoint", name)
		case slices.ContainsFunc(out, func(r registry.Record) bool { return r.Name == name }):
			return nil, fmt.Errorf("--via: %s is named twice", name)
		}
		out = append(out, r)
	}
	return out, nil
}

// aside tells on stderr what stdout, which is a file, cannot.
func aside(cmd *cobra.Command, lines ...string) {
	if len(lines) > 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), printable(strings.Join(lines, "\n")))
	}
}
