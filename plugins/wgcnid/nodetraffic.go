package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

// NodeTraffic is how the machines' own traffic fares, with encryptNodes.
type NodeTraffic struct {
	DirectPorts []uint16 `json:"directPorts,omitempty"` // TCP, outside of the tunnel
	// All says that this machine encrypts its traffic with all that do so too; else
	// it is with those inside externalCIDRs.
	All bool `json:"all"`
	// Unreached are the nodes to which nothing but the direct ports gets through.
	Unreached []reconcile.Unreached `json:"unreached,omitempty"`
}

// What becomes of the traffic between this machine and a peer's.
const (
	nodesEncrypted = "encrypted"
	nodesClear     = "clear" // the peer does not encrypt it, or has only just said so
	nodesUnreached = "no handshake"
)

// nodeTraffic also fills in what each peer's line says; nil without encryptNodes.
func nodeTraffic(c config.Config, o reconcile.Outcome, peers []PeerStatus, now time.Time) *NodeTraffic {
	if !c.ReachesHosts() {
		return nil
	}
	n := &NodeTraffic{DirectPorts: c.DirectPorts, All: c.EncryptNodes, Unreached: reconcile.NodesUnreached(o, now)}
	routed := map[string]bool{}
	for _, p := range o.Plan.Peers {
		routed[p.Name] = len(reconcile.RoutedHosts(o.Plan.State, p)) > 0
	}
	for i := range peers {
		p := &peers[i]
		switch {
		case !routed[p.Name]:
			p.NodeTraffic = nodesClear
		case slices.ContainsFunc(n.Unreached, func(u reconcile.Unreached) bool { return u.Node == p.Name }):
			p.NodeTraffic = nodesUnreached
		default:
			p.NodeTraffic = nodesEncrypted
		}
	}
	return n
}

// note is the line of the head.
func (n *NodeTraffic) note(peers []PeerStatus) string {
	var clear []string
	encrypted := 0
	for _, p := range peers {
		switch p.NodeTraffic {
		case nodesClear:
			clear = append(clear, p.Name)
		case nodesEncrypted:
			encrypted++
		}
	}
	text := fmt.Sprintf("traffic with %d of %d machines is encrypted", encrypted, len(peers))
	switch {
	case !n.All && encrypted == 0:
		text = "traffic between the machines themselves is in the clear"
	case !n.All:
		text += ", by externalCIDRs"
	case len(clear) > 0:
		text += "; in the clear with " + few(clear, "") + ", which have no encryptNodes"
	}
	var ports []string
	for _, p := range n.DirectPorts {
		ports = append(ports, fmt.Sprint(p))
	}
	return text + "; TCP ports outside of the tunnel: " + few(ports, "none")
}

// print names the nodes that are out of reach, below the table.
func (n *NodeTraffic) print(b *strings.Builder, now time.Time) {
	const most = 20
	for _, u := range n.Unreached[:min(len(n.Unreached), most)] {
		since := "there has been no handshake yet"
		if !u.Since.IsZero() {
			since = "the last handshake was " + ago(now, u.Since)
		}
		fmt.Fprintf(b, "node traffic to %s cannot be delivered: %s; see that UDP reaches its WireGuard, and that wgcnid runs there\n", u.Node, since)
	}
	if more := len(n.Unreached) - most; more > 0 {
		fmt.Fprintf(b, "node traffic to %d more cannot be delivered\n", more)
	}
}
