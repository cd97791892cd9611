package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// captureBuffer is what the kernel may queue while the scanner is behind.
const captureBuffer = 64 << 20

// CaptureOptions say what a capture looks for.
type CaptureOptions struct {
	ListenPort uint16         // optional: WireGuard's; 51820 by default
	Prefixes   []netip.Prefix // optional: addresses that should be seen in no plain header
	Markers    [][]byte       // optional: byte strings that should be seen in no frame
}

// Finding is a frame that should not be there.
type Finding struct {
	At    time.Time
	Why   string
	Frame []byte // the first 256 bytes
}

// CaptureReport is what a capture has seen. Large segments that the kernel
// does not split between veths count as one packet.
type CaptureReport struct {
	Packets    int // all frames, without our own sentinels
	WireGuard  int // WireGuard messages to or from the listen port
	Fragments  int // of IP packets; right behind the IPv6 header, where WireGuard's are
	WithMarker int // frames with a marker, wherever in the frame
	Plain      int // IP packets, without neighbour discovery, from or to the prefixes
	Dropped    int // frames that the kernel could not queue: not looked at
	Findings   []Finding
	Seen       map[string]int // frames with each marker, by the first that they have
}

// String is the report with the frames that should not be there.
func (r CaptureReport) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d packets, %d WireGuard, %d with marker, %d plain, %d dropped",
		r.Packets, r.WireGuard, r.WithMarker, r.Plain, r.Dropped)
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "\n%s %s\n%s", f.At.Format("15:04:05.000"), f.Why, hex.Dump(f.Frame))
	}
	return b.String()
}

// Clean returns an error if a marker or a plain packet was seen, or if frames
// were missed, since then their absence proves nothing.
func (r CaptureReport) Clean() error {
	if r.WithMarker > 0 || r.Plain > 0 || r.Dropped > 0 {
		return fmt.Errorf("capture: %s", r)
	}
	return nil
}

// Capture looks at every frame of an interface, in both directions, and keeps
// counters and the frames that should not be there.
type Capture struct {
	at      Endpointer
	iface   string
	ifindex int
	options CaptureOptions
	file    *os.File // the packet socket, read through the runtime's poller
	done    chan struct{}

	mu      sync.Mutex
	report  CaptureReport
	waiting map[[16]byte]chan struct{} // sentinels under way
	closed  bool
	err     error // why the reader ended, if not by Stop
}

// StartCapture starts a capture. All frames from its return on are looked at.
// On a bridge it sees the frames that pass between the ports as well.
func StartCapture(at Endpointer, iface string, o CaptureOptions) (*Capture, error) {
	if o.ListenPort == 0 {
		o.ListenPort = 51820
	}
	c := &Capture{at: at, iface: iface, options: o, done: make(chan struct{}), waiting: map[[16]byte]chan struct{}{}}
	if err := at.Do(c.open); err != nil {
		return nil, fmt.Errorf("capture on %s of %s: %w", iface, at, err)
	}
	go c.read()
	return c, nil
}

func (c *Capture) open() error {
	ifi, err := net.InterfaceByName(c.iface)
	if err != nil {
		return err
	}
	c.ifindex = ifi.Index
	// Protocol 0 receives nothing until the bind, which names the interface.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	file := os.NewFile(uintptr(fd), "capture")
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer); err != nil {
		return errors.Join(fmt.Errorf("set receive buffer: %w", err), file.Close())
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: c.ifindex}); err != nil {
		return errors.Join(fmt.Errorf("bind packet socket: %w", err), file.Close())
	}
	// A bridge hands itself the frames between its ports while it is promiscuous.
	mreq := unix.PacketMreq{Ifindex: int32(c.ifindex), Type: unix.PACKET_MR_PROMISC}
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &mreq); err != nil {
		return errors.Join(fmt.Errorf("set promiscuous mode: %w", err), file.Close())
	}
	c.file = file
	return nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// read scans until the socket is closed.
