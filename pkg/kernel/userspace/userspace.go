// Package userspace runs WireGuard where the kernel has none: one process an
// interface, apart from the helper, so that a restart of the helper does not cut
// the tunnel.
//
//	helper --Start--> tunnel process (Run) --> tun device + /run/wireguard/NAME.sock
//
// The process is found again by its device and its socket, as wg(8) finds it;
// there is no other state to go stale. It ends when its device is deleted.
package userspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
	"golang.zx2c4.com/wireguard/tun"
)

// readyFD is the pipe by which the process tells that it can be configured.
const readyFD = 3

const ready = "ready\n"

// readyEnv says that there is somebody at the other end of readyFD.
const readyEnv = "WGCNI_TUNNEL_READY"

// startTimeout bounds the wait for a tunnel process to be ready.
const startTimeout = 10 * time.Second

// Command is the helper's hidden command under which Run is reached.
const Command = "tunnel"

// Start starts this very program once more, as `wgcnid tunnel NAME MTU` in a
// session of its own, and returns when the interface can be configured. What
// the process has to say goes to logFile, and what it counts to a file of
// the same name that ends in .json.
func Start(name string, mtu int, logFile string) error {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(self(), Command, name, strconv.Itoa(mtu))
	cmd.Args[0] = "wgcnid"
	cmd.Env = append(os.Environ(), readyEnv+"=1", countsEnv+"="+countsPath(logFile))
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{w}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close() //nolint:errcheck // ours is not written to
	if err != nil {
		return err
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }() // for as long as the helper lives, so that no zombie stays

	if err := r.SetReadDeadline(time.Now().Add(startTimeout)); err != nil {
		return err
	}
	answer, err := io.ReadAll(io.LimitReader(r, int64(len(ready))))
	if string(answer) == ready {
		return nil
	}
	_ = cmd.Process.Kill()
	<-exited
	said, _ := os.ReadFile(logFile)
	if last := strings.TrimSpace(string(said)); last != "" {
		return errors.New(last)
	}
	if err != nil {
		return fmt.Errorf("the tunnel process is not ready after %s: %w", startTimeout, err)
	}
	return errors.New("the tunnel process ended at once")
}

// self is the path of this program: by its name, which top and ps show, unless
// the file has been replaced by another version meanwhile.
func self() string {
	const running = "/proc/self/exe"
	path, err := os.Executable()
	if err != nil {
		return running
	}
	byName, err1 := os.Stat(path)
	itself, err2 := os.Stat(running)
	if err1 != nil || err2 != nil || !os.SameFile(byName, itself) {
		return running
	}
	return path
}

// Run is the tunnel process. It returns when the device is gone or ctx ends.
func Run(ctx context.Context, name string, mtu int, logs *log.Logger) error {
	dev, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return fmt.Errorf("make tun device %s: %w (is the tun module there, and /dev/net/tun?)", name, err)
	}
	socket, err := openSocket(ctx, name)
	if err != nil {
		dev.Close() //nolint:errcheck // on the way out
		return fmt.Errorf("open the control socket of %s: %w", name, err)
	}
	counter := newCounter()
	wg := device.NewDevice(checked{dev}, newBind(conn.NewDefaultBind()), &device.Logger{
		Verbosef: counter.verbosef,
		Errorf:   logs.Printf,
	})
	defer wg.Close()
	if path := os.Getenv(countsEnv); path != "" { // else it was started by hand: nobody asks
		go counter.keep(ctx, path, countsEvery)
	}
	// Not ipc.UAPIListen: it would need an inotify instance, of which root has 128
	// on a node for everything.
	listener, err := net.FileListener(socket)
	if err != nil {
		return fmt.Errorf("listen on the control socket of %s: %w", name, err)
	}
	defer listener.Close()
	listener.(*net.UnixListener).SetUnlinkOnClose(true) //nolint:forcetypeassert // UAPIOpen has made it one
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go wg.IpcHandle(c)
		}
	}()
	// Up from the start: else it would take its port only when the interface comes
	// up, by itself, and that the port is taken would be told to nobody.
	if err := wg.Up(); err != nil {
		return fmt.Errorf("start WireGuard on %s: %w", name, err)
	}
	tellReady()
	select {
	case <-wg.Wait():
	case <-ctx.Done():
	}
	return nil
}

// socketPatience is how long a predecessor, whose interface is gone already, may
// take to end.
const socketPatience = time.Second

func openSocket(ctx context.Context, name string) (*os.File, error) {
	for deadline := time.Now().Add(socketPatience); ; {
		f, err := ipc.UAPIOpen(name)
		if err == nil || ctx.Err() != nil || time.Now().After(deadline) {
			return f, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func tellReady() {
	if os.Getenv(readyEnv) == "" {
		return // started by hand: there is nobody to tell
	}
	f := os.NewFile(readyFD, "ready")
	_, _ = f.WriteString(ready) // a helper that has died needs no answer
	_ = f.Close()
}
