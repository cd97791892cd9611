package userspace

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
)

func initiation(index, ephemeral byte) []byte {
	b := make([]byte, device.MessageInitiationSize)
	b[0], b[senderAt], b[ephemeralAt] = device.MessageInitiationType, index, ephemeral
	return b
}

func response(to byte) []byte {
	b := make([]byte, device.MessageResponseSize)
	b[0], b[receiverAt] = device.MessageResponseType, to
	return b
}

// place is an endpoint.
type place struct {
	conn.Endpoint
	addr netip.AddrPort
}

func (p place) DstToString() string { return p.addr.String() }

// The names of the packets say whose they are: a's ephemeral key is 5.
func TestHandshakesThatCross(t *testing.T) {
	there, elsewhere := place{addr: netip.MustParseAddrPort("192.0.2.1:1")}, place{addr: netip.MustParseAddrPort("192.0.2.2:1")}
	transport := []byte{device.MessageTransportType, 0, 0, 0}
	for _, tt := range []struct {
		name  string
		after time.Duration // our initiation, until theirs comes
		from  place
		first []byte // what comes
		then  []byte // what comes next, at once
		want  time.Duration
		never bool
	}{
		{"theirs is the lesser: ours will be answered", 0, there, initiation(9, 4), response(1), 0, true},
		{"and if it is not, theirs counts", 0, there, initiation(9, 4), nil, winnerPatience, false},
		{"theirs is the greater", 0, there, initiation(9, 6), nil, loserPatience, false},
		{"theirs is the greater, and ours is answered all the same", 0, there, initiation(9, 6), response(1), 0, true},
		{"the answer is to an earlier one", 0, there, initiation(9, 6), response(2), loserPatience, false},
		{"the answer comes from elsewhere, so ours may be lost", 0, elsewhere, initiation(9, 4), nil, 0, false},
		{"ours was long ago", attemptLife + 1, there, initiation(9, 4), nil, 0, false},
		{"late, but it may have crossed", attemptLife, there, initiation(9, 4), nil, winnerPatience, false},
		{"ours comes back", 0, there, initiation(1, 5), nil, 0, false},
		{"a response is never held", 0, there, response(1), nil, 0, false},
		{"nor is anything else", 0, there, transport, nil, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCrossing()
				late := c.open()
				c.sent([][]byte{transport, initiation(1, 5)}, there)
				time.Sleep(tt.after)
				start := time.Now()
				var took time.Duration
				got := make(chan []byte, 1)
				go func() {
					packets, sizes, eps := [][]byte{make([]byte, 2048)}, make([]int, 1), make([]conn.Endpoint, 1)
					if n, err := late(packets, sizes, eps); n == 1 && err == nil && eps[0] == conn.Endpoint(tt.from) {
						took = time.Since(start)
						got <- packets[0][:sizes[0]]
					}
					close(got)
				}()
				kept := c.received(tt.first, tt.from)
				if kept != (tt.never || tt.want > 0) {
					t.Fatalf("held: %v", kept)
				}
				if tt.then != nil && c.received(tt.then, tt.from) {
					t.Error("what comes next is held")
				}
				time.Sleep(2 * winnerPatience)
				synctest.Wait()
				select {
				case b := <-got:
					if tt.never || !bytes.Equal(b, tt.first) || took != tt.want {
						t.Errorf("handed on after %v: %v", took, b[:9])
					}
				default:
					if kept && !tt.never {
						t.Error("not handed on")
					}
				}
				c.close()
				c.close() // as often as anybody likes
				synctest.Wait()
			})
		})
	}
}

// A third that comes while one is held takes its place: the far end has begun anew.
func TestOnlyTheLatestIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		there := place{addr: netip.MustParseAddrPort("192.0.2.1:1")}
		c := newCrossing()
		late := c.open()
		c.sent([][]byte{initiation(1, 5)}, there)
		if !c.received(initiation(7, 4), there) || !c.received(initiation(8, 4), there) {
			t.Fatal("not held")
		}
		packets, sizes, eps := [][]byte{make([]byte, 2048)}, make([]int, 1), make([]conn.Endpoint, 1)
		start := time.Now()
		if _, err := late(packets, sizes, eps); err != nil || packets[0][senderAt] != 8 || time.Since(start) != winnerPatience {
			t.Errorf("handed on: %v, %v, after %v", packets[0][:9], err, time.Since(start))
		}
		c.close()
		if _, err := late(packets, sizes, eps); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after close: %v", err)
		}
		late = c.open()
		c.sent([][]byte{initiation(2, 5)}, there)
		c.received(initiation(9, 6), there)
		if _, err := late(packets, sizes, eps); err != nil || packets[0][senderAt] != 9 {
			t.Errorf("opened anew: %v, %v", packets[0][:9], err)
		}
		c.close()
	})
}

// Endpoints that were called once do not stay for ever.
func TestAttemptsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing()
		for i := range 5000 {
			c.sent([][]byte{initiation(1, 5)}, place{addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), uint16(i))})
			time.Sleep(attemptLife / 100)
		}
		if n := len(c.attempts); n > 1000 {
			t.Errorf("%d attempts are kept", n)
		}
	})
}