func (c *Capture) read() {
	defer close(c.done)
	conn, err := c.file.SyscallConn()
	buf := make([]byte, 1<<18) // larger than any frame with segmentation offload
	for err == nil {
		var n int
		var rerr error
		err = conn.Read(func(fd uintptr) bool {
			n, _, rerr = unix.Recvfrom(int(fd), buf, 0)
			return rerr != unix.EAGAIN
		})
		switch {
		case err != nil:
		case rerr == unix.ENETDOWN || rerr == unix.EINTR: // the interface is down: not for ever
		case rerr != nil:
			err = rerr
		default:
			c.take(buf[:n])
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.err = err
	}
}

func (c *Capture) take(frame []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if nonce, ok := isSentinel(frame); ok {
		if ch := c.waiting[nonce]; ch != nil {
			delete(c.waiting, nonce)
			close(ch)
		}
		return
	}
	c.report.inspect(frame, &c.options)
}

// Sync returns once all frames were looked at that had been sent before: also
// those on their way through veths, whose queues (one per CPU) it flushes
// first, but not what waits in a shaper or in a userspace program.
func (c *Capture) Sync(ctx context.Context) error {
	ctx, cancel := withDefaultTimeout(ctx, probeTimeout)
	defer cancel()
	err := flushBacklogs(ctx, c.at)
	if err == nil {
		err = c.syncSocket(ctx)
	}
	if err != nil {
		return fmt.Errorf("sync the capture on %s of %s: %w", c.iface, c.at, err)
	}
	return nil
}

// syncSocket sends a sentinel and waits until the reader has come to it. It is
// sent again while the socket's full buffer may have lost it.
func (c *Capture) syncSocket(ctx context.Context) error {
	return Poll(ctx, "a sentinel frame", func() error {
		var nonce [16]byte
		_, _ = rand.Read(nonce[:]) // never fails
		seen := make(chan struct{})
		c.mu.Lock()
		c.waiting[nonce] = seen
		c.mu.Unlock()
		defer func() {
			c.mu.Lock()
			delete(c.waiting, nonce)
			c.mu.Unlock()
		}()
		if err := c.at.Do(func() error { return sendFrame(c.ifindex, sentinel(nonce)) }); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, Patience(probeTimeout/3))
		defer cancel()
		select {
		case <-seen:
			return nil
		case <-c.done:
			return fmt.Errorf("the capture has ended: %w", errors.Join(os.ErrClosed, c.err))
		case <-ctx.Done():
			return errors.New("not seen")
		}
	})
}

// sendFrame uses a socket of its own: none is shown what it sent itself.
func sendFrame(ifindex int, frame []byte) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifindex}); err != nil {
		return fmt.Errorf("send a frame: %w", err)
	}
	return nil
}

// backlogRounds is the most veths that a packet passes one after the other:
// pod, node, underlay, node, pod, and some to spare.
const backlogRounds = 8

// flushBacklogs sees that no packet waits in a CPU's backlog, through which
// each veth and loopback passes its packets on, first in, first out, for all
// namespaces (net/core/dev.c, enqueue_to_backlog). A datagram that was sent on
// a CPU over loopback and has arrived had all earlier ones before it; each
// veth on a packet's way queues it anew.
func flushBacklogs(ctx context.Context, at Endpointer) error {
	return at.Do(func() error {
		var cpus unix.CPUSet
		if err := unix.SchedGetaffinity(0, &cpus); err != nil {
			return fmt.Errorf("list CPUs: %w", err)
		}
		conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return fmt.Errorf("open a loopback socket: %w", err)
		}
		defer conn.Close()
		deadline, _ := ctx.Deadline()
		_ = conn.SetDeadline(deadline) // can't fail on an open socket
		for range backlogRounds {
			for cpu := range len(cpus) * 64 {
				if !cpus.IsSet(cpu) {
					continue
				}
				if err := passLoopback(conn, cpu); err != nil {
					return fmt.Errorf("flush the backlog of CPU %d: %w", cpu, err)
				}
			}
		}
		return nil
	})
}

// passLoopback pins the calling thread, which Do throws away.
func passLoopback(conn *net.UDPConn, cpu int) error {
	var one unix.CPUSet
	one.Set(cpu)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return err
	}
	if _, err := conn.WriteTo([]byte{1}, conn.LocalAddr()); err != nil {
		return err
	}
	_, _, err := conn.ReadFrom(make([]byte, 1))
	return err
}

// Report returns what was seen so far. Call Sync first for a complete one.
func (c *Capture) Report() (CaptureReport, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.report, fmt.Errorf("capture on %s of %s: %w", c.iface, c.at, c.err)
	}
	if err := c.addDrops(); err != nil {
		return c.report, fmt.Errorf("capture on %s of %s: %w", c.iface, c.at, err)
	}
	r := c.report
	r.Findings = slices.Clone(r.Findings)
	r.Seen = maps.Clone(r.Seen)
	return r, nil
}

// addDrops adds the kernel's counter, which each reading sets to zero.
func (c *Capture) addDrops() error {
	conn, err := c.file.SyscallConn()
	if err != nil {
		return err
	}
	var stats *unix.TpacketStats
	cerr := conn.Control(func(fd uintptr) {
		stats, err = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
	})
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("read drop counter: %w", err)
	}
	c.report.Dropped += int(stats.Drops)
	return nil
}

// Stop syncs, ends the capture and returns what it has seen. It ends also when
// it can't sync.
func (c *Capture) Stop(ctx context.Context) (CaptureReport, error) {
	serr := c.Sync(ctx)
	r, rerr := c.Report()
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	cerr := c.file.Close()
	<-c.done
	return r, errors.Join(serr, rerr, cerr)
}
