package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

func nodesCommand(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "nodes",
		Short: "List the nodes of the mesh, as the registry has them",
		Long: `List the nodes of the mesh: what the registry says, taken into what this node
knows already. Nodes that have left or were forgotten are among them. Records that
are refused are listed below, with the reason. While the registry is away, what
this node knows is shown.

Which of them this node has a tunnel to is told by ` + "`wgcnid status`" + `.`,
		Example: "  wgcnid nodes\n  wgcnid nodes --json | jq -r '.nodes[] | select(.state == \"member\" and .sealedBy == null) | .name'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			v, err := viewMesh(cmd.Context(), c)
			if err != nil {
				return err
			}
			return printNodes(cmd.OutOrStdout(), listNodes(c, v), asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// NodeList is what `wgcnid nodes --json` prints.
type NodeList struct {
	Registry      string          `json:"registry"`
	RegistryError string          `json:"registryError,omitempty"` // why it cannot be read; then Nodes is what this node knows
	Nodes         []NodeStatus    `json:"nodes"`                   // by name
	Refused       []RefusedRecord `json:"refused"`                 // by name; what the registry has and does not count
}

// NodeStatus is one line of the table.
type NodeStatus struct {
	Name      string            `json:"name"`
	State     string            `json:"state"`
	PublicKey string            `json:"publicKey,omitempty"` // of a forgotten node the revoked one
	Endpoints []string          `json:"endpoints,omitempty"`
	Prefixes  []netip.Prefix    `json:"prefixes,omitempty"` // of its pods, those outside of its own range among them
	Hosts     []netip.Prefix    `json:"hosts,omitempty"`    // its own addresses inside externalCIDRs, reached through the tunnel
	SealedBy  identity.SecretID `json:"sealedBy,omitempty"`
	Since     time.Time         `json:"since,omitzero"` // when it joined
	Revision  uint64            `json:"revision"`
}

// RefusedRecord is a record of the registry that does not count.
type RefusedRecord struct {
	Node   string `json:"node"` // the name that it is stored under
	Reason string `json:"reason"`
}

// The states of a node.
const (
	nodeSelf      = "this node"
	nodeMember    = "member"
	nodePeer      = "peer" // runs nothing but WireGuard; see `wgcnid peer`
	nodeLeft      = "left"
	nodeForgotten = "forgotten"   // and its key revoked
	nodeRevoked   = "key revoked" // a record with the key of a forgotten node: nobody is its peer
)

func listNodes(c config.Config, v meshView) NodeList {
	l := NodeList{Registry: v.registry.String(), Nodes: []NodeStatus{}, Refused: []RefusedRecord{}}
	if v.away != nil {
		l.RegistryError = v.away.Error()
	}
	records := v.records.Records()
	revoked := map[wgtypes.Key]bool{}
	for _, r := range records {
		if key, ok := r.Revoked(); ok {
			revoked[key] = true
		}
	}
	for _, r := range records {
		l.Nodes = append(l.Nodes, nodeStatus(r, c, revoked))
	}
	for name, err := range v.records.Invalid {
		l.Refused = append(l.Refused, RefusedRecord{name, err.Error()})
	}
	for _, s := range v.stale {
		l.Refused = append(l.Refused, RefusedRecord{s.Name, s.Error()})
	}
	slices.SortFunc(l.Refused, func(a, b RefusedRecord) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Reason, b.Reason))
	})
	return l
}

func nodeStatus(r registry.Record, c config.Config, revoked map[wgtypes.Key]bool) NodeStatus {
	n := NodeStatus{
		Name: r.Name, State: nodeMember, Endpoints: r.Endpoints,
		SealedBy: r.Seal.Secret, Since: r.Since, Revision: r.Revision,
	}
	for _, claims := range [][]mesh.Claim{r.Prefixes, r.Pods} {
		for _, claim := range claims {
			n.Prefixes = append(n.Prefixes, claim.Prefix)
		}
	}
	for _, claim := range r.Hosts {
		if slices.ContainsFunc(c.ExternalCIDRs, func(p netip.Prefix) bool { return p.Contains(claim.Prefix.Addr()) }) {
			n.Hosts = append(n.Hosts, claim.Prefix)
		}
	}
	_, forgotten := r.Revoked()
	switch {
	case forgotten:
		n.State = nodeForgotten
	case r.Left:
		n.State = nodeLeft
	case revoked[r.PublicKey]:
		n.State = nodeRevoked
	case len(r.Via) > 0:
		n.State = nodePeer
	case r.Name == c.NodeName:
		n.State = nodeSelf
	}
	if r.PublicKey != (wgtypes.Key{}) {
		n.PublicKey = r.PublicKey.String()
	}
	return n
}

func printNodes(w io.Writer, l NodeList, asJSON bool) error {
	if asJSON {
		return printJSON(w, l)
	}
	var b strings.Builder
	if l.RegistryError != "" {
		fmt.Fprintf(&b, "The registry is away; this is what this node knows: %s\n\n", oneLine(l.RegistryError))
	}
	if len(l.Nodes) == 0 {
		fmt.Fprintln(&b, "No node has joined yet.")
	} else {
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "NODE\tSTATE\tENDPOINTS\tPREFIXES\tSEALED BY\tJOINED")
		for _, n := range l.Nodes {
			joined := "-"
			if !n.Since.IsZero() {
				joined = n.Since.Local().Format(time.DateTime)
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", n.Name, n.State, few(n.Endpoints, "-"), few(texts(slices.Concat(n.Prefixes, n.Hosts)), "-"),
				cmp.Or(string(n.SealedBy), "-"), joined)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	for _, r := range l.Refused {
		fmt.Fprint(&b, "refused: ", oneLine(r.Reason))
		if shown := strings.Trim(strconv.Quote(r.Node), `"`); !strings.Contains(r.Reason, shown) { // but whom it pretends to be of
			fmt.Fprintf(&b, " (stored under %s)", oneLine(strconv.Quote(r.Node)))
		}
		fmt.Fprintln(&b)
	}
	_, err := io.WriteString(w, printable(b.String()))
	return err
}
