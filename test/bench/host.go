package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/test/cluster"
)

// The networks of a host. Pods are attached to those of the primary plugin
// alone; what is chained to it is then called directly.
const (
	insideNetwork  = "inside"  // in the node's own prefix
	outsideNetwork = "outside" // in clusterCIDRs, in no node's prefix
)

// clusterCIDR has room for the prefixes of thousands of peers.
const clusterCIDR = "10.0.0.0/8"

// host is a node that runs wgcnid, and on which plugins are timed.
type host struct {
	*cluster.Node
	bin     string
	process *cluster.Process
	timer   *timer
	helper  []int          // wgcnid's processes: the helper, and a userspace tunnel
	stanza  map[string]any // of wgcni
}

// newHost makes a node a mesh of its own, with this many peers in a registry
// file, and waits until its kernel holds the plan.
func newHost(ctx context.Context, c *cluster.Cluster, n *cluster.Node, peers int) (*host, error) {
	path := filepath.Join(c.Shared, n.Name+".json")
	if err := writeRegistry(path, peers); err != nil {
		return nil, err
	}
	h, err := startHost(c, n, inFile(path).registry())
	if err != nil {
		return nil, err
	}
	return h, h.join(ctx, peers)
}

// startHost starts wgcnid on a node. What it does then is join's to wait for.
func startHost(c *cluster.Cluster, n *cluster.Node, registry map[string]any) (*host, error) {
	h := &host{Node: n, bin: c.BinDir, stanza: map[string]any{
		"clusterCIDRs": []string{clusterCIDR, "fd00:244::/32"},
		"registry":     registry,
	}}
	if err := h.writeNetworks(); err != nil {
		return nil, err
	}
	var err error
	h.process, err = n.StartHelper()
	return h, err
}

// join waits until the host has its peers and its kernel holds the plan, and
// makes it ready for timing.
func (h *host) join(ctx context.Context, peers int) error {
	if err := awaitPeers(ctx, h.Node, peers); err != nil {
		return fmt.Errorf("%w; log of wgcnid:\n%.4000s", err, h.process.Log)
	}
	helper, tunnel, err := findWgcnid(h.Node)
	if err != nil {
		return err
	}
	if h.helper = []int{helper}; tunnel != 0 {
		h.helper = append(h.helper, tunnel)
	}
	h.timer, err = startTimer(ctx, h.Node)
	return err
}

// findWgcnid returns the processes of a node's helper, and of its userspace
// tunnel, 0 where the kernel has WireGuard.
func findWgcnid(n *cluster.Node) (helper, tunnel int, err error) {
	found, err := n.FindProcesses("wgcnid")
	for _, p := range found {
		switch {
		case filepath.Base(p.Args[0]) != "wgcnid" || len(p.Args) < 2: // such as nsenter
		case p.Args[1] == "run":
			helper = p.HostPID
		case p.Args[1] == userspace.Command:
			tunnel = p.HostPID
		}
	}
	if err != nil || helper == 0 {
		return 0, 0, errors.Join(err, fmt.Errorf("find wgcnid on %s: no such process", n))
	}
	return helper, tunnel, nil
}

// writeNetworks writes wgcnid's configuration and the networks of the pods.
func (h *host) writeNetworks() error {
	if err := h.Configure(cluster.NetworkOptions{Stanza: h.stanza}); err != nil {
		return err
	}
	ranges := func(subnet string) map[string]any {
		return map[string]any{
			"type": "host-local", "ranges": [][]map[string]string{{{"subnet": subnet}}},
			"routes": []map[string]string{{"dst": "0.0.0.0/0"}},
		}
	}
	for _, net := range []struct{ name, bridge, subnet string }{
		{insideNetwork, "cni0", h.PodCIDRs()[0].String()},
		{outsideNetwork, "cni1", "10.200.0.0/24"},
	} {
		list, err := json.MarshalIndent(map[string]any{
			"cniVersion": "1.0.0", "name": net.name,
			"plugins": []any{map[string]any{
				"type": "bridge", "bridge": net.bridge, "isGateway": true, "ipam": ranges(net.subnet),
			}},
		}, "", "  ")
		if err != nil {
			return fmt.Errorf("write network %s: %w", net.name, err)
		}
		if err := h.WriteConflist("20-"+net.name+".conflist", string(list)); err != nil {
			return err
		}
	}
	return nil
}

