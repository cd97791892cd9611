package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// takeAddresses gives a new machine its addresses, and the ranges behind it.
func (v meshView) takeAddresses(c config.Config, r *registry.Record, a peerAddition) error {
	prefixes, err := v.givenAddresses(c, r.Name, a.addresses)
	if len(a.addresses) == 0 {
		prefixes, err = v.freeAddresses(c, r.Name)
	}
	if err != nil {
		return err
	}
	for _, text := range a.subnets {
		p, err := v.subnet(c, *r, text)
		if err != nil {
			return fmt.Errorf("--subnet: %w", err)
		}
		prefixes = append(prefixes, p)
	}
	r.Prefixes = nil
	for _, p := range prefixes {
		r.Prefixes = append(r.Prefixes, mesh.Claim{Prefix: p, Since: r.Since})
	}
	return nil
}

// givenAddresses are those of --address.
func (v meshView) givenAddresses(c config.Config, name string, addresses []string) (out []netip.Prefix, err error) {
	for _, text := range addresses {
		a, err := netip.ParseAddr(text)
		if p, perr := netip.ParsePrefix(text); perr == nil && p.IsSingleIP() {
			a, err = p.Addr(), nil
		}
		if err != nil {
			return nil, fmt.Errorf("--address: %q is no single address", text)
		}
		a = a.Unmap()
		p := netip.PrefixFrom(a, a.BitLen())
		i := slices.IndexFunc(c.PeerCIDRs, func(q netip.Prefix) bool { return q.Contains(a) })
		switch {
		case i < 0:
			return nil, fmt.Errorf("--address: %s is not inside peerCIDRs (%s)", a, few(texts(c.PeerCIDRs), ""))
		case reserved(c.PeerCIDRs[i], a):
			return nil, fmt.Errorf("--address: %s is the first or the last of %s, which hosts do not get", a, c.PeerCIDRs[i])
		case slices.ContainsFunc(out, func(q netip.Prefix) bool { return q.Addr().Is4() == a.Is4() }):
			return nil, errors.New("--address: at most one of each family")
		}
		if who := v.holder(c, p, name); who != "" {
			return nil, fmt.Errorf("--address: %s is taken: %s", a, who)
		}
		out = append(out, p)
	}
	return out, nil
}

// freeAddresses are the lowest that nobody has, one a family.
func (v meshView) freeAddresses(c config.Config, name string) (out []netip.Prefix, err error) {
	for _, v6 := range []bool{false, true} {
		found, asked := false, false
		for _, q := range c.PeerCIDRs {
			if q.Addr().Is6() != v6 || found {
				continue
			}
			asked = true
			for a := q.Addr(); q.Contains(a) && !found; a = a.Next() {
				p := netip.PrefixFrom(a, a.BitLen())
				if found = !reserved(q, a) && v.holder(c, p, name) == ""; found {
					out = append(out, p)
				}
			}
		}
		if asked && !found {
			return nil, fmt.Errorf("all addresses of peerCIDRs (%s) are taken: add a range on every node, or remove peers (`wgcnid peer list`)", few(texts(c.PeerCIDRs), ""))
		}
	}
	return out, nil
}

// reserved are the addresses of a range that mean all of it to some: the first, and
// with IPv4 the last.
func reserved(q netip.Prefix, a netip.Addr) bool {
	if a.BitLen()-q.Bits() < 2 {
		return false
	}
	return a == q.Masked().Addr() || a.Is4() && a == netipx.PrefixLastIP(q)
}

// holder says who has a part of a prefix; "" if nobody has. What entry nodes claim
// for peers is the peers'.
func (v meshView) holder(c config.Config, p netip.Prefix, but string) string {
	for _, r := range v.records.Records() {
		if r.Left || r.Name == but {
			continue
		}
		for _, claim := range slices.Concat(r.Prefixes, r.Pods, r.Hosts) {
			carried := len(r.Via) == 0 && slices.ContainsFunc(c.PeerCIDRs, func(q netip.Prefix) bool { return q.Contains(claim.Prefix.Addr()) })
			if claim.Prefix.Overlaps(p) && !carried {
				return fmt.Sprintf("%s has %s", r.Name, claim.Prefix)
			}
		}
		for _, a := range r.Addresses {
			if p.Contains(a.Unmap()) {
				return fmt.Sprintf("%s is an address of %s", a, r.Name)
			}
		}
		for _, e := range r.Endpoints {
			if at, err := netip.ParseAddrPort(e); err == nil && p.Contains(at.Addr().Unmap()) {
				return fmt.Sprintf("%s is the endpoint of %s", e, r.Name)
			}
		}
	}
	return ""
}

// sharesAddress returns another machine with one of r's addresses, or "".
func (v meshView) sharesAddress(r registry.Record) string {
	for _, other := range v.records.Records() {
		if other.Left || other.Name == r.Name || len(other.Via) == 0 {
			continue
		}
		for _, claim := range r.Prefixes {
			if !claim.Prefix.IsSingleIP() {
				continue
			}
			if slices.ContainsFunc(other.Prefixes, func(o mesh.Claim) bool { return o.Prefix == claim.Prefix }) {
				return other.Name
			}
		}
	}
	return ""
}

// subnet reads a range behind a machine that is masqueraded. Other sites may have
// the same range, but not at a common entry.
func (v meshView) subnet(c config.Config, r registry.Record, text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil || p != p.Masked() || p.Bits() == 0 {
		return p, fmt.Errorf("%q is no range such as 192.168.1.0/24", text)
	}
	for key, ranges := range map[string][]netip.Prefix{"clusterCIDRs": c.ClusterCIDRs, "externalCIDRs": c.ExternalCIDRs, "peerCIDRs": c.PeerCIDRs} {
		for _, q := range ranges {
			if q.Overlaps(p) {
				return p, fmt.Errorf("%s overlaps %s of %s", p, q, key)
			}
		}
	}
	for _, other := range v.records.Records() {
		common := slices.IndexFunc(r.Via, other.Enters)
		if other.Left || other.Name == r.Name {
			continue
		}
		for _, claim := range other.Prefixes {
			if common >= 0 && claim.Prefix.Overlaps(p) {
				return p, fmt.Errorf("%s overlaps %s of %s, which enters by %s too: choose another entry with --via", p, claim.Prefix, other.Name, r.Via[common])
			}
		}
		entry := slices.Contains(r.Via, other.Name)
		for _, a := range other.Addresses {
			if entry && p.Contains(a.Unmap()) {
				return p, fmt.Errorf("%s has the address %s of its entry %s in it", p, a, other.Name)
			}
		}
		for _, e := range other.Endpoints {
			if at, err := netip.ParseAddrPort(e); err == nil && p.Contains(at.Addr().Unmap()) {
				return p, fmt.Errorf("%s has the endpoint %s of %s in it: the tunnel would lead into itself", p, e, other.Name)
			}
		}
	}
	return p, nil
}

// claimed are a machine's addresses, and the ranges behind it.
func claimed(r registry.Record) (out []netip.Prefix) {
	for _, claim := range r.Prefixes {
		out = append(out, claim.Prefix)
	}
	return out
}
