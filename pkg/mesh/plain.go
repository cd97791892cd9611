package mesh

import (
	"cmp"
	"net/netip"
	"slices"
)

// plainMachines are the machines that run nothing but WireGuard, by address.
type plainMachines map[netip.Prefix]Node

// settlePlain hands out the plain machines' addresses, to the oldest machine
// first, and returns the other nodes.
func (o *Ownership) settlePlain(nodes []Node, peerCIDRs []netip.Prefix) ([]Node, plainMachines) {
	if !slices.ContainsFunc(nodes, Node.Plain) {
		return nodes, nil
	}
	var rest, machines []Node
	for _, n := range nodes {
		if n.Plain() {
			machines = append(machines, n)
		} else {
			rest = append(rest, n)
		}
	}
	slices.SortStableFunc(machines, func(a, b Node) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Name, b.Name)) })
	out := plainMachines{}
	for _, n := range machines {
		if o.Refused[n.Name] {
			continue
		}
		for _, c := range n.Prefixes {
			p := c.Prefix.Masked()
			switch other, taken := out[p]; {
			case n.Masqueraded: // nobody but its entry knows them
			case !p.IsSingleIP() || !anyCovers(peerCIDRs, p):
				o.refuse(n.Name, p, "not a single address inside peerCIDRs")
			case taken && other.Name != n.Name:
				o.refuse(n.Name, p, "%s has had it longer", other.Name)
			default:
				out[p] = n
			}
		}
	}
	return rest, out
}

// entering returns the machine that a node claims because the machine enters by it.
func (m plainMachines) entering(h holding) (name string, ok bool) {
	n, ok := m[h.prefix]
	return n.Name, ok && slices.Contains(n.Via, h.node)
}

// externalHost reports whether a machine has others reach it by the tunnel at one
// of its own addresses.
func (n Node) externalHost(a netip.Addr, b Bounds) bool {
	return anyContains(b.External, a) && slices.ContainsFunc(n.Hosts, func(c Claim) bool { return c.Prefix == hostPrefix(a) })
}
