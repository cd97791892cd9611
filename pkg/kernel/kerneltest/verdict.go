package kerneltest

import (
	"cmp"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// The answers of Verdict, besides "encrypted:" with the peer's name or key.
const (
	Local       = "local"       // stays on this machine
	Dropped     = "dropped"     // by the filter
	Unreachable = "unreachable" // by a route, or no peer that could take it
	Plaintext   = "plaintext"   // leaves by the uplink as it is
)

// Verdict says what would become of a packet without a mark from src to dst,
// which a pod or a process on this machine sends. It goes the data plane's way:
// rules by priority, the longest prefix in each one's table, the main table at
// last, WireGuard's allowed IPs, the filter. Nothing in the main table for dst
// is taken for a default route by Uplink.
//
// The answer is one of Local, Dropped, Unreachable and Plaintext, or
// "encrypted:" and the peer.
func (k *Kernel) Verdict(src, dst netip.Addr) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.hasAddress(dst) {
		return Local
	}
	r := k.lookup(dst)
	switch {
	case r.Type == mesh.Unreachable:
		return Unreachable
	case k.filtered(src, dst, r.dev):
		return Dropped
	case r.dev == Uplink:
		return Plaintext
	}
	d := k.device(r.dev)
	if d == nil {
		return Local
	}
	peer, ok := d.peers[d.owner(dst)]
	if !ok || !peer.Endpoint.IsValid() { // ENOKEY, EDESTADDRREQ
		return Unreachable
	}
	return "encrypted:" + k.name(peer.PublicKey)
}

// lookup follows the policy rules to the route that the packet takes.
func (k *Kernel) lookup(dst netip.Addr) route {
	rules := make([]mesh.Rule, 0, len(k.rules)+1)
	for r := range k.rules {
		if r.IPv6 == dst.Is6() {
			rules = append(rules, r)
		}
	}
	rules = append(rules, mesh.Rule{Priority: 32766, Table: MainTable})
	slices.SortFunc(rules, func(a, b mesh.Rule) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Table, b.Table))
	})
	for _, rule := range rules {
		if r, ok := k.inTable(rule.Table, dst); ok && r.Type != mesh.Throw {
			return r
		}
	}
	return route{dev: Uplink}
}

// inTable returns the table's route for dst: the longest prefix, then the least metric.
func (k *Kernel) inTable(table int, dst netip.Addr) (best route, found bool) {
	for key, r := range k.routes {
		if key.table != table || !key.prefix.Contains(dst) {
			continue
		}
		if !found || cmp.Or(cmp.Compare(best.Prefix.Bits(), key.prefix.Bits()), cmp.Compare(key.metric, best.Metric)) < 0 {
			best, found = r, true
		}
	}
	return best, found
}

// owner is WireGuard's lookup among the allowed IPs; the zero key is nobody's.
func (d *device) owner(dst netip.Addr) wgtypes.Key {
	var best netip.Prefix
	for p := range d.owners {
		if p.Contains(dst) && (!best.IsValid() || p.Bits() > best.Bits()) {
			best = p
		}
	}
	return d.owners[best]
}

// filtered says whether the filter drops a packet that leaves by dev.
func (k *Kernel) filtered(src, dst netip.Addr, dev string) bool {
	f := k.filter
	return f.Interface != "" && !f.Broken && dev != f.Interface && dev != mesh.SpareInterface(f.Interface) && contains(f.Cluster, src) && contains(f.Guarded, dst) &&
		!contains(f.Local, dst) && !slices.Contains(f.Pods, dst) && !slices.Contains(f.Exempt, dst)
}

func contains(set []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(set, func(p netip.Prefix) bool { return p.Contains(a) })
}
