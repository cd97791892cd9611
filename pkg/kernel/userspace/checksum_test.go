package userspace

import (
	"encoding/binary"
	"fmt"
	"net"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// Datagrams whose checksum adds up to 0 leave with 0xffff, as the kernel sends them
// where it does the sum (RFC 768): of IPv6 one in 65,536 was lost.
func TestChecksumIsNeverZero(t *testing.T) {
	inNamespace(t, sums)
}

// sums sends datagrams into a tun device, alone and as a train of segments that the
// device is to cut.
func sums(t *testing.T) error {
	dev, err := tun.CreateTUN("sums0", 1420)
	if err != nil {
		return err
	}
	defer dev.Close()
	if out, err := exec.Command("sh", "-c", "ip link set sums0 up; ip address add 192.0.2.1/24 dev sums0; ip address add 2001:db8::1/64 dev sums0 nodad").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	reader := newSumReader(checked{dev})
	for _, to := range []string{"192.0.2.2:7", "[2001:db8::2]:7"} {
		for _, segments := range []int{1, 3} {
			c, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			if err := segment(c, segments); err != nil {
				return err
			}
			train := make([]byte, 4*segments)
			got, err := reader.after(c, train)
			if err != nil {
				return err
			}
			// One's complement: what is missing makes it full.
			for i := range segments {
				binary.BigEndian.PutUint16(train[4*i:], got[0])
			}
			if got, err = reader.after(c, train); err != nil {
				return err
			}
			for i, sum := range got {
				if sum != 0xffff {
					t.Errorf("to %s, %d of %d: a checksum of %#04x, want 0xffff", to, i+1, segments, sum)
				}
			}
			_ = c.Close()
		}
	}
	return nil
}

// segment has the datagrams that are written to c cut into 4 bytes each.
func segment(c net.Conn, segments int) error {
	if segments == 1 {
		return nil
	}
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, 4) })
	if err != nil {
		return err
	}
	return failed
}

// A sumReader reads packets as device.Device does.
type sumReader struct {
	dev   tun.Device
	bufs  [][]byte
	sizes []int
}

func newSumReader(dev tun.Device) *sumReader {
	r := &sumReader{dev: dev, sizes: make([]int, dev.BatchSize())}
	for range dev.BatchSize() {
		r.bufs = append(r.bufs, make([]byte, 1<<16))
	}
	return r
}

// after writes a train to c and returns the checksums of its datagrams, as they come
// out of the device.
func (r *sumReader) after(c net.Conn, train []byte) (out []uint16, err error) {
	if _, err := c.Write(train); err != nil {
		return nil, err
	}
	const offset = 16
	for {
		n, err := r.dev.Read(r.bufs, r.sizes, offset)
		if err != nil {
			return nil, err
		}
		for i := range n {
			if datagram, _ := udpOf(r.bufs[i][offset : offset+r.sizes[i]]); datagram != nil {
				out = append(out, binary.BigEndian.Uint16(datagram[udpChecksumAt:]))
			}
		}
		if len(out) > 0 { // else it was a neighbour's word
			return out, nil
		}
	}
}

// What has no checksum on purpose keeps none.
func TestNoChecksumStays(t *testing.T) {
	v6 := func(payload ...byte) []byte {
		p := make([]byte, ipv6HeaderLen+udpHeaderLen)
		p[0], p[6], p[7] = 0x60, unix.IPPROTO_UDP, 64
		binary.BigEndian.PutUint16(p[4:], uint16(udpHeaderLen+len(payload)))
		binary.BigEndian.PutUint16(p[ipv6HeaderLen+4:], uint16(udpHeaderLen+len(payload)))
		return append(p, payload...)
	}
	for name, packet := range map[string][]byte{
		"empty":            {},
		"a tunnel's":       v6(1, 2, 3),
		"cut off":          v6()[:ipv6HeaderLen+5],
		"an address alone": v6()[:20],
		"too short":        {0x45, 0, 0},
		"a wrong length":   append([]byte{0x4f}, make([]byte, 25)...),
	} {
		before := string(packet)
		if mendChecksum(packet); string(packet) != before {
			t.Errorf("%s: %x became %x", name, before, packet)
		}
	}
}
