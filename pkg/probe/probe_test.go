package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the tests of pkg/probe open raw sockets: run them as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

var loopback4, loopback6 = netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")

// As many at once as a large mesh has peers, and those among them that nobody answers.
func TestEcho(t *testing.T) {
	var requests []Request
	for range 5000 {
		requests = append(requests, Sized(loopback4, 92), Sized(loopback6, 600))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	answers, err := Echo(ctx, Options{Every: 200 * time.Millisecond}, requests)
	if err != nil {
		t.Fatal(err)
	}
	for i, a := range answers {
		if !a.Answered || a.Err != nil || a.RTT <= 0 {
			t.Fatalf("request %d: %+v", i, a)
		}
	}
}

func TestEchoUnanswered(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	nowhere := netip.MustParseAddr("240.0.0.1") // class E: not even sent
	requests := []Request{Sized(loopback4, 92), Sized(nowhere, 92), Sized(loopback4, 1<<16+28)}
	answers, err := Echo(ctx, Options{Every: 50 * time.Millisecond, Whole: true}, requests)
	if err != nil {
		t.Fatal(err)
	}
	if !answers[0].Answered || answers[1].Answered || answers[2].Answered || !errors.Is(answers[2].Err, unix.EMSGSIZE) {
		t.Errorf("%+v", answers)
	}
	if answers, err := Echo(t.Context(), Options{Every: time.Second}, nil); err != nil || len(answers) != 0 {
		t.Errorf("none asked: %v %v", answers, err)
	}
	if _, err := Echo(t.Context(), Options{Every: time.Second, Namespace: "/nowhere"}, requests); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such namespace: %v", err)
	}
}

func TestRefused(t *testing.T) {
	server, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	to := server.LocalAddr().(*net.UDPAddr).AddrPort()
	if Refused(t.Context(), to, 0, 100*time.Millisecond) {
		t.Error("a port with a listener refuses")
	}
	_ = server.Close()
	if !Refused(t.Context(), to, 0, 5*time.Second) {
		t.Error("a port with no listener does not refuse")
	}
}
