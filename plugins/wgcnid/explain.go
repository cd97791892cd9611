package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/explain"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

func explainCommand(o *options) *cobra.Command {
	var asJSON bool
	var flow explain.Flow
	cmd := &cobra.Command{
		Use:   "explain SRC DST",
		Short: "Say what becomes of a packet: which rule, route, peer and key, and whether it is encrypted",
		Long: `Say what becomes of the first packet from SRC to DST on this machine: by which
rule and route it goes, what the filter says, to which peer with which key, and
whether it is encrypted, in the clear, dropped, or stays on this machine. All of it
is read from the kernel, whose own answer (RTM_GETROUTE) decides. Nothing is sent.

SRC and DST are addresses, pods of this node (namespace/name, or the beginning of a
container ID) or machines of the mesh, by name. Where SRC is on another machine and
DST is here, it is the way in that is explained. To see both halves of a way, run it
on both machines.

What other programs do to the packet is not looked at: a NAT such as kube-proxy's,
or a firewall. The exit status is 1 where the packet should have fared otherwise.`,
		Example: "  wgcnid explain default/web-0 10.244.2.7\n  wgcnid explain 10.244.1.5 node-b --proto tcp --dport 22\n  wgcnid explain 10.244.2.7 default/web-0 --json | jq -r .verdict",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if flow.Protocol != "" && !slices.Contains([]string{"tcp", "udp", "icmp"}, flow.Protocol) {
				return fmt.Errorf("--proto %q: want tcp, udp or icmp", flow.Protocol)
			}
			if flow.Port != 0 && flow.Protocol != "tcp" && flow.Protocol != "udp" {
				return errors.New("--dport: give --proto tcp or --proto udp with it")
			}
			e, err := explainPacket(cmd.Context(), *o, args[0], args[1], flow)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), e)
			} else {
				err = printExplanation(cmd.OutOrStdout(), e)
			}
			if err == nil && e.Fault {
				err = fmt.Errorf("fault: the packet is %s", map[explain.Verdict]string{
					explain.Dropped: "dropped", explain.Plaintext: "not encrypted",
				}[e.Verdict])
			}
			return err
		},
	}
	cmd.Flags().StringVar(&flow.Protocol, "proto", "", "tcp, udp or icmp (default: any)")
	cmd.Flags().Uint16Var(&flow.Port, "dport", 0, "destination port, with --proto tcp or udp")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// explainPacket gathers the facts and explains them.
func explainPacket(ctx context.Context, o options, source, destination string, flow explain.Flow) (e explain.Explanation, err error) {
	c, err := o.loadLast()
	if err != nil {
		return e, err
	}
	if os.Geteuid() != 0 {
		return e, errors.New("the kernel tells its WireGuard peers to root only: run it as root")
	}
	k, err := kernel.Open(kernel.Config{Interface: c.Interface})
	if err != nil {
		return e, err
	}
	defer k.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	now := time.Now()
	v, err := viewNode(ctx, c, k, now)
	if err != nil {
		return e, err
	}
	d := directory(c, v.public, v.known, v.outcome)
	if d.Addresses, err = k.OwnAddresses(); err != nil {
		return e, err
	}
	f := factsOf(c, d, v.outcome, flow, now)
	if f.Source, f.Destination, err = d.Find(source, destination); err != nil {
		return e, err
	}
	if err := f.Observe(k); err != nil {
		return e, err
	}
	return explain.Explain(f), nil
}

// directory is who is where.
func directory(c config.Config, public wgtypes.Key, known store.Known, o reconcile.Outcome) explain.Directory {
	f := reconcile.Facts(c, public, nil, known, nil)
	return explain.Directory{
		Self: f.Self, Nodes: f.Nodes, Bounds: f.Bounds(), Pods: o.Pods,
		Owners: mesh.Owners(append(slices.Clone(f.Nodes), f.Self), f.Bounds(), f.Revoked),
	}
}

// factsOf are those that do not depend on the packet.
func factsOf(c config.Config, d explain.Directory, o reconcile.Outcome, flow explain.Flow, now time.Time) explain.Facts {
	f := explain.Facts{
		Node: d.Self.Name, Settings: c.Settings, Flow: flow, State: o.Observed, Now: now,
		Names: map[wgtypes.Key]string{}, Segments: map[string][]string{}, Why: map[string]string{}, EncryptNodes: map[string]bool{},
	}
	for _, n := range d.Nodes {
		f.Names[n.Spare.PublicKey] = n.Name
	}
	for _, p := range o.Plan.Peers {
		f.Names[p.PublicKey] = p.Name
	}
	for _, n := range append(slices.Clone(d.Nodes), d.Self) {
		f.Segments[n.Name] = n.Segments
		f.EncryptNodes[n.Name] = len(d.Owners.Hosts[n.Name]) > 0
	}
	for _, conflict := range o.Plan.Conflicts {
		if conflict.What == "traffic with "+d.Self.Name {
			f.Why[conflict.Node] = conflict.Reason
		}
	}
	return f
}

// verdictWords begin the first line.
var verdictWords = map[explain.Verdict]string{
	explain.Encrypted: "Encrypted", explain.Plaintext: "NOT encrypted", explain.Dropped: "Dropped", explain.Local: "Stays here",
}

func printExplanation(w io.Writer, e explain.Explanation) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s.\n", verdictWords[e.Verdict], oneLine(e.Why))
	switch {
	case e.Mend == "":
	case e.Fault:
		fmt.Fprintf(&b, "Mend: %s.\n", oneLine(e.Mend))
	default:
		fmt.Fprintf(&b, "Hint: %s.\n", oneLine(e.Mend))
	}
	fmt.Fprintln(&b)
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, s := range e.Steps {
		text := s.Text
		if s.Object != "" && !strings.Contains(text, s.Object) {
			text = s.Object + ": " + text
		}
		fmt.Fprintf(t, "%s\t%s\n", s.Stage, oneLine(text))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := io.WriteString(w, printable(b.String()))
	return err
}
