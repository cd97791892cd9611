package endpoint

import (
	"errors"
	"io"
	"net"
	"testing"
)

// BenchmarkRoundTrip is 64 bytes to and fro, of which the proxy's part is the
// difference to the direct way.
func BenchmarkRoundTrip(b *testing.B) {
	b.Run("direct", func(b *testing.B) { roundTrips(b, false) })
	b.Run("forwarded", func(b *testing.B) { roundTrips(b, true) })
}

func roundTrips(b *testing.B, forwarded bool) {
	to := target(b, "127.0.0.1:0", echo)
	if forwarded {
		to = start(b, Config{Forwards: tcpForward(to)}).Addr(0, 0)
	}
	c := call(b, to)
	buf := make([]byte, 64)
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCall connects, has one message echoed, and closes.
func BenchmarkCall(b *testing.B) {
	b.Run("direct", func(b *testing.B) { calls(b, false) })
	b.Run("forwarded", func(b *testing.B) { calls(b, true) })
}

func calls(b *testing.B, forwarded bool) {
	to := target(b, "127.0.0.1:0", echo)
	if forwarded {
		to = start(b, Config{Forwards: tcpForward(to)}).Addr(0, 0)
	}
	b.RunParallel(func(pb *testing.PB) {
		buf := make([]byte, 64)
		for pb.Next() {
			c, err := net.Dial("tcp", to.String())
			if err != nil {
				b.Error(err)
				return
			}
			_, werr := c.Write(buf)
			_, rerr := io.ReadFull(c, buf)
			_ = c.(*net.TCPConn).SetLinger(0) // no port waits for late packets
			c.Close()
			if err := errors.Join(werr, rerr); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
