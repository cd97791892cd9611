package mesh

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"time"
)

// A Pod is an address of a pod that is attached to this node, and since when.
type Pod struct {
	Addr  netip.Addr
	Since time.Time // zero: not known
}

// Equal compares times by their instant.
func (p Pod) Equal(q Pod) bool { return p.Addr == q.Addr && p.Since.Equal(q.Since) }

// Announcement is what a node's claims are made from.
type Announcement struct {
	Prefixes     []netip.Prefix // the node's own
	ClusterCIDRs []netip.Prefix
	Pods         []Pod           // in any order; of two with one address the newer counts
	Before       Node            // what the node claimed last
	Rivals       iter.Seq[Claim] // the other nodes' claims of single pods; nil: there are none

	rivals map[netip.Addr]time.Time // the newest of them for each of Pods
}

// Announce returns the claims that a node publishes: its own prefixes, and the
// pods that need a claim of their own. Those are the ones outside of the
// prefixes, and the ones inside that another node claims singly: a pod that
// went there and came back (A -> B -> A).
//
// Pods that nobody else claims are merged into the fewest prefixes that cover
// exactly these; a merged claim is as new as its newest pod. What is contested
// stays single, with its own time: by it the nodes decide.
func Announce(a Announcement, now time.Time) (own, single []Claim) {
	for _, p := range unsortedUnique(a.Prefixes) {
		if anyCovers(a.ClusterCIDRs, p) {
			own = append(own, keepTime(a.Before.Prefixes, p, now))
		}
	}
	a.Pods = newest(a.Pods)
	a.findRivals()
	prefixes := claimPrefixes(own)
	var alone []Claim // uncontested
	for _, p := range a.Pods {
		if !anyContains(a.ClusterCIDRs, p.Addr) {
			continue
		}
		c := Claim{Prefix: hostPrefix(p.Addr), Since: a.since(p, now)}
		if _, contested := a.rivals[p.Addr]; contested {
			single = append(single, c)
		} else if !anyContains(prefixes, p.Addr) {
			alone = append(alone, c)
		}
	}
	for _, p := range Merge(claimPrefixes(alone)) {
		merged := Claim{Prefix: p}
		for _, c := range alone {
			if covers(p, c.Prefix) && c.Since.After(merged.Since) {
				merged.Since = c.Since
			}
		}
		if c := keepTime(a.Before.Pods, p, merged.Since); c.Since.After(merged.Since) {
			merged = c
		}
		single = append(single, merged)
	}
	slices.SortFunc(single, func(a, b Claim) int { return ComparePrefixes(a.Prefix, b.Prefix) })
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

// newest sorts the pods, each address once, with the time of its latest pod.
func newest(pods []Pod) []Pod {
	pods = slices.Clone(pods)
	for i := range pods {
		pods[i].Addr = pods[i].Addr.Unmap() // net.IP's 16 byte form would be in no IPv4 prefix, and its pod unprotected
		pods[i].Since = ClaimTime(pods[i].Since)
	}
	slices.SortStableFunc(pods, func(p, q Pod) int { return cmp.Or(p.Addr.Compare(q.Addr), q.Since.Compare(p.Since)) })
	return slices.CompactFunc(pods, func(p, q Pod) bool { return p.Addr == q.Addr })
}

// findRivals looks who else claims this node's pods.
func (a *Announcement) findRivals() {
	if a.Rivals == nil || len(a.Pods) == 0 {
		return
	}
	ours := make(map[netip.Addr]bool, len(a.Pods))
	for _, p := range a.Pods {
		ours[p.Addr] = true
	}
	a.rivals = map[netip.Addr]time.Time{}
	meet := func(addr netip.Addr, since time.Time) {
		if last, met := a.rivals[addr]; ours[addr] && (!met || since.After(last)) {
			a.rivals[addr] = since
		}
	}
	for c := range a.Rivals {
		if c.Prefix.IsSingleIP() {
			meet(c.Prefix.Addr(), c.Since)
			continue
		}
		for addr := range ours {
			if c.Prefix.Contains(addr) {
				meet(addr, c.Since)
			}
		}
	}
}

// arrival is how long after its ADD a pod may be taken for one that is announced
// for the first time.
const arrival = time.Minute

// since is the time of a pod's claim: that of its ADD. A pod that has just come
// is newer than every claim of it that is known by then, whatever the clock of
// the node that it left says.
func (a *Announcement) since(p Pod, now time.Time) time.Time {
	i := slices.IndexFunc(a.Before.Pods, func(c Claim) bool { return c.Prefix.Contains(p.Addr) })
	rival, contested := a.rivals[p.Addr]
	switch {
	case !p.Since.IsZero():
	case i >= 0:
		return a.Before.Pods[i].Since
	case contested: // the other knows since when
		return rival.Add(-time.Millisecond)
	default:
		return now
	}
	switch announced := i >= 0 && !a.Before.Pods[i].Since.Before(p.Since); {
	case announced && a.Before.Pods[i].Prefix.IsSingleIP():
		return a.Before.Pods[i].Since
	case !announced && contested && !rival.Before(p.Since) && !anyContains(a.Prefixes, p.Addr) && now.Sub(p.Since) < arrival:
		return rival.Add(time.Millisecond)
	}
	return p.Since
}

// outside returns the pods that are in the cluster but in none of the node's prefixes.
func outside(pods []netip.Addr, prefixes, clusterCIDRs []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, a := range pods {
		a = a.Unmap()
		if anyContains(clusterCIDRs, a) && !anyContains(prefixes, a) {
			out = append(out, a)
		}
	}
	return SortAddrs(out)
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
