package cluster

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// Ping sends one ICMP echo request and returns the round-trip time.
func Ping(ctx context.Context, from Endpointer, to netip.Addr, payload []byte) (time.Duration, error) {
	return ping(ctx, from, to, payload, false)
}

// PingWhole is [Ping] with a packet that may not be fragmented, by this host or
// on the way. It fails with EMSGSIZE when it is larger than the interface's MTU.
func PingWhole(ctx context.Context, from Endpointer, to netip.Addr, payload []byte) (time.Duration, error) {
	return ping(ctx, from, to, payload, true)
}

// echoFamily is what differs between ICMP and ICMPv6.
type echoFamily struct {
	network, wildcard  string
	protocol           int
	request, reply     icmp.Type
	level, opt, refuse int // the socket option against fragmentation
}

func familyOf(a netip.Addr) echoFamily {
	if a.Is4() {
		return echoFamily{
			"ip4:icmp", "0.0.0.0", unix.IPPROTO_ICMP, ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply,
			unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO,
		}
	}
	return echoFamily{
		"ip6:ipv6-icmp", "::", unix.IPPROTO_ICMPV6, ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply,
		unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO,
	}
}

func ping(ctx context.Context, from Endpointer, to netip.Addr, payload []byte, whole bool) (time.Duration, error) {
	ctx, cancel := withDefaultTimeout(ctx, probeTimeout)
	defer cancel()
	f := familyOf(to)
	// The id alone tells our reply from those of others: each raw socket gets
	// a copy of every packet that arrives.
	echo := &icmp.Echo{ID: int(rand.Uint32() & 0xffff), Seq: int(rand.Uint32() & 0xffff), Data: payload}
	request, err := (&icmp.Message{Type: f.request, Body: echo}).Marshal(nil)
	if err != nil {
		return 0, fmt.Errorf("ping %s: %w", to, err)
	}
	var conn net.PacketConn
	err = from.Do(func() error {
		lc := net.ListenConfig{}
		if whole {
			lc.Control = f.dontFragment
		}
		var err error
		conn, err = lc.ListenPacket(ctx, f.network, f.wildcard)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("ping %s from %s: %w", to, from, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	start := time.Now()
	if _, err := conn.WriteTo(request, &net.IPAddr{IP: to.AsSlice(), Zone: to.Zone()}); err != nil {
		return 0, fmt.Errorf("ping %s from %s: %w", to, from, err)
	}
	if err := f.await(conn, to, echo); err != nil {
		return 0, fmt.Errorf("ping %s from %s: %w", to, from, err)
	}
	return time.Since(start), nil
}

// await reads until the reply comes or the connection's deadline passes.
func (f echoFamily) await(conn net.PacketConn, to netip.Addr, want *icmp.Echo) error {
	buf := make([]byte, 1<<16)
	for {
		n, peer, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		m, err := icmp.ParseMessage(f.protocol, buf[:n])
		if err != nil || m.Type != f.reply {
			continue
		}
		got, ok := m.Body.(*icmp.Echo)
		if !ok || got.ID != want.ID || got.Seq != want.Seq || !bytes.Equal(got.Data, want.Data) {
			continue
		}
		if ip, ok := peer.(*net.IPAddr); ok {
			if a, _ := netip.AddrFromSlice(ip.IP); a.Unmap() != to.WithZone("") {
				return fmt.Errorf("the reply came from %s", a.Unmap())
			}
		}
		return nil
	}
}

func (f echoFamily) dontFragment(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), f.level, f.opt, f.refuse) }); cerr != nil {
		return cerr
	}
	return err
}
