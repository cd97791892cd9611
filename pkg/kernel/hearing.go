package kernel

import (
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Greet sends peers a keepalive at once, by switching theirs off and on again; see
// greet. Their keepalive is the one given from then on.
func (k *Kernel) Greet(peers []wgtypes.Key, keepalive time.Duration) error {
	return k.setKeepalives(k.Interface, peers, 0, keepalive)
}

// Uplink reports whether a default route leads out by an interface that has a
// carrier: else this machine is cut off from the others, and not they from it.
func (k *Kernel) Uplink() (bool, error) {
	ours, err := k.ownIndices()
	if err != nil {
		return false, err
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		route, err := k.defaultRoute(family, ours)
		if err != nil {
			return false, err
		}
		if route == nil {
			continue
		}
		l, err := k.rt.LinkByIndex(route.LinkIndex)
		if err != nil {
			return false, fmt.Errorf("look up the default route's interface: %w", err)
		}
		if l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0 {
			return true, nil
		}
	}
	return false, nil
}
