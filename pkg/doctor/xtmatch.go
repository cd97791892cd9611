package doctor

import (
	"encoding/binary"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// match runs a match of iptables.
func (m *machine) match(e *expr.Match) Tri {
	p := m.packet
	ports := func(proto uint8, src, dst [2]uint16, invertSrc, invertDst bool) Tri {
		if p.Proto != 0 && p.Proto != proto {
			return No
		}
		t := min(inRange(p.SrcPort, src, invertSrc), inRange(p.DstPort, dst, invertDst))
		if p.Proto == 0 {
			t = min(t, Maybe)
		}
		return t
	}
	switch info := e.Info.(type) {
	case *xt.Comment:
		return Yes
	case *xt.Udp:
		return ports(unix.IPPROTO_UDP, info.SrcPorts, info.DstPorts, info.InvFlags&xt.UdpInvSrcPorts != 0, info.InvFlags&xt.UdpInvDestPorts != 0)
	case *xt.Tcp:
		t := ports(unix.IPPROTO_TCP, info.SrcPorts, info.DstPorts, info.InvFlags&xt.TcpInvSrcPorts != 0, info.InvFlags&xt.TcpInvDestPorts != 0)
		if info.FlagsMask != 0 || info.Option != 0 {
			t = min(t, Maybe)
		}
		return t
	case *xt.ConntrackMtinfo3:
		return m.conntrack(info.MatchFlags, info.InvertFlags, info.StateMask)
	case *xt.ConntrackMtinfo2:
		return m.conntrack(info.MatchFlags, info.InvertFlags, info.StateMask)
	case *xt.Unknown:
		switch e.Name {
		case "multiport":
			return m.multiport(*info)
		case "mark":
			return m.markMatch(*info)
		}
	}
	return Maybe
}

func inRange(port uint16, r [2]uint16, invert bool) Tri {
	t := Maybe
	switch {
	case r[0] == 0 && r[1] == 0xffff:
		t = Yes
	case port != 0:
		t = tri(port >= r[0] && port <= r[1])
	}
	if invert {
		return t.Not()
	}
	return t
}

// conntrack knows the match of states only (XT_CONNTRACK_STATE).
func (m *machine) conntrack(flags, invert, states uint16) Tri {
	if flags&^uint16(xt.ConntrackState|xt.ConntrackStateAlias) != 0 || m.packet.State == 0 {
		return Maybe
	}
	t := tri(uint32(states)&m.packet.State != 0)
	if invert&uint16(xt.ConntrackState) != 0 {
		return t.Not()
	}
	return t
}

// multiport reads struct xt_multiport_v1 of linux/netfilter/xt_multiport.h.
func (m *machine) multiport(b []byte) Tri {
	if len(b) < 48 || int(b[1]) > 15 {
		return Maybe
	}
	const source, destination = 0, 1
	port := m.packet.DstPort
	if b[0] == source {
		port = m.packet.SrcPort
	} else if b[0] != destination {
		return Maybe
	}
	if port == 0 {
		return Maybe
	}
	in := false
	for i := 0; i < int(b[1]); i++ {
		from := binary.NativeEndian.Uint16(b[2+2*i:])
		to := from
		if b[32+i] != 0 && i+1 < int(b[1]) { // it begins a range
			i++
			to = binary.NativeEndian.Uint16(b[2+2*i:])
		}
		in = in || port >= from && port <= to
	}
	if b[47] != 0 {
		return tri(!in)
	}
	return tri(in)
}

// markMatch reads struct xt_mark_mtinfo1 of linux/netfilter/xt_mark.h.
func (m *machine) markMatch(b []byte) Tri {
	if len(b) < 9 || m.packet.Mark == nil {
		return Maybe
	}
	mark, mask := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:])
	return tri((*m.packet.Mark&mask == mark) != (b[8] != 0))
}
