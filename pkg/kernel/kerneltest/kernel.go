// Package kerneltest is a kernel in memory: it takes mesh.Ops, can be observed,
// prints itself as text in the manner of ip(8), wg(8) and nft(8), and answers
// where a packet would go.
//
// It refuses and forgets what Linux refuses and forgets, because the order of
// the ops is what tests have to find fault with. It is for speed: pkg/kernel is
// tested against real kernels as well.
package kerneltest

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// MainTable is the number of Linux' main routing table, where foreign routes
// say what is on this machine.
const MainTable = 254

// Uplink is the device by which packets leave the machine. What the main table
// sends to any other device stays on it.
const Uplink = "eth0"

// Kernel is a kernel in memory. The zero value has nothing in it and is ready
// for use. All methods may be called at the same time.
type Kernel struct {
	// FailAt, if set, is asked before each op. An error that it returns is the
	// op's, and the op does nothing. Set it before use.
	FailAt func(mesh.Op) error
	// Name, if set, gives a public key the name under which String and Verdict
	// show it; keys that it gives "" are shown whole. Set it before use.
	Name func(wgtypes.Key) string
	// Own are the machine's own addresses. Set it before use.
	Own []netip.Addr

	mu        sync.Mutex
	primary   device
	spare     device
	addresses map[netip.Prefix]bool // of the primary
	routes    map[routeKey]route    // ours and foreign ones
	rules     map[mesh.Rule]bool    // true: foreign
	filter    mesh.Filter

	srcValidMark bool
}

// device is a WireGuard interface. The zero value is its absence.
type device struct {
	link   mesh.Link
	peers  map[wgtypes.Key]mesh.Peer    // without their allowed IPs
	owners map[netip.Prefix]wgtypes.Key // the allowed IPs: each has one peer
}

// device returns the interface of that name, or nil.
func (k *Kernel) device(name string) *device {
	for _, d := range k.devices() {
		if d.link.Name == name && name != "" {
			return d
		}
	}
	return nil
}

func (k *Kernel) devices() []*device { return []*device{&k.primary, &k.spare} }

type routeKey struct {
	prefix        netip.Prefix
	table, metric int
}

type route struct {
	mesh.Route
	dev     string
	foreign bool
}

func keyOf(r mesh.Route) routeKey { return routeKey{r.Prefix, r.Table, r.Metric} }

// init makes the maps of a zero Kernel.
func (k *Kernel) init() {
	if k.routes == nil {
		k.addresses = map[netip.Prefix]bool{}
		k.routes = map[routeKey]route{}
		k.rules = map[mesh.Rule]bool{}
	}
}

// Observe returns all that is not foreign, sorted. It shares no memory with
// the kernel, and its error is always nil.
func (k *Kernel) Observe() (mesh.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state(), nil
}

func (k *Kernel) state() mesh.State {
	s := mesh.State{Link: k.primary.link, Filter: cloneFilter(k.filter), SrcValidMark: k.srcValidMark}
	for p := range k.addresses {
		s.Addresses = append(s.Addresses, p)
	}
	s.Peers = k.primary.list()
	s.Spare = mesh.SpareLink{Link: k.spare.link, Peers: k.spare.list()}
	for _, r := range k.routes {
		if !r.foreign {
			s.Routes = append(s.Routes, r.Route)
		}
	}
	for r, foreign := range k.rules {
		if !foreign {
			s.Rules = append(s.Rules, r)
		}
	}
	s.Sort()
	return s
}

func (d *device) list() (peers []mesh.Peer) {
	allowed := make(map[wgtypes.Key][]netip.Prefix, len(d.peers))
	for p, key := range d.owners {
		allowed[key] = append(allowed[key], p)
	}
	for key, p := range d.peers {
		p.AllowedIPs = allowed[key]
		peers = append(peers, p)
	}
	return peers
}

