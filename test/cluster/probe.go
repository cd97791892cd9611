package cluster

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// probeTimeout holds for probes whose context has no deadline.
const probeTimeout = 3 * time.Second

// Dial opens a TCP or UDP connection ("tcp", "udp") from inside a network
// namespace. The connection may be used from anywhere.
func Dial(ctx context.Context, from Endpointer, network string, to netip.AddrPort) (net.Conn, error) {
	var conn net.Conn
	err := from.Do(func() error {
		var err error
		// An address, rather than a name, is dialed by the calling goroutine.
		conn, err = (&net.Dialer{Control: deepQueue}).DialContext(ctx, network, to.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("from %s: %w", from, err)
	}
	return conn, nil
}

// datagramQueue is what may wait for a receiver that is not scheduled: the
// default holds 50 small datagrams that WireGuard has decrypted, each in a page.
const datagramQueue = 8 << 20

// deepQueue is a net.Dialer's or net.ListenConfig's Control.
func deepQueue(network, _ string, c syscall.RawConn) error {
	if !strings.HasPrefix(network, "udp") {
		return nil
	}
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, datagramQueue)
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("set receive buffer: %w", err)
	}
	return nil
}

// dialProbe is Dial with a connection that fails once ctx ends. End must be called.
func dialProbe(ctx context.Context, from Endpointer, network string, to netip.AddrPort) (conn net.Conn, end func(), err error) {
	ctx, cancel := withDefaultTimeout(ctx, probeTimeout)
	conn, err = Dial(ctx, from, network, to)
	if err != nil {
		cancel()
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return conn, func() { stop(); cancel(); _ = conn.Close() }, nil
}

// TCP connects to a [Server], sends the payload, checks that it comes back, and
// returns the client's address as the server saw it.
func TCP(ctx context.Context, from Endpointer, to netip.AddrPort, payload []byte) (netip.AddrPort, error) {
	conn, end, err := dialProbe(ctx, from, "tcp", to)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer end()
	seen, err := echoTCP(conn, payload)
	if err != nil {
		return seen, fmt.Errorf("TCP from %s to %s: %w", from, to, err)
	}
	return seen, nil
}

func echoTCP(conn net.Conn, payload []byte) (netip.AddrPort, error) {
	r := bufio.NewReader(conn)
	line, err := r.ReadString('\n')
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("read the server's first line: %w", err)
	}
	seen, err := netip.ParseAddrPort(strings.TrimSpace(strings.TrimPrefix(line, "from ")))
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("parse the server's first line: %w", err)
	}
	wrote := make(chan error, 1)
	go func() { // a large payload fills both buffers unless somebody reads
		_, err := conn.Write(payload)
		wrote <- err
	}()
	back := make([]byte, len(payload))
	_, rerr := io.ReadFull(r, back)
	if rerr != nil {
		_ = conn.Close() // frees the writer
	}
	if err := errors.Join(rerr, <-wrote); err != nil {
		return seen, fmt.Errorf("exchange %d bytes: %w", len(payload), err)
	}
	if !bytes.Equal(back, payload) {
		return seen, fmt.Errorf("%d bytes came back altered", len(payload))
	}
	return seen, nil
}

// UDP sends one datagram to a [Server], checks that its payload comes back, and
// returns the client's address as the server saw it. It does not send again.
func UDP(ctx context.Context, from Endpointer, to netip.AddrPort, payload []byte) (netip.AddrPort, error) {
	conn, end, err := dialProbe(ctx, from, "udp", to)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer end()
	seen, err := echoUDP(conn, payload)
	if err != nil {
		return seen, fmt.Errorf("UDP from %s to %s: %w", from, to, err)
	}
	return seen, nil
}

func echoUDP(conn net.Conn, payload []byte) (netip.AddrPort, error) {
	if _, err := conn.Write(payload); err != nil {
		return netip.AddrPort{}, err
	}
	buf := make([]byte, 1<<16)
	n, err := conn.Read(buf)
	if err != nil {
		return netip.AddrPort{}, err
	}
	seen, back, err := parseReply(buf[:n])
	if err != nil {
		return netip.AddrPort{}, err
	}
	if !bytes.Equal(back, payload) {
		return seen, fmt.Errorf("%d bytes came back altered", len(payload))
	}
	return seen, nil
}

// parseReply takes the server's datagram "from ADDRPORT PAYLOAD" apart.
func parseReply(b []byte) (netip.AddrPort, []byte, error) {
	rest, ok := bytes.CutPrefix(b, []byte("from "))
	addr, payload, ok2 := bytes.Cut(rest, []byte(" "))
	if !ok || !ok2 {
		return netip.AddrPort{}, nil, fmt.Errorf("parse the server's answer: %.40q is not one", b)
	}
	seen, err := netip.ParseAddrPort(string(addr))
	if err != nil {
		return netip.AddrPort{}, nil, fmt.Errorf("parse the server's answer: %w", err)
	}
	return seen, payload, nil
}
