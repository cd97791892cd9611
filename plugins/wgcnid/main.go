// wgcnid keeps a node's part of the mesh: its key, its record in the registry,
// its WireGuard interface, routes and filters. It is also the operator's command line.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/version"
)

func main() {
	// Never stopped: the process ends with the command.
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "wgcnid:", err)
		os.Exit(1)
	}
}

// options are the flags that all commands share.
type options struct {
	configFile string
	cniDir     string
}

func (o options) load() (config.Config, error) {
	return asRoot(config.Load(o.configFile, o.cniDir))
}

// loadLast is load for those commands that also make sense when the entry has
// been taken out of the conflist.
func (o options) loadLast() (config.Config, error) {
	if o.configFile != "" {
		return o.load()
	}
	return asRoot(config.LoadLast(o.cniDir))
}

func asRoot(c config.Config, err error) (config.Config, error) {
	if os.IsPermission(err) {
		return c, fmt.Errorf("%w: run it as root", err)
	}
	return c, err
}

func rootCommand() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:   "wgcnid",
		Short: "Encrypt pod traffic between nodes with WireGuard, whatever the network plugin",
		Long: `wgcnid is the helper of the chained CNI plugin wgcni. One runs on each node: it
keeps the node's key, exchanges public keys with the other nodes through the
registry, and keeps WireGuard, routes and filters as planned. Its other commands
show and change what the node does. They read the wgcni entry of the network
configuration list; a machine with no CNI gives that entry in a file of its own.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&o.configFile, "config", "", "conflist, or a bare wgcni entry (default: the first conflist in --cni-dir that chains wgcni)")
	root.PersistentFlags().StringVar(&o.cniDir, "cni-dir", config.DefaultDir, "folder of the CNI network configurations")
	root.AddCommand(runCommand(&o), syncCommand(&o), statusCommand(&o), nodesCommand(&o), leaveCommand(&o), forgetCommand(&o), secretCommand(&o), versionCommand(), tunnelCommand())
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "wgcnid", version.String())
			return err
		},
	}
}
