package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"
)

// keepAlive finds callers and targets that are gone without a word, in a minute.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

// attemptDelay is what one address has before the next is tried beside it (RFC 8305, section 5).
const attemptDelay = 250 * time.Millisecond

// interleave puts addresses in the order of RFC 8305, section 4: the first one's
// family first, and then in turns.
func interleave(addrs []netip.Addr) []netip.Addr {
	var first, second []netip.Addr
	for _, a := range addrs {
		if a.Is4() == addrs[0].Is4() {
			first = append(first, a)
		} else {
			second = append(second, a)
		}
	}
	out := make([]netip.Addr, 0, len(addrs))
	for i := range max(len(first), len(second)) {
		if i < len(first) {
			out = append(out, first[i])
		}
		if i < len(second) {
			out = append(out, second[i])
		}
	}
	return out
}

// dial connects to the first of these addresses that answers. They are tried in
// their order: the next one as soon as one fails, or has not answered for a while.
func dial(ctx context.Context, addrs []netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{KeepAliveConfig: keepAlive}
	d.SetMultipathTCP(false)
	one := func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
		c, err := d.DialTCP(ctx, "tcp", netip.AddrPort{}, to)
		if op := (*net.OpError)(nil); errors.As(err, &op) {
			err = op.Err // which does not speak of a source that nobody chose
		}
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w", to, err)
		}
		return c, nil
	}
	if len(addrs) == 1 {
		return one(ctx, addrs[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the attempts that are under way
	type result struct {
		conn *net.TCPConn
		err  error
	}
	results := make(chan result)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var errs []error
	for next, open := 0, 0; ; {
		if next == len(addrs) && open == 0 {
			return nil, errors.Join(errs...)
		}
		select {
		case <-timer.C:
			if next < len(addrs) {
				to := addrs[next]
				next, open = next+1, open+1
				go func() {
					c, err := one(ctx, to)
					select {
					case results <- result{c, err}:
					case <-ctx.Done():
						if err == nil {
							abandon(c, true)
						}
					}
				}()
				timer.Reset(attemptDelay)
			}
		case r := <-results:
			if r.err == nil {
				return r.conn, nil
			}
			open--
			if !slices.ContainsFunc(errs, func(e error) bool { return e.Error() == r.err.Error() }) {
				errs = append(errs, r.err)
			}
			timer.Reset(0)
		case <-ctx.Done():
			return nil, errors.Join(append(errs, ctx.Err())...)
		}
	}
}
