package endpoint

import (
	"encoding/binary"
	"net/netip"
)

// proxySignature begins a header (section 2.2 of proxy-protocol.txt, HAProxy).
const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

// proxyHeader tells the target who called, and where (PROXY protocol, version 2).
func proxyHeader(source, listen netip.AddrPort) []byte {
	const version2, proxy, tcp4, tcp6 = 0x20, 0x01, 0x11, 0x21
	family := byte(tcp6)
	if source.Addr().Is4() {
		family = tcp4
	}
	b := append([]byte(proxySignature), version2|proxy, family)
	b = binary.BigEndian.AppendUint16(b, uint16(2*source.Addr().BitLen()/8+4))
	b = append(b, source.Addr().AsSlice()...)
	b = append(b, listen.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, source.Port())
	return binary.BigEndian.AppendUint16(b, listen.Port())
}
