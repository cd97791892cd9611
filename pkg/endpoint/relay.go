package endpoint

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// end is how a connection came to its end, as metrics and logs name it.
type end string

const (
	endClosed  end = "closed"  // both sides have said all
	endReset   end = "reset"   // one side broke it off, and so it was for the other
	endIdle    end = "idle"    // nothing moved for the idle timeout
	endDrain   end = "drain"   // the server ended first
	endRefused end = "refused" // its source is no longer allowed
	endFailed  end = "failed"  // the target was not reached
)

var epoch = time.Now()

// monotonic is a clock that nobody sets, in nanoseconds.
func monotonic() int64 { return int64(time.Since(epoch)) }

// relay is one connection: the caller's, and ours to the target.
type relay struct {
	source netip.AddrPort
	client *net.TCPConn
	abort  func() // ends the dial

	mu     sync.Mutex
	target *net.TCPConn // nil until it is reached
	over   bool
	how    end

	idle     time.Duration
	timer    *time.Timer
	last     atomic.Int64 // when bytes moved, in either direction
	finished atomic.Int32 // directions that have
	broken   atomic.Bool  // one side takes no more bytes
	eof      [2]atomic.Bool
}

// The directions, by the side that the bytes come from.
const (
	fromClient = iota
	fromTarget
)

// run relays until the end. in and out are told of bytes from and to the client.
func (r *relay) run(target *net.TCPConn, p *pipes, in, out func(int)) {
	r.mu.Lock()
	if r.over {
		r.mu.Unlock()
		abandon(target, true)
		return
	}
	r.target = target
	r.last.Store(monotonic())
	if r.idle > 0 {
		r.timer = time.AfterFunc(r.idle, r.checkIdle)
	}
	r.mu.Unlock()

	other := make(chan struct{})
	go func() {
		defer close(other)
		r.direction(fromTarget, target, r.client, p, out)
	}()
	r.direction(fromClient, r.client, target, p, in)
	<-other
}

// direction copies one way, and then waits for the end of the connection:
//
//	from: FIN           to gets a FIN, and may go on sending
//	from: RST           to gets a RST, even if from had sent a FIN before
//	to:   takes no more what it sent before still arrives, then from gets a RST
func (r *relay) direction(side int, from, to *net.TCPConn, p *pipes, moved func(int)) {
	c, err := newPump(from, to, p, func(n int) {
		r.last.Store(monotonic())
		moved(n)
	})
	if err != nil { // closed meanwhile
		r.finish(endReset)
		return
	}
	err = c.run()
	if errors.As(err, &readError{}) {
		r.finish(endReset)
		return
	}
	if err != nil {
		r.broken.Store(true)
	} else {
		r.eof[side].Store(true)
		_ = to.CloseWrite() // fails if it is broken already, which the other direction sees
	}
	if r.finished.Add(1) == 2 {
		if r.broken.Load() {
			r.finish(endReset)
		} else {
			r.finish(endClosed)
		}
		return
	}
	if err == nil && awaitReset(from) {
		r.finish(endReset)
	}
}

// awaitReset waits until a side that has sent its FIN sends a RST as well, or is
// closed by us, when it returns false. Nobody reads from it any more, so that
// nobody else would notice.
func awaitReset(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	return raw.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(poll, 0)
		return err == nil && n > 0 && poll[0].Revents&unix.POLLERR != 0
	}) == nil
}

func (r *relay) checkIdle() {
	left := r.idle - time.Duration(monotonic()-r.last.Load())
	if left <= 0 {
		r.finish(endIdle)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.over {
		r.timer.Reset(left)
	}
}

// finish ends both connections; the first call decides how.
func (r *relay) finish(how end) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return
	}
	r.over, r.how = true, how
	if r.timer != nil {
		r.timer.Stop()
	}
	if r.abort != nil {
		r.abort()
	}
	reset := how != endClosed
	// A reset throws away what has not been sent. Behind a FIN that would be what
	// the sender had completed.
	abandon(r.client, reset && (how != endReset || !r.eof[fromTarget].Load() || unsent(r.client) == 0))
	if r.target != nil {
		abandon(r.target, reset && (how != endReset || !r.eof[fromClient].Load() || unsent(r.target) == 0))
	}
}

// ended says how the connection has ended; "" if it has not.
func (r *relay) ended() end {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.how
}

// abandon closes a connection, with a RST or as usual.
func abandon(c *net.TCPConn, reset bool) {
	if reset {
		_ = c.SetLinger(0)
	}
	_ = c.Close()
}

// unsent is how many bytes wait to be sent or acknowledged; 0 if that cannot be told.
func unsent(c *net.TCPConn) (n int) {
	raw, err := c.SyscallConn()
	if err == nil {
		_ = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	}
	return n
}
