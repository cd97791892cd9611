package userspace

import (
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// Endpoints of both families, called in turns: each gets what is meant for it, and
// nobody gets anything else.
func TestBothFamilies(t *testing.T) {
	inNamespace(t, inTurns)
}

// inNamespace does something in a network namespace of its own, which ends with it.
func inNamespace(t *testing.T, do func(*testing.T) error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with it, and the namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = do(t)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func inTurns(t *testing.T) error {
	hosts := []string{"127.0.0.1", "2001:db8::1", "2001:db8:1::2"}
	if out, err := exec.Command("sh", "-c", "ip link set lo up; ip address add 2001:db8::1/128 dev lo nodad; ip address add 2001:db8:1::2/128 dev lo nodad").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	b := newBind(conn.NewDefaultBind())
	if _, _, err := b.Open(0); err != nil {
		return err
	}
	defer b.Close()
	var peers []net.PacketConn
	var endpoints []conn.Endpoint
	for _, host := range hosts {
		c, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
		if err != nil {
			return err
		}
		defer c.Close()
		e, err := b.ParseEndpoint(c.LocalAddr().String())
		if err != nil {
			return err
		}
		peers, endpoints = append(peers, c), append(endpoints, e)
	}
	buf := make([]byte, 100)
	for round := range 100 {
		for _, i := range []int{0, 1, 0, 2, 1, 2} {
			want := fmt.Sprintf("%d to %s", round, hosts[i])
			if err := b.Send([][]byte{[]byte(want)}, endpoints[i]); err != nil {
				return err
			}
			if err := peers[i].SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				return err
			}
			n, _, err := peers[i].ReadFrom(buf)
			if err != nil || string(buf[:n]) != want {
				return fmt.Errorf("%q: got %q, %w", want, buf[:n], err)
			}
		}
	}
	if b.six.Bind == nil {
		t.Error("the library's bind has another form: it has no twin")
	}
	return nil
}
