package cluster

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func startTestMachine(t *testing.T, name string) *Machine {
	t.Helper()
	m, err := StartMachine(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func mustRun(t *testing.T, m *Machine, name string, args ...string) string {
	t.Helper()
	out, err := m.Run(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestMachineLooksLikeAComputer(t *testing.T) {
	m := startTestMachine(t, "alone")
	for _, tt := range []struct {
		command, want string
	}{
		{"hostname", "alone\n"},
		{"ls /sys/class/net", "lo\n"},
		{"cat /proc/1/comm", "exe\n"},
		{"ls /run", "lock\nnetns\nwireguard\n"},
		{"ls -A /var/lib/wgcni /var/lib/cni /etc/cni | wc -w", "3\n"}, // their own names
		{"ip -o addr show dev lo up | wc -l", "2\n"},
		{"ls -d /var/run/wireguard", "/var/run/wireguard\n"},
		{"pwd", "/\n"},
		{"which nft", "/usr/sbin/nft\n"},
	} {
		if got := mustRun(t, m, "sh", "-c", tt.command); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.command, got, tt.want)
		}
	}
}

func TestMachinesAreIsolated(t *testing.T) {
	before := hostState(t)
	a, b := startTestMachine(t, "a"), startTestMachine(t, "b")
	for _, m := range []*Machine{a, b} {
		mustRun(t, m, "ip", "link", "add", "wgcni0", "type", "bridge")
		mustRun(t, m, "ip", "netns", "add", "pod")
		for _, file := range []string{"/run/wireguard/wgcni0.sock", "/etc/cni/net.d/x", "/etc/wgcni-test", "/var/lib/wgcni/key", "/var/lib/x"} {
			if err := m.WriteFile(file, m.Name, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := mustRun(t, m, "cat", "/sys/class/net/wgcni0/ifindex"); got != "2\n" {
			t.Errorf("wgcni0 of %s has index %s", m, got)
		}
	}
	for _, m := range []*Machine{a, b} {
		if got := mustRun(t, m, "cat", "/var/run/wireguard/wgcni0.sock"); got != m.Name {
			t.Errorf("/run/wireguard of %s has the file of %s", m, got)
		}
		if got, err := m.ReadFile("/var/run/wireguard/wgcni0.sock"); err != nil || got != m.Name {
			t.Errorf("read from outside: %q, %v", got, err)
		}
	}
	if after := hostState(t); after != before {
		t.Errorf("host before:\n%s\nafter:\n%s", before, after)
	}
	for _, file := range []string{"/etc/wgcni-test", "/var/lib/x"} {
		if _, err := os.Stat(file); !os.IsNotExist(err) {
			t.Errorf("%s is on the host: %v", file, err)
		}
	}
}

func TestRebootKeepsDurableFilesOnly(t *testing.T) {
	c := newCluster(t, 2)
	n := c.Nodes[0]
	for _, file := range []string{"/var/lib/wgcni/private.key", "/var/lib/cni/results/x", "/etc/cni/net.d/10-x.conflist", "/run/wgcni/db"} {
		if err := n.WriteFile(file, "kept", 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustRun(t, n.Machine, "ip", "link", "add", "wgcni0", "type", "bridge")
	p, err := n.Start("sleep", "1000000")
	if err != nil {
		t.Fatal(err)
	}
	// A server's sockets hold the old network namespace, and must not hold the link.
	s, err := StartServer(n, 7000)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := n.Reboot(t.Context(), "/var/lib/cni"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Error("a process has survived the reboot")
	}
	if got, err := n.ReadFile("/var/lib/wgcni/private.key"); err != nil || got != "kept" {
		t.Errorf("private.key after the reboot: %q, %v", got, err)
	}
	if got, err := n.ReadFile("/etc/cni/net.d/10-x.conflist"); err != nil || got != "kept" {
		t.Errorf("conflist after the reboot: %q, %v", got, err)
	}
	if got := mustRun(t, n.Machine, "sh", "-c", "ls -A /var/lib/cni; ls /run; ls /sys/class/net"); got != "lock\nnetns\nwireguard\neth0\nlo\n" {
		t.Errorf("after the reboot there is: %q", got)
	}
	if _, err := Ping(t.Context(), c.Nodes[1], n.IPv4, nil); err != nil {
		t.Error(err)
	}
}

func TestProcessStops(t *testing.T) {
	m := startTestMachine(t, "a")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	script := `trap 'echo stopping; exit 7' TERM; echo started; while :; do sleep 0.01; done`
	p, err := m.Start("sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.WaitFor(ctx, "started"); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := p.Stop(ctx); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("Stop returned %v, want exit status 7", err)
	}
	if !strings.Contains(p.Log.String(), "stopping") {
		t.Errorf("log is %q", p.Log)
	}
	if err := p.WaitFor(ctx, "never"); err == nil || ctx.Err() != nil {
		t.Errorf("WaitFor on an ended program returned %v", err)
	}
}

// A program that was stopped can be ended, and is seen to end.
func TestStoppedProcessEnds(t *testing.T) {
	m := startTestMachine(t, "a")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGTERM, unix.SIGQUIT} {
		p, err := m.Start("sleep", "54321")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(p.Signal(ctx, unix.SIGSTOP), p.Signal(ctx, sig)); err != nil {
			t.Error(err)
		}
		if err := p.Wait(ctx); err == nil || ctx.Err() != nil {
			t.Fatalf("after SIGSTOP and %v it ended with %v", sig, err)
		}
	}
}

func TestKill9StaysInsideTheMachine(t *testing.T) {
	m, other := startTestMachine(t, "a"), startTestMachine(t, "b")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var sleeps []*Process
	for _, on := range []*Machine{m, m, other} {
		p, err := on.Start("sleep", "54321")
		if err != nil {
			t.Fatal(err)
		}
		sleeps = append(sleeps, p)
		if err := Poll(ctx, "sleep to run", func() error {
			_, err := onlyChild(p.cmd.Process.Pid)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := Poll(ctx, "both to be found", func() error {
		found, err := m.FindProcesses("sleep 54321")
		if err == nil && len(found) != 2 {
			err = errors.New("not both")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if n, err := m.Kill9(ctx, "sleep 54321"); n != 2 || err != nil {
		t.Errorf("Kill9 killed %d: %v", n, err)
	}
	for _, p := range sleeps[:2] {
		if err := p.Wait(ctx); err == nil {
			t.Error("a killed program ended well")
		}
	}
	if found, err := other.FindProcesses("sleep 54321"); err != nil || len(found) != 1 {
		t.Errorf("on the other machine there are %v, %v", found, err)
	}
	if err := sleeps[2].Signal(ctx, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	_ = sleeps[2].Wait(ctx)
}

func TestCommandEndsWithItsContext(t *testing.T) {
	m := startTestMachine(t, "a")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if out, err := m.Run(ctx, "sleep", "54321"); err == nil {
		t.Errorf("sleep ended with %q", out)
	}
	if err := Poll(t.Context(), "sleep to be dead", func() error {
		found, err := m.FindProcesses("sleep")
		if err == nil && len(found) > 0 {
			err = errors.New("still there")
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	// What stays in the background must not hold Run.
	if out, err := m.Run(t.Context(), "sh", "-c", "sleep 54321 & echo done"); err != nil || out != "done\n" {
		t.Errorf("got %q, %v", out, err)
	}
	_, err := m.Run(t.Context(), "sh", "-c", "echo why >&2; exit 3")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(err.Error(), "why") {
		t.Errorf("error is %v", err)
	}
}

func TestDo(t *testing.T) {
	m := startTestMachine(t, "a")
	if err := m.Do(func() error { return nil }); err != nil {
		t.Error(err)
	}
	if err := m.Do(func() error { return os.ErrInvalid }); !errors.Is(err, os.ErrInvalid) {
		t.Error(err)
	}
	if err := m.Do(func() error { runtime.Goexit(); return nil }); !errors.Is(err, errGoexit) {
		t.Error(err)
	}
	inner := func() error { return m.Do(loopbackUp) }
	if err := m.Do(inner); err != nil {
		t.Error(err)
	}
}
