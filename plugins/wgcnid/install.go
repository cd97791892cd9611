package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/containerd"
	"github.com/wgcni/wgcni/pkg/install"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

// installFlags are the flags of install.
type installFlags struct {
	entry, conflist, binDir, plugin, secret string

	inPlace, dryRun bool
	wait            time.Duration
}

func installCommand(o *options) *cobra.Command {
	var f installFlags
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put wgcni onto this node: the plugin's binary, and its entry in the conflist",
		Long: `Place the plugin's binary in --bin-dir, and chain wgcni to the node's network
configuration, with the entry in the file --entry: a JSON object as a conflist has
it. Run it again to change the entry or to upgrade the binary; without --entry it
keeps the one that it installed. What is as it should be is left alone.

The primary plugin's own file is not touched. A copy of it with the entry as its
last plugin is written beside it, as 00-wgcni.conflist: it sorts first, so the
runtime takes it, and nothing that the primary's agent writes at boot lets a pod
start without wgcni. As long as ` + "`wgcnid run`" + ` runs, the copy follows the
original. A .conf file, which has one plugin, is copied as a list.

An entry without "nodeName" is given that of $NODE_NAME, if that is set: the plugin,
which the runtime starts, does not have it.

--in-place inserts the entry into the file itself, and ` + "`wgcnid run`" + ` puts it back
when the agent rewrites the file; until then pods start without wgcni. It is meant
for runtimes that use several networks at once (containerd with max_conf_num other
than 1), which would use the copy beside its original, and for Multus, which picks
the first file as its own default: name that one with --conflist.

Where there is no network configuration yet, or only half of one, it waits for the
primary plugin's agent to write it. --dry-run shows what would be changed.`,
		Example: `  wgcnid install --entry wgcni.json --dry-run
  wgcnid install --entry wgcni.json
  wgcnid install                                  # again, after an upgrade
  wgcnid install --entry wgcni.json --conflist /etc/cni/net.d/10-flannel.conflist --in-place`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			at, err := f.options(o)
			if err != nil {
				return err
			}
			if f.dryRun {
				p, err := at.Prepare()
				if err != nil {
					return err
				}
				return printDryRun(cmd.OutOrStdout(), p, "Nothing would be changed.")
			}
			if os.Geteuid() != 0 {
				return errors.New("only root may install: run it as root, or look at what it would do with --dry-run")
			}
			at.Say = func(text string) { fmt.Fprintln(cmd.ErrOrStderr(), printable(text)) }
			p, err := install.Install(cmd.Context(), at)
			if err != nil {
				return err
			}
			return printInstalled(cmd.OutOrStdout(), p)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.entry, "entry", "", "file with the wgcni entry; - is standard input (default: the one that is installed)")
	flags.StringVar(&f.conflist, "conflist", "", "network configuration to chain wgcni to (default: the first in --cni-dir)")
	flags.BoolVar(&f.inPlace, "in-place", false, "insert the entry into the network configuration itself, instead of a copy")
	flags.StringVar(&f.binDir, "bin-dir", "", "folder of the CNI plugins (default: where it is installed, else containerd's, else /opt/cni/bin)")
	flags.StringVar(&f.plugin, "plugin", "", "the plugin's binary (default: the file wgcni beside wgcnid's own)")
	flags.StringVar(&f.secret, "secret", "", "file with the cluster secret, to be copied to the entry's \"clusterSecretFile\"; wgcnid follows its changes")
	flags.DurationVar(&f.wait, "wait", 0, "how long to wait for a network configuration at most; 0: for ever")
	flags.BoolVar(&f.dryRun, "dry-run", false, "show what would be changed, as a diff, and change nothing")
	return cmd
}

