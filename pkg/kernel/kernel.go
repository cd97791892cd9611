package kernel

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	rtnetlink "github.com/mdlayher/netlink"
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
	// Interface is the name of the WireGuard interface; mesh.SpareInterface has
	// that of the second one. Required.
	Interface string
	// PrivateKey returns the key that has this public one; it is asked only to
	// configure an interface. Required to apply mesh.ConfigureLink.
	PrivateKey func(public wgtypes.Key) (wgtypes.Key, error)
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
	rt    *netlink.Handle
	batch *rtnetlink.Conn // of setRoutes
	nft   *nftables.Conn  // dialled by the first use
	wg    wireguard
	// linkIndex are those of our interfaces, by name. They are good for one Apply,
	// in which thousands of routes may need them.
	linkIndex map[string]int
	waves     waves
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
	batch, err := rtnetlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		rt.Close()
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	return &Kernel{Config: c, rt: rt, batch: batch, linkIndex: map[string]int{}}, nil
}

// Close releases the sockets.
func (k *Kernel) Close() {
	k.rt.Close()
	_ = k.batch.Close()
	k.wg.close()
	k.waves.close()
	if k.nft != nil {
		_ = k.nft.CloseLasting()
	}
}

// Observe returns all that the kernel holds of ours.
func (k *Kernel) Observe() (mesh.State, error) {
	var s mesh.State
	for _, read := range []func(*mesh.State) error{k.observeLinks, k.observeRoutes, k.observeRules, k.observeFilter, k.observeSrcValidMark} {
		if err := read(&s); err != nil {
			return mesh.State{}, err
		}
	}
	s.Sort()
	return s, nil
}

// Apply carries out the ops in order. An op that fails does not keep the others
// from being tried; all failures are returned, joined. Where an interface
// cannot be made, the ops that need it are left out, and only the cause is
// returned.
func (k *Kernel) Apply(ops []mesh.Op) error {
	var errs []error
	missing := map[string]bool{} // interfaces that could not be made
	gate := newNodeGate(ops)
	clear(k.linkIndex)
	for len(ops) > 0 {
		op, n := ops[0], 1
		var err error
		switch {
		case missing[linkOf(op)]:
			gate.fail(op)
		case gate.shuts(op):
		case isPeerOp(op):
			n = leadingPeerOps(ops)
			err = k.applyPeers(ops[:n])
		case isRoute(op):
			n = leadingRoutes(ops, gate)
			for i, rerr := range k.setRoutes(ops[:n]) {
				if rerr != nil {
					errs = append(errs, fmt.Errorf("%s: %w", ops[i], rerr))
					gate.fail(ops[i])
				}
			}
		default:
			err = k.apply(op)
		}
		if err != nil {
			if !isPeerOp(op) { // applyPeers has named those that it is about
				err = fmt.Errorf("%s: %w", op, err)
			}
			errs = append(errs, err)
			gate.fail(op)
			if k.needsToBe(op) {
				missing[linkOf(op)] = true
			}
		}
		ops = ops[n:]
	}
	if err := k.forgetRoutes6(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// linkOf is the interface that an op works on, and is nothing without; "" if it
// needs none.
func linkOf(op mesh.Op) string {
	switch o := op.(type) {
	case mesh.AddLink:
		return o.Name
	case mesh.ConfigureLink:
		return o.Link.Name
	case mesh.SetLink:
		return o.Name
	case mesh.AddAddress:
		return o.Link
	case mesh.SetPeer:
		return o.Link
	case mesh.Greet:
		return o.Link
	case mesh.SetRoute:
		if o.Route.Type == mesh.ViaLink {
			return o.Link
		}
	}
	return ""
}

// needsToBe reports whether the ops for the same interface are in vain without this
// one. Routes into a primary interface that has no port yet fail closed; those into
// a spare one would lose what the primary carries.
func (k *Kernel) needsToBe(op mesh.Op) bool {
	switch o := op.(type) {
	case mesh.AddLink:
		return true
	case mesh.ConfigureLink:
		return o.Link.Name != k.Interface
	case mesh.SetLink:
		return o.Name != k.Interface
	}
	return false
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
		delete(k.linkIndex, o.Name)
		return k.addLink(o)
	case mesh.ConfigureLink:
		return k.configureLink(o.Link)
	case mesh.SetLink:
		return k.setLink(o)
	case mesh.RemoveLink:
		delete(k.linkIndex, o.Name)
		return k.removeLink(o.Name)
	case mesh.AddAddress:
		return k.changeAddress(o.Link, o.Prefix, k.rt.AddrReplace)
	case mesh.RemoveAddress:
		return ignoring(k.changeAddress(o.Link, o.Prefix, k.rt.AddrDel), unix.EADDRNOTAVAIL, unix.ENODEV)
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

func isRoute(op mesh.Op) bool {
	_, ok := op.(mesh.SetRoute)
	return ok
}
