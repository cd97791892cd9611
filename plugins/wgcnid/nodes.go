package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
)

func nodesCommand(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "nodes",
		Short: "List the nodes of the mesh, as the registry has them",
		Long: `List the nodes of the mesh: what the registry says, taken into what this node
knows already. Records that are refused are listed below, with the reason. While
the registry is away this node's own knowledge is shown.`,
		Example: "  wgcnid nodes\n  wgcnid nodes --json | jq '.nodes[] | select(.sealedBy == null)'",
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
	Registry      string       `json:"registry"`
	RegistryError string       `json:"registryError,omitempty"` // why it cannot be read; then Nodes is what this node knows
	Nodes         []NodeStatus `json:"nodes"`
	Refused       []string     `json:"refused,omitempty"` // records of the registry that do not count, and why
}

// NodeStatus is one line of the table.
type NodeStatus struct {
	Name      string            `json:"name"`
	State     string            `json:"state"`
	PublicKey string            `json:"publicKey,omitempty"` // of a forgotten node the revoked one
	Endpoints []string          `json:"endpoints,omitempty"`
	Prefixes  []netip.Prefix    `json:"prefixes,omitempty"` // of its pods, those outside of its own range among them
	SealedBy  identity.SecretID `json:"sealedBy,omitempty"`
	Since     time.Time         `json:"since,omitzero"` // when it joined
	Revision  uint64            `json:"revision"`
}

// The states of a node.
const (
	nodeSelf      = "this node"
	nodeMember    = "member"
	nodeLeft      = "left"
	nodeForgotten = "forgotten"
)

func listNodes(c config.Config, v meshView) NodeList {
	l := NodeList{Registry: v.registry.String(), Nodes: []NodeStatus{}}
	if v.away != nil {
		l.RegistryError = v.away.Error()
	}
	for _, r := range v.records.Records() {
		n := NodeStatus{
			Name: r.Name, State: nodeMember, Endpoints: r.Endpoints,
			SealedBy: r.Seal.Secret, Since: r.Since, Revision: r.Revision,
		}
		for _, claims := range [][]mesh.Claim{r.Prefixes, r.Pods} {
			for _, claim := range claims {
				n.Prefixes = append(n.Prefixes, claim.Prefix)
			}
		}
		_, revoked := r.Revoked()
		switch {
		case revoked:
			n.State = nodeForgotten
		case r.Left:
			n.State = nodeLeft
		case r.Name == c.NodeName:
			n.State = nodeSelf
		}
		if !r.Left || revoked {
			n.PublicKey = r.PublicKey.String()
		}
		l.Nodes = append(l.Nodes, n)
	}
	for _, err := range v.records.Invalid {
		l.Refused = append(l.Refused, err.Error())
	}
	for _, s := range v.stale {
		l.Refused = append(l.Refused, s.Error())
	}
	slices.Sort(l.Refused)
	return l
}

func printNodes(w io.Writer, l NodeList, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(l)
	}
	var b strings.Builder
	if l.RegistryError != "" {
		fmt.Fprintf(&b, "The registry is away; this is what this node knows: %s\n\n", l.RegistryError)
	}
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tSTATE\tENDPOINTS\tPREFIXES\tSEALED BY\tJOINED")
	for _, n := range l.Nodes {
		joined := "-"
		if !n.Since.IsZero() {
			joined = n.Since.Local().Format(time.DateTime)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", n.Name, n.State, cmp.Or(strings.Join(n.Endpoints, " "), "-"),
			list(n.Prefixes), cmp.Or(string(n.SealedBy), "-"), joined)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, r := range l.Refused {
		fmt.Fprintln(&b, "refused:", r)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
