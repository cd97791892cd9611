package kerneltest

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// What Linux answers. The texts are those that ip(8), wg(8) and nft(8) print.
var (
	errNoLink    = errors.New("no such device")
	errInUse     = errors.New("address already in use")
	errDown      = errors.New("device for nexthop is not up")
	errNoSource  = errors.New("invalid prefsrc address")
	errNoTable   = errors.New("no such table")
	errForeign   = errors.New("a foreign route is in its place")
	errUnmasked  = errors.New("invalid prefix for given prefix length")
	errNoAddress = errors.New("invalid argument")
)

func (k *Kernel) apply(o mesh.Op) error {
	switch o := o.(type) {
	case mesh.ReplaceFilter:
		k.filter = cloneFilter(o.Filter)
		k.filter.Broken = false
	case mesh.SetFilter:
		return k.setFilter(o.Filter)
	case mesh.SetFilterPods:
		return k.setFilterPods(o)
	case mesh.RemoveFilter:
		k.filter = mesh.Filter{}
	case mesh.SetFilterNodes:
		if k.filter.Interface == "" || k.filter.Nodes.Mark == 0 || o.Nodes.Mark != k.filter.Nodes.Mark {
			return errNoTable
		}
		k.filter.Nodes = cloneNodes(o.Nodes)
	case mesh.SetSrcValidMark:
		if k.filter.Interface == "" {
			return errNoTable
		}
		k.srcValidMark = o.On
	case mesh.AddLink:
		return k.addLink(o)
	case mesh.ConfigureLink:
		return k.configureLink(o.Link)
	case mesh.SetLink:
		d := k.device(o.Name)
		if d == nil {
			return errNoLink
		}
		d.link.MTU, d.link.Up = o.MTU, true
	case mesh.Greet:
		if k.device(o.Link) == nil {
			return errNoLink
		}
	case mesh.RemoveLink:
		if d := k.device(o.Name); d != nil {
			k.dropLink(d)
		}
	case mesh.AddAddress:
		return k.addAddress(o)
	case mesh.RemoveAddress:
		k.removeAddress(o)
	case mesh.SetRoute:
		return k.setRoute(o)
	case mesh.RemoveRoute:
		if have, ok := k.routes[keyOf(o.Route)]; ok && !have.foreign {
			delete(k.routes, keyOf(o.Route))
		}
	case mesh.AddRule:
		if _, ok := k.rules[o.Rule]; !ok { // EEXIST, tolerated
			k.rules[o.Rule] = false
		}
	case mesh.RemoveRule:
		if !k.rules[o.Rule] {
			delete(k.rules, o.Rule)
		}
	case mesh.SetPeer:
		return k.setPeer(o)
	case mesh.RemovePeer:
		if d := k.device(o.Link); d != nil {
			d.removePeer(o.PublicKey)
		}
	default:
		return fmt.Errorf("kerneltest knows no %T", o)
	}
	return nil
}

func (k *Kernel) setFilter(f mesh.Filter) error {
	if k.filter.Interface == "" {
		return errNoTable
	}
	f = cloneFilter(f)
	f.Interface, f.Pods, f.Broken, f.Nodes = k.filter.Interface, k.filter.Pods, k.filter.Broken, k.filter.Nodes
	k.filter = f
	return nil
}

func (k *Kernel) setFilterPods(o mesh.SetFilterPods) error {
	if k.filter.Interface == "" {
		return errNoTable
	}
	pods := slices.DeleteFunc(append(k.filter.Pods, o.Add...), func(a netip.Addr) bool { return slices.Contains(o.Remove, a) })
	slices.SortFunc(pods, netip.Addr.Compare)
	k.filter.Pods = slices.Compact(pods)
	return nil
}

// addLink tolerates that the link is there. One of another name, that is not its
// spare, would listen on the same port.
func (k *Kernel) addLink(o mesh.AddLink) error {
	d := &k.primary
	switch primary := k.primary.link.Name; {
	case k.device(o.Name) != nil:
		return nil
	case primary != "" && o.Name == mesh.SpareInterface(primary):
		d = &k.spare
	case primary != "":
		return errInUse
	}
	*d = device{mesh.Link{Name: o.Name, MTU: o.MTU}, map[wgtypes.Key]mesh.Peer{}, map[netip.Prefix]wgtypes.Key{}}
	return nil
}

