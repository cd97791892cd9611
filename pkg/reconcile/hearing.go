package reconcile

import (
	"context"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// lookInterval is how often a node that has to know looks what it has heard of its
// peers: WireGuard does not tell by itself.
const lookInterval = time.Second

// HearingKernel tells whether other machines are heard, and lets them hear this one.
type HearingKernel interface {
	Handshakes() (map[wgtypes.Key]kernel.Handshake, error)
	HandshakesOn(mesh.Plane) (map[wgtypes.Key]kernel.Handshake, error)
	Wave(from, to netip.Addr) error
	Uplink() (bool, error)
	Greet(peers []wgtypes.Key, keepalive time.Duration) error
}

var _ HearingKernel = (*kernel.Kernel)(nil)

// listen looks what was heard of the plain machines that enter by this node, and of
// the other gateways of its location, and reports whether that changes what this
// node has to say. It looks after the peers as well that may be called where they are
// not any more. Other nodes do not look: WireGuard tells of all its peers or of none.
func (l *Loop) listen(ctx context.Context) bool {
	var heard map[wgtypes.Key]kernel.Handshake
	begun := l.Now()
	answers := l.watchesAnswers(begun)
	if l.isEntry() || len(l.fellowGateways()) > 0 || answers {
		var err error
		if heard, err = l.Kernel.Handshakes(); err != nil {
			return false // the next pass says so
		}
	}
	now := l.Now()
	lost := answers && l.hearAnswers(ctx, heard, now.Sub(begun), now)
	machines, gateways := l.hearMachines(heard, now), l.hearGateways(heard, now)
	return machines || gateways || lost
}
