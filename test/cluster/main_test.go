package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// harnessMarker makes the test binary a harness that is waiting to be killed.
const harnessMarker = "WGCNI_CLUSTER_TEST_HARNESS"

// binDir has cnitool and the reference plugins, as go.mod pins them.
var binDir string

func TestMain(m *testing.M) {
	Init()
	if os.Getenv(harnessMarker) != "" {
		if err := harness(); err != nil {
			fmt.Println(err)
		}
		os.Exit(1)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests make namespaces: run them as root")
		return 1
	}
	dir, err := os.MkdirTemp("", "wgcni-test-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir,
		"github.com/containernetworking/cni/cnitool",
		"github.com/containernetworking/plugins/plugins/main/bridge",
		"github.com/containernetworking/plugins/plugins/ipam/host-local")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the plugins: %v\n%s", err, out)
		return 1
	}
	binDir = dir
	return m.Run()
}

// harness makes a cluster with all that a harness may leave behind, says where
// and waits.
func harness() error {
	ctx := context.Background()
	c, err := New(ctx, Options{Nodes: 2, BinDir: "/nonexistent"})
	if err != nil {
		return err
	}
	if _, err := c.Nodes[0].AddPod(ctx, "", "pod", PodOptions{}); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if _, err := n.Start("sleep", "1000000"); err != nil {
			return err
		}
		// One that has left its process group and its nsenter.
		if _, err := n.Run(ctx, "sh", "-c", "setsid sleep 1000000 &"); err != nil {
			return err
		}
		if _, err := n.startGrouped("sleep", "1000000"); err != nil {
			return err
		}
	}
	if err := Poll(ctx, "the control groups", func() error { return cgroupExists(filepath.Base(c.dir)+"-node-b", true) }); err != nil {
		return err
	}
	if _, err := StartServer(c.Nodes[0], 7000); err != nil {
		return err
	}
	fmt.Println(c.dir, c.Underlay.PID(), c.Nodes[0].PID(), c.Nodes[1].PID())
	select {}
}

// namespacesOf returns the identities of a process's namespaces. It holds them
// open until the test ends: the kernel gives the number of one that is gone to
// the next, which may be another test's.
func namespacesOf(t *testing.T, pid int) []string {
	t.Helper()
	var ids []string
	for _, kind := range []string{"mnt", "net", "pid", "uts", "ipc"} {
		path := fmt.Sprintf("/proc/%d/ns/%s", pid, kind)
		held, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { held.Close() })
		id, err := os.Readlink(path)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	return ids
}

// holders lists the processes of the host that are in one of the namespaces.
func holders(ids []string) []string {
	var found []string
	links, _ := filepath.Glob("/proc/[0-9]*/ns/*")
	for _, l := range links {
		id, err := os.Readlink(l)
		for _, want := range ids {
			if err == nil && id == want {
				found = append(found, l)
			}
		}
	}
	return found
}

func TestKilledHarnessLeavesNothing(t *testing.T) {
	before := hostState(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), harnessMarker+"=1")
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	fields := strings.Fields(line)
	if err != nil || len(fields) != 4 {
		t.Fatalf("harness says %q: %v", line, err)
	}
	dir := fields[0]
	var ids []string
	for _, f := range fields[1:] {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, namespacesOf(t, pid)...)
	}
	if len(holders(ids)) == 0 {
		t.Fatal("the search for processes in the namespaces finds none of a live harness")
	}

	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := Poll(ctx, "all that the harness made to vanish", func() error {
		if left := holders(ids); len(left) > 0 {
			return fmt.Errorf("namespaces in use: %v", left)
		}
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			return errors.Join(fmt.Errorf("%s is still there", dir), err)
		}
		for _, n := range []string{"-node-a", "-node-b"} {
			if err := cgroupExists(filepath.Base(dir)+n, false); err != nil {
				return err
			}
		}
		if after := hostState(t); after != before {
			return fmt.Errorf("host before:\n%s\nafter:\n%s", before, after)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func cgroupExists(name string, want bool) error {
	return withCgroups(func(root string) error {
		if _, err := os.Stat(filepath.Join(root, name, "runtime")); (err == nil) != want {
			return fmt.Errorf("control group %s: there %v, want %v", name, err == nil, want)
		}
		return nil
	})
}

// hostState is what a harness might alter on the host.
func hostState(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	b.Write(mounts)
	for _, cmd := range [][]string{{"ip", "netns"}, {"ip", "-o", "link"}, {"ip", "rule"}, {"nft", "list", "ruleset"}} {
		out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput()
		fmt.Fprintf(&b, "%v: %v\n%s", cmd, err, out)
	}
	for _, dir := range []string{"/etc/cni", "/var/lib/cni", "/var/lib/wgcni", "/run/netns", "/run/wireguard"} {
		_, err := os.Stat(dir)
		fmt.Fprintf(&b, "%s: %v\n", dir, err)
	}
	return b.String()
}

// newCluster is a cluster with the plugins of this test, which are in a folder
// of their own, so that the host's state can be compared.
func newCluster(t *testing.T, nodes int) *Cluster {
	t.Helper()
	before := hostState(t)
	t.Cleanup(func() {
		if after := hostState(t); after != before {
			t.Errorf("the host was altered; before:\n%s\nafter:\n%s", before, after)
		}
	})
	return NewWithT(t, Options{Nodes: nodes, BinDir: binDir})
}

func addrPort(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
