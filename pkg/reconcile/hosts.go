package reconcile

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/store"
)

// publishedHosts are this node's own addresses that the others can have heard of:
// what they do not know of they do not let through the tunnel.
func publishedHosts(c config.Config, known store.Known) []mesh.Claim {
	published, _ := known.Records.Record(c.NodeName)
	if !c.EncryptNodes || published.Left {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(known.Self.Hosts), func(own mesh.Claim) bool {
		return !slices.ContainsFunc(published.Hosts, func(p mesh.Claim) bool { return p.Prefix == own.Prefix })
	})
}

// settling is how long it takes until the next host claim has settled; 0 if all have.
func (l *Loop) settling(now time.Time) (next time.Duration) {
	if !l.config.ReachesHosts() {
		return 0
	}
	look := func(claims []mesh.Claim) {
		for _, c := range claims {
			age := now.Sub(c.Since)
			if left := mesh.HostsSettle - age; age.Abs() < mesh.HostsSettle && (next == 0 || left < next) {
				next = left
			}
		}
	}
	look(l.known.Self.Hosts)
	for _, r := range l.known.Records.Nodes {
		look(r.Hosts)
	}
	return next
}

// Unreached is a node whose machine is to be reached through the tunnel, and
// which has not shaken hands for longer than a session lives: what is sent to it
// is lost, but for the direct ports.
type Unreached struct {
	Node string `json:"node"`
	// Since is the last handshake; zero if there never was one.
	Since time.Time `json:"since,omitzero"`
}

// NodesUnreached compares what the kernel holds with the plan. The keepalive that
// such peers have tells one that is silent from one that nobody talks to.
func NodesUnreached(o Outcome, now time.Time) (out []Unreached) {
	last := make(map[wgtypes.Key]time.Time, len(o.Observed.Peers))
	for _, p := range o.Observed.Peers {
		last[p.PublicKey] = p.LastHandshake
	}
	for _, p := range o.Plan.Peers {
		at := last[p.PublicKey]
		if len(RoutedHosts(o.Plan.State, p)) > 0 && (at.IsZero() || now.Sub(at).Abs() >= mesh.HandshakeFresh) {
			out = append(out, Unreached{p.Name, at})
		}
	}
	slices.SortFunc(out, func(a, b Unreached) int { return cmp.Compare(a.Node, b.Node) })
	return out
}

// RoutedHosts are the addresses at which a peer's machine is reached through the tunnel.
func RoutedHosts(s mesh.State, p mesh.Peer) (out []netip.Addr) {
	for _, q := range p.AllowedIPs {
		if _, routed := slices.BinarySearchFunc(s.Filter.Nodes.Peers, q.Addr(), netip.Addr.Compare); routed && q.IsSingleIP() {
			out = append(out, q.Addr())
		}
	}
	return out
}

// unreachedPatience is how long a first handshake may take before a peer is called unreached.
const unreachedPatience = 10 * time.Second

// unreached follows the nodes that cannot be reached, and when that was noticed.
type unreached map[string]time.Time

// hear takes in what an observation of the kernel shows, and returns those that
// have been out of reach for long enough, and which of them are news.
func (u *unreached) hear(found []Unreached, now time.Time) (standing, news []Unreached) {
	noticed := unreached{}
	for _, f := range found {
		at, known := (*u)[f.Node]
		if !known {
			at = now
		}
		noticed[f.Node] = at
		if f.Since.IsZero() && now.Sub(at) < unreachedPatience {
			continue
		}
		standing = append(standing, f)
		if at != told {
			news = append(news, f)
			noticed[f.Node] = told
		}
	}
	*u = noticed
	return standing, news
}

// told stands for a node that has been reported.
var told = time.Unix(0, 0)

// lookForNodes reports the nodes that are out of reach. Only what was read from
// the kernel just now tells of handshakes.
func (l *Loop) lookForNodes(o Outcome, now time.Time) {
	var news []Unreached
	l.nodesUnreached, news = l.unreached.hear(NodesUnreached(o, now), now)
	for _, u := range news {
		l.Log.Warn("node traffic cannot be delivered: no handshake", "node", u.Node, "since", u.Since,
			"mend", "see that UDP reaches its \"listenPort\", and that wgcnid runs there")
	}
}
