package reconcile

import (
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
)

// lookInterval is how often a node that has to know looks what it has heard of its
// peers: WireGuard does not tell by itself.
const lookInterval = time.Second

// HearingKernel tells whether other machines are heard, and lets them hear this one.
type HearingKernel interface {
	Handshakes() (map[wgtypes.Key]kernel.Handshake, error)
	Uplink() (bool, error)
	Greet(peers []wgtypes.Key, keepalive time.Duration) error
}

var _ HearingKernel = (*kernel.Kernel)(nil)

// listen looks what was heard of the plain machines that enter by this node, and of
// the other gateways of its location, and reports whether that changes what this
// node has to say. Other nodes do not look: WireGuard tells of all its peers or of
// none.
func (l *Loop) listen() bool {
	var heard map[wgtypes.Key]kernel.Handshake
	if l.isEntry() || len(l.fellowGateways()) > 0 {
		var err error
		if heard, err = l.Kernel.Handshakes(); err != nil {
			return false // the next pass says so
		}
	}
	now := l.Now()
	machines, gateways := l.hearMachines(heard, now), l.hearGateways(heard, now)
	return machines || gateways
}
