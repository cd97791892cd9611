package explain

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/store"
)

// A Kind says what an address is to this node.
type Kind string

// The kinds of parties.
const (
	Pod         Kind = "pod"         // one of this node's
	Self        Kind = "node"        // this machine
	Free        Kind = "free"        // in this node's range, and no pod has it
	Remote      Kind = "remote"      // behind another machine of the mesh
	Machine     Kind = "machine"     // another machine of the mesh, at an address of its own
	Unannounced Kind = "unannounced" // in the ranges of the mesh, and nobody has it
	Outside     Kind = "outside"     // not in the ranges of the mesh
)

// Here reports whether packets to it stay on this machine.
func (k Kind) Here() bool { return k == Pod || k == Self || k == Free }

// A Party is one end of the packet.
type Party struct {
	Name    string     `json:"name"` // as it was asked for
	Address netip.Addr `json:"address,omitzero"`
	Kind    Kind       `json:"kind"`
	// Node is the machine that it belongs to, Prefix what that one announces.
	Node   string       `json:"node,omitempty"`
	Prefix netip.Prefix `json:"prefix,omitzero"`
	// Pod and Container are a local pod's; Pod is namespace/name, if the runtime told.
	Pod       string `json:"pod,omitempty"`
	Container string `json:"container,omitempty"`
	// Interface is the one of this machine that it is reached by, or that has it.
	Interface string `json:"interface,omitempty"`
}

// A Directory is who is where, as this node knows it.
type Directory struct {
	Self   mesh.Node
	Nodes  []mesh.Node // the other machines that take part
	Owners mesh.Ownership
	Bounds mesh.Bounds
	Pods   []store.Attachment
	// Addresses are this machine's, each with its interface.
	Addresses map[netip.Addr]string
}

// Find returns the two parties that are meant by two words: addresses, local pods
// (namespace/name or the beginning of a container ID) or machines. Both have
// addresses of one family; where neither word is an address that is IPv4, if it
// can be. A machine that sends has no address yet if it is this one: the kernel chooses it.
func (d Directory) Find(source, destination string) (src, dst Party, err error) {
	from, err := d.candidates(source)
	if err != nil {
		return src, dst, err
	}
	to, err := d.candidates(destination)
	if err != nil {
		return src, dst, err
	}
	for _, v6 := range []bool{false, true} {
		family := func(p Party) bool { return p.Address.Is6() == v6 }
		i, j := slices.IndexFunc(from, family), slices.IndexFunc(to, family)
		if i < 0 || j < 0 {
			continue
		}
		src, dst = from[i], to[j]
		if src.Kind == Self && src.Name != src.Address.String() {
			src.Address, src.Interface = netip.Addr{}, ""
		}
		return src, dst, nil
	}
	return src, dst, fmt.Errorf("%s and %s have no addresses of the same family", source, destination)
}

// candidates are the addresses that a word may mean, the preferred ones first.
func (d Directory) candidates(word string) ([]Party, error) {
	if a, err := netip.ParseAddr(word); err == nil {
		if a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.IsLinkLocalUnicast() {
			return nil, fmt.Errorf("%s does not pass between machines: want the address of one", word)
		}
		return []Party{d.who(a.Unmap(), a.Unmap().String())}, nil
	}
	pods, err := d.podsNamed(word)
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for _, at := range pods {
		addrs = append(addrs, at.Addresses...)
	}
	if len(pods) == 0 {
		addrs = d.machineNamed(word)
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("%q is no address, no pod of this node and no machine of the mesh that has an address: give a pod of another node by its address", word)
	}
	var out []Party
	for _, a := range addrs {
		out = append(out, d.who(a.Unmap(), word))
	}
	return out, nil
}

// minContainerID keeps a short word from meaning some pod by chance.
const minContainerID = 4

