package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"go4.org/netipx"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// wireguard is the wgctrl client, dialled by its first use.
type wireguard struct {
	client *wgctrl.Client
}

func (w *wireguard) close() {
	if w.client != nil {
		_ = w.client.Close()
		w.client = nil
	}
}

// device reads an interface. The kernel may have loaded its module since the
// last dial, which the client would not notice: so a device that is not found
// is looked for once more with a new client.
func (w *wireguard) device(name string) (d *wgtypes.Device, err error) {
	for range 2 {
		if w.client == nil {
			if w.client, err = wgctrl.New(); err != nil {
				return nil, err
			}
		}
		if d, err = w.client.Device(name); !errors.Is(err, os.ErrNotExist) {
			return d, err
		}
		w.close()
	}
	return nil, err
}

// configure makes sure of a client that sees the device, then hands it the change.
func (w *wireguard) configure(name string, c wgtypes.Config) (err error) {
	for range 2 {
		if w.client == nil {
			if w.client, err = wgctrl.New(); err != nil {
				return err
			}
		}
		if err = w.client.ConfigureDevice(name, c); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		w.close()
	}
	return err
}

// Handshake is what the interface has heard of a peer.
type Handshake struct {
	At       time.Time // of the last one; zero if there was none
	Received int64     // bytes in all, handshakes among them
	Sent     int64     // the same
}

// Handshakes returns those of all peers, by public key. Where the interface is
// missing there are none.
func (k *Kernel) Handshakes() (map[wgtypes.Key]Handshake, error) { return k.HandshakesOn(mesh.Primary) }

// HandshakesOn is Handshakes, of a plane's interface.
func (k *Kernel) HandshakesOn(p mesh.Plane) (map[wgtypes.Key]Handshake, error) {
	name := k.interfaceOf(p)
	// A tunnel process that was killed leaves its socket behind.
	if l, err := k.link(name); err != nil || l == nil {
		return nil, err
	}
	d, err := k.wg.device(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read WireGuard interface %s: %w", name, err)
	}
	out := make(map[wgtypes.Key]Handshake, len(d.Peers))
	for _, p := range d.Peers {
		h := Handshake{Received: p.ReceiveBytes, Sent: p.TransmitBytes}
		if p.LastHandshakeTime.Unix() > 0 { // the kernel has 1970 for none
			h.At = p.LastHandshakeTime
		}
		out[p.PublicKey] = h
	}
	return out, nil
}

func (k *Kernel) configureLink(l mesh.Link) error {
	if k.PrivateKey == nil {
		return errors.New("no private key at hand")
	}
	key, err := k.PrivateKey(l.PublicKey)
	if err != nil {
		return err
	}
	if key.PublicKey() != l.PublicKey {
		return errors.New("the private key has changed since the plan was made; the next pass will use it")
	}
	mark := int(l.FwMark)
	set := func(port int) error {
		return k.wg.configure(l.Name, wgtypes.Config{PrivateKey: &key, ListenPort: &port, FirewallMark: &mark})
	}
	err = set(l.ListenPort)
	for give := time.Now().Add(portWait); portTaken(err) && time.Now().Before(give); err = set(l.ListenPort) {
		time.Sleep(5 * time.Millisecond)
	}
	if portTaken(err) {
		// Userspace WireGuard remembers a port that it could not open, and would
		// seem to be as planned. With any other port it does not.
		_ = set(0)
		return k.portError(l.Name, l.ListenPort, err)
	}
	return err
}

// ErrPortTaken says that the tunnel has not the port at which others look for it. Until
// that is free it comes and goes by another one, from which it can call them.
var ErrPortTaken = errors.New("is taken by another program")

func (k *Kernel) portError(link string, port int, err error) error {
	setting := "listenPort"
	if link == k.spare() {
		setting = "rotationPort"
	}
	return fmt.Errorf("UDP port %d %w, and %s needs it: find it with `ss -ulpn`, or set %q to another (%w)", port, ErrPortTaken, link, setting, err)
}

// portWait is how long a tunnel process that was killed may take to let go of its port.
const portWait = 500 * time.Millisecond

// portTaken knows EADDRINUSE in both its forms: userspace WireGuard's answer has no type.
func portTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || err != nil && strings.Contains(err.Error(), fmt.Sprintf("errno=-%d", unix.EADDRINUSE))
}

// greet switches the keepalive on and off again: WireGuard sends one at once
// when it is switched on, and for that needs a session (set_peer in
// drivers/net/wireguard/netlink.c; wireguard-go does the same).
func (k *Kernel) greet(o mesh.Greet) error {
	return k.setKeepalives(o.Link, o.Peers, time.Hour, 0)
}

func (k *Kernel) setKeepalives(link string, peers []wgtypes.Key, intervals ...time.Duration) error {
	for _, interval := range intervals {
		var c wgtypes.Config
		for _, key := range peers {
			c.Peers = append(c.Peers, wgtypes.PeerConfig{PublicKey: key, UpdateOnly: true, PersistentKeepaliveInterval: &interval})
		}
		if err := k.wg.configure(link, c); err != nil {
			return err
		}
	}
	return nil
}

