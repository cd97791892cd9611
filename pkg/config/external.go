package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// checkExternal reads what is about machines that are no nodes, and where this
// machine's own ranges may lie.
func checkExternal(c *Config, raw rawStanza) (err error) {
	if c.ExternalCIDRs, err = prefixes("externalCIDRs", raw.ExternalCIDRs); err != nil {
		return err
	}
	if c.PeerCIDRs, err = prefixes("peerCIDRs", raw.PeerCIDRs); err != nil {
		return err
	}
	if c.Subnets, err = prefixes("subnets", raw.Subnets); err != nil {
		return err
	}
	for _, ranges := range []struct {
		key string
		in  []netip.Prefix
	}{{"externalCIDRs", c.ExternalCIDRs}, {"peerCIDRs", c.PeerCIDRs}} {
		for _, p := range ranges.in {
			if p.Bits() == 0 {
				return &Error{ranges.key, p.String() + " is every address there is", "name the machines' ranges only"}
			}
		}
	}
	for _, pair := range []struct {
		key, other string
		a, b       []netip.Prefix
	}{
		{"externalCIDRs", "clusterCIDRs", c.ExternalCIDRs, c.ClusterCIDRs},
		{"peerCIDRs", "clusterCIDRs", c.PeerCIDRs, c.ClusterCIDRs},
		{"peerCIDRs", "externalCIDRs", c.PeerCIDRs, c.ExternalCIDRs},
	} {
		if p, q, found := overlap(pair.a, pair.b); found {
			return &Error{pair.key, fmt.Sprintf("%s overlaps %s of %s", p, q, pair.other), "choose ranges that share no address"}
		}
	}
	for _, ranges := range []struct {
		key string
		in  []netip.Prefix
	}{{"podCIDRs", c.PodCIDRs}, {"subnets", c.Subnets}} {
		for _, p := range ranges.in {
			if !slices.ContainsFunc(c.Bounds().Claimable(), func(q netip.Prefix) bool { return q.Bits() <= p.Bits() && q.Contains(p.Addr()) }) {
				return &Error{ranges.key, p.String() + " is not inside clusterCIDRs or externalCIDRs", "add it there on every machine, or correct it"}
			}
		}
	}
	return nil
}

func overlap(a, b []netip.Prefix) (p, q netip.Prefix, found bool) {
	for _, p := range a {
		for _, q := range b {
			if p.Overlaps(q) {
				return p, q, true
			}
		}
	}
	return p, q, false
}

// checkPlace reads where the machine stands in the mesh.
func checkPlace(c *Config, raw rawStanza) error {
	switch raw.Role {
	case "", "node":
	case "gateway", "spoke":
		c.Role = mesh.Role(raw.Role)
	default:
		return &Error{"role", strconv.Quote(raw.Role) + " is no role", `use "node", "gateway" or "spoke"`}
	}
	const want = "use up to 63 lower case letters, digits and -"
	if c.Location = raw.Location; c.Location != "" && !label(c.Location) {
		return &Error{"location", strconv.Quote(c.Location) + " is no name", want}
	}
	for _, s := range raw.Segments {
		if !label(s) {
			return &Error{"segments", strconv.Quote(s) + " is no name", want}
		}
	}
	c.Segments = slices.Compact(slices.Sorted(slices.Values(raw.Segments)))
	return nil
}

func label(s string) bool {
	return len(s) <= 63 && wellFormed(s, lower+digits, lower+digits+"-", lower+digits)
}
