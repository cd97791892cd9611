package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/graph"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

func graphCommand(o *options) *cobra.Command {
	var format, output string
	cmd := &cobra.Command{
		Use:   "graph",
		Short: "Draw the mesh: its locations, gateways and tunnels",
		Long: `Draw the mesh as this node knows it: machines by location, gateways, spokes and
plain WireGuard peers, the tunnels by which traffic goes, this node, and who cannot
talk to whom. While the registry is away, what this node knows is drawn. As root,
this node's own tunnels are drawn as its kernel has them: by their last handshake,
and wider with more traffic.

The formats are svg (for browsers, on light and dark backgrounds), dot (for
Graphviz), mermaid (for Markdown) and json. Without --format it is that of the
output file's extension (.svg, .dot, .gv, .mmd, .mermaid, .json); else dot where it
goes to a terminal, and svg anywhere else. Of more than six machines that all have
tunnels to each other, a point in their midst stands for these.`,
		Example: "  wgcnid graph --output mesh.svg\n  wgcnid graph > mesh.svg\n  wgcnid graph --format dot | dot -Tpdf > mesh.pdf\n  wgcnid graph --format json | jq '.apart'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := graphFormat(format, output, cmd.OutOrStdout())
			if err != nil {
				return err
			}
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			v, err := viewMesh(cmd.Context(), c)
			if err != nil {
				return err
			}
			if v.away != nil {
				fmt.Fprintln(cmd.ErrOrStderr(), printable("The registry is away; this is what this node knows: "+oneLine(v.away.Error())))
			}
			text, err := graphText(drawMesh(c, v).WithTunnels(ownTunnels(c, v, time.Now())), format)
			if err != nil {
				return err
			}
			if output != "" {
				return os.WriteFile(output, []byte(text), 0o644)
			}
			_, err = io.WriteString(cmd.OutOrStdout(), printable(text))
			return err
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "svg, dot, mermaid or json (default: by --output's extension, see above)")
	cmd.Flags().StringVar(&output, "output", "", "file to write to (default: standard output)")
	return cmd
}

// The formats.
const (
	formatSVG     = "svg"
	formatDOT     = "dot"
	formatMermaid = "mermaid"
	formatJSON    = "json"
)

// graphFormat checks the format that was asked for, or chooses one.
func graphFormat(asked, output string, stdout io.Writer) (string, error) {
	known := []string{formatSVG, formatDOT, formatMermaid, formatJSON}
	if asked != "" {
		if !slices.Contains(known, asked) {
			return "", fmt.Errorf("format %s: want %s", strconv.Quote(asked), strings.Join(known, ", "))
		}
		return asked, nil
	}
	byExtension := map[string]string{
		".svg": formatSVG, ".dot": formatDOT, ".gv": formatDOT, ".mmd": formatMermaid, ".mermaid": formatMermaid, ".json": formatJSON,
	}
	if f, ok := byExtension[strings.ToLower(filepath.Ext(output))]; ok {
		return f, nil
	}
	if output == "" && isTerminal(stdout) {
		return formatDOT, nil
	}
	return formatSVG, nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// drawMesh arranges the nodes whose records count, as the plan does.
func drawMesh(c config.Config, v meshView) graph.Graph {
	self := v.self
	if r, published := v.records.Record(c.NodeName); published && self.PublicKey == (wgtypes.Key{}) {
		self = r
	}
	f := reconcile.Facts(c, self.PublicKey, nil, store.Known{Self: self, Records: v.records}, nil)
	nodes := append(slices.Clone(f.Nodes), f.Self)
	owners := mesh.Owners(nodes, f.Bounds(), f.Revoked)
	nodes = slices.DeleteFunc(nodes, func(n mesh.Node) bool { return owners.Refused[n.Name] })
	carrier := maps.Clone(owners.Carrier)
	if carrier == nil {
		carrier = map[string]string{}
	}
	for _, n := range nodes {
		if n.Masqueraded { // nobody claims its addresses: its entry node alone knows them
			carrier[n.Name] = n.Via[0]
		}
	}
	return graph.New(nodes, carrier, c.NodeName)
}

// ownTunnels are this node's, by the names of the far ends, as its kernel has them;
// nil where it has none, or does not tell.
func ownTunnels(c config.Config, v meshView, now time.Time) map[string]graph.Tunnel {
	k, err := kernel.Open(kernel.Config{Interface: c.Interface})
	if err != nil {
		return nil
	}
	defer k.Close()
	heard, err := k.Handshakes()
	if err != nil || heard == nil {
		return nil
	}
	return tunnelsOf(heard, readSpare(c).Peers, v, now)
}

// tunnelsOf takes in the second interface's, where there is one.
func tunnelsOf(heard map[wgtypes.Key]kernel.Handshake, spare []mesh.Peer, v meshView, now time.Time) map[string]graph.Tunnel {
	spares := map[wgtypes.Key]mesh.Peer{}
	for _, p := range spare {
		spares[p.PublicKey] = p
	}
	out := map[string]graph.Tunnel{}
	for _, r := range v.records.Records() {
		if h, there := heard[r.PublicKey]; there && !r.Left {
			s := spares[r.SpareKey()]
			h.Received, h.Sent = h.Received+s.ReceiveBytes, h.Sent+s.TransmitBytes
			if s.LastHandshake.After(h.At) {
				h.At = s.LastHandshake
			}
			out[r.Name] = graph.NewTunnel(h.At, h.Received, h.Sent, now)
		}
	}
	return out
}

func graphText(g graph.Graph, format string) (string, error) {
	switch format {
	case formatDOT:
		return g.DOT(), nil
	case formatMermaid:
		return g.Mermaid(), nil
	case formatJSON:
		text, err := json.MarshalIndent(g, "", "  ")
		return string(text) + "\n", err
	}
	return g.SVG(), nil
}
