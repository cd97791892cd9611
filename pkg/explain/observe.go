package explain

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// Kernel is who is asked.
type Kernel interface {
	Route(kernel.RouteQuery) (kernel.RouteAnswer, error)
	PolicyRules(ipv6 bool) ([]kernel.PolicyRule, error)
}

var _ Kernel = (*kernel.Kernel)(nil)

// A Flow is what the packet carries.
type Flow struct {
	Protocol string `json:"protocol,omitempty"` // tcp, udp, icmp; "": any
	Port     uint16 `json:"port,omitempty"`     // of the far end; 0: any
}

// A Way is how a packet meets this machine, and what its kernel does with it.
type Way struct {
	In    string             `json:"in,omitempty"` // the interface by which it comes; "" where it is made here
	Mark  uint32             `json:"mark,omitempty"`
	Route kernel.RouteAnswer `json:"route"`
}

// Facts are everything that an explanation depends on.
type Facts struct {
	Node                string // this machine
	Settings            mesh.Settings
	Flow                Flow
	Source, Destination Party
	// State is what the kernel holds of ours.
	State mesh.State
	// Names are the peers' by their keys, Segments those of all machines by name.
	Names    map[wgtypes.Key]string
	Segments map[string][]string
	// Why has the reasons for which this machine has no traffic with others, by name.
	Why map[string]string
	// EncryptNodes are the machines that have their own traffic encrypted, by name.
	EncryptNodes map[string]bool
	Rules        []kernel.PolicyRule
	// Way is that of the packet. Where another machine sends it, it comes by the
	// tunnel if WireGuard takes it from a peer; Clear is then what would become of
	// the same packet in the clear.
	Way   Way
	Clear *Way
	// Outer is where WireGuard's own packets to the peer's endpoint go.
	Outer *kernel.RouteAnswer
	Now   time.Time
}

// Observe asks the kernel for the rest of the facts: for those that come after State.
func (f *Facts) Observe(k Kernel) (err error) {
	v6 := f.Destination.Address.Is6()
	if f.Rules, err = k.PolicyRules(v6); err != nil {
		return err
	}
	for _, p := range []*Party{&f.Source, &f.Destination} {
		if p.Kind == Pod || p.Kind == Free {
			a, err := k.Route(kernel.RouteQuery{Destination: p.Address})
			if err != nil {
				return err
			}
			p.Interface = a.Interface
		}
	}
	if f.Source.Kind.Here() {
		f.Way = Way{Mark: f.sendMark()}
		if f.Source.Kind != Self {
			f.Way.In = f.Source.Interface
		}
		return f.follow(k)
	}
	clearWay := Way{Mark: f.arriveMark()}
	// The mark has WireGuard's own packets go past the tunnel: so does the question
	// by which interface the other machine is reached without it.
	back, err := k.Route(kernel.RouteQuery{Destination: f.Source.Address, Mark: f.Settings.FwMark})
	if err != nil {
		return err
	}
	clearWay.In = back.Interface
	if _, ok := f.taker(f.Source.Address); ok && f.tunnelled() {
		f.Way = Way{In: f.Settings.Interface}
		if clearWay.Route, err = f.ask(k, clearWay); err != nil {
			return err
		}
		f.Clear = &clearWay
	} else {
		f.Way = clearWay
	}
	return f.follow(k)
}

// tunnelled reports whether the machine that has the source sends into the tunnel
// what is for the destination: all but what is for this machine's own addresses,
// where not both encrypt that.
func (f *Facts) tunnelled() bool {
	dst, filter := f.Destination.Address, f.State.Filter
	if f.Destination.Kind != Self || inSet(filter.Local, dst).IsValid() || slices.Contains(filter.Pods, dst) {
		return true
	}
	return slices.Contains(filter.Nodes.Own, dst) && f.EncryptNodes[f.Source.Node]
}

// follow asks for the packet's route, and if that leads into the tunnel for the outer one.
func (f *Facts) follow(k Kernel) (err error) {
	if f.Way.Route, err = f.ask(k, f.Way); err != nil {
		return err
	}
	peer, ok := f.takerBy(f.Way.Route.Interface, f.Destination.Address)
	if isTunnel(f.Settings.Interface, f.Way.Route.Interface) && ok && peer.Endpoint.IsValid() {
		outer, err := k.Route(kernel.RouteQuery{Destination: peer.Endpoint.Addr().Unmap(), Mark: f.State.Link.FwMark})
		if err != nil {
			return err
		}
		f.Outer = &outer
	}
	return nil
}

func (f *Facts) ask(k Kernel, w Way) (kernel.RouteAnswer, error) {
	return k.Route(kernel.RouteQuery{Source: f.Source.Address, Destination: f.Destination.Address, From: w.In, Mark: w.Mark})
}

// sendMark is what chain node-send gives to a packet that is made here.
func (f *Facts) sendMark() uint32 {
	n := f.State.Filter.Nodes
	if f.Source.Kind == Self && f.Flow.Protocol == "tcp" && slices.Contains(n.DirectPorts, f.Flow.Port) && slices.Contains(n.Peers, f.Destination.Address) {
		return n.Mark
	}
	return 0
}

// arriveMark is what chain node-plain gives to a packet that comes in the clear.
func (f *Facts) arriveMark() uint32 {
	n, filter, dst := f.State.Filter.Nodes, f.State.Filter, f.Destination.Address
	if !slices.Contains(n.Peers, f.Source.Address) {
		return 0
	}
	here := slices.Contains(n.Own, dst) || slices.Contains(filter.Exempt, dst) || inSet(filter.Local, dst).IsValid() || slices.Contains(filter.Pods, dst)
	if !here && (inSet(filter.Cluster, dst).IsValid() || slices.Contains(n.Peers, dst)) {
		return 0
	}
	return n.Mark
}

// taker is the peer that WireGuard has for an address: that with the longest
// prefix among all peers' allowed IPs (wireguard.com, "Cryptokey Routing").
func (f *Facts) taker(a netip.Addr) (peer mesh.Peer, ok bool) {
	return f.takerBy(f.Settings.Interface, a)
}

// takerBy is taker, of one of the two interfaces that a pair of nodes has while keys
// are rotated.
func (f *Facts) takerBy(link string, a netip.Addr) (peer mesh.Peer, ok bool) {
	peers := f.State.Peers
	if link != f.Settings.Interface && link == f.State.Spare.Link.Name {
		peers = f.State.Spare.Peers
	}
	return mesh.Taker(peers, a)
}

// nameOf is a peer's name, or its key where the plan does not know it.
func (f *Facts) nameOf(p mesh.Peer) string {
	return cmp.Or(f.Names[p.PublicKey], "peer "+p.PublicKey.String())
}

// inSet is the prefix of a set that has the address; the zero value if none has.
func inSet(set []netip.Prefix, a netip.Addr) netip.Prefix {
	for _, p := range set {
		if p.Contains(a) {
			return p
		}
	}
	return netip.Prefix{}
}
