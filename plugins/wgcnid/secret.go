package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/identity"
)

func secretCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "secret",
		Short: "Make a cluster secret, and see which nodes use it",
		Long: `The cluster secret seals the records of the registry, so that whoever else can
write to it changes nothing, and gives each pair of nodes a preshared key.
"clusterSecretFile" names the file that holds it, the same on every node.

A mesh that runs already is given its first secret without losing traffic:

  1. set "clusterSecretFile", and "seal": "preferred" beside it, on every node;
  2. when ` + "`wgcnid secret list`" + ` shows no line "none" any more, take "seal" out
     on every node: from then on, a record without a seal is refused.

The file may hold several secrets, one a line. The first seals this node's record,
and all of them are accepted, so that a secret can be changed:

  1. make a new one on one node, and add it as the last line on every node;
  2. make it the first line, on every node;
  3. when ` + "`wgcnid secret list`" + ` shows no node that uses the old one, delete that.

wgcnid reads the configuration and the file again within ten seconds; nothing has
to be restarted.`,
		Example: "  wgcnid secret new --file /etc/wgcni/secret\n  wgcnid secret list",
		Args:    cobra.NoArgs, // else a subcommand that is misspelt would print this help, and succeed
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(secretNewCommand(), secretListCommand(o))
	return cmd
}

func secretNewCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "new",
		Short: "Make a secret",
		Long: `Make a secret. With --file it goes into a new file that only its owner can read:
copy that to every node, by a way that you trust. Without, it is printed as one
line, which can be appended to a file of secrets.

What the shell makes for ">" or ">>" can be read by others, unless ` + "`umask 077`" + ` went
before. wgcnid reads no secret from such a file, and this command writes none to it.`,
		Example: "  wgcnid secret new --file /etc/wgcni/secret   # the first one\n  wgcnid secret new >> /etc/wgcni/secret       # one more; copy the file again",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			if file == "" {
				if err := notForOthers(out, "use `wgcnid secret new --file FILE`"); err != nil {
					return err
				}
			}
			s, err := identity.NewSecret(time.Now())
			if err != nil {
				return err
			}
			if file == "" {
				_, err = fmt.Fprintln(out, s.Reveal())
				return err
			}
			path, err := writeSecret(file, s)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(out, "Secret %s is in %s. Copy the file to every node, and name it there: \"clusterSecretFile\": %q\n", s.ID(), path, path)
			return err
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "write it to this file, which must not exist yet")
	return cmd
}

// notForOthers refuses to print a secret into a file that others may read, and says
// what to do instead.
func notForOthers(w io.Writer, instead string) error {
	f, ok := w.(*os.File)
	if !ok {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if mode := info.Mode(); mode.IsRegular() && mode.Perm()&0o077 != 0 {
		return fmt.Errorf("the output is a file that is open to others (mode %04o): %s, or run `chmod 600` on it first", mode.Perm(), instead)
	}
	return nil
}

// writeSecret returns the path as the configuration must name it.
func writeSecret(file string, s identity.Secret) (path string, err error) {
	if path, err = filepath.Abs(file); err != nil {
		return "", err
	}
	err = identity.WriteSecret(path, s)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: make the folder first (`mkdir -m 700 %s`)", err, filepath.Dir(path))
	}
	return path, err
}

func secretListCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the secrets that this node accepts, and the nodes that use each",
		Long: `List the secrets that this node accepts, in the order of its file, and the nodes
that use each: those whose record in the registry it has sealed. A secret is named
by its ID, 8 digits that tell nothing about it.`,
		Example: "  wgcnid secret list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			if c.SecretFile == "" {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "This node has no cluster secret (\"clusterSecretFile\"): whoever can write to the registry is trusted.")
				return err
			}
			v, err := viewMesh(cmd.Context(), c)
			if err != nil {
				return err
			}
			return printSecrets(cmd.OutOrStdout(), v)
		},
	}
}

func printSecrets(w io.Writer, v meshView) error {
	users := map[identity.SecretID][]string{}
	for _, r := range v.records.Records() {
		if !r.Left {
			users[r.Seal.Secret] = append(users[r.Seal.Secret], r.Name)
		}
	}
	var b strings.Builder
	if v.away != nil {
		fmt.Fprintf(&b, "The registry is away; this is what this node knows: %s\n\n", oneLine(v.away.Error()))
	}
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SECRET\tMADE\tUSE\tNODES")
	trust := v.registry.Trust()
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
	if err := t.Flush(); err != nil {
		return err
	}
	if note := behindNote(behindSecrets(trust, v.records)); note != "" {
		fmt.Fprintln(&b, note)
	}
	if n := len(v.records.Invalid); n > 0 {
		fmt.Fprintf(&b, "refused: %d of the records in the registry; `wgcnid nodes` says why\n", n)
	}
	_, err := io.WriteString(w, printable(b.String()))
	return err
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
