package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

// family is which addresses a network's pods have.
type family string

const (
	ipv4 family = "IPv4"
	ipv6 family = "IPv6"
	dual family = "both"
)

var families = []family{ipv4, ipv6, dual}

// of picks what belongs to the family out of a pair for IPv4 and IPv6.
func of[T any](f family, v4, v6 T) []T {
	switch f {
	case ipv4:
		return []T{v4}
	case ipv6:
		return []T{v6}
	}
	return []T{v4, v6}
}

// A network is what a node's conflist says, on each of the two nodes.
type network struct {
	version      string   // cniVersion; 1.0.0 by default
	clusterCIDRs []string // by default those of conflist/, as the family needs them
	primary      func(*cluster.Node, family) map[string]any
	stanza       map[string]any // more keys of our entry
	// before and after are entries between the primary and wgcni, and behind it.
	before, after func(*cluster.Node) []any
	// options are what the runtime says about a node's i-th pod.
	options func(n *cluster.Node, i int, f family) cluster.PodOptions
	// attached and detached do what a primary would do that the reference plugins don't.
	attached, detached func(context.Context, *cluster.Pod) error
}

// bed is the two nodes that all cells are run on, one after the other.
type bed struct {
	*cluster.Cluster
	helpers []*cluster.Process
	runs    []string // what each node's helper was started with
	etcd    *cluster.Etcd
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{Cluster: cluster.NewT(t, 2), helpers: make([]*cluster.Process, 2), runs: make([]string, 2)}
	for _, n := range b.Nodes { // of the veths' ends to come; see attach
		mustRun(t, n, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
	}
	return b
}

// Pods outside of the nodes' prefixes lie in these.
var scattered = []netip.Prefix{netip.MustParsePrefix("192.0.2.128/25"), netip.MustParsePrefix("2001:db8:1::140/124")}

// noDAD spares a pod the detection of duplicate IPv6 addresses, for which ptp and
// bridge wait 2 to 4 s.
var noDAD = map[string]string{"ipv6/conf/default/accept_dad": "0"}

// configure writes the conflists, and starts the helpers anew where what they
// read of them has changed.
func (b *bed) configure(ctx context.Context, o network, f family) error {
	return together([]int{0, 1}, func(i int) error {
		n := b.Nodes[i]
		primary := o.primary(n, f)
		ours := map[string]any{"type": "wgcni", "clusterCIDRs": o.ranges(f), "registry": map[string]any{"type": "file", "path": b.RegistryFile()}}
		maps.Copy(ours, o.stanza)
		plugins := []any{primary}
		if o.before != nil {
			plugins = append(plugins, o.before(n)...)
		}
		plugins = append(plugins, ours)
		if o.after != nil {
			plugins = append(plugins, o.after(n)...)
		}
		text, err := json.MarshalIndent(map[string]any{"cniVersion": or(o.version, "1.0.0"), "name": cluster.NetworkName, "plugins": plugins}, "", "  ")
		if err != nil {
			return err
		}
		if err := n.WriteConflist(cluster.ConflistFile, string(text)); err != nil {
			return err
		}
		ipam, _ := primary["ipam"].(map[string]any)
		runs := fmt.Sprint(ours["clusterCIDRs"], primary["type"] == "flannel", ipam["type"], ipam["ranges"])
		if b.runs[i] == runs && primary["type"] != "flannel" { // whose ranges are in another file
			return nil
		}
		b.runs[i] = runs
		if h := b.helpers[i]; h != nil {
			if err := h.Stop(ctx); err != nil {
				return err
			}
		}
		b.helpers[i], err = n.StartHelper()
		return err
	})
}

func (o network) ranges(f family) []string {
	if o.clusterCIDRs != nil {
		return of(f, o.clusterCIDRs[0], o.clusterCIDRs[1])
	}
	return of(f, "10.244.0.0/16", "fd00:244::/32")
}

// attach adds two pods to the first node and one to the second, with a server in
// each, and waits until both nodes can send to all.
func (b *bed) attach(ctx context.Context, o network, f family) (pods []*cluster.Pod, servers []*cluster.Server, err error) {
	pods, servers = make([]*cluster.Pod, 3), make([]*cluster.Server, 3)
	// One after the other on a node: bridge's MAC address is not settled before its
	// first port is, and CHECK compares it with the result.
	err = together([][]int{{0, 1}, {2}}, func(places []int) error {
		for _, i := range places {
			var err error
			if pods[i], servers[i], err = b.attachOne(ctx, o, f, b.Nodes[i/2], i%2); err != nil {
				return err
			}
		}
		return nil
	})
	return pods, servers, err
}

func (b *bed) attachOne(ctx context.Context, o network, f family, n *cluster.Node, i int) (*cluster.Pod, *cluster.Server, error) {
	var of cluster.PodOptions
	if o.options != nil {
		of = o.options(n, i, f)
	}
	of.Sysctls = noDAD
	p, err := n.AddPod(ctx, cluster.NetworkName, fmt.Sprintf("pod%d", i), of)
	if err != nil {
		return nil, nil, err
	}
	if p.IPv4().IsValid() != (f != ipv6) || p.IPv6().IsValid() != (f != ipv4) {
		return p, nil, fmt.Errorf("%s has the addresses %v, want %s", p, p.Result.IPs, f)
	}
	if o.attached != nil {
		if err := o.attached(ctx, p); err != nil {
			return p, nil, err
		}
	}
	s, err := cluster.StartServer(p, echoPort)
	return p, s, err
}

// awaitKnown waits until each node holds its plan, and the pods of the other.
func (b *bed) awaitKnown(ctx context.Context, pods []*cluster.Pod) error {
	return together(b.Nodes, func(n *cluster.Node) error {
		return cluster.Poll(ctx, n.Name+" to know the other's pods", func() error {
			s, err := n.Status(ctx)
			if err != nil || !s.OK {
				return errors.Join(fmt.Errorf("%s %v", s.Verdict, s.Pending), err)
			}
			for _, p := range pods {
				for _, ip := range p.Result.IPs {
					if p.Node != n && !allowed(s, ip.Address.Addr()) {
						return fmt.Errorf("no peer has %s of %s", ip.Address, p)
					}
				}
			}
			return nil
		})
	})
}

func allowed(s cluster.Status, a netip.Addr) bool {
	for _, peer := range s.Peers {
		if slices.ContainsFunc(peer.AllowedIPs, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return true
		}
	}
	return false
}

// exchange does what each network must stand: traffic between the nodes and on
// one of them, unseen on the underlay, then CHECK and DEL, and nothing is left.
func (b *bed) exchange(ctx context.Context, o network, f family, more func(context.Context, []*cluster.Pod) error) (err error) {
	marker := []byte("plaintext-marker-of-the-matrix")
	capture, err := cluster.StartCapture(b.Underlay, cluster.Bridge, cluster.CaptureOptions{Markers: [][]byte{marker}, Prefixes: o.secret(f)})
	if err != nil {
		return err
	}
	pods, servers, err := b.attach(ctx, o, f)
	defer func() {
		for _, s := range servers {
			if s != nil {
				_ = s.Close()
			}
		}
		// The cell's time may be up, the next one's nodes still have to be clean.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cellTimeout)
		defer cancel()
		attached := slices.DeleteFunc(pods, func(p *cluster.Pod) bool { return p == nil })
		err = errors.Join(err, together(attached, func(p *cluster.Pod) error {
			if o.detached != nil {
				return errors.Join(p.Delete(ctx), o.detached(ctx, p))
			}
			return p.Delete(ctx)
		}))
		if err == nil {
			err = b.awaitNothingLeft(ctx, pods)
		}
	}()
	if err != nil {
		return errors.Join(err, stopCapture(ctx, capture, false))
	}
	err = b.awaitKnown(ctx, pods)
	for _, pair := range [][2]int{{0, 2}, {2, 1}, {0, 1}} {
		if err == nil {
			err = talk(ctx, pods[pair[0]], pods[pair[1]], marker)
		}
	}
	if err == nil && more != nil {
		err = more(ctx, pods)
	}
	if err == nil {
		err = together(pods, func(p *cluster.Pod) error { _, err := p.CNI(ctx, "check"); return err })
	}
	return errors.Join(err, stopCapture(ctx, capture, err == nil))
}

// secret are the addresses that should be seen in no plain header.
func (o network) secret(f family) []netip.Prefix {
	if o.clusterCIDRs != nil { // nodes are among them
		return scattered
	}
	var out []netip.Prefix
	for _, r := range o.ranges(f) {
		out = append(out, netip.MustParsePrefix(r))
	}
	return out
}

// stopCapture wants a clean underlay, and one that encrypted traffic has crossed
// where it has.
func stopCapture(ctx context.Context, c *cluster.Capture, crossed bool) error {
	report, err := c.Stop(ctx)
	if err == nil {
		err = report.Clean()
	}
	if err == nil && crossed && report.WireGuard == 0 {
		err = errors.New("no WireGuard packet on the underlay")
	}
	return err
}

// everything prints what a plugin could leave on a node.
const everything = `ip -o addr; ip route show table all; ip -6 route show table all; ip rule; ip -6 rule
ip neigh show proxy; ip -6 neigh show proxy; tc qdisc; nft list ruleset; iptables-save; ip6tables-save; find /var/lib/cni
grep -rs --exclude 'last_reserved_ip*' . /var/lib/cni/networks || true`

// awaitNothingLeft waits until no node has an address or the ID of a pod that is
// gone. The other node hears of single addresses a little later.
func (b *bed) awaitNothingLeft(ctx context.Context, pods []*cluster.Pod) error {
	var names []string
	for _, p := range pods {
		names = append(names, regexp.QuoteMeta(p.ContainerID()))
		for _, ip := range p.Result.IPs {
			names = append(names, regexp.QuoteMeta(ip.Address.Addr().String())+`\b`)
		}
	}
	if len(names) == 0 {
		return nil
	}
	left := regexp.MustCompile(`\b(` + strings.Join(names, "|") + `)`)
	return together(b.Nodes, func(n *cluster.Node) error {
		return cluster.Poll(ctx, n.Name+" to have forgotten its pods", func() error {
			out, err := n.Run(ctx, "sh", "-c", everything)
			if err != nil {
				return err
			}
			for line := range strings.Lines(out) {
				if left.MatchString(line) {
					return fmt.Errorf("left behind: %s", strings.TrimSpace(line))
				}
			}
			if s, err := n.Status(ctx); err != nil || s.Pods > 0 {
				return errors.Join(fmt.Errorf("wgcnid knows of %d pods", s.Pods), err)
			}
			return nil
		})
	})
}

// clean removes the bridge, which has the addresses of the network before.
func (b *bed) clean() error {
	ctx, cancel := context.WithTimeout(context.Background(), cellTimeout)
	defer cancel()
	return together(b.Nodes, func(n *cluster.Node) error {
		_, err := n.Run(ctx, "sh", "-c", "ip link delete cni0 2>/dev/null; rm -rf /var/lib/cni/networks")
		return err
	})
}

// routeAround gives the nodes ordinary routes to each other's pods, or takes them.
func (b *bed) routeAround(ctx context.Context, verb string) error {
	return together([]int{0, 1}, func(i int) error {
		other := b.Nodes[1-i]
		var batch strings.Builder
		for j, p := range other.PodCIDRs() {
			fmt.Fprintf(&batch, "route %s %s via %s\n", verb, p, []netip.Addr{other.IPv4, other.IPv6}[j])
		}
		_, err := b.Nodes[i].Batch(ctx, batch.String(), "ip", "-force", "-batch", "-")
		return err
	})
}

// together does f for all at once.
func together[T any](items []T, f func(T) error) error {
	errs := make([]error, len(items))
	var all sync.WaitGroup
	for i, item := range items {
		all.Go(func() { errs[i] = f(item) })
	}
	all.Wait()
	return errors.Join(errs...)
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
