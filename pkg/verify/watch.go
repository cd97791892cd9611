package verify

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// markerLen makes it impossible that other traffic has the same bytes.
const markerLen = 16

// window is how many bytes more than the packet itself a frame may have that
// carries it: WireGuard's 80 and its padding, or the headers of whatever other tunnel
// it might have got into.
const window = 200

// watcher looks at the packets of all interfaces. Only those that may carry one of
// ours by their size come up from the kernel, so that other traffic does no harm.
type watcher struct {
	fd      int
	tunnels map[int]bool   // the interfaces' indices
	watched map[int]string // names, by index
	stopped chan struct{}  // closed to end
	done    sync.WaitGroup

	mu      sync.Mutex
	markers [][]byte // by target
	results []Result
	err     error
}

func watch(o Options, size int) (*watcher, error) {
	w := &watcher{tunnels: map[int]bool{}, watched: map[int]string{}, stopped: make(chan struct{}), results: make([]Result, len(o.Targets)), markers: make([][]byte, len(o.Targets))}
	for _, name := range o.Tunnels {
		l, err := net.InterfaceByName(name)
		if err != nil {
			return nil, fmt.Errorf("find interface %s: %w", name, err)
		}
		w.tunnels[l.Index] = true
	}
	for _, name := range o.Watched {
		l, err := net.InterfaceByName(name)
		if err != nil {
			return nil, fmt.Errorf("find interface %s: %w", name, err)
		}
		w.watched[l.Index] = name
	}
	var err error
	// Without a protocol it receives nothing until the bind. The link's header is left
	// out: not all links have one.
	if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open a packet socket, which takes CAP_NET_RAW: %w", err)
	}
	if err := w.listen(size); err != nil {
		return nil, errors.Join(err, unix.Close(w.fd))
	}
	w.done.Go(w.read)
	return w, nil
}

func (w *watcher) listen(size int) error {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_LEN},
		{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, K: uint32(size), Jf: 2},
		{Code: unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K, K: uint32(size + window), Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	if err := unix.SetsockoptSockFprog(w.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
		return fmt.Errorf("attach a packet filter: %w", err)
	}
	if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		return fmt.Errorf("set the receive buffer: %w", err)
	}
	if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}); err != nil {
		return fmt.Errorf("set the receive timeout: %w", err)
	}
	all := uint16(unix.ETH_P_ALL)
	if err := unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: all<<8 | all>>8}); err != nil {
		return fmt.Errorf("bind the packet socket: %w", err)
	}
	return nil
}

// add says what to look for. It is called before anything is sent.
func (w *watcher) add(i int, marker []byte, t Target) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.markers[i] = marker
	w.results[i] = Result{Peer: t.Name, Address: t.Address, Endpoint: t.Endpoint}
}

// read looks at what comes until it was told to stop, and then at what is waiting.
// Other traffic of that size may never pause: it is the queue that has to be empty.
func (w *watcher) read() {
	buf := make([]byte, 1<<16)
	for flags := 0; ; {
		select {
		case <-w.stopped:
			flags = unix.MSG_DONTWAIT
		default:
		}
		n, from, err := unix.Recvfrom(w.fd, buf, flags)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if flags != 0 {
				return
			}
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN): // an interface went down
		case err != nil:
			w.mu.Lock()
			w.err = fmt.Errorf("read packets: %w", err)
			w.mu.Unlock()
			return
		default:
			if link, ok := from.(*unix.SockaddrLinklayer); ok {
				w.take(link.Ifindex, link.Pkttype == unix.PACKET_OUTGOING, buf[:n])
			}
		}
	}
}

// stop returns how many packets were missed.
func (w *watcher) stop() (missed int, err error) {
	close(w.stopped)
	w.done.Wait()
	stats, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err == nil {
		missed = int(stats.Drops)
	}
	return missed, errors.Join(w.err, err, unix.Close(w.fd))
}

func (w *watcher) take(ifindex int, outgoing bool, packet []byte) {
	name, watched := w.watched[ifindex]
	if !watched && !w.tunnels[ifindex] {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, marker := range w.markers {
		if !bytes.Contains(packet, marker) {
			continue
		}
		r := &w.results[i]
		if !watched {
			r.InTunnel++
			return
		}
		r.InClear++
		if r.ClearOn == nil {
			r.ClearOn = map[string]int{}
		}
		r.ClearOn[name]++
		return
	}
	if watched {
		w.wireGuard(outgoing, packet)
	}
}

// wireGuard counts a transport data message (type 4, section 5.4.6 of the WireGuard
// paper) to or from an endpoint.
func (w *watcher) wireGuard(outgoing bool, packet []byte) {
	src, dst, data, ok := udp(packet)
	if !ok || len(data) < 4 || binary.LittleEndian.Uint32(data) != 4 {
		return
	}
	for i := range w.results {
		r := &w.results[i]
		if outgoing && dst == r.Endpoint {
			r.WireGuardOut++
		} else if !outgoing && src == r.Endpoint {
			r.WireGuardIn++
		}
	}
}

// udp takes an IP packet apart; ok is false for all but UDP that is not fragmented.
func udp(p []byte) (src, dst netip.AddrPort, data []byte, ok bool) {
	if len(p) < 20 {
		return src, dst, nil, false
	}
	var from, to netip.Addr
	header := 0
	switch {
	case p[0]>>4 == 4 && p[9] == unix.IPPROTO_UDP:
		header = int(p[0]&15) * 4
		from, to = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	case p[0]>>4 == 6 && p[6] == unix.IPPROTO_UDP && len(p) >= 40:
		header = 40
		from, to = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	default:
		return src, dst, nil, false
	}
	if len(p) < header+8 {
		return src, dst, nil, false
	}
	u := p[header:]
	return netip.AddrPortFrom(from, binary.BigEndian.Uint16(u)), netip.AddrPortFrom(to, binary.BigEndian.Uint16(u[2:])), u[8:], true
}

// names lists interfaces, those with the most packets first.
func names(on map[string]int) string {
	list := slices.SortedFunc(maps.Keys(on), func(a, b string) int { return cmp.Or(on[b]-on[a], strings.Compare(a, b)) })
	return strings.Join(list, ", ")
}
