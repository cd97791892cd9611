// wgcnid keeps a node's part of the mesh: its key, its record in the registry,
// its WireGuard interface, routes and filters. It is also the operator's command line.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/version"
)

func main() {
	// The private key and the cluster secret stay out of core files. A limit of
	// RLIMIT_CORE=0 would not do: where core_pattern is a pipe it is ignored
	// (core(5)). A tunnel process comes through here as well; execve(2) has reset it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "wgcnid: should this process crash, a core file may hold the node's keys:", err)
	}
	// Never stopped: the process ends with the command.
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "wgcnid:", printable(asRoot(err, os.Geteuid()).Error()))
		os.Exit(1)
	}
}

// options are the flags that all commands share.
type options struct {
	configFile string
	cniDir     string
	resync     time.Duration // of `run`; 0 is the loop's own
}

func (o options) load() (config.Config, error) { return config.Load(o.configFile, o.cniDir) }

// loadLast is load for those commands that also make sense when the entry has
// been taken out of the conflist.
func (o options) loadLast() (config.Config, error) {
	if o.configFile != "" {
		return o.load()
	}
	return config.LoadLast(o.cniDir)
}

// asRoot says how to get a permission that only root has.
func asRoot(err error, euid int) error {
	if euid != 0 && errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: run it as root", err)
	}
	return err
}

// tagged are the commands of files that have a build tag.
var tagged []func() *cobra.Command

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
	root.AddCommand(
		runCommand(&o), syncCommand(&o), statusCommand(&o), nodesCommand(&o), graphCommand(&o), leaveCommand(&o), forgetCommand(&o),
		peerCommand(&o), secretCommand(&o), keyCommand(&o), endpointCommand(&o), versionCommand(), tunnelCommand(),
		explainCommand(&o),
		doctorCommand(&o),
		verifyCommand(&o),
		installCommand(&o), uninstallCommand(&o),
		completionCommand(), idleCommand(),
	)
	for _, command := range tagged {
		root.AddCommand(command())
	}
	completeArguments(root, &o)
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  wgcnid version",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "wgcnid", version.String())
			return err
		},
	}
}
