package endpoint

import (
	"errors"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// smallBuffer is what one reading takes, in bytes; HAProxy and nginx use as much.
	smallBuffer = 16 << 10
	// pipeSize is what one splice takes at most, in bytes, and maxPipes how many
	// pipes there are: 2 descriptors each, and a bound for what slow readers hold.
	// Together they are what a user may have without CAP_SYS_RESOURCE
	// (pipe-user-pages-soft in pipe(7)): 64 MiB.
	pipeSize = 256 << 10
	maxPipes = 256
)

var smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}

// pipe is one for splice(2): its content is pages of the kernel's, not ours.
type pipe struct{ r, w int }

// pipes are those that are idle. They are kept; maxPipes bounds them, and those in use.
type pipes struct {
	mu   sync.Mutex
	idle []pipe
	made int
}

func (s *pipes) take() (pipe, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.idle); n > 0 {
		p := s.idle[n-1]
		s.idle = s.idle[:n-1]
		return p, true
	}
	if s.made == maxPipes {
		return pipe{}, false
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, false // no descriptor is free
	}
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize) // else it has the default, and is slower
	s.made++
	return pipe{fds[0], fds[1]}, true
}

// give takes a pipe back. One that is not empty is closed: its content is lost.
func (s *pipes) give(p pipe, empty bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if empty {
		s.idle = append(s.idle, p)
		return
	}
	s.made--
	_, _ = unix.Close(p.r), unix.Close(p.w)
}

// close closes those that are idle.
func (s *pipes) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.idle {
		_, _ = unix.Close(p.r), unix.Close(p.w)
	}
	s.made -= len(s.idle)
	s.idle = nil
}

// pump moves the bytes of one direction.
type pump struct {
	from, to syscall.RawConn
	pipes    *pipes
	moved    func(n int) // is told of bytes that were written

	bulk     bool // the last reading was full: the next is worth a pipe
	noSplice bool // the kernel does not splice these sockets
	buf      *[smallBuffer]byte
	pipe     pipe
	piped    bool // the bytes are in pipe, not in buf
	n, off   int  // bytes that were read, and how many of them are written
	err      error
}

func newPump(from, to *net.TCPConn, p *pipes, moved func(int)) (*pump, error) {
	f, err := from.SyscallConn()
	if err != nil {
		return nil, err
	}
	t, err := to.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &pump{from: f, to: t, pipes: p, moved: moved}, nil
}

// readError says that it was the reading side that failed.
type readError struct{ error }

func (e readError) Unwrap() error { return e.error }

// run copies until the end of the stream. An error of the source is a readError.
func (p *pump) run() error {
	defer p.release()
	read, write := p.read, p.write // made once: every call would allocate them
	for {
		p.n, p.off, p.err = 0, 0, nil
		if err := p.from.Read(read); err != nil {
			return readError{err}
		}
		if p.err != nil {
			return readError{p.err}
		}
		if p.n == 0 {
			return nil
		}
		p.bulk = !p.noSplice && p.n >= smallBuffer
		for p.off < p.n {
			before := p.off
			if err := p.to.Write(write); err != nil {
				return err
			}
			if p.err != nil {
				return p.err
			}
			p.moved(p.off - before)
		}
		p.release()
	}
}

// release gives back what holds the bytes.
func (p *pump) release() {
	switch {
	case p.piped:
		p.pipes.give(p.pipe, p.off == p.n)
		p.piped = false
	case p.buf != nil:
		smallBuffers.Put(p.buf)
		p.buf = nil
	}
}

// read is called when there may be something to read. It reports whether that was
// so: until it was, nothing is borrowed.
func (p *pump) read(fd uintptr) bool {
	if p.bulk {
		if p.pipe, p.piped = p.pipes.take(); p.piped {
			p.n, p.err = retry(func() (int, error) {
				n, err := unix.Splice(int(fd), nil, p.pipe.w, nil, pipeSize, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
				return int(n), err
			})
			switch {
			case errors.Is(p.err, unix.EINVAL):
				p.noSplice, p.bulk = true, false
			case errors.Is(p.err, unix.EAGAIN):
				p.n, p.err = 0, nil
				p.release()
				return false
			default:
				return true
			}
			p.n, p.err = 0, nil
			p.release()
		}
	}
	p.buf, _ = smallBuffers.Get().(*[smallBuffer]byte)
	p.n, p.err = retry(func() (int, error) { return unix.Read(int(fd), p.buf[:]) })
	if errors.Is(p.err, unix.EAGAIN) {
		p.n, p.err = 0, nil
		p.release()
		return false
	}
	return true
}

// write is called when there may be room to write.
func (p *pump) write(fd uintptr) bool {
	n, err := retry(func() (int, error) {
		if !p.piped {
			return unix.Write(int(fd), p.buf[p.off:p.n])
		}
		n, err := unix.Splice(p.pipe.r, nil, int(fd), nil, p.n-p.off, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		return int(n), err
	})
	if errors.Is(err, unix.EAGAIN) {
		return false
	}
	if p.err = err; err == nil {
		p.off += n
	}
	return true
}

// retry calls f until no signal interrupts it. Of an error n is 0, as a fault of
// the callers' otherwise: system calls return -1.
func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
}