// options completes the flags with what was installed before.
func (f installFlags) options(o *options) (at install.Options, err error) {
	stateDir := o.installedIn()
	var text []byte
	switch f.entry {
	case "":
	case "-":
		text, err = io.ReadAll(io.LimitReader(os.Stdin, 1<<20))
	default:
		text, err = os.ReadFile(f.entry)
	}
	if err != nil {
		return at, err
	}
	if f.entry != "" {
		if at.Entry, err = install.Entry(text); err != nil {
			return at, fmt.Errorf("--entry %s: %w", f.entry, err)
		}
		if at.Entry, err = withNodeName(at.Entry, os.Getenv(nodeNameEnv)); err != nil {
			return at, err
		}
		c, err := config.Parse(at.Entry)
		if err != nil {
			return at, fmt.Errorf("--entry %s: %w", f.entry, err)
		}
		stateDir = c.StateDir
	}
	had, err := install.Load(stateDir)
	switch {
	case err == nil && f.entry == "":
		at.Entry = []byte(had.Entry)
	case f.entry == "" && errors.Is(err, fs.ErrNotExist):
		return at, errors.New("wgcni is not installed here: say with --entry FILE what its entry is to be, for example {\"clusterCIDRs\": [\"10.244.0.0/16\"], \"registry\": {\"type\": \"file\", \"path\": \"/srv/shared/mesh.json\"}}")
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return at, err
	}
	if f.inPlace && stateDir != config.DefaultStateDir {
		// The helper would look for its record by the very entry that is lost.
		return at, fmt.Errorf("--in-place needs the \"stateDir\" %s: once the entry is lost, wgcnid looks there for what to put back", config.DefaultStateDir)
	}
	at.InPlace, at.Wait = f.inPlace, f.wait
	if f.entry == "" && !f.inPlace {
		at.InPlace = had.Mode == install.InPlace
	}
	if f.binDir == "" {
		f.binDir = cmp.Or(containerd.Read(containerd.File).BinDir, containerd.DefaultBinDir)
		if had.Plugin.Path != "" {
			f.binDir = filepath.Dir(had.Plugin.Path)
		}
	}
	if f.plugin == "" {
		self, err := os.Executable()
		if err != nil {
			return at, err
		}
		f.plugin = filepath.Join(filepath.Dir(self), config.PluginType)
	}
	for _, path := range []struct {
		to   *string
		from string
	}{{&at.CNIDir, o.cniDir}, {&at.BinDir, f.binDir}, {&at.Plugin, f.plugin}, {&at.Conflist, f.conflist}, {&at.Secret, f.secret}} {
		if path.from != "" {
			if *path.to, err = filepath.Abs(path.from); err != nil {
				return at, err
			}
		}
	}
	return at, nil
}

// installedIn is the state folder of this node's installation, if there is one.
func (o options) installedIn() string {
	if c, err := o.loadLast(); err == nil {
		return c.StateDir
	}
	return config.StateDir(o.cniDir)
}

func printInstalled(w io.Writer, p install.Plan) error {
	for _, c := range p.Changes {
		fmt.Fprintln(w, printable(c.Path+" "+c.Text))
	}
	if len(p.Changes) == 0 {
		fmt.Fprintln(w, printable("Nothing to do: "+p.Record.Plugin.Path+" and the entry are in place."))
	}
	for _, note := range p.Notes {
		fmt.Fprintln(w, printable("Note: "+note+"."))
	}
	if c, err := config.Parse([]byte(p.Record.Entry)); err == nil && !reconcile.HelperAlive(c.RunDir) {
		fmt.Fprintln(w, "Next: start `wgcnid run`, and see with `wgcnid status` what it does.")
		if c.Encryption == mesh.Required {
			fmt.Fprintln(w, "Until it runs, what new pods and other nodes send each other is dropped.")
		}
	}
	return nil
}

func printDryRun(w io.Writer, p install.Plan, nothing string) error {
	if len(p.Changes) == 0 {
		fmt.Fprintln(w, nothing)
	}
	if err := p.Print(printableWriter{w}); err != nil {
		return err
	}
	for _, note := range p.Notes {
		fmt.Fprintln(w, printable("Note: "+note+"."))
	}
	return nil
}

// printableWriter is printable for whole texts; what is shown of a file keeps its
// tabs and line ends.
type printableWriter struct{ w io.Writer }

func (p printableWriter) Write(text []byte) (int, error) {
	parts := strings.Split(string(text), "\t")
	for i := range parts {
		parts[i] = printable(strings.ReplaceAll(parts[i], "\r\n", "\n"))
	}
	_, err := io.WriteString(p.w, strings.Join(parts, "\t"))
	return len(text), err
}
