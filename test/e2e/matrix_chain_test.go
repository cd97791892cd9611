package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/wgcni/wgcni/test/cluster"
	"github.com/wgcni/wgcni/test/matrix"
)

// A sibling is a plugin that stands beside wgcni in a chain, behind a bridge
// that masquerades.
type sibling struct {
	row, detail string
	entries     []any
	// hostPorts lets the runtime map port 8080 and up of a node to its pods.
	hostPorts bool
	prepare   func(context.Context, *bed) (remove func() error, err error)
	more      func(context.Context, *bed, []*cluster.Pod) error
}

const (
	mappedPort = 8080
	// Of the bandwidth plugin, in bits a second and in bits.
	podRate, podBurst = 16_000_000, 800_000
)

func chained() []sibling {
	portmap := func(backend string) map[string]any {
		return map[string]any{"type": "portmap", "backend": backend, "capabilities": map[string]any{"portMappings": true}}
	}
	bandwidth := map[string]any{"type": "bandwidth", "ingressRate": podRate, "ingressBurst": podBurst, "egressRate": podRate, "egressBurst": podBurst}
	tuning := map[string]any{"type": "tuning", "mtu": 1300, "sysctl": map[string]any{"net.ipv4.conf.eth0.log_martians": "1"}}
	firewall := map[string]any{"type": "firewall", "backend": "iptables"}
	return []sibling{
		{
			row: "portmap, iptables", detail: "mapped ports answer machines outside of the cluster, and other nodes' pods",
			entries: []any{portmap("iptables")}, hostPorts: true, more: portsAnswer,
		},
		{row: "portmap, nftables", detail: "the same", entries: []any{portmap("nftables")}, hostPorts: true, more: portsAnswer},
		{row: "bandwidth", detail: "the rate holds", entries: []any{bandwidth}, prepare: needsIFB, more: rateHolds},
		{row: "tuning", detail: "sysctls and a smaller MTU are set", entries: []any{tuning}, more: isTuned},
		{
			row: "firewall, iptables", detail: "pods talk although `FORWARD` drops", entries: []any{firewall},
			prepare: dropForwarded,
		},
		{
			row: "portmap, tuning and firewall at once", detail: "GC forgets a pod that is gone",
			entries: []any{portmap("iptables"), tuning, firewall}, hostPorts: true, more: collectsGarbage,
		},
	}
}

func (b *bed) chainCells() (cells []cell) {
	for _, s := range chained() {
		for _, column := range []string{"before wgcni", "after wgcni"} {
			cells = append(cells, cell{
				matrix.Cell{Table: matrix.Chained, Row: s.row, Detail: s.detail, Column: column, Outcome: matrix.Works},
				func(ctx context.Context) error { return b.runChain(ctx, s, column == "before wgcni") },
			})
		}
	}
	return cells
}

func (b *bed) runChain(ctx context.Context, s sibling, before bool) (err error) {
	prepare := s.prepare
	if prepare == nil {
		prepare = func(context.Context, *bed) (func() error, error) { return func() error { return nil }, nil }
	}
	remove, err := prepare(ctx, b)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove(), b.clean()) }()
	entries := func(*cluster.Node) []any { return s.entries }
	o := network{version: "1.1.0", after: entries, primary: func(n *cluster.Node, f family) map[string]any {
		return map[string]any{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "ipam": hostLocal(n, f)}
	}}
	if before {
		o.before, o.after = entries, nil
	}
	if s.hostPorts {
		o.options = func(_ *cluster.Node, i int, _ family) cluster.PodOptions {
			return cluster.PodOptions{CapabilityArgs: fmt.Sprintf(`{"portMappings":[{"hostPort":%d,"containerPort":%d,"protocol":"tcp"}]}`, mappedPort+i, echoPort)}
		}
	}
	if err := b.configure(ctx, o, dual); err != nil {
		return err
	}
	return b.exchange(ctx, o, dual, func(ctx context.Context, pods []*cluster.Pod) error {
		if s.more == nil {
			return nil
		}
		return s.more(ctx, b, pods)
	})
}

// portsAnswer asks both ports of the first node, from outside and from a pod of
// the other node.
func portsAnswer(ctx context.Context, b *bed, pods []*cluster.Pod) error {
	for _, from := range []cluster.Endpointer{b.Underlay, pods[2]} {
		for _, to := range []netip.Addr{b.Nodes[0].IPv4, b.Nodes[0].IPv6} {
			for port := uint16(mappedPort); port < mappedPort+2; port++ {
				if _, err := cluster.TCP(ctx, from, netip.AddrPortFrom(to, port), []byte("x")); err != nil {
					return fmt.Errorf("the mapped port %d: %w", port, err)
				}
			}
		}
	}
	return nil
}

