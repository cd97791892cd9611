package kernel

import (
	"fmt"
	"net"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Reading is what the WireGuard interface shows at the moment, without what is
// planned. The zero value is its absence.
type Reading struct {
	Name string
	MTU  int // bytes
	Up   bool
	// Userspace says that a process is the interface, and not the kernel.
	Userspace bool
	// Unallowed are the packets that a peer had sealed, but not with a source
	// address that is allowed to it; nil where Userspace: the process counts them.
	Unallowed *uint64
	Peers     []mesh.Peer // in no order, and without allowed IPs
}

// Read reads the interface. That costs memory for every peer while it lasts.
func (k *Kernel) Read() (Reading, error) {
	l, err := k.link(k.Interface)
	if err != nil || l == nil {
		return Reading{}, err
	}
	r := Reading{Name: k.Interface, MTU: l.Attrs().MTU, Up: l.Attrs().Flags&net.FlagUp != 0, Userspace: l.Type() != "wireguard"}
	if s := l.Attrs().Statistics; s != nil && !r.Userspace {
		// With packets that are neither IPv4 nor IPv6 (wg_packet_consume_data_done in
		// drivers/net/wireguard/receive.c), which no peer sends by mistake either.
		r.Unallowed = &s.RxFrameErrors
	}
	d, err := k.wg.device(k.Interface)
	if err != nil {
		return r, fmt.Errorf("read WireGuard interface %s: %w", k.Interface, err)
	}
	for i := range d.Peers {
		d.Peers[i].AllowedIPs = nil
	}
	r.Peers = decodePeers(d.Peers)
	return r, nil
}
