package endpoint

import (
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What comes out is what went in, both ways at once, in pieces of all sizes.
func TestBulk(t *testing.T) {
	s := start(t, Config{Forwards: tcpForward(target(t, "127.0.0.1:0", echo))})
	const size = 24 << 20
	var work sync.WaitGroup
	for i := range 3 {
		work.Go(func() {
			c := call(t, s.Addr(0, 0))
			var sent, got [sha256.Size]byte
			var both sync.WaitGroup
			both.Go(func() {
				h := sha256.New()
				random := rand.NewChaCha8([32]byte{byte(i)})
				pick := rand.New(rand.NewPCG(1, uint64(i)))
				buf := make([]byte, 1<<20)
				for left := size; left > 0; {
					n := min(left, 1+pick.IntN(len(buf)>>pick.IntN(20)))
					_, _ = random.Read(buf[:n])
					_, _ = h.Write(buf[:n])
					if _, err := c.Write(buf[:n]); err != nil {
						t.Error(err)
						return
					}
					left -= n
				}
				_ = c.CloseWrite()
				h.Sum(sent[:0])
			})
			both.Go(func() {
				h := sha256.New()
				if n, err := io.Copy(h, c); err != nil || n != size {
					t.Errorf("%d bytes came back, %v", n, err)
				}
				h.Sum(got[:0])
			})
			both.Wait()
			if sent != got {
				t.Error("what came back is something else")
			}
		})
	}
	work.Wait()
	s.awaitValue(t, 3*size, "bytes_total", "direction=in")
	s.awaitValue(t, 3*size, "bytes_total", "direction=out")
}

func heapAndStacks() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// Targets that do not read stop the callers, and hold no more than a reading each.
func TestSlowReaders(t *testing.T) {
	const connections = 24
	ch := make(chan *net.TCPConn, connections)
	s := start(t, Config{Forwards: tcpForward(target(t, "127.0.0.1:0", func(c *net.TCPConn) { ch <- c }))})
	before := heapAndStacks()
	chunk := make([]byte, 1<<16)
	var clients []*net.TCPConn
	var sent atomic.Int64
	for range connections {
		c := call(t, s.Addr(0, 0))
		clients = append(clients, c)
		_ = c.SetWriteBuffer(1 << 16)
	}
	var blocked sync.WaitGroup
	for _, c := range clients {
		blocked.Go(func() {
			for {
				_ = c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
				n, err := c.Write(chunk)
				if err != nil {
					sent.Add(int64(n))
					return // every buffer on the way is full
				}
				if sent.Add(int64(n)) > 8<<30 {
					t.Error("no back-pressure: 8 GiB went into targets that read nothing")
					return
				}
			}
		})
	}
	blocked.Wait()
	grown := int64(heapAndStacks()) - int64(before)
	t.Logf("%d callers are blocked with %d KiB each under way; heap and stacks grew by %d KiB, which is %d KiB a connection",
		connections, sent.Load()/connections>>10, grown>>10, grown/connections>>10)
	if most := int64(connections) * (smallBuffer + 48<<10); grown > most {
		t.Errorf("memory grew by %d bytes, want at most %d", grown, most)
	}
	// They read after all, and everything arrives.
	var work sync.WaitGroup
	var mu sync.Mutex
	var got int64
	for range connections {
		far := take(t, ch)
		work.Go(func() {
			n, err := io.Copy(io.Discard, far)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			got += n
			mu.Unlock()
		})
	}
	for _, c := range clients {
		c.Close()
	}
	work.Wait()
	if got != sent.Load() {
		t.Errorf("%d bytes arrived of %d", got, sent.Load())
	}
}

// As many connections at once as this process's files allow, callers and targets
// included: 4 descriptors each.
func TestManyConnections(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	connections := min(10000, (int(min(limit.Cur, 1<<20))-reserve)/4, 1500)
	if connections < 100 {
		t.Fatalf("the limit of open files, %d, is too low for this test: raise it", limit.Cur)
	}
	ch := make(chan *net.TCPConn, connections)
	s := start(t, Config{Forwards: tcpForward(target(t, "127.0.0.1:0", func(c *net.TCPConn) { ch <- c }))})
	filesBefore, before := openFiles(t), heapAndStacks()
	clients, targets := make([]*net.TCPConn, connections), make([]*net.TCPConn, connections)
	for i := range connections {
		clients[i], targets[i] = call(t, s.Addr(0, 0)), take(t, ch)
	}
	for i := range clients { // all of them work
		say(t, clients[i], "x")
		say(t, targets[i], "y")
	}
	for i := range clients {
		hear(t, clients[i], "y")
	}
	files, grown := openFiles(t)-filesBefore, int64(heapAndStacks())-int64(before)
	t.Logf("%d connections: %.2f descriptors each of ours, %d bytes of heap and stack each with both ends",
		connections, float64(files)/float64(connections)-2, grown/int64(connections))
	if files > 4*connections+16 {
		t.Errorf("%d descriptors for %d connections and their ends, want 4 each", files, connections)
	}
	if most := int64(connections) * 40 << 10; grown > most {
		t.Errorf("memory grew by %d bytes, want at most %d", grown, most)
	}
	if open, _ := s.Open(); open != connections {
		t.Errorf("%d connections open", open)
	}
	for i := range clients {
		clients[i].Close()
		targets[i].Close()
	}
	s.awaitValue(t, 0, "connections_open")
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestFit(t *testing.T) {
	tcp, udp := []Forward{{Protocol: TCP}}, []Forward{{Protocol: UDP}}
	for _, tt := range []struct {
		forwards       []Forward
		files          uint64
		max            int
		want, sessions int
		reduced        bool
	}{
		{tcp, 1 << 20, 0, 10000, 4096, false},
		{tcp, 20000, 0, (20000 - reserve) / 2, 4096, true},
		{udp, 20000, 100, 100, 2500, false},
		{tcp, 1024, 0, (1024 - reserve) / 2, 4096, true},
		{tcp, 100, 0, 1, 4096, true},
		{tcp, 1 << 63, 20, 20, 4096, false},
	} {
		c := Config{Forwards: tt.forwards, MaxConnections: tt.max}
		if reduced := c.Fit(tt.files); reduced != tt.reduced || c.MaxConnections != tt.want || c.MaxSessions != tt.sessions {
			t.Errorf("%v with %d files: %d connections, %d sessions, %v; want %d, %d, %v",
				tt.forwards, tt.files, c.MaxConnections, c.MaxSessions, reduced, tt.want, tt.sessions, tt.reduced)
		}
	}
}
