package cluster

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// etherTypeSentinel is IEEE 802's "local experimental EtherType 1".
const etherTypeSentinel = 0x88b5

const (
	etherTypeIPv4 = 0x0800
	etherTypeIPv6 = 0x86dd
	etherHeader   = 14

	protoUDP      = 17
	protoFragment = 44 // IPv6's extension header
	protoICMPv6   = 58
)

// packet is what the headers of a frame say.
type packet struct {
	src, dst  netip.Addr // invalid if the frame is not IP
	proto     byte
	wireGuard bool
	neighbour bool // neighbour discovery, which stands for ARP
	fragment  bool // of an IP packet, the first included
}

func (p packet) String() string {
	if !p.src.IsValid() {
		return "not IP"
	}
	return fmt.Sprintf("%s > %s protocol %d", p.src, p.dst, p.proto)
}

// parseFrame reads an Ethernet frame. Truncated frames give what there is.
func parseFrame(frame []byte, listenPort uint16) packet {
	var p packet
	if len(frame) < etherHeader {
		return p
	}
	ip := frame[etherHeader:]
	var payload []byte
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherTypeIPv4:
		if len(ip) < 20 {
			return p
		}
		p.src, p.dst = netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
		p.proto = ip[9]
		header := int(ip[0]&0x0f) * 4
		later := binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 // a later fragment, without a UDP header
		p.fragment = later || ip[6]&0x20 != 0
		if !later && header >= 20 && len(ip) >= header {
			payload = ip[header:]
		}
	case etherTypeIPv6:
		if len(ip) < 40 {
			return p
		}
		p.src, p.dst = netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40]))
		p.proto = ip[6]
		p.fragment = p.proto == protoFragment
		payload = ip[40:]
	}
	switch {
	case p.proto == protoUDP && len(payload) >= 8+4:
		p.wireGuard = isWireGuard(payload, listenPort)
	case p.proto == protoICMPv6 && len(payload) > 0:
		p.neighbour = payload[0] >= 133 && payload[0] <= 137 // RFC 4861, section 4
	}
	return p
}

// isWireGuard checks a UDP datagram for the message types of WireGuard's
// protocol, section 5.4 of its paper: one byte, then three zero bytes.
func isWireGuard(udp []byte, listenPort uint16) bool {
	src, dst := binary.BigEndian.Uint16(udp), binary.BigEndian.Uint16(udp[2:])
	message := udp[8:]
	return (src == listenPort || dst == listenPort) &&
		message[0] >= 1 && message[0] <= 4 && message[1] == 0 && message[2] == 0 && message[3] == 0
}

// sentinel is a frame that marks a moment in the order of a capture.
func sentinel(nonce [16]byte) []byte {
	// The destination is reserved for link-local protocols (IEEE 802.1Q,
	// 01-80-C2-00-00-0E), which bridges do not forward.
	f := []byte{0x01, 0x80, 0xc2, 0, 0, 0x0e, 0x02, 0, 0, 0, 0, 0xfe}
	f = binary.BigEndian.AppendUint16(f, etherTypeSentinel)
	f = append(f, nonce[:]...)
	return append(f, make([]byte, 60-len(f))...) // the least length of a frame
}

func isSentinel(frame []byte) (nonce [16]byte, ok bool) {
	if len(frame) < etherHeader+16 || binary.BigEndian.Uint16(frame[12:]) != etherTypeSentinel {
		return nonce, false
	}
	return [16]byte(frame[etherHeader:]), true
}

// inspect counts a frame and keeps it if it is one that should not be there.
func (r *CaptureReport) inspect(frame []byte, o *CaptureOptions) {
	p := parseFrame(frame, o.ListenPort)
	r.Packets++
	if p.wireGuard {
		r.WireGuard++
	}
	if p.fragment {
		r.Fragments++
	}
	for _, m := range o.Markers {
		if bytes.Contains(frame, m) {
			r.WithMarker++
			if r.Seen == nil {
				r.Seen = map[string]int{}
			}
			r.Seen[string(m)]++
			r.keep(frame, fmt.Sprintf("has marker %.40q: %s", m, p))
			break
		}
	}
	if p.src.IsValid() && !p.neighbour {
		for _, prefix := range o.Prefixes {
			if prefix.Contains(p.src) || prefix.Contains(p.dst) {
				r.Plain++
				r.keep(frame, fmt.Sprintf("has an address in %s: %s", prefix, p))
				break
			}
		}
	}
}

const (
	maxFindings   = 32
	maxFrameBytes = 256
)

func (r *CaptureReport) keep(frame []byte, why string) {
	if len(r.Findings) < maxFindings {
		r.Findings = append(r.Findings, Finding{At: time.Now(), Why: why, Frame: bytes.Clone(frame[:min(len(frame), maxFrameBytes)])})
	}
}
