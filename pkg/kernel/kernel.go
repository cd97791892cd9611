package kernel

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

const (
	// RouteProtocol marks our routes and rules ("proto 119" in ip route and ip
	// rule; 'w'). No registered routing daemon uses it, see rtnetlink(7).
	RouteProtocol = 119
	// LinkAlias marks our WireGuard interface ("alias wgcni" in ip link).
	LinkAlias = "wgcni"
	// TableName is that of our nftables table, of family inet.
	TableName = "wgcni"
)

// ErrNoWireGuard says that the kernel has no WireGuard and that the caller
// cannot start a userspace one. All that needs no tunnel has been applied.
var ErrNoWireGuard = errors.New("this kernel has no WireGuard, and no userspace WireGuard is running: start `wgcnid run`")

// Config is what a Kernel needs to know.
type Config struct {
	// Interface is the name of the WireGuard interface. Required.
	Interface string
	// PrivateKey returns the node's key; it is asked only to configure an
	// interface. Required to apply mesh.ConfigureLink.
	PrivateKey func() (wgtypes.Key, error)
	// PresharedKey returns the key that this node shares with a peer, of that
	// fingerprint; it is asked only to set it. Required to apply a mesh.SetPeer
	// that names one.
	PresharedKey func(peer wgtypes.Key, f mesh.Fingerprint) (wgtypes.Key, error)
	// StartTunnel starts userspace WireGuard where the kernel has none and
	// returns when the interface can be configured. Optional.
	StartTunnel func(name string, mtu int) error
}

// Kernel is the network namespace that the calling thread was in at Open. It
// is not safe for concurrent use.
type Kernel struct {
	Config
	rt  *netlink.Handle
	nft *nftables.Conn // dialled by the first use
	wg  wireguard
	// linkIndex is that of Interface, 0 while it has to be looked up. It is good
	// for one Apply, in which thousands of routes may need it.
	linkIndex int
	// staleRoutes6 is set while sockets may hold on to another route for a machine
	// that is reached through the tunnel now.
	staleRoutes6 bool
}

// Open connects to the kernel.
func Open(c Config) (*Kernel, error) {
	rt, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	return &Kernel{Config: c, rt: rt}, nil
}

// Close releases the sockets.
func (k *Kernel) Close() {
	k.rt.Close()
	k.wg.close()
	if k.nft != nil {
		_ = k.nft.CloseLasting()
	}
}

// Observe returns all that the kernel holds of ours.
func (k *Kernel) Observe() (mesh.State, error) {
	var s mesh.State
	for _, read := range []func(*mesh.State) error{k.observeLink, k.observeRoutes, k.observeRules, k.observeFilter, k.observeSrcValidMark} {
		if err := read(&s); err != nil {
			return mesh.State{}, err
		}
	}
	s.Sort()
	return s, nil
}

// Apply carries out the ops in order. An op that fails does not keep the others
// from being tried; all failures are returned, joined. Where the interface
// cannot be made, the ops that need it are left out, and only the cause is
// returned.
func (k *Kernel) Apply(ops []mesh.Op) error {
	var errs []error
	linkMissing := false
	gate := newNodeGate(ops)
	k.linkIndex = 0
	for len(ops) > 0 {
		op, n := ops[0], 1
		var err error
		switch {
		case linkMissing && mesh.NeedsLink(op):
			gate.fail(op)
		case gate.shuts(op):
		case isPeerOp(op):
			n = leadingPeerOps(ops)
			err = k.applyPeers(ops[:n])
		default:
			err = k.apply(op)
		}
		if err != nil {
			if !isPeerOp(op) { // applyPeers has named those that it is about
				err = fmt.Errorf("%s: %w", op, err)
			}
			errs = append(errs, err)
			gate.fail(op)
			if _, add := op.(mesh.AddLink); add {
				linkMissing = true
			}
		}
		ops = ops[n:]
	}
	if err := k.forgetRoutes6(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (k *Kernel) apply(op mesh.Op) error {
	switch o := op.(type) {
	case mesh.ReplaceFilter:
		return k.replaceFilter(o.Filter)
	case mesh.SetFilter:
		return k.setFilter(o.Filter)
	case mesh.SetFilterPods:
		return k.setFilterPods(o.Add, o.Remove)
	case mesh.RemoveFilter:
		return k.removeFilter()
	case mesh.SetFilterNodes:
		return k.setFilterNodes(o.Nodes)
	case mesh.SetSrcValidMark:
		return k.setSrcValidMark(o.On)
	case mesh.AddLink:
		k.linkIndex = 0
		return k.addLink(o)
	case mesh.ConfigureLink:
		return k.configureLink(o.Link)
	case mesh.SetLink:
		return k.setLink(o)
	case mesh.RemoveLink:
		k.linkIndex = 0
		return k.removeLink(o.Name)
	case mesh.AddAddress:
		return k.changeAddress(o.Link, o.Prefix, k.rt.AddrReplace)
	case mesh.RemoveAddress:
		return ignoring(k.changeAddress(o.Link, o.Prefix, k.rt.AddrDel), unix.EADDRNOTAVAIL, unix.ENODEV)
	case mesh.SetRoute:
		return k.setRoute(o)
	case mesh.RemoveRoute:
		return k.removeRoute(o.Route)
	case mesh.Greet:
		return k.greet(o)
	case mesh.AddRule:
		return ignoring(k.rt.RuleAdd(rule(o.Rule)), unix.EEXIST)
	case mesh.RemoveRule:
		return ignoring(k.rt.RuleDel(rule(o.Rule)), unix.ENOENT)
	}
	return fmt.Errorf("unknown operation %T", op)
}

// ignoring makes an op idempotent: what it wanted is so already.
func ignoring(err error, errnos ...unix.Errno) error {
	for _, e := range errnos {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}
