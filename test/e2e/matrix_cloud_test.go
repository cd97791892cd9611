package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// The AWS VPC CNI gives pods addresses of the nodes' own network, scattered over
// it, and routes by policy: what goes to a pod by the main table, what comes from
// one by the table of the network card that the address belongs to
// (aws/amazon-vpc-cni-k8s, docs/cni-proposal.md and pkg/networkutils):
//
//	512:  from all to POD lookup main      # POD dev veth scope link
//	1536: from POD lookup 2                # default via the VPC's router dev ethN
const (
	toPodPriority, fromPodPriority = "512", "1536"
	cardTable                      = "2"
)

// cloudLayouts have pods of which no prefix covers the node's: each is announced
// by itself, and clusterCIDRs have the nodes' own addresses in them.
func cloudLayouts() []layout {
	return []layout{{
		row: "ptp with the AWS VPC CNI's routing", ipam: "host-local, addresses of the nodes' network",
		network: network{
			clusterCIDRs: []string{"192.0.2.0/24", "2001:db8:1::/64"},
			primary: func(n *cluster.Node, f family) map[string]any {
				return map[string]any{"type": "ptp", "ipam": map[string]any{"type": "host-local", "ranges": cloudRanges(n, f)}}
			},
			attached: func(ctx context.Context, p *cluster.Pod) error { return policyRoute(ctx, p, "add") },
			detached: func(ctx context.Context, p *cluster.Pod) error { return policyRoute(ctx, p, "delete") },
		},
		prepare: cloudNodes,
		more:    nodesReach,
	}}
}

// cloudRanges alternate between the nodes, so that no two neighbours can be
// merged: 140 and 144 on the first, 142 and 146 on the second. Pods send all to a
// link-local address, as those of the AWS VPC CNI do to 169.254.1.1.
func cloudRanges(n *cluster.Node, f family) (out []any) {
	for _, family := range of(f, []string{"192.0.2.", "0/24", "169.254.1.1"}, []string{"2001:db8:1::", "/64", "fe80::1"}) {
		var set []any
		for i := range 2 {
			address := family[0] + strconv.Itoa(140+2*int(n.IPv4.As4()[3]-10)+4*i)
			set = append(set, map[string]any{"subnet": family[0] + family[1], "rangeStart": address, "rangeEnd": address, "gateway": family[2]})
		}
		out = append(out, set)
	}
	return out
}

// cloudNodes makes the table of the network card.
func cloudNodes(ctx context.Context, b *bed, _ family) (func() error, error) {
	err := together(b.Nodes, func(n *cluster.Node) error {
		_, err := n.Batch(ctx, fmt.Sprintf(`route replace %[1]s dev eth0 table %[3]s
route replace default via %[1]s dev eth0 table %[3]s
route replace %[2]s dev eth0 table %[3]s
route replace default via %[2]s dev eth0 table %[3]s
`, cluster.Gateway4, cluster.Gateway6, cardTable), "ip", "-batch", "-")
		return err
	})
	return func() error {
		return together(b.Nodes, func(n *cluster.Node) error {
			_, err := n.Run(context.Background(), "sh", "-c", "ip route flush table "+cardTable+"; ip -6 route flush table "+cardTable)
			return err
		})
	}, err
}

// policyRoute does what the AWS VPC CNI does after the veth is made, and what the
// VPC does: frames for the pod reach the node.
func policyRoute(ctx context.Context, p *cluster.Pod, verb string) error {
	for _, ip := range p.Result.IPs {
		a, flag := ip.Address.Addr().String(), "-4"
		if ip.Address.Addr().Is6() {
			flag = "-6"
		}
		batch := strings.Join([]string{
			"rule " + verb + " to " + a + " lookup main priority " + toPodPriority,
			"rule " + verb + " from " + a + " lookup " + cardTable + " priority " + fromPodPriority,
			"neigh " + verb + " proxy " + a + " dev eth0\n",
		}, "\n")
		if _, err := p.Node.Batch(ctx, batch, "ip", flag, "-batch", "-"); err != nil {
			return err
		}
		if verb == "add" { // ptp adds IPAM's routes before its gateway can be reached
			if _, err := p.Run(ctx, "ip", "route", "add", "default", "via", ip.Gateway.String(), "dev", "eth0"); err != nil {
				return err
			}
		}
	}
	return nil
}

// A node without a prefix of its own has no tunnel address. With encryptNodes it
// reaches other nodes' pods, and is answered, by its own.
func TestCloudNodesReachPods(t *testing.T) {
	b, l := newBed(t), cloudLayouts()[0]
	l.stanza = map[string]any{"encryptNodes": true}
	l.more = func(ctx context.Context, b *bed, pods []*cluster.Pod) error {
		awaitNodesEncrypted(t, b.Nodes...)
		return together(b.Nodes, func(n *cluster.Node) error {
			var errs []error
			for _, p := range pods {
				for _, ip := range p.Result.IPs {
					_, err := cluster.TCP(ctx, n, netip.AddrPortFrom(ip.Address.Addr(), echoPort), []byte("x"))
					errs = append(errs, err)
				}
			}
			return errors.Join(errs...)
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := b.runPrimary(ctx, l, dual); err != nil {
		t.Error(err)
	}
}

// nodesReach: the nodes' own addresses are inside clusterCIDRs and stay what they
// were, reached in the clear by each other; and a node reaches its own pods.
func nodesReach(ctx context.Context, b *bed, pods []*cluster.Pod) error {
	a, other := b.Nodes[0], b.Nodes[1]
	var targets []netip.Addr
	for _, ip := range pods[0].Result.IPs {
		targets = append(targets, ip.Address.Addr())
	}
	var errs []error
	for _, to := range append(targets, other.IPv4, other.IPv6) {
		if _, err := cluster.Ping(ctx, a, to, nil); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