// configureLink drops the peer that has the link's own key, as wg_set_device does.
func (k *Kernel) configureLink(l mesh.Link) error {
	d := k.device(l.Name)
	if d == nil {
		return errNoLink
	}
	for _, other := range k.devices() {
		if other != d && other.link.ListenPort == l.ListenPort && l.ListenPort != 0 {
			return errInUse
		}
	}
	d.link.PublicKey, d.link.ListenPort, d.link.FwMark = l.PublicKey, l.ListenPort, l.FwMark
	d.removePeer(l.PublicKey)
	return nil
}

func (k *Kernel) addAddress(o mesh.AddAddress) error {
	switch {
	case o.Link == "" || k.primary.link.Name != o.Link:
		return errNoLink
	case !o.Prefix.IsValid():
		return errNoAddress
	}
	k.addresses[o.Prefix] = true
	return nil
}

// removeAddress takes along what refers to the address: an IPv4 route whole
// (fib_sync_down_addr; since Linux 6.2 the main table's alone, but older ones
// are about), an IPv6 route's source (rt6_remove_prefsrc).
func (k *Kernel) removeAddress(o mesh.RemoveAddress) {
	if k.primary.link.Name != o.Link || !k.addresses[o.Prefix] {
		return
	}
	delete(k.addresses, o.Prefix)
	for key, r := range k.routes {
		switch {
		case r.foreign || r.Source != o.Prefix.Addr():
		case r.Source.Is4():
			delete(k.routes, key)
		default:
			r.Source = netip.Addr{}
			k.routes[key] = r
		}
	}
}

func (k *Kernel) setRoute(o mesh.SetRoute) error {
	r := o.Route
	if r.Prefix != r.Prefix.Masked() {
		return errUnmasked
	}
	if k.routes[keyOf(r)].foreign {
		return errForeign
	}
	made := route{Route: r}
	if r.Type == mesh.ViaLink {
		d := k.device(o.Link)
		switch {
		case d == nil:
			return errNoLink
		case !d.link.Up:
			return errDown
		case r.Source.IsValid() && !k.hasAddress(r.Source):
			return errNoSource
		}
		made.dev, made.Plane = o.Link, mesh.Plane(d == &k.spare)
	}
	k.routes[keyOf(r)] = made
	return nil
}

func (k *Kernel) hasAddress(a netip.Addr) bool {
	for p := range k.addresses {
		if p.Addr() == a {
			return true
		}
	}
	return slices.Contains(k.Own, a)
}

func (k *Kernel) setPeer(o mesh.SetPeer) error {
	d := k.device(o.Link)
	if d == nil {
		return errNoLink
	}
	if o.PublicKey == d.link.PublicKey {
		return nil // silently, as set_peer in the kernel's netlink.c does
	}
	p := d.peers[o.PublicKey]
	p.PublicKey = o.PublicKey
	if o.PresharedKey != nil {
		p.PresharedKey = *o.PresharedKey
	}
	if o.Endpoint.IsValid() {
		p.Endpoint = o.Endpoint
	}
	if o.Keepalive != nil {
		p.Keepalive = *o.Keepalive
	}
	d.peers[o.PublicKey] = p
	for _, ip := range o.Remove {
		if d.owners[ip] == o.PublicKey { // another's by now: its REMOVE_ME is for that peer alone
			delete(d.owners, ip)
		}
	}
	for _, ip := range o.Add {
		if ip != ip.Masked() {
			return errUnmasked
		}
		d.owners[ip] = o.PublicKey // moves it
	}
	return nil
}

func (d *device) removePeer(key wgtypes.Key) {
	delete(d.peers, key)
	for ip, owner := range d.owners {
		if owner == key {
			delete(d.owners, ip)
		}
	}
}
