package probe

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Refused sends one byte to a UDP port and reports whether its machine answers
// that nobody listens there (ICMP port unreachable, RFC 1122, section 4.1.3.1).
// WireGuard, where it listens, takes no notice of such a packet. Silence is false.
func Refused(ctx context.Context, to netip.AddrPort, mark uint32, patience time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		cerr := raw.Control(func(fd uintptr) {
			if mark != 0 {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
			}
		})
		return errors.Join(cerr, err)
	}}
	conn, err := d.DialContext(ctx, "udp", to.String())
	if err != nil {
		return false
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline) // never fails on an open socket
	if _, err := conn.Write([]byte{0}); err != nil {
		return errors.Is(err, unix.ECONNREFUSED)
	}
	_, err = conn.Read(make([]byte, 1))
	return errors.Is(err, unix.ECONNREFUSED)
}
