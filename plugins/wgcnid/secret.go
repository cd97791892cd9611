package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
)

func secretCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "secret",
		Short: "Make a cluster secret, and see which nodes use it",
		Long: `The cluster secret seals the records of the registry, so that whoever else can
write to it changes nothing, and gives each pair of nodes a preshared key.
"clusterSecretFile" names the file that holds it, the same on every node.

The file may hold several secrets, one a line. The first seals this node's record;
all of them are accepted. So a secret is changed node by node, without losing
traffic:

  1. add the new one as the second line, on every node;
  2. make it the first line, on every node;
  3. when ` + "`wgcnid secret list`" + ` shows no node that uses the old one, delete that.

wgcnid reads the file again within ten seconds; nothing has to be restarted.`,
	}
	cmd.AddCommand(secretNewCommand(), secretListCommand(o))
	return cmd
}

func secretNewCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "new",
		Short: "Make a secret",
		Long: `Make a secret and print it, or write it to a new file that only its owner can
read. Copy it to every node by a way that you trust.`,
		Example: "  wgcnid secret new --file /etc/wgcni/secret\n  wgcnid secret new",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := identity.NewSecret(time.Now())
			if err != nil {
				return err
			}
			if file == "" {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), s.Reveal())
				return err
			}
			if err := identity.WriteSecret(file, s); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "secret %s is in %s; copy the file to every node and name it there: \"clusterSecretFile\": %q\n", s.ID(), file, file)
			return err
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "write it to this file, which must not exist yet")
	return cmd
}

func secretListCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the secrets that this node accepts, and the nodes that use each",
		Example: "  wgcnid secret list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			if c.SecretFile == "" {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "This node has no cluster secret: whoever can write to the registry is trusted.")
				return err
			}
			v, err := viewMesh(cmd.Context(), c)
			if err != nil {
				return err
			}
			if v.away != nil {
				fmt.Fprintln(cmd.ErrOrStderr(), "The registry is away; this is what this node knows:", v.away)
			}
			trust, err := reconcile.ReadTrust(c)
			if err != nil {
				return err
			}
			return printSecrets(cmd.OutOrStdout(), trust, v.records)
		},
	}
}

func printSecrets(w io.Writer, trust registry.Trust, records registry.Snapshot) error {
	users := map[identity.SecretID][]string{}
	for _, r := range records.Records() {
		if !r.Left {
			users[r.Seal.Secret] = append(users[r.Seal.Secret], r.Name)
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SECRET\tMADE\tUSE\tNODES")
	for i, s := range trust.Secrets {
		use := "accepted"
		if i == 0 {
			use = "seals this node's record"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", s.ID(), s.Made().Format(time.DateOnly), use, names(users[s.ID()]))
	}
	if unsealed := users[""]; len(unsealed) > 0 {
		fmt.Fprintf(t, "none\t-\taccepted (\"seal\" is \"preferred\")\t%s\n", names(unsealed))
	}
	return t.Flush()
}

// names prints how many, and the first few.
func names(nodes []string) string {
	const most = 5
	switch n := len(nodes); {
	case n == 0:
		return "none"
	case n <= most:
		return fmt.Sprintf("%d: %s", n, strings.Join(nodes, " "))
	default:
		return fmt.Sprintf("%d: %s and %d more", n, strings.Join(nodes[:most], " "), n-most)
	}
}