// joinTimeout bounds a join with thousands of peers on a busy machine.
const joinTimeout = 2 * time.Minute

func awaitPeers(ctx context.Context, n *cluster.Node, peers int) error {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	return cluster.Poll(ctx, fmt.Sprintf("%s to hold %d peers", n, peers), func() error {
		s, err := n.Status(ctx)
		switch {
		case err != nil:
			return err
		case len(s.Pending) > 0:
			return fmt.Errorf("%d changes pending", len(s.Pending))
		case len(s.Peers) != peers:
			return fmt.Errorf("%d peers", len(s.Peers))
		}
		return nil
	})
}

// idle is how much wgcnid may run between two looks and still count as idle.
const idle = 200 * time.Microsecond

// settle waits until wgcnid has done on all hosts what the last verb woke it
// for, so that the next plugin to be timed does not share the CPUs with it.
func settle(ctx context.Context, hosts []*host) error {
	last := make([]time.Duration, len(hosts))
	quiet := 0
	return cluster.Poll(ctx, "wgcnid to be idle", func() error {
		quiet++
		busy := ""
		for i, h := range hosts {
			now, err := h.helperCPU()
			if err != nil {
				return err
			}
			if now-last[i] > idle {
				quiet, busy = 0, h.Name
			}
			last[i] = now
		}
		if quiet < 2 { // Poll pauses as long as wgcnid lets events gather
			return fmt.Errorf("it was not long enough so; busy on %q", busy)
		}
		return nil
	})
}

// helperCPU is what wgcnid has run for since its start.
func (h *host) helperCPU() (sum time.Duration, err error) {
	for _, pid := range h.helper {
		t, err := cpuTime(pid)
		if err != nil {
			return 0, fmt.Errorf("wgcnid on %s: %w", h, err)
		}
		sum += t
	}
	return sum, nil
}

// cpuTime sums what the threads of a process have run, to the nanosecond
// (proc_pid_schedstat in the kernel's Documentation/scheduler/sched-stats.rst).
func cpuTime(pid int) (time.Duration, error) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if len(files) == 0 {
		return 0, fmt.Errorf("read the CPU time of process %d: it has ended", pid)
	}
	var sum time.Duration
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		first, _, _ := strings.Cut(string(text), " ")
		n, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the CPU time of process %d: %w", pid, err)
		}
		sum += time.Duration(n)
	}
	return sum, nil
}

// memory reads one of the figures of proc_pid_status(5) that are given in kB, in bytes.
func memory(pid int, field string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("read the memory of process %d: %w", pid, err)
	}
	return parseMemory(string(text), field)
}

func parseMemory(status, field string) (int64, error) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read %s: %w", field, err)
			}
			return n << 10, nil
		}
	}
	return 0, fmt.Errorf("read %s: there is none", field)
}

// underlayMTU is the MTU that the primary plugin gives to a pod's link, in bytes.
const underlayMTU = 1500

// resetMTU gives both ends of a pod's link the MTU that they had before any
// chained plugin.
func resetMTU(p *cluster.Pod) error {
	var peer int
	err := p.Do(func() error {
		link, err := netlink.LinkByName(p.IfName)
		if err != nil {
			return err
		}
		peer = link.Attrs().ParentIndex
		return netlink.LinkSetMTU(link, underlayMTU)
	})
	if err == nil {
		err = p.Node.Do(func() error {
			link, err := netlink.LinkByIndex(peer)
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(link, underlayMTU)
		})
	}
	if err != nil {
		return fmt.Errorf("reset the MTU of %s: %w", p, err)
	}
	return nil
}