// podsNamed are the attachments of the one pod that is meant, or none.
func (d Directory) podsNamed(word string) (out []store.Attachment, err error) {
	for _, at := range d.Pods {
		byID := len(word) >= minContainerID && strings.HasPrefix(at.ContainerID, word)
		if word == "" || at.Pod != word && !byID {
			continue
		}
		out = append(out, at)
	}
	for _, at := range out {
		if at.ContainerID != out[0].ContainerID && out[0].Pod != word {
			return nil, fmt.Errorf("%q is the beginning of more than one container ID: give more of it", word)
		}
	}
	if len(out) > 0 && !slices.ContainsFunc(out, func(at store.Attachment) bool { return len(at.Addresses) > 0 }) {
		return nil, errors.New("pod " + word + " has no address")
	}
	return out, nil
}

// machineNamed are the addresses of a machine: its own, and those in the tunnel.
func (d Directory) machineNamed(name string) (out []netip.Addr) {
	for _, n := range append(slices.Clone(d.Nodes), d.Self) {
		if n.Name != name {
			continue
		}
		for _, c := range d.Owners.Hosts[name] {
			out = append(out, c.Prefix.Addr())
		}
		out = append(out, n.Addresses...)
		for _, p := range d.Owners.Prefixes[name] {
			if n.Plain() && p.IsSingleIP() {
				out = append(out, p.Addr())
			}
		}
		return append(out, n.TunnelAddresses()...)
	}
	return nil
}

// who says whose an address is.
func (d Directory) who(a netip.Addr, name string) Party {
	p := Party{Name: name, Address: a}
	if link, own := d.Addresses[a]; own || name == d.Self.Name {
		p.Kind, p.Node, p.Interface = Self, d.Self.Name, link
		return p
	}
	for i := len(d.Pods) - 1; i >= 0; i-- { // an address belongs to its latest attachment
		if at := d.Pods[i]; slices.Contains(at.Addresses, a) {
			p.Kind, p.Node, p.Pod, p.Container = Pod, d.Self.Name, at.Pod, at.ContainerID
			return p
		}
	}
	bits := -1
	take := func(kind Kind, node string, prefix netip.Prefix) {
		if prefix.Contains(a) && prefix.Bits() > bits {
			p.Kind, p.Node, p.Prefix, bits = kind, node, prefix, prefix.Bits()
		}
	}
	for _, c := range d.Self.Prefixes {
		take(Free, d.Self.Name, c.Prefix.Masked())
	}
	for _, n := range d.Nodes {
		for _, q := range d.Owners.Prefixes[n.Name] {
			take(Remote, n.Name, q)
		}
		for _, own := range append(slices.Clone(n.Addresses), hosts(d.Owners.Hosts[n.Name])...) {
			if own.Unmap() == a {
				take(Machine, n.Name, netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	if p.Kind == "" {
		p.Kind = Outside
		if slices.ContainsFunc(d.Bounds.All(), func(q netip.Prefix) bool { return q.Contains(a) }) {
			p.Kind = Unannounced
		}
	}
	return p
}

func hosts(claims []mesh.Claim) (out []netip.Addr) {
	for _, c := range claims {
		out = append(out, c.Prefix.Addr())
	}
	return out
}

// String says who it is.
func (p Party) String() string {
	switch p.Kind {
	case Pod:
		name := p.Pod
		if name == "" {
			name = "container " + shortID(p.Container)
		} else {
			name = "pod " + name
		}
		return name + " of this node, " + p.Node + p.by()
	case Self:
		return "this machine, " + p.Node + p.by()
	case Free:
		return fmt.Sprintf("in %s of this node, %s, where no pod has it", p.Prefix, p.Node)
	case Remote:
		return fmt.Sprintf("in %s of %s", p.Prefix, p.Node)
	case Machine:
		return "the machine " + p.Node
	case Unannounced:
		return "in the ranges of the mesh; nobody has announced it"
	}
	return "outside of the ranges of the mesh"
}

func (p Party) by() string {
	if p.Interface == "" {
		return ""
	}
	return ", at " + p.Interface
}

// shortID is as much of a container ID as people know it by.
func shortID(id string) string {
	const most = 24
	if len(id) <= most {
		return id
	}
	return id[:most]
}
