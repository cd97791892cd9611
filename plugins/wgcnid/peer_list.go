package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
)

func peerListCommand(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the peers, and who carries each",
		Long: `List the machines that were added, their addresses, the nodes that they enter by,
and the one that carries each now. Handshakes are those with this node, where it is
an entry node; the kernel tells them to root only.`,
		Example: "  wgcnid peer list\n  wgcnid peer list --json | jq -r '.peers[] | select(.carriedBy == \"node-a\") | .name'",
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
			heard, err := handshakes(c)
			if err != nil {
				return err
			}
			return printPeers(cmd.OutOrStdout(), listPeers(c, v, heard, time.Now()), asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// handshakes are those of this node's tunnel, for root.
func handshakes(c config.Config) (map[wgtypes.Key]kernel.Handshake, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	k, err := kernel.Open(kernel.Config{Interface: c.Interface})
	if err != nil {
		return nil, err
	}
	defer k.Close()
	return k.Handshakes()
}

// PeerList is what `wgcnid peer list --json` prints.
type PeerList struct {
	Time          time.Time   `json:"time"`
	RegistryError string      `json:"registryError,omitempty"` // why it cannot be read; then Peers is what this node knows
	Peers         []PlainPeer `json:"peers"`                   // by name
}

// PlainPeer is one line of the table.
type PlainPeer struct {
	Name        string         `json:"name"`
	PublicKey   string         `json:"publicKey"`
	Addresses   []netip.Prefix `json:"addresses"` // and with nat the ranges behind it
	Via         []string       `json:"via"`       // the preferred one first
	NAT         bool           `json:"nat,omitempty"`
	CarriedBy   string         `json:"carriedBy,omitempty"`    // "": nobody, or with nat any
	HandshakeAt time.Time      `json:"lastHandshake,omitzero"` // with this node
	Segments    []string       `json:"segments,omitempty"`
	// SealedBy is the cluster secret that its preshared keys are derived from.
	SealedBy identity.SecretID `json:"sealedBy,omitempty"`
	State    string            `json:"state"`
}

// The states of a plain peer, beside those of peerState.
const (
	peerElsewhere = "elsewhere"   // another node carries it, and may hear of it
	peerUncarried = "not carried" // none of its entry nodes is there
)

func listPeers(c config.Config, v meshView, heard map[wgtypes.Key]kernel.Handshake, now time.Time) PeerList {
	l := PeerList{Time: now, Peers: []PlainPeer{}}
	if v.away != nil {
		l.RegistryError = v.away.Error()
	}
	_, owners := reconcile.Machines(c, v.records)
	for _, r := range v.records.Records() {
		if r.Left || len(r.Via) == 0 {
			continue
		}
		p := PlainPeer{
			Name: r.Name, PublicKey: r.PublicKey.String(), Addresses: claimed(r), Via: r.Via, NAT: r.Masqueraded,
			CarriedBy: owners.Carrier[r.Name], HandshakeAt: heard[r.PublicKey].At, Segments: r.Segments, SealedBy: r.Seal.Secret,
		}
		p.State = plainState(p, owners.Refused[r.Name], c.NodeName, now)
		l.Peers = append(l.Peers, p)
	}
	return l
}

func plainState(p PlainPeer, refused bool, self string, now time.Time) string {
	fresh := !p.HandshakeAt.IsZero() && now.Sub(p.HandshakeAt) < mesh.HandshakeFresh
	here := p.CarriedBy == self || p.NAT && slices.Contains(p.Via, self)
	switch {
	case refused:
		return nodeRevoked
	case here && fresh:
		return stateConnected
	case here && !p.HandshakeAt.IsZero():
		return stateIdle
	case here:
		return stateWaiting
	case p.CarriedBy == "" && !p.NAT:
		return peerUncarried
	}
	return peerElsewhere
}

func printPeers(w io.Writer, l PeerList, asJSON bool) error {
	if asJSON {
		return printJSON(w, l)
	}
	var b strings.Builder
	if l.RegistryError != "" {
		fmt.Fprintf(&b, "The registry is away; this is what this node knows: %s\n\n", oneLine(l.RegistryError))
	}
	if len(l.Peers) == 0 {
		fmt.Fprintln(&b, "There are no peers: `wgcnid peer add NAME` adds one.")
	} else {
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "PEER\tADDRESSES\tVIA\tCARRIED BY\tHANDSHAKE\tSEGMENTS\tSEALED BY\tSTATE")
		for _, p := range l.Peers {
			handshake := "-"
			if !p.HandshakeAt.IsZero() {
				handshake = ago(l.Time, p.HandshakeAt)
			}
			carrier := cmp.Or(p.CarriedBy, "-")
			if p.NAT {
				carrier = "nat"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Name, list(p.Addresses), few(p.Via, "-"), carrier, handshake,
				few(p.Segments, "-"), cmp.Or(string(p.SealedBy), "-"), p.State)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, printable(b.String()))
	return err
}

// behindSecrets are the peers whose preshared keys depend on another secret than
// the one that this node seals with.
func behindSecrets(trust registry.Trust, records registry.Snapshot) (out []string) {
	for _, r := range records.Records() {
		if current := trust.Secrets.Current(); !r.Left && len(r.Via) > 0 && current != "" && r.Seal.Secret != current {
			out = append(out, r.Name)
		}
	}
	return out
}

// behindNote says what to do about them; "" if there are none.
func behindNote(peers []string) string {
	if len(peers) == 0 {
		return ""
	}
	return fmt.Sprintf("peers that depend on an older secret: %s; give each a new file (`wgcnid peer config NAME --renew`) before that is deleted", names(peers))
}
