package endpoint

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// ingress knows by which interface callers must come in. On the tunnel WireGuard
// vouches for the source address; on any other interface nobody does.
//
// Sockets bound to the interface (SO_BINDTODEVICE) would not do: they are bound to
// its number, and hear nothing any more when it is deleted and made anew, nor
// would the connections they accepted. So the interface of every caller is looked
// at, by its number, which the kernel tells: for UDP with the datagram, for TCP as
// that of the packet which completed the handshake (IP_PKTOPTIONS in ip(7)).
type ingress struct {
	name string       // "": any will do
	last atomic.Int64 // the number that the name had last; no other interface gets it (dev_new_index)
}

// ok reports whether this number is that of the interface, or of the second one,
// by which the same machines come while keys are rotated.
func (i *ingress) ok(index int) bool {
	if i.name == "" {
		return true
	}
	if index == 0 {
		return false
	}
	if i.last.Load() == int64(index) {
		return true
	}
	if interfaceIndex(i.name) != index && interfaceIndex(mesh.SpareInterface(i.name)) != index {
		return false
	}
	i.last.Store(int64(index))
	return true
}

// interfaceIndex is 0 if there is no such interface. It asks for the one; package
// net would list all.
func interfaceIndex(name string) int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0
	}
	return int(req.Uint32())
}

// tcpOK reports whether an accepted connection came in by the interface.
func (i *ingress) tcpOK(c *net.TCPConn) bool {
	if i.name == "" {
		return true
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	index := 0
	_ = raw.Control(func(fd uintptr) { index = arrivedBy(fd) })
	return i.ok(index)
}

// ipv62292PktOptions is in no Go package (IPV6_2292PKTOPTIONS in linux/in6.h).
const ipv62292PktOptions = 6

// arrivedBy is the interface's number; 0 if it is not told. The listener was asked
// to tell (tell), which the sockets that it accepts inherit.
func arrivedBy(fd uintptr) int {
	for _, o := range [][2]uintptr{{unix.IPPROTO_IP, unix.IP_PKTOPTIONS}, {unix.IPPROTO_IPV6, ipv62292PktOptions}} {
		var buf [256]byte // room for all that a socket could be asked to tell
		size := uint32(len(buf))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, o[0], o[1],
			uintptr(unsafe.Pointer(&buf)), uintptr(unsafe.Pointer(&size)), 0) //nolint:gosec // x/sys has no getsockopt that returns bytes
		if errno == 0 && size > 0 && int(size) <= len(buf) {
			if index := controlIndex(buf[:size]); index != 0 {
				return index
			}
		}
	}
	return 0
}

// controlIndex finds an interface's number in control messages; 0 if there is none.
func controlIndex(oob []byte) int {
	for len(oob) >= unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return 0
		}
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			return int(binary.NativeEndian.Uint32(data)) // struct in_pktinfo begins with it
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo,
			h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_2292PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			return int(binary.NativeEndian.Uint32(data[16:])) // struct in6_pktinfo has it behind the address
		}
		oob = rest
	}
	return 0
}

// control prepares a listening socket. IP_FREEBIND lets it listen at an address
// that is not there yet, or is gone for a moment while the interface is made anew:
// no need to listen again, and no moment in which callers are refused for that.
func control(at netip.Addr, tell, stream bool) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var errs [8]error
		err := c.Control(func(fd uintptr) {
			set := func(i, level, option, value int) { errs[i] = unix.SetsockoptInt(int(fd), level, option, value) }
			if at.Is4() {
				set(0, unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
			} else {
				set(0, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
			}
			switch {
			case tell && at.Is4():
				set(1, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
			case tell:
				set(1, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
			}
			if stream { // which accepted sockets inherit; package net would set it for each anew
				set(2, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
				set(3, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle.Seconds()))
				set(4, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepAlive.Interval.Seconds()))
				set(5, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count)
			}
		})
		for _, e := range append(errs[:], err) {
			if e != nil {
				return e
			}
		}
		return nil
	}
}
