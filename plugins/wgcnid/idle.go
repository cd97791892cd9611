package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// idleCommand is what a pod runs whose init container has done its work: the image
// has no shell, and a DaemonSet would start anew what ends.
func idleCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "idle",
		Short:  "Do nothing until SIGTERM",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "Done. Waiting to be stopped.")
			<-cmd.Context().Done()
			return err
		},
	}
}
