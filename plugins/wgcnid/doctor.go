package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/doctor"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/pkg/version"
)

func doctorCommand(o *options) *cobra.Command {
	var asJSON, quick bool
	var binDir string
	cmd := &cobra.Command{
		Use:   "doctor [PEER...]",
		Short: "Find what is wrong with this node, and say how to mend it",
		Long: `Find what is wrong with this node, and say how to mend it. The worst comes first.
Each finding says what was looked at, what was found, and what to do.

  fail  does not work
  warn  works, but will not always, or not well
  note  worth knowing
  ok    as it should be

The peers are looked at by a few packets: pings through the tunnel, which start a
handshake where there is none, and pings and one byte of UDP below it. With --quick
nothing is sent. With names of peers only these are looked at. Nothing is changed.

It looks from this side only: where a peer does not answer, run it there as well.
The exit status is 1 if something fails.`,
		Example: "  wgcnid doctor\n  wgcnid doctor node-b\n  wgcnid doctor --quick\n  wgcnid doctor --json | jq -r '.checks[] | select(.level == \"fail\") | .mend'",
		RunE: func(cmd *cobra.Command, peers []string) error {
			checks, node, err := examine(cmd.Context(), *o, binDir, quick, peers)
			if err != nil {
				return err
			}
			if err := printChecks(cmd.OutOrStdout(), node, checks, asJSON); err != nil {
				return err
			}
			if n := doctor.Count(checks, doctor.Fail); n > 0 {
				return fmt.Errorf("%s on %s", counted(n, "fault", "faults"), node)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&quick, "quick", false, "send nothing")
	cmd.Flags().StringVar(&binDir, "bin-dir", "", "folder of the CNI plugins (default: where install put wgcni, else containerd's, else /opt/cni/bin)")
	return cmd
}

// examine gathers and decides. Where there is no working configuration it says so
// as a check, and looks at the CNI folder.
func examine(ctx context.Context, o options, binDir string, quick bool, peers []string) (checks []doctor.Check, node string, err error) {
	if os.Geteuid() != 0 {
		return nil, "", errors.New("most of what it looks at is shown to root only: run it as root")
	}
	const looked = "the wgcni entry of the network configuration"
	c, err := o.load()
	if err != nil {
		checks = append(checks, doctor.Check{
			ID: "config", Title: "Configuration", Level: doctor.Fail, Looked: looked, Found: err.Error(),
			Mend: "mend what it names; all else is looked at once this is right",
		})
		return append(checks, doctor.ExamineChains(doctor.GatherChains(ctx, o.cniDir, binDir, config.Config{}), nil)...), "this node", nil
	}
	k, err := kernel.Open(kernel.Config{Interface: c.Interface})
	if err != nil {
		return nil, "", err
	}
	defer k.Close()
	if err := knownPeers(ctx, c, peers); err != nil {
		return nil, "", err
	}
	trust, trustErr := reconcile.ReadTrust(c)
	s := doctor.Sources{
		Config: c, Kernel: k, Registry: registry.New(openStore(c.Registry), trust), Trust: trust, TrustError: trustErr,
		CNIDir: o.cniDir, BinDir: binDir, Version: version.String(), Peers: peers, Quick: quick,
	}
	s.Report = func() *reconcile.Report {
		r, err := readReport(c.RunDir)
		if err != nil {
			return nil
		}
		return &r
	}
	checks = append(checks, doctor.Check{
		ID: "config", Title: "Configuration", Level: doctor.OK, Looked: looked,
		Found: fmt.Sprintf("%s, encryption %s", c, c.Encryption),
	})
	return append(checks, doctor.Examine(doctor.Gather(ctx, s))...), c.NodeName, nil
}

// knownPeers refuses names that this node does not know.
func knownPeers(ctx context.Context, c config.Config, peers []string) error {
	if len(peers) == 0 {
		return nil
	}
	known, _, err := store.LoadKnown(ctx, c.StateDir)
	if err != nil {
		return err
	}
	var names []string
	for _, r := range known.Records.Records() {
		if r.Name != c.NodeName && !r.Left {
			names = append(names, r.Name)
		}
	}
	for _, p := range peers {
		if !slices.Contains(names, p) {
			return fmt.Errorf("this node knows no machine %q: it knows %s", p, few(names, "none"))
		}
	}
	return nil
}

// Diagnosis is what `wgcnid doctor --json` prints.
type Diagnosis struct {
	Node   string         `json:"node"`
	OK     bool           `json:"ok"`     // nothing fails
	Checks []doctor.Check `json:"checks"` // the worst first
}

func printChecks(w io.Writer, node string, checks []doctor.Check, asJSON bool) error {
	checks = doctor.Sort(checks)
	fails, warns, notes := doctor.Count(checks, doctor.Fail), doctor.Count(checks, doctor.Warn), doctor.Count(checks, doctor.Note)
	if asJSON {
		return printJSON(w, Diagnosis{Node: node, OK: fails == 0, Checks: checks})
	}
	var b strings.Builder
	var found []string
	for _, n := range []struct {
		n         int
		one, many string
	}{{fails, "fault", "faults"}, {warns, "warning", "warnings"}, {notes, "note", "notes"}} {
		if n.n > 0 {
			found = append(found, counted(n.n, n.one, n.many))
		}
	}
	if len(found) == 0 {
		found = append(found, "Nothing is wrong")
	}
	fmt.Fprintf(&b, "%s on %s; %d of %d checks are ok.\n", strings.Join(found, ", "), node, len(checks)-fails-warns-notes, len(checks))
	for _, c := range checks {
		printCheck(&b, c)
	}
	_, err := io.WriteString(w, printable(b.String()))
	return err
}

func printCheck(b *strings.Builder, c doctor.Check) {
	if c.Level == doctor.OK {
		fmt.Fprintf(b, "ok    %s: %s (looked at %s)\n", c.Title, oneLine(c.Found), oneLine(c.Looked))
		return
	}
	level := string(c.Level)
	if c.Level == doctor.Fail {
		level = "FAIL" // it is to catch the eye
	}
	fmt.Fprintf(b, "%-5s %s\n      looked at: %s\n      found:     %s\n", level, c.Title, oneLine(c.Looked), oneLine(c.Found))
	if c.Mend != "" {
		fmt.Fprintf(b, "      mend:      %s\n", oneLine(c.Mend))
	}
}

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
