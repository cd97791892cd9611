package reconcile

import (
	"context"
	"iter"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// SelfRecord is the record that a node publishes about itself, but for its
// revision, which stays that of the record before. Rivals are the other nodes'
// claims of single pods.
func SelfRecord(c config.Config, key wgtypes.Key, u kernel.Underlay, pods []mesh.Pod, rivals iter.Seq[mesh.Claim], before registry.Record, now time.Time) registry.Record {
	r := registry.Record{
		Name: c.NodeName, PublicKey: key, Endpoints: Endpoints(c, u), Addresses: u.All,
		Since: before.Since, Revision: before.Revision,
		Place: registry.Place{Location: c.Location, Role: c.Role, Segments: c.Segments, CalledInside: c.CalledInside},
	}
	if before.Left || r.Since.IsZero() {
		before, r.Since = registry.Record{Revision: before.Revision}, now
	}
	own := c.PodCIDRs
	if c.PodCIDRsLater { // those of before the boot, which a node most often gets again
		for _, claim := range before.Prefixes {
			own = append(own, claim.Prefix)
		}
	}
	r.Prefixes, r.Pods = mesh.Announce(mesh.Announcement{
		Prefixes: slices.Concat(own, c.Subnets), ClusterCIDRs: slices.Concat(c.ClusterCIDRs, c.ExternalCIDRs), Pods: pods,
		Before: mesh.Node{Prefixes: before.Prefixes, Pods: before.Pods}, Rivals: rivals,
	}, now)
	if c.EncryptNodes {
		r.Hosts = mesh.AnnounceHosts(u.Addresses, before.Hosts, now)
	}
	return r
}

// Rivals are the claims of single pods that all nodes but the named one make.
func Rivals(records registry.Snapshot, name string) iter.Seq[mesh.Claim] {
	return func(yield func(mesh.Claim) bool) {
		for _, r := range records.Nodes {
			if r.Left || r.Name == name {
				continue
			}
			for _, c := range r.Pods {
				if !yield(c) {
					return
				}
			}
		}
	}
}

// ReadTrust reads the cluster's secrets, where the configuration names any.
func ReadTrust(c config.Config) (t registry.Trust, err error) {
	if c.SecretFile == "" {
		return t, nil
	}
	t.AcceptUnsealed = c.AcceptUnsealed
	t.Secrets, err = identity.LoadSecrets(c.SecretFile)
	return t, err
}

// ReadPairs reads what the preshared keys of the node with this public key are
// derived from. It is nil where the configuration names no secret.
func ReadPairs(c config.Config, key wgtypes.Key) (*identity.Pairs, error) {
	trust, err := ReadTrust(c)
	if err != nil || len(trust.Secrets) == 0 {
		return nil, err
	}
	return identity.NewPairs(key, trust.Secrets), nil
}

// Endpoints are where others reach this node: as configured, else at the addresses that the default routes use.
func Endpoints(c config.Config, u kernel.Underlay) []string {
	if c.CallsOnly {
		return nil
	}
	if c.Endpoint != "" {
		return []string{c.Endpoint}
	}
	var out []string
	for _, a := range u.Addresses {
		out = append(out, netip.AddrPortFrom(a, uint16(c.ListenPort)).String())
	}
	return out
}

// Bootstrap completes what is known on a node where the helper has not run yet:
// its own prefixes and the MTU, from the configuration and the underlay alone.
// The plugin's stanza does not say what ranges its siblings have, so that they
// are looked up in the CNI folder.
func Bootstrap(c config.Config, known store.Known, k UnderlayKernel, now time.Time) (store.Known, error) {
	if known.Self.Since.IsZero() {
		if len(c.PodCIDRs) == 0 {
			// None found: the pods' own addresses are guarded one by one.
			c.PodCIDRs, _ = config.FindPodCIDRs(c.Name, config.DefaultDir)
		}
		known.Self.Prefixes, _ = mesh.Announce(mesh.Announcement{
			Prefixes: slices.Concat(c.PodCIDRs, c.Subnets), ClusterCIDRs: slices.Concat(c.ClusterCIDRs, c.ExternalCIDRs),
		}, now)
	}
	if known.MTU == 0 {
		u, err := Underlay(k, c)
		if err != nil {
			return known, err
		}
		self := known.Self
		self.Endpoints = Endpoints(c, u)
		known.MTU = FindMTU(c, u, self, known.Records)
	}
	return known, nil
}

// Resolver turns the endpoints of records into addresses. Names are looked up
// in the background, so that a name server which is away holds nothing up.
type Resolver struct {
	// Lookup is net.Resolver.LookupNetIP but in tests.
	Lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
	// Changed is called when a name has a new address.
	Changed func()

	mu    sync.Mutex
	names map[string]*lookup
}

type lookup struct {
	addrs  []netip.Addr
	at     time.Time
	busy   bool
	failed bool // the last time
}

// lookupTTL is how long an answer is used before the name is looked up again.
const lookupTTL = 30 * time.Second

const lookupTimeout = 10 * time.Second

// Endpoint chooses where to reach a record's node: the first of its endpoints of a
// family that this node has too, else the first of all. known is the answer of
// the last time, and stays in use while a name cannot be resolved.
func (r *Resolver) Endpoint(ctx context.Context, rec registry.Record, own []netip.Addr, known netip.AddrPort, now time.Time) netip.AddrPort {
	var usable []netip.AddrPort
	for _, e := range rec.Endpoints {
		host, port, err := net.SplitHostPort(e)
		if err != nil {
			continue
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			continue
		}
		for _, a := range r.addresses(ctx, host, now) {
			usable = append(usable, netip.AddrPortFrom(a, uint16(n)))
		}
	}
	if len(usable) == 0 {
		if len(rec.Endpoints) == 0 {
			return netip.AddrPort{}
		}
		return known
	}
	i := slices.IndexFunc(usable, func(e netip.AddrPort) bool {
		return slices.ContainsFunc(own, func(a netip.Addr) bool { return a.Is4() == e.Addr().Is4() })
	})
	return usable[max(i, 0)]
}

func (r *Resolver) addresses(ctx context.Context, host string, now time.Time) []netip.Addr {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a.Unmap()}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.names == nil {
		r.names = map[string]*lookup{}
	}
	l := r.names[host]
	if l == nil {
		l = &lookup{}
		r.names[host] = l
	}
	if l.at.IsZero() || now.Sub(l.at) > lookupTTL {
		r.begin(ctx, host, l, now)
	}
	return l.addrs
}

// begin looks a name up, unless that is being done. The lock is held.
func (r *Resolver) begin(ctx context.Context, host string, l *lookup, now time.Time) {
	if !l.busy {
		l.busy, l.at = true, now
		go r.resolve(ctx, host, l)
	}
}

func (r *Resolver) resolve(ctx context.Context, host string, l *lookup) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found, err := r.Lookup(ctx, "ip", host)
	for i := range found {
		found[i] = found[i].Unmap()
	}
	slices.SortFunc(found, netip.Addr.Compare)
	r.mu.Lock()
	l.busy, l.failed = false, err != nil || len(found) == 0
	changed := !l.failed && !slices.Equal(found, l.addrs)
	if changed {
		l.addrs = found
	}
	r.mu.Unlock()
	if changed {
		r.Changed()
	}
}
