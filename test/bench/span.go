package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// spanWatch measures from the kernel's word that an interface is there to its word of
// the last of many routes. It reads with as little ado as can be: tens of thousands of
// routes come within a tenth of a second, and what lags behind measures itself.
type spanWatch struct {
	socket int
	node   *cluster.Node
	link   string
	bits   byte // of the routes' prefixes
	want   int  // routes
	done   chan error

	from, to time.Duration // see monotonic
	routes   int
}

// watchSpan waits for this many IPv4 routes of that prefix length, until ctx ends.
func watchSpan(ctx context.Context, n *cluster.Node, link string, bits byte, want int) (*spanWatch, error) {
	s := &spanWatch{node: n, link: link, bits: bits, want: want, done: make(chan error, 1)}
	err := n.Do(func() (err error) {
		s.socket, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		return err
	})
	if err == nil {
		err = errors.Join(
			unix.SetsockoptInt(s.socket, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, routeBuffer),
			unix.SetsockoptTimeval(s.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}), // how soon it sees that ctx has ended
			unix.Bind(s.socket, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK | unix.RTMGRP_IPV4_ROUTE}))
	}
	if err != nil {
		return nil, fmt.Errorf("subscribe to the links and routes of %s: %w", n, err)
	}
	go func() {
		defer unix.Close(s.socket) //nolint:errcheck // it only reads
		s.done <- s.read(ctx)
	}()
	return s, nil
}

func (s *spanWatch) read(ctx context.Context) error {
	buffer := make([]byte, 64<<10)
	for s.routes < s.want {
		n, _, err := unix.Recvfrom(s.socket, buffer, 0)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		}
		s.take(buffer[:n], monotonic())
	}
	return nil
}

// take reads what the kernel tells of in one datagram.
func (s *spanWatch) take(b []byte, now time.Duration) {
	for len(b) >= unix.SizeofNlMsghdr {
		length, kind := int(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint16(b[4:])
		if length < unix.SizeofNlMsghdr || length > len(b) {
			return
		}
		switch data := b[unix.SizeofNlMsghdr:length]; {
		case kind == unix.RTM_NEWLINK && s.from == 0 && linkName(data) == s.link:
			s.from = now
		case kind == unix.RTM_NEWROUTE && len(data) >= unix.SizeofRtMsg && data[1] == s.bits: // rtm_dst_len
			s.routes, s.to = s.routes+1, now
		}
		b = b[min((length+3)&^3, len(b)):]
	}
}

// linkName reads it from a struct ifinfomsg and what follows; "" if it has none.
func linkName(message []byte) string {
	if len(message) < unix.SizeofIfInfomsg {
		return ""
	}
	attributes, err := netlink.NewAttributeDecoder(message[unix.SizeofIfInfomsg:])
	if err != nil {
		return ""
	}
	for attributes.Next() {
		if attributes.Type() == unix.IFLA_IFNAME {
			return attributes.String()
		}
	}
	return ""
}

// await returns the time between the two.
func (s *spanWatch) await() (time.Duration, error) {
	err := <-s.done
	if err == nil && s.from == 0 {
		err = fmt.Errorf("it never told of %s", s.link)
	}
	if err != nil {
		return 0, fmt.Errorf("watch the links and routes of %s, after %d routes: %w", s.node, s.routes, err)
	}
	return s.to - s.from, nil
}
