package kernel

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// waves are the sockets of Wave, by source.
type waves map[netip.Addr]int

// mostWaves is how many sockets are kept: sources may be pods, which come and go.
const mostWaves = 32

const (
	waveLength = 400 // bytes: more than a keepalive, or a whole handshake
	wavePort   = 9   // discard (RFC 863)
)

// Wave sends one UDP datagram of 400 bytes and with a hop limit of 1, so that it
// ends at the machine that it reaches. It goes the way that the routes say, and does
// not wait. The source may be a local pod's address, which is not this machine's own
// (IP_TRANSPARENT in ip(7)).
func (k *Kernel) Wave(from, to netip.Addr) error {
	from, to = from.Unmap(), to.Unmap()
	if !from.IsValid() || from.Is6() != to.Is6() {
		return fmt.Errorf("send from %s to %s: not addresses of one family", from, to)
	}
	if k.waves == nil {
		k.waves = waves{}
	}
	s, err := k.waves.socket(from)
	if err == nil {
		err = unix.Sendto(s, make([]byte, waveLength), unix.MSG_DONTWAIT, socketAddress(to, wavePort))
	}
	if err != nil {
		return fmt.Errorf("send from %s to %s: %w", from, to, err)
	}
	return nil
}

func (w waves) socket(from netip.Addr) (int, error) {
	if s, ok := w[from]; ok {
		return s, nil
	}
	if len(w) >= mostWaves {
		w.close()
	}
	domain, level, options := unix.AF_INET, unix.SOL_IP, [][2]int{{unix.IP_TRANSPARENT, 1}, {unix.IP_TTL, 1}}
	if from.Is6() {
		domain, level, options = unix.AF_INET6, unix.SOL_IPV6, [][2]int{{unix.IPV6_TRANSPARENT, 1}, {unix.IPV6_UNICAST_HOPS, 1}}
	}
	s, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	for _, o := range options {
		if err == nil {
			err = unix.SetsockoptInt(s, level, o[0], o[1])
		}
	}
	if err == nil {
		err = unix.Bind(s, socketAddress(from, 0))
	}
	if err != nil {
		unix.Close(s) //nolint:errcheck // nothing was sent
		return 0, err
	}
	w[from] = s
	return s, nil
}

func socketAddress(a netip.Addr, port int) unix.Sockaddr {
	if a.Is6() {
		return &unix.SockaddrInet6{Addr: a.As16(), Port: port}
	}
	return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
}

func (w waves) close() {
	for from, s := range w {
		unix.Close(s) //nolint:errcheck // it only sends
		delete(w, from)
	}
}
