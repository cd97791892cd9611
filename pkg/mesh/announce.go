package mesh

import (
	"net/netip"
	"slices"
	"time"
)

// Announce returns the claims that a node publishes: its own prefixes, and the
// fewest prefixes that cover exactly its pods outside of them. Claims that it
// held before keep their time; new ones begin at now.
func Announce(prefixes, clusterCIDRs []netip.Prefix, pods []netip.Addr, before Node, now time.Time) (own, single []Claim) {
	for _, p := range unsortedUnique(prefixes) {
		if anyCovers(clusterCIDRs, p) {
			own = append(own, keepTime(before.Prefixes, p, now))
		}
	}
	for _, p := range Merge(hostPrefixes(outside(pods, claimPrefixes(own), clusterCIDRs))) {
		single = append(single, keepTime(before.Pods, p, now))
	}
	return own, single
}

func keepTime(before []Claim, p netip.Prefix, now time.Time) Claim {
	for _, c := range before {
		if c.Prefix == p {
			return c
		}
	}
	return Claim{Prefix: p, Since: now}
}

// outside returns the pods that are in the cluster but in none of the node's prefixes.
func outside(pods []netip.Addr, prefixes, clusterCIDRs []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, a := range pods {
		a = a.Unmap() // net.IP's 16 byte form would be in no IPv4 prefix, and its pod unprotected
		if anyContains(clusterCIDRs, a) && !anyContains(prefixes, a) {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// unsortedUnique masks, and drops repetitions; the first prefix of each family stays first.
func unsortedUnique(in []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range in {
		if p = p.Masked(); !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}
