package userspace

import (
	"bytes"
	"net"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
)

// crossing settles handshakes that both ends begin at the same moment, as they do
// when two pods start to talk to each other. By the protocol alone each answers
// the other's initiation, forgets its own, and drops the answer to it. Both begin
// anew after five seconds, and often collide again: a third of the connections
// that two machines began at once took 5 s, and a tenth 20 s.
//
//	a  initiation ──┐ ┌── initiation  b        the greater ephemeral key is a's:
//	       held  <──┼─┘                        b's initiation waits for winnerPatience
//	                └────> held                a's for loserPatience
//	                       answered
//	   session  <───────── response
//
// An end that does not do so, such as the kernel's, answers at once, and what is
// held is then dropped: a session is there. What waits for an answer that does not
// come is handled late, but as it would have been.
type crossing struct {
	due chan held // initiations that have waited for long enough

	mu       sync.Mutex
	attempts map[string]*attempt // by endpoint: initiations of ours that were not answered yet
	sweepAt  int                 // number of attempts from which on old ones are looked for
	closed   chan struct{}
}

const (
	// winnerPatience is more than a round trip on nearly all networks.
	winnerPatience = 300 * time.Millisecond
	// loserPatience is for an end that answers at once although it should not.
	loserPatience = 30 * time.Millisecond
	// attemptLife is how long after ours an initiation of the other end may have
	// crossed it. It is later than a loaded machine is late.
	attemptLife  = time.Second
	manyAttempts = 64
)

// attempt is an initiation that was sent.
type attempt struct {
	index     [4]byte // by which the response refers to it
	ephemeral []byte
	at        time.Time
	held      *held // the other end's
}

type held struct {
	packet []byte
	from   conn.Endpoint
}

// The forms of the handshake's messages; section 5.4 of the WireGuard paper.
const (
	senderAt, ephemeralAt, ephemeralEnd = 4, 8, 40
	receiverAt                          = 8 // of a response
)

func isInitiation(b []byte) bool {
	return len(b) == device.MessageInitiationSize && b[0] == device.MessageInitiationType
}

func isResponse(b []byte) bool {
	return len(b) == device.MessageResponseSize && b[0] == device.MessageResponseType
}

func newCrossing() *crossing {
	return &crossing{due: make(chan held), attempts: map[string]*attempt{}, sweepAt: manyAttempts}
}

// sent notes the initiations among what is sent.
func (c *crossing) sent(bufs [][]byte, to conn.Endpoint) {
	for _, b := range bufs {
		if !isInitiation(b) {
			continue
		}
		a := &attempt{index: [4]byte(b[senderAt:ephemeralAt]), ephemeral: bytes.Clone(b[ephemeralAt:ephemeralEnd]), at: time.Now()}
		c.mu.Lock()
		c.attempts[to.DstToString()] = a
		if len(c.attempts) > c.sweepAt {
			for endpoint, old := range c.attempts {
				if time.Since(old.at) > attemptLife {
					delete(c.attempts, endpoint)
				}
			}
			c.sweepAt = 2*len(c.attempts) + manyAttempts
		}
		c.mu.Unlock()
	}
}

// received looks at a packet and reports whether it is held.
func (c *crossing) received(b []byte, from conn.Endpoint) bool {
	initiation := isInitiation(b)
	if !initiation && !isResponse(b) {
		return false
	}
	endpoint := from.DstToString()
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.attempts[endpoint]
	switch {
	case a == nil:
		return false
	case !initiation:
		if [4]byte(b[receiverAt:receiverAt+4]) == a.index {
			delete(c.attempts, endpoint) // and what it holds
		}
		return false
	case time.Since(a.at) > attemptLife:
		return false
	}
	order := bytes.Compare(a.ephemeral, b[ephemeralAt:ephemeralEnd])
	if order == 0 {
		return false // our own, reflected
	}
	patience := loserPatience
	if order > 0 {
		patience = winnerPatience
	}
	h := &held{bytes.Clone(b), from}
	a.held = h
	closed := c.closed
	time.AfterFunc(patience, func() { c.release(endpoint, a, h, closed) })
	return true
}

// release hands on what is still held.
func (c *crossing) release(endpoint string, a *attempt, h *held, closed <-chan struct{}) {
	c.mu.Lock()
	waiting := c.attempts[endpoint] == a && a.held == h
	if waiting {
		delete(c.attempts, endpoint)
	}
	c.mu.Unlock()
	if !waiting {
		return
	}
	select {
	case c.due <- *h:
	case <-closed:
	}
}

// open returns a source of the packets that were held, until close.
func (c *crossing) open() conn.ReceiveFunc {
	closed := make(chan struct{})
	c.mu.Lock()
	c.closed = closed
	c.mu.Unlock()
	return func(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		select {
		case h := <-c.due:
			sizes[0], eps[0] = copy(packets[0], h.packet), h.from
			return 1, nil
		case <-closed:
			return 0, net.ErrClosed
		}
	}
}

func (c *crossing) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed != nil {
		close(c.closed)
		c.closed = nil
	}
}

// watch is receive, but for what is held.
func (c *crossing) watch(receive conn.ReceiveFunc) conn.ReceiveFunc {
	return func(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		n, err := receive(packets, sizes, eps)
		for i := range n {
			if c.received(packets[i][:sizes[i]], eps[i]) {
				sizes[i] = 0 // too short for a message, so it is passed over
			}
		}
		return n, err
	}
}