func isPeerOp(op mesh.Op) bool {
	switch op.(type) {
	case mesh.SetPeer, mesh.RemovePeer:
		return true
	}
	return false
}

// peerLink is the interface of an op for a peer.
func peerLink(op mesh.Op) string {
	if o, ok := op.(mesh.RemovePeer); ok {
		return o.Link
	}
	return linkOf(op)
}

// leadingPeerOps counts the peer ops at the head of ops that may share one
// message: those of one interface that name each peer once, and remove no single
// allowed IP.
func leadingPeerOps(ops []mesh.Op) int {
	n := 0
	for ; n < len(ops); n++ {
		if o, ok := ops[n].(mesh.SetPeer); !isPeerOp(ops[n]) || peerLink(ops[n]) != peerLink(ops[0]) || ok && len(o.Remove) > 0 {
			break
		}
	}
	return max(n, 1)
}

// applyPeers carries out ops that may share one message. One whose preshared key
// is not at hand is left out, all of it: a new peer would be there without its key.
func (k *Kernel) applyPeers(ops []mesh.Op) error {
	if o, ok := ops[0].(mesh.SetPeer); ok && len(o.Remove) > 0 {
		_, err := k.removeAllowedIPs(o)
		return about(ops, err)
	}
	var c wgtypes.Config
	var sent, keyless []mesh.Op
	var missing error // the first; for the others it will be the same
	link := peerLink(ops[0])
	for _, op := range ops {
		switch o := op.(type) {
		case mesh.SetPeer:
			p, err := k.encodePeer(o)
			if err != nil {
				keyless = append(keyless, o)
				if missing == nil {
					missing = err
				}
				continue
			}
			c.Peers = append(c.Peers, p)
		case mesh.RemovePeer:
			// UpdateOnly: a peer that is gone already is not made first.
			c.Peers = append(c.Peers, wgtypes.PeerConfig{PublicKey: o.PublicKey, Remove: true, UpdateOnly: true})
		}
		sent = append(sent, op)
	}
	var err error
	if len(sent) > 0 {
		err = k.wg.configure(link, c)
	}
	return errors.Join(about(keyless, missing), about(sent, err))
}

// about says what an error was met with: of many ops, it names the first.
func about(ops []mesh.Op, err error) error {
	switch {
	case err == nil:
		return nil
	case len(ops) == 1:
		return fmt.Errorf("%s: %w", ops[0], err)
	}
	return fmt.Errorf("%s, and %d peers more: %w", ops[0], len(ops)-1, err)
}

func (k *Kernel) encodePeer(o mesh.SetPeer) (wgtypes.PeerConfig, error) {
	p := wgtypes.PeerConfig{PublicKey: o.PublicKey, PersistentKeepaliveInterval: o.Keepalive}
	if o.PresharedKey != nil {
		key, err := k.presharedKey(o.PublicKey, *o.PresharedKey)
		if err != nil {
			return p, err
		}
		p.PresharedKey = &key
	}
	if o.Endpoint.IsValid() {
		p.Endpoint = net.UDPAddrFromAddrPort(o.Endpoint)
	}
	for _, prefix := range o.Add {
		p.AllowedIPs = append(p.AllowedIPs, *netipx.PrefixIPNet(prefix))
	}
	return p, nil
}

// presharedKey returns the key of that fingerprint. For none it is all zeros,
// by which WireGuard removes the one there is (WGPEER_A_PRESHARED_KEY in
// <linux/wireguard.h>; preshared_key in wireguard.com/xplatform).
func (k *Kernel) presharedKey(peer wgtypes.Key, f mesh.Fingerprint) (wgtypes.Key, error) {
	if f == (mesh.Fingerprint{}) {
		return wgtypes.Key{}, nil
	}
	if k.PresharedKey == nil {
		return wgtypes.Key{}, errors.New("no preshared key at hand")
	}
	key, err := k.PresharedKey(peer, f)
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("no preshared key at hand: %w", err)
	}
	if mesh.FingerprintOf(key) != f {
		return wgtypes.Key{}, errors.New("the preshared key has changed since the plan was made; the next pass will use it")
	}
	return key, nil
}

func decodePeers(in []wgtypes.Peer) []mesh.Peer {
	out := make([]mesh.Peer, 0, len(in))
	for _, p := range in {
		d := mesh.Peer{
			PublicKey: p.PublicKey, PresharedKey: mesh.FingerprintOf(p.PresharedKey), Keepalive: p.PersistentKeepaliveInterval,
			ReceiveBytes: p.ReceiveBytes, TransmitBytes: p.TransmitBytes,
		}
		if p.LastHandshakeTime.Unix() > 0 {
			d.LastHandshake = p.LastHandshakeTime
		}
		if p.Endpoint != nil {
			ap := p.Endpoint.AddrPort()
			d.Endpoint = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		}
		for i := range p.AllowedIPs {
			if prefix, ok := netipx.FromStdIPNet(&p.AllowedIPs[i]); ok {
				d.AllowedIPs = append(d.AllowedIPs, prefix)
			}
		}
		out = append(out, d)
	}
	return out
}