// needsIFB: the plugin holds what a pod sends by an ifb device.
func needsIFB(ctx context.Context, b *bed) (func() error, error) {
	n := b.Nodes[0]
	if out, err := n.Run(ctx, "ip", "link", "add", "ifbtest", "type", "ifb"); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errImpossible, out, err)
	}
	_, err := n.Run(ctx, "ip", "link", "delete", "ifbtest")
	return func() error { return nil }, err
}

// rateHolds sends what takes the pod some time at its rate.
func rateHolds(ctx context.Context, _ *bed, pods []*cluster.Pod) error {
	payload := bytes.Repeat([]byte("0123456789abcdef"), 1<<15)
	least := time.Duration((len(payload)*8 - 2*podBurst)) * time.Second / podRate // either end has a burst
	for _, to := range []netip.Addr{pods[0].IPv4(), pods[0].IPv6()} {
		start := time.Now()
		if _, err := cluster.TCP(ctx, pods[2], netip.AddrPortFrom(to, echoPort), payload); err != nil {
			return err
		}
		if took := time.Since(start); took < least {
			return fmt.Errorf("%d bytes took %s, at the pods' rate they need %s", len(payload), took, least)
		}
	}
	return nil
}

func isTuned(ctx context.Context, _ *bed, pods []*cluster.Pod) error {
	for _, p := range pods {
		out, err := p.Run(ctx, "sh", "-c", "cat /proc/sys/net/ipv4/conf/eth0/log_martians; ip -o link show eth0")
		if err != nil {
			return err
		}
		if !strings.HasPrefix(out, "1\n") || !strings.Contains(out, " mtu 1300 ") {
			return fmt.Errorf("%s: tuning has not done its part: %s", p, out)
		}
	}
	return nil
}

// dropForwarded makes nodes on which nothing is forwarded but what the firewall
// plugin lets pass: it accepts what pods send, and their answers. What others
// send to them is for the operator to let in, by the chain that the plugin has for that.
func dropForwarded(ctx context.Context, b *bed) (func() error, error) {
	script := func(ctx context.Context, text string) error {
		return together(b.Nodes, func(n *cluster.Node) error {
			_, err := n.Run(ctx, "sh", "-ec", "for t in iptables ip6tables; do "+text+"; done")
			return err
		})
	}
	remove := func() error {
		return script(context.Background(), "$t -P FORWARD ACCEPT; $t -F; $t -X")
	}
	return remove, script(ctx, "$t -P FORWARD DROP; $t -N CNI-ADMIN; $t -A CNI-ADMIN -i wgcni0+ -j ACCEPT")
}

// collectsGarbage: a pod whose DEL never comes, since the runtime has lost it.
func collectsGarbage(ctx context.Context, b *bed, pods []*cluster.Pod) error {
	n := b.Nodes[0]
	list, err := n.ReadFile(cluster.ConfDir + "/" + cluster.ConflistFile)
	if err != nil {
		return err
	}
	if _, err := n.Run(ctx, "sh", "-ec", "ip netns add lost; ip netns exec lost sysctl -qw net.ipv6.conf.default.accept_dad=0"); err != nil {
		return err
	}
	var result cluster.Result
	replies, err := runtimeOf(ctx, n, list, 1, []netCall{{Verb: "ADD", Container: "lost"}})
	if err == nil && replies[0].Error != "" {
		err = errors.New(replies[0].Error)
	}
	if err == nil {
		err = json.Unmarshal(replies[0].Result, &result)
	}
	if _, derr := n.Run(ctx, "ip", "netns", "delete", "lost"); err != nil || derr != nil {
		return errors.Join(err, derr)
	}
	gc := netCall{Verb: "GC"}
	for _, p := range pods[:2] {
		gc.Valid = append(gc.Valid, gcAttachment(p))
	}
	replies, err = runtimeOf(ctx, n, list, 1, []netCall{gc})
	if err == nil && replies[0].Error != "" {
		err = errors.New(replies[0].Error)
	}
	if err != nil {
		return fmt.Errorf("GC: %w", err)
	}
	out, err := n.Run(ctx, "sh", "-c", everything)
	for line := range strings.Lines(out) {
		for _, ip := range result.IPs {
			if a := ip.Address.Addr().String(); strings.HasSuffix(strings.TrimSpace(line), "/"+a) {
				return fmt.Errorf("GC has left %s", line)
			}
		}
	}
	s, serr := n.Status(ctx)
	if serr == nil && s.Pods != 2 {
		serr = fmt.Errorf("%d pods are attached after GC, want 2", s.Pods)
	}
	// The others have not been touched.
	return errors.Join(err, serr, talk(ctx, pods[2], pods[0], []byte("x")), talk(ctx, pods[2], pods[1], []byte("x")))
}

func gcAttachment(p *cluster.Pod) types.GCAttachment {
	return types.GCAttachment{ContainerID: p.ContainerID(), IfName: p.IfName}
}
