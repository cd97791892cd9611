package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// Server answers TCP and UDP, IPv4 and IPv6, on one port in some network
// namespace, and tells each client from which address it came:
//
//   - TCP: a line "from ADDRPORT", then whatever the client sends, until it closes;
//   - UDP: one datagram "from ADDRPORT " followed by the client's payload, from
//     the very address that the client's was sent to.
type Server struct {
	Port uint16

	at      Endpointer
	closers []io.Closer
	running sync.WaitGroup

	mu      sync.Mutex
	conns   map[net.Conn]bool
	sources map[netip.Addr]int
	closed  bool
}

// StartServer starts a server. It answers when StartServer returns.
func StartServer(at Endpointer, port uint16) (*Server, error) {
	s := &Server{Port: port, at: at, conns: map[net.Conn]bool{}, sources: map[netip.Addr]int{}}
	if err := at.Do(s.listen); err != nil {
		return nil, errors.Join(fmt.Errorf("start a server on port %d of %s: %w", port, at, err), s.Close())
	}
	return s, nil
}

func (s *Server) listen() error {
	ctx := context.Background()
	lc := net.ListenConfig{Control: deepQueue}
	lc.SetMultipathTCP(false) // what goes over the wire shall be plain TCP
	for _, network := range []string{"tcp4", "tcp6"} {
		l, err := lc.Listen(ctx, network, fmt.Sprintf(":%d", s.Port))
		if err != nil {
			return err
		}
		s.closers = append(s.closers, l)
		s.running.Go(func() { s.serveTCP(l) })
	}
	c4, err := lc.ListenPacket(ctx, "udp4", fmt.Sprintf(":%d", s.Port))
	if err != nil {
		return err
	}
	s.closers = append(s.closers, c4)
	p4 := ipv4.NewPacketConn(c4) // remembers the flags, the socket alone won't do
	if err := p4.SetControlMessage(ipv4.FlagDst, true); err != nil {
		return fmt.Errorf("ask for destination addresses: %w", err)
	}
	c6, err := lc.ListenPacket(ctx, "udp6", fmt.Sprintf(":%d", s.Port))
	if err != nil {
		return err
	}
	s.closers = append(s.closers, c6)
	p6 := ipv6.NewPacketConn(c6)
	if err := p6.SetControlMessage(ipv6.FlagDst, true); err != nil {
		return fmt.Errorf("ask for destination addresses: %w", err)
	}
	s.running.Go(func() { s.serveUDP(packetConn4{p4}) })
	s.running.Go(func() { s.serveUDP(packetConn6{p6}) })
	return nil
}

// Sources returns how many connections and datagrams came from each address.
func (s *Server) Sources() map[netip.Addr]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.sources)
}

// Overflowed is how many datagrams its sockets had no room for, since nobody read
// them in time: the harness has lost these, and not the network.
func (s *Server) Overflowed() (int, error) { return udpDrops(s.at, s.Port) }

// Close ends the server and its connections.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	var errs []error
	for _, c := range s.closers {
		errs = append(errs, c.Close())
	}
	for c := range s.conns {
		_ = c.Close()
	}
	s.closers = nil
	s.mu.Unlock()
	s.running.Wait()
	return errors.Join(errs...)
}

func (s *Server) serveTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // the client gave up before we came to it
		}
		from := source(c.RemoteAddr())
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			_ = c.Close()
			return
		}
		s.conns[c] = true
		s.sources[from.Addr()]++
		s.mu.Unlock()
		s.running.Go(func() {
			defer func() {
				_ = c.Close()
				s.mu.Lock()
				delete(s.conns, c)
				s.mu.Unlock()
			}()
			if _, err := fmt.Fprintf(c, "from %s\n", from); err == nil {
				_, _ = io.Copy(c, c) // ends with the client, whatever its reason
			}
		})
	}
}

// packetConn receives a datagram along with the address it was sent to, and
// answers from that address. A wildcard socket alone would answer from the one
// that its route back prefers, and the client's connected socket would refuse it.
type packetConn interface {
	receive(b []byte) (n int, from net.Addr, reply func([]byte) error, err error)
}

type packetConn4 struct{ *ipv4.PacketConn }

func (c packetConn4) receive(b []byte) (int, net.Addr, func([]byte) error, error) {
	n, cm, from, err := c.ReadFrom(b)
	return n, from, func(answer []byte) error {
		var out *ipv4.ControlMessage
		if cm != nil {
			out = &ipv4.ControlMessage{Src: cm.Dst}
		}
		_, err := c.WriteTo(answer, out, from)
		return err
	}, err
}

type packetConn6 struct{ *ipv6.PacketConn }

func (c packetConn6) receive(b []byte) (int, net.Addr, func([]byte) error, error) {
	n, cm, from, err := c.ReadFrom(b)
	return n, from, func(answer []byte) error {
		var out *ipv6.ControlMessage
		if cm != nil {
			out = &ipv6.ControlMessage{Src: cm.Dst}
		}
		_, err := c.WriteTo(answer, out, from)
		return err
	}, err
}

func (s *Server) serveUDP(c packetConn) {
	buf := make([]byte, 1<<16)
	for {
		n, addr, reply, err := c.receive(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error for an earlier answer
		}
		from := source(addr)
		s.mu.Lock()
		s.sources[from.Addr()]++
		s.mu.Unlock()
		// An answer that can't be sent is a packet lost, which the client sees.
		_ = reply(fmt.Appendf(nil, "from %s %s", from, buf[:n]))
	}
}

// source is the address without zone and without the IPv4-in-IPv6 form.
func source(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
