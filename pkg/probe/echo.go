package probe

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// ErrNoSocket says that this process may not send pings.
var ErrNoSocket = errors.New("cannot open an ICMP socket; without CAP_NET_RAW nobody can")

// Options say how packets are sent. The zero value sends them as everybody's.
type Options struct {
	Namespace string // optional: path of the network namespace that they are sent from
	Mark      uint32 // optional: of the packets (SO_MARK)
	// Whole keeps packets from being fragmented, by this machine and on the way, whatever
	// is known of the path's MTU.
	Whole bool
	// Every is how long an answer may take before the request is sent again. Required.
	Every time.Duration
}

// Request is an ICMP echo request.
type Request struct {
	To      netip.Addr
	Payload []byte // of at least four bytes less than the path's MTU allows
}

// Answer is what became of a Request.
type Answer struct {
	Answered bool
	RTT      time.Duration // since it was sent last
	// Err is why it could not be sent; nil if it was.
	Err error
}

// overhead is that of IP and ICMP, in bytes.
func overhead(to netip.Addr) int {
	if to.Is4() {
		return ipv4.HeaderLen + 8
	}
	return ipv6.HeaderLen + 8
}

// Sized is a request whose packet has so many bytes, the IP header included.
func Sized(to netip.Addr, size int) Request {
	return Request{To: to, Payload: make([]byte, max(size-overhead(to), 0))}
}

// Echo sends the requests, each again and again, until all are answered or ctx
// ends. The answers are in the order of the requests, of which 65,536 are the most.
func Echo(ctx context.Context, o Options, requests []Request) ([]Answer, error) {
	if len(requests) > 1<<16 {
		return nil, fmt.Errorf("%d echo requests at once are too many", len(requests))
	}
	e := echo{Options: o, requests: requests, answers: make([]Answer, len(requests)), sent: make([]time.Time, len(requests)), done: make(chan struct{})}
	var id [2]byte
	_, _ = rand.Read(id[:]) // never fails
	e.id = binary.BigEndian.Uint16(id[:])
	if err := e.open(); err != nil {
		return nil, err
	}
	var readers sync.WaitGroup
	for _, c := range e.conns {
		readers.Go(func() { e.receive(c) })
	}
	e.sendAll(ctx)
	for _, c := range e.conns {
		_ = c.conn.Close()
	}
	readers.Wait()
	return e.answers, nil
}

// echo is an exchange under way.
type echo struct {
	Options
	id       uint16
	requests []Request
	conns    map[bool]echoConn // by whether it is for IPv6

	mu      sync.Mutex
	answers []Answer
	sent    []time.Time
	left    int
	done    chan struct{} // closed when none is left
}

type echoConn struct {
	conn           net.PacketConn
	protocol       int
	request, reply icmp.Type
}

func (e *echo) open() error {
	e.conns = map[bool]echoConn{}
	e.left = len(e.requests)
	for _, r := range e.requests {
		v6 := r.To.Is6()
		if _, open := e.conns[v6]; open {
			continue
		}
		c := echoConn{protocol: unix.IPPROTO_ICMP, request: ipv4.ICMPTypeEcho, reply: ipv4.ICMPTypeEchoReply}
		network, wildcard := "ip4:icmp", "0.0.0.0"
		if v6 {
			c = echoConn{protocol: unix.IPPROTO_ICMPV6, request: ipv6.ICMPTypeEchoRequest, reply: ipv6.ICMPTypeEchoReply}
			network, wildcard = "ip6:ipv6-icmp", "::"
		}
		err := In(e.Namespace, func() (err error) {
			lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error { return e.control(raw, v6) }}
			c.conn, err = lc.ListenPacket(context.Background(), network, wildcard)
			return err
		})
		if err != nil {
			for _, c := range e.conns {
				_ = c.conn.Close()
			}
			return fmt.Errorf("%w: %w", ErrNoSocket, err)
		}
		e.conns[v6] = c
	}
	return nil
}

func (e *echo) control(raw syscall.RawConn, v6 bool) error {
	var err error
	cerr := raw.Control(func(fd uintptr) {
		if e.Mark != 0 {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(e.Mark))
		}
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20) // a smaller one does for fewer answers
		level, option, value := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT
		if v6 {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
		}
		if e.Whole {
			value = unix.IP_PMTUDISC_PROBE // the same number for both families
		}
		err = errors.Join(err, unix.SetsockoptInt(int(fd), level, option, value))
	})
	return errors.Join(cerr, err)
}

func (e *echo) sendAll(ctx context.Context) {
	for {
		for i, r := range e.requests {
			e.mu.Lock()
			answered := e.answers[i].Answered
			e.sent[i] = time.Now()
			e.mu.Unlock()
			if answered {
				continue
			}
			c := e.conns[r.To.Is6()]
			packet, err := (&icmp.Message{Type: c.request, Body: &icmp.Echo{ID: int(e.id), Seq: i, Data: r.Payload}}).Marshal(nil)
			if err == nil {
				_, err = c.conn.WriteTo(packet, &net.IPAddr{IP: r.To.AsSlice(), Zone: r.To.Zone()})
			}
			e.mu.Lock()
			e.answers[i].Err = err
			e.mu.Unlock()
			if i%64 == 63 { // each may start a handshake
				time.Sleep(time.Millisecond)
			}
		}
		if len(e.requests) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-e.done:
			return
		case <-time.After(e.Every):
		}
	}
}

// receive reads until the socket is closed.
func (e *echo) receive(c echoConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.conn.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil {
			continue // an ICMP error for an earlier request
		}
		m, err := icmp.ParseMessage(c.protocol, buf[:n])
		if err != nil || m.Type != c.reply {
			continue
		}
		body, ok := m.Body.(*icmp.Echo)
		addr, isIP := from.(*net.IPAddr)
		if !ok || !isIP || body.ID != int(e.id) || body.Seq >= len(e.requests) {
			continue
		}
		if a, _ := netip.AddrFromSlice(addr.IP); a.Unmap() != e.requests[body.Seq].To.WithZone("") {
			continue
		}
		e.take(body.Seq)
	}
}

func (e *echo) take(i int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.answers[i].Answered {
		return
	}
	e.answers[i] = Answer{Answered: true, RTT: time.Since(e.sent[i])}
	if e.left--; e.left == 0 {
		close(e.done)
	}
}
