package userspace

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// checked mends the UDP checksums of what a device hands over.
//
// The kernel leaves the checksums of its own packets to the device, and the library
// completes them. One datagram of 65,536 comes out at 0, which is to be sent as
// 0xffff (RFC 768): 0 says that there is none, and IPv6 has such a datagram dropped
// (RFC 8200, section 8.1). The library sends it as 0 (gsoNoneChecksum and gsoSplit in
// tun/offload_linux.go).
type checked struct{ tun.Device }

// Read reads packets as a device does.
func (d checked) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n, err := d.Device.Read(bufs, sizes, offset)
	for i := range n {
		mendChecksum(bufs[i][offset : offset+sizes[i]])
	}
	return n, err
}

const (
	ipv4HeaderLen  = 20
	ipv6HeaderLen  = 40
	udpHeaderLen   = 8
	udpChecksumAt  = 6
	ipv4FragmentAt = 6
)

// mendChecksum writes 0xffff where a UDP checksum is 0 and adds up to that. A
// datagram that has none on purpose, as some tunnels send, is left as it is, but for
// one in 65,536: for that both are right.
func mendChecksum(packet []byte) {
	datagram, sum := udpOf(packet)
	if len(datagram) < udpHeaderLen || binary.BigEndian.Uint16(datagram[udpChecksumAt:]) != 0 {
		return
	}
	sum = onesSum(sum, datagram)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	if sum == 0xffff {
		binary.BigEndian.PutUint16(datagram[udpChecksumAt:], 0xffff)
	}
}

// udpOf is a packet's UDP datagram and the sum of its pseudo header; the datagram is
// nil of any other packet. Behind IPv6 extension headers there is none that the kernel
// would leave to the device, nor in fragments.
func udpOf(packet []byte) (datagram []byte, sum uint64) {
	if len(packet) == 0 {
		return nil, 0
	}
	switch packet[0] >> 4 {
	case 4:
		header := int(packet[0]&0xf) * 4
		if header < ipv4HeaderLen || len(packet) < header || packet[9] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(packet[ipv4FragmentAt:])&0x3fff != 0 {
			return nil, 0
		}
		datagram, sum = packet[header:], onesSum(0, packet[12:ipv4HeaderLen])
	case 6:
		if len(packet) < ipv6HeaderLen || packet[6] != unix.IPPROTO_UDP {
			return nil, 0
		}
		datagram, sum = packet[ipv6HeaderLen:], onesSum(0, packet[8:ipv6HeaderLen])
	}
	return datagram, sum + uint64(len(datagram)) + unix.IPPROTO_UDP
}

// onesSum adds the 16-bit words of b, the last one filled up by 0.
func onesSum(sum uint64, b []byte) uint64 {
	for ; len(b) >= 2; b = b[2:] {
		sum += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	return sum
}