func cloneFilter(f mesh.Filter) mesh.Filter {
	f.Cluster, f.Guarded, f.Withheld, f.Local = slices.Clone(f.Cluster), slices.Clone(f.Guarded), slices.Clone(f.Withheld), slices.Clone(f.Local)
	f.Behind = slices.Clone(f.Behind)
	f.Pods, f.Exempt, f.Masqueraded = slices.Clone(f.Pods), slices.Clone(f.Exempt), slices.Clone(f.Masqueraded)
	f.Nodes = cloneNodes(f.Nodes)
	return f
}

func cloneNodes(n mesh.NodeFilter) mesh.NodeFilter {
	n.Own, n.Peers, n.Held, n.DirectPorts = slices.Clone(n.Own), slices.Clone(n.Peers), slices.Clone(n.Held), slices.Clone(n.DirectPorts)
	return n
}

// AddForeignRoute puts in a route that is not ours, by the device dev.
func (k *Kernel) AddForeignRoute(r mesh.Route, dev string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.init()
	k.routes[keyOf(r)] = route{Route: r, dev: dev, foreign: true}
}

// AddForeignRule puts in a policy rule that is not ours.
func (k *Kernel) AddForeignRule(r mesh.Rule) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.init()
	k.rules[r] = true
}

// KillTunnel does what the death of a userspace tunnel's process does: the link
// goes, and with it its addresses, its peers and the routes into it. All else stays,
// the spare link too.
func (k *Kernel) KillTunnel() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dropLink(&k.primary)
}

// KillSpare is KillTunnel, of the spare link.
func (k *Kernel) KillSpare() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dropLink(&k.spare)
}

// BreakFilter does what a stranger's `nft flush table` does: the filter's table
// is still there but drops nothing, and is observed as broken.
func (k *Kernel) BreakFilter() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.filter.Broken = k.filter.Interface != ""
}

// Roam does what an authentic handshake from a new place does: the peer's
// endpoint is now there, and its last handshake at that time. It does nothing
// where there is no such peer.
func (k *Kernel) Roam(peer wgtypes.Key, endpoint netip.AddrPort, at time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.change(peer, func(p *mesh.Peer) { p.Endpoint, p.LastHandshake = endpoint, at })
}

// Hear lets that many bytes more have come from a peer. It does nothing where
// there is no such peer.
func (k *Kernel) Hear(peer wgtypes.Key, bytes int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.change(peer, func(p *mesh.Peer) { p.ReceiveBytes += bytes })
}

// change changes a peer, of whichever interface.
func (k *Kernel) change(peer wgtypes.Key, to func(*mesh.Peer)) {
	for _, d := range k.devices() {
		if p, ok := d.peers[peer]; ok {
			to(&p)
			d.peers[peer] = p
		}
	}
}

// Received is how many bytes have come from each peer. It fails without a link.
func (k *Kernel) Received() (map[wgtypes.Key]int64, error) { return k.ReceivedOn(mesh.Primary) }

// ReceivedOn is Received, of a plane's link.
func (k *Kernel) ReceivedOn(plane mesh.Plane) (map[wgtypes.Key]int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := &k.primary
	if plane == mesh.Spare {
		d = &k.spare
	}
	if d.link.Name == "" {
		return nil, os.ErrNotExist
	}
	out := map[wgtypes.Key]int64{}
	for key, p := range d.peers {
		out[key] = p.ReceiveBytes
	}
	return out, nil
}

// dropLink removes a link with all that depends on it.
func (k *Kernel) dropLink(d *device) {
	for key, r := range k.routes {
		if !r.foreign && r.Type == mesh.ViaLink && r.dev == d.link.Name {
			delete(k.routes, key)
		}
	}
	if d == &k.primary {
		clear(k.addresses)
	}
	*d = device{}
}

// Apply does the ops in their order and stops at the first that fails. The
// error names the op.
func (k *Kernel) Apply(ops []mesh.Op) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.init()
	for _, o := range ops {
		err := k.failAt(o)
		if err == nil {
			err = k.apply(o)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	return nil
}

func (k *Kernel) failAt(o mesh.Op) error {
	if k.FailAt == nil {
		return nil
	}
	return k.FailAt(o)
}
