package userspace

import (
	"errors"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// bind sends again, in another way, what the library's bind could not, and settles
// handshakes that cross.
type bind struct {
	conn.Bind
	crossing *crossing
	six      *twin
}

func newBind(b conn.Bind) bind { return bind{b, newCrossing(), &twin{}} }

// Open is called again after Close.
func (b bind) Open(port uint16) (fns []conn.ReceiveFunc, actual uint16, err error) {
	fns, actual, err = b.Bind.Open(port)
	if err != nil {
		return nil, 0, err
	}
	b.six.follow(b.Bind)
	for i := range fns {
		fns[i] = b.crossing.watch(fns[i])
	}
	return append(fns, b.crossing.open()), actual, nil
}

// Close ends what Open has returned.
func (b bind) Close() error {
	b.crossing.close()
	return b.Bind.Close()
}

// Send sends what does not fit into the underlay's packets in fragments, as the
// kernel's WireGuard does: Linux refuses datagrams that are handed over together
// (UDP_SEGMENT) where one of them does not fit, with EINVAL or EMSGSIZE. Some may
// have left before; the far end drops what it has seen.
//
// And it sends from another address where the one that the peer called is gone.
// The library looks after routes that change, but not for a bind that is not its
// own; what moves without an error is found by the next handshake that fails.
func (b bind) Send(bufs [][]byte, to conn.Endpoint) error {
	b.crossing.sent(bufs, to)
	err := b.of(to).Send(bufs, to)
	if err == nil {
		return nil
	}
	if len(bufs) > 1 && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EMSGSIZE)) {
		var errs []error
		for _, one := range bufs {
			errs = append(errs, b.Send([][]byte{one}, to))
		}
		return errors.Join(errs...)
	}
	if !to.SrcIP().IsValid() {
		return err
	}
	anew, perr := b.ParseEndpoint(to.DstToString())
	if perr != nil {
		return err
	}
	return b.of(anew).Send(bufs, anew)
}

// of is the bind that sends to an endpoint; see twin.
func (b bind) of(to conn.Endpoint) conn.Bind {
	if b.six.Bind != nil && to.DstIP().Is6() {
		return b.six.Bind
	}
	return b.Bind
}
