package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// readState prints all that wgcni could leave on a node: one kind of object a
// line, so that two states can be compared by line. "linkdown" comes and goes
// on its own, up to a second late.
const readState = `
ip -4 rule | sed 's/^/rule4 /'
ip -6 rule | sed 's/^/rule6 /'
ip -4 route show table all | sed 's/ linkdown//; s/^/route4 /'
ip -6 route show table all | sed 's/ linkdown//; s/^/route6 /'
ip -4 route show table all proto 119 | sed 's/^/ours4 /'
ip -6 route show table all proto 119 | sed 's/^/ours6 /'
nft -s list ruleset | sed 's/^/nft /'
for link in /sys/class/net/*; do echo "link ${link##*/} mtu $(cat $link/mtu)"; done
ip -o address | sed 's/^[0-9]*: /address /; s/ *valid_lft.*//'
grep -rs . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf | sed 's/^/sysctl /'
find /run /etc/cni /var/lib/cni /var/lib/wgcni | sed 's/^/file /'
cat /etc/cni/net.d/* | sed 's/^/conflist /'
`

// state is what a node's kernel and disk hold, a line an object.
type state []string

func readNodeState(ctx context.Context, n *cluster.Node) (state, error) {
	text, err := n.Batch(ctx, readState, "sh", "-s")
	if err != nil {
		return nil, fmt.Errorf("read the state of %s: %w", n.Name, err)
	}
	processes, err := n.Processes()
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for _, p := range processes {
		lines = append(lines, fmt.Sprintf("process %d %s", p.PID, strings.Join(p.Args, " ")))
	}
	return lines, nil
}

func (d *demo) readStates(ctx context.Context) (map[*cluster.Node]state, error) {
	var mu sync.Mutex
	states := map[*cluster.Node]state{}
	err := parallel(d.cluster.Nodes, func(n *cluster.Node) error {
		s, err := readNodeState(ctx, n)
		mu.Lock()
		defer mu.Unlock()
		states[n] = s
		return err
	})
	return states, err
}

// diff lists the lines that only one of two states has.
func diff(before, after state) []string {
	count := map[string]int{}
	for _, line := range before {
		count[line]--
	}
	var out []string
	for _, line := range after {
		if count[line]++; count[line] > 0 {
			out = append(out, "+ "+line)
		}
	}
	for _, line := range before {
		if count[line] < 0 {
			count[line]++
			out = append(out, "- "+line)
		}
	}
	return out
}

func leave(ctx context.Context, d *demo) (string, error) {
	if err := d.deletePods(ctx); err != nil {
		return "", err
	}
	if err := parallel(d.cluster.Nodes, func(n *cluster.Node) error { return d.leaveNode(ctx, n) }); err != nil {
		return "", err
	}
	for _, n := range d.cluster.Nodes {
		ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
		err := d.helpers[n].Wait(ctx)
		cancel()
		if err != nil {
			return "", fmt.Errorf("wgcnid run on %s after leave: %w", n.Name, err)
		}
	}
	seen, err := d.capture.Stop(ctx)
	if err != nil {
		return "", err
	}
	if err := seen.Clean(); err != nil {
		return "", err
	}
	lines, err := d.compareStates(ctx)
	if err != nil {
		return "", err
	}
	d.show("compared: rules, routes, nft, links, addresses, sysctls, files, conflists, processes")
	d.show(fmt.Sprintf("between the nodes, all the time: %d packets, %d WireGuard, 0 in plaintext", seen.Packets, seen.WireGuard))
	return fmt.Sprintf("%d nodes are as before wgcni, 0 of %d lines of state differ", len(d.cluster.Nodes), lines), nil
}

// leaveNode takes the entry out of the conflist first, else new pods would be
// given the filters again.
func (d *demo) leaveNode(ctx context.Context, n *cluster.Node) error {
	if err := n.Configure(cluster.NetworkOptions{Plain: true}); err != nil {
		return err
	}
	_, err := n.Wgcnid(ctx, "leave", "--purge")
	return err
}

// compareStates waits for the nodes to be as they were before wgcni came, since
// processes end a moment after their interface, and returns the number of lines
// compared.
func (d *demo) compareStates(ctx context.Context) (lines int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err = cluster.Poll(ctx, "the nodes to be as before wgcni came", func() error {
		lines = 0
		now, err := d.readStates(ctx)
		if err != nil {
			return err
		}
		for _, n := range d.cluster.Nodes {
			lines += len(d.before[n])
			if left := diff(d.before[n], now[n]); len(left) > 0 {
				return fmt.Errorf("%s differs:\n%s", n.Name, strings.Join(left[:min(len(left), 30)], "\n"))
			}
		}
		return nil
	})
	return lines, err
}
