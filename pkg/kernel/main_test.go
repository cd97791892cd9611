package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// insideEnv marks the copy of the test binary that runs in namespaces of its own.
const insideEnv = "WGCNI_TEST_INSIDE"

// TestMain runs the tests in a network, mount and PID namespace of their own:
// the machine's network is never touched, and all ends with the process.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == userspace.Command {
		os.Exit(tunnel(os.Args[2], os.Args[3]))
	}
	if os.Getenv(insideEnv) == "" {
		os.Exit(outside())
	}
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "prepare the test's namespaces:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func outside() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the kernel tests make network namespaces: run them as root")
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt) // it reaches the child too
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

func prepare() error {
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"none", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", 0},
		{"sysfs", "/sys", "sysfs", 0},
		{"run", "/run", "tmpfs", 0},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return exec.Command("ip", "link", "set", "lo", "up").Run()
}

func tunnel(name, mtu string) int {
	n, err := strconv.Atoi(mtu)
	if err != nil {
		return 2
	}
	if err := userspace.Run(context.Background(), name, n, log.New(os.Stderr, "", 0)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// sh runs a command line of iproute2, nft or wg and returns what it printed.
func sh(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "PATH=$PATH:/usr/sbin; "+line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}

// foreign prints all that is in the kernel, ours included, without what changes by itself.
func everything(t *testing.T) string {
	t.Helper()
	return strings.Join([]string{
		sh(t, "ip rule; ip -6 rule"),
		sh(t, "ip route show table all; ip -6 route show table all"),
		sh(t, "nft -s list ruleset"),
		sh(t, "ip -o link | sed 's/^[0-9]*: //'"),
		sh(t, "ip -o addr | sed 's/^[0-9]*: //'"),
		sh(t, "wg showconf wg-other; wg show wg-other allowed-ips"),
	}, "\n---\n")
}

func newKey() wgtypes.Key {
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		panic(err)
	}
	return k
}

var key, spareKey = newKey(), newKey()

// privateKeys is kernel.Config's PrivateKey for a node that has these.
func privateKeys(keys ...wgtypes.Key) func(wgtypes.Key) (wgtypes.Key, error) {
	return func(public wgtypes.Key) (wgtypes.Key, error) {
		for _, k := range keys {
			if k.PublicKey() == public {
				return k, nil
			}
		}
		return wgtypes.Key{}, fmt.Errorf("no test has the private key of %s", public)
	}
}

const link = "wgcni0"

func open(t *testing.T) *kernel.Kernel {
	t.Helper()
	k, err := kernel.Open(kernel.Config{
		Interface:    link,
		PrivateKey:   privateKeys(key, spareKey),
		PresharedKey: presharedKeys,
		StartTunnel: func(name string, mtu int) error {
			return userspace.Start(name, mtu, t.TempDir()+"/tunnel-"+name+".log")
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer k.Close()
		apply(t, k, mesh.State{})
	})
	return k
}

// apply makes the kernel hold the state, and fails the test unless nothing differs then.
func apply(t *testing.T, k *kernel.Kernel, want mesh.State) []mesh.Op {
	t.Helper()
	observed, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	ops := mesh.Diff(observed, want, mesh.Context{})
	if err := k.Apply(ops); err != nil {
		t.Fatalf("apply:\n%s%v", mesh.Text(ops), err)
	}
	if observed, err = k.Observe(); err != nil {
		t.Fatal(err)
	}
	if again := mesh.Diff(observed, want, mesh.Context{}); len(again) > 0 {
		t.Fatalf("after\n%sthere still differs\n%s", mesh.Text(ops), mesh.Text(again))
	}
	return ops
}
