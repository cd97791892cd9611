package endpoint

import (
	"net/netip"
	"slices"
)

// Sources tells to which machine of the mesh an address belongs. Do not modify
// what it was made of.
type Sources struct {
	mesh    []netip.Prefix
	owner   map[netip.Prefix]string
	lengths []int // of owner's prefixes, the longest first
}

// NewSources takes the ranges of the whole mesh, and what each machine has by its
// name. Of overlapping prefixes the longest counts.
func NewSources(mesh []netip.Prefix, machines map[string][]netip.Prefix) *Sources {
	s := &Sources{mesh: slices.Clone(mesh), owner: map[netip.Prefix]string{}}
	for name, prefixes := range machines {
		for _, p := range prefixes {
			p = p.Masked()
			// Two machines with the very same prefix: neither is believed.
			if other, taken := s.owner[p]; taken && other != name {
				name = ""
			}
			s.owner[p] = name
			if !slices.Contains(s.lengths, p.Bits()) {
				s.lengths = append(s.lengths, p.Bits())
			}
		}
	}
	slices.Sort(s.lengths)
	slices.Reverse(s.lengths)
	return s
}

// Owner names the machine that has the address; "" if none has.
func (s *Sources) Owner(a netip.Addr) string {
	if s == nil {
		return ""
	}
	for _, bits := range s.lengths {
		if p, err := a.Prefix(bits); err == nil { // else the length is of the other family
			if name, ok := s.owner[p]; ok {
				return name
			}
		}
	}
	return ""
}

// allows reports whether a caller with this address is on the list. Without a
// list it is enough to be of the mesh.
func (s *Sources) allows(list Allow, a netip.Addr) bool {
	contains := func(p netip.Prefix) bool { return p.Contains(a) }
	if slices.ContainsFunc(list.Prefixes, contains) {
		return true
	}
	if list.IsZero() {
		return s != nil && slices.ContainsFunc(s.mesh, contains)
	}
	if len(list.Names) == 0 {
		return false
	}
	owner := s.Owner(a)
	return owner != "" && slices.Contains(list.Names, owner)
}
