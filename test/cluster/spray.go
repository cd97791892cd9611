package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// SprayOptions describe datagrams that nobody counts on the far side.
type SprayOptions struct {
	To      []netip.AddrPort // required: one after the other gets a datagram
	Rate    int              // required: datagrams per second
	Payload []byte           // optional
}

// Spray sends datagrams from one place to many, whatever becomes of them: as a pod
// does that does not know what goes on around it.
type Spray struct {
	cancel  context.CancelFunc
	done    chan struct{}
	conns   [2]net.PacketConn // of IPv4 and IPv6
	sent    atomic.Int64
	refused atomic.Int64
}

// StartSpray starts to send. Stop ends it; until then even a network namespace
// that was removed stays.
func StartSpray(from Endpointer, o SprayOptions) (*Spray, error) {
	if o.Rate <= 0 || len(o.To) == 0 {
		return nil, fmt.Errorf("spray from %s: want a rate, and somebody to send to", from)
	}
	s := &Spray{done: make(chan struct{})}
	err := from.Do(func() error {
		for i, network := range []string{"udp4", "udp6"} {
			conn, err := (&net.ListenConfig{}).ListenPacket(context.Background(), network, ":0")
			if err != nil {
				return err
			}
			s.conns[i] = conn
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("spray from %s: %w", from, err), s.close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go s.send(ctx, o)
	return s, nil
}

func (s *Spray) send(ctx context.Context, o SprayOptions) {
	defer close(s.done)
	ticker := time.NewTicker(time.Second / time.Duration(o.Rate))
	defer ticker.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		to := o.To[i%len(o.To)]
		conn := s.conns[0]
		if to.Addr().Is6() {
			conn = s.conns[1]
		}
		if _, err := conn.WriteTo(o.Payload, net.UDPAddrFromAddrPort(to)); err != nil {
			s.refused.Add(1)
			continue
		}
		s.sent.Add(1)
	}
}

// Sent is how many datagrams the kernel took.
func (s *Spray) Sent() int { return int(s.sent.Load()) }

// Refused is how many it would not take, for want of a route.
func (s *Spray) Refused() int { return int(s.refused.Load()) }

// Stop ends it.
func (s *Spray) Stop() error {
	s.cancel()
	<-s.done
	return s.close()
}

func (s *Spray) close() error {
	var errs []error
	for _, c := range s.conns {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}
