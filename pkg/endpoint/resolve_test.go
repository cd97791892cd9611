package endpoint

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// speaker is a target that says its name.
func speaker(t *testing.T, at, name string) netip.AddrPort {
	return target(t, at, func(c *net.TCPConn) {
		defer c.Close()
		_, _ = io.WriteString(c, name+"\n")
		_, _ = io.Copy(io.Discard, c)
	})
}

func whoAnswers(t *testing.T, s *running) string {
	t.Helper()
	line, err := bufio.NewReader(call(t, s.Addr(0, 0))).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

func TestTargetMoves(t *testing.T) {
	first := speaker(t, "127.0.0.2:0", "first")
	speaker(t, fmt.Sprintf("127.0.0.3:%d", first.Port()), "second")
	n := &names{}
	n.set("db.example", "127.0.0.2")
	s := start(t, Config{Lookup: n.lookup, Forwards: []Forward{{Protocol: TCP, Target: fmt.Sprintf("db.example:%d", first.Port())}}})
	if got := whoAnswers(t, s); got != "first" {
		t.Fatalf("%s answers", got)
	}
	n.set("db.example", "127.0.0.3")
	if got := whoAnswers(t, s); got != "second" {
		t.Fatalf("%s answers after the move", got)
	}

	// While the name server is away the last answer counts, and the log says so.
	n.fail(errors.New("server misbehaving"))
	if got := whoAnswers(t, s); got != "second" {
		t.Fatalf("%s answers while the name server is away", got)
	}
	if !strings.Contains(s.log.String(), "using its last answer") {
		t.Errorf("the log does not tell:\n%s", s.log)
	}
	n.fail(nil)

	// That there is no such name is an answer.
	n.set("db.example")
	mustBeRefused(t, s.Addr(0, 0))
	s.awaitValue(t, 1, "refused_total", "reason=resolve")
}

// A name server that takes questions and does not answer holds nobody up for long.
func TestNameServerHangs(t *testing.T) {
	to := speaker(t, "127.0.0.2:0", "first")
	n := &names{}
	n.set("db.example", "127.0.0.2")
	s := start(t, Config{Lookup: n.lookup, Forwards: []Forward{{Protocol: TCP, Target: fmt.Sprintf("db.example:%d", to.Port())}}})
	if got := whoAnswers(t, s); got != "first" {
		t.Fatalf("%s answers", got)
	}
	n.mu.Lock()
	n.hang = make(chan struct{})
	defer close(n.hang)
	n.mu.Unlock()
	begin := time.Now()
	if got := whoAnswers(t, s); got != "first" {
		t.Fatalf("%s answers", got)
	}
	if d := time.Since(begin); d < lookupPatience/2 || d > 2*lookupPatience {
		t.Errorf("took %s, want about %s", d, lookupPatience)
	}
}

func TestSecondAddressAnswers(t *testing.T) {
	to := speaker(t, "[::1]:0", "six")
	n := &names{}
	n.set("db.example", "127.0.0.9", "127.0.0.8", "::1") // nobody listens at the first two
	s := start(t, Config{Lookup: n.lookup, Forwards: []Forward{{Protocol: TCP, Target: fmt.Sprintf("db.example:%d", to.Port())}}})
	if got := whoAnswers(t, s); got != "six" {
		t.Fatalf("%s answers", got)
	}
}

func TestInterleave(t *testing.T) {
	var in []netip.Addr
	for _, a := range []string{"::1", "::2", "::3", "127.0.0.1", "127.0.0.2"} {
		in = append(in, netip.MustParseAddr(a))
	}
	if got, want := fmt.Sprint(interleave(in)), "[::1 127.0.0.1 ::2 127.0.0.2 ::3]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestProxyProtocol(t *testing.T) {
	header := make(chan []byte, 2)
	to := target(t, "127.0.0.1:0", func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 16)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Error(err)
			return
		}
		rest := make([]byte, int(b[14])<<8|int(b[15]))
		if _, err := io.ReadFull(c, rest); err != nil {
			t.Error(err)
			return
		}
		header <- append(b, rest...)
		_, _ = io.Copy(c, c)
	})
	f := tcpForward(to)
	f[0].ProxyProtocol = true
	s := start(t, Config{Addresses: []netip.Addr{loopback4, loopback6}, Forwards: f})
	for family, want := range []byte{0x11, 0x21} {
		c := call(t, s.Addr(0, family))
		talk(t, c)
		got := <-header
		if !strings.HasPrefix(string(got), "\r\n\r\n\x00\r\nQUIT\n\x21"+string(want)) {
			t.Errorf("header %x", got)
		}
		source, listen := remoteOf(c.LocalAddr()), remoteOf(c.RemoteAddr())
		body := append(append([]byte{}, source.Addr().AsSlice()...), listen.Addr().AsSlice()...)
		body = append(body, byte(source.Port()>>8), byte(source.Port()), byte(listen.Port()>>8), byte(listen.Port()))
		if string(got[16:]) != string(body) {
			t.Errorf("addresses %x, want %x", got[16:], body)
		}
	}
}

func remoteOf(a net.Addr) netip.AddrPort { return unmapped(a.(*net.TCPAddr).AddrPort()) }
