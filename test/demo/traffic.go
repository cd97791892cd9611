package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

func addPods(ctx context.Context, d *demo) (string, error) {
	if err := d.addPods(ctx, podsPerNode); err != nil {
		return "", err
	}
	for _, p := range d.pods {
		d.showMore(fmt.Sprintf("%s %s %s\n%s", p, p.IPv4(), p.IPv6(), p.Raw))
	}
	first, last := d.pods[0], d.pods[len(d.pods)-1]
	return fmt.Sprintf("%d pods, %s and %s to %s and %s", len(d.pods), first.IPv4(), first.IPv6(), last.IPv4(), last.IPv6()), nil
}

// addPods adds pods to each node, all nodes at once, with a server in each.
func (d *demo) addPods(ctx context.Context, perNode int) error {
	var added atomic.Int32
	pods := make([]*cluster.Pod, len(d.cluster.Nodes)*perNode)
	err := parallel(d.cluster.Nodes, func(n *cluster.Node) error {
		first := slices.Index(d.cluster.Nodes, n) * perNode
		for i := range perNode {
			p, err := n.AddPod(ctx, cluster.NetworkName, fmt.Sprintf("%s-pod%d", n.Name, i+1), cluster.PodOptions{})
			if err != nil {
				return err
			}
			pods[first+i] = p
			d.working("%d of %d", added.Add(1), len(pods))
		}
		return nil
	})
	if err != nil {
		return err
	}
	d.pods = pods
	for _, p := range pods {
		s, err := cluster.StartServer(p, echoPort)
		if err != nil {
			return err
		}
		d.servers = append(d.servers, s)
	}
	return nil
}

func (d *demo) deletePods(ctx context.Context) error {
	d.closeTraffic()
	err := parallel(d.cluster.Nodes, func(n *cluster.Node) error {
		for _, p := range d.pods {
			if p.Node != n {
				continue
			}
			if err := p.Delete(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	d.pods = nil
	return err
}

// exchange is one packet or connection from a pod to a pod, and the answer.
type exchange struct {
	protocol string
	from, to *cluster.Pod
	src, dst netip.Addr
}

// exchanges are all ways in which from can talk to to.
func exchanges(from, to *cluster.Pod) []exchange {
	var all []exchange
	for _, protocol := range []string{"TCP", "UDP", "ICMP"} {
		all = append(all,
			exchange{protocol, from, to, from.IPv4(), to.IPv4()},
			exchange{protocol, from, to, from.IPv6(), to.IPv6()})
	}
	return all
}

var errSource = errors.New("another source address")

// do sends the payload, and checks the answer, and the source that the far end
// saw; ICMP doesn't tell that.
func (e exchange) do(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	seen, err := netip.AddrPortFrom(e.src, 0), error(nil)
	server := netip.AddrPortFrom(e.dst, echoPort)
	switch e.protocol {
	case "TCP":
		seen, err = cluster.TCP(ctx, e.from, server, []byte(payload))
	case "UDP":
		seen, err = cluster.UDP(ctx, e.from, server, []byte(payload))
	case "ICMP":
		_, err = cluster.Ping(ctx, e.from, e.dst, []byte(payload))
	}
	if err != nil {
		return fmt.Errorf("%s %s -> %s: %w", e.protocol, e.from, e.to, err)
	}
	if seen.Addr().Unmap() != e.src {
		return fmt.Errorf("%s %s -> %s: %w: the far end sees %s, want %s", e.protocol, e.from, e.to, errSource, seen.Addr(), e.src)
	}
	return nil
}

// talk counts the exchanges among all pods that succeed.
func (d *demo) talk(ctx context.Context) (ok, all int, err error) {
	var succeeded, ended atomic.Int32
	all = len(d.pods) * (len(d.pods) - 1) * len(exchanges(d.pods[0], d.pods[1]))
	err = parallel(d.pods, func(from *cluster.Pod) error {
		var errs []error
		for _, to := range d.pods {
			if to == from {
				continue
			}
			for _, e := range exchanges(from, to) {
				if err := e.do(ctx, exchangeTimeout); err != nil {
					errs = append(errs, err)
				} else {
					succeeded.Add(1)
				}
				d.working("%d of %d", ended.Add(1), all)
				if ctx.Err() != nil {
					return ctx.Err()
				}
			}
		}
		return errors.Join(errs...)
	})
	return int(succeeded.Load()), all, err
}

func talkAll(ctx context.Context, d *demo) (string, error) {
	ok, all, err := d.talk(ctx)
	if err != nil {
		return "", fmt.Errorf("%d of %d exchanges: %w", ok, all, err)
	}
	return fmt.Sprintf("%d of %d exchanges (TCP, UDP, ICMP; IPv4, IPv6), sources intact", ok, all), nil
}

// look returns what was seen between the nodes since the first helper's start.
// It is an error if that includes plaintext.
func (d *demo) look(ctx context.Context) (cluster.CaptureReport, error) {
	if err := d.capture.Sync(ctx); err != nil {
		return cluster.CaptureReport{}, err
	}
	seen, err := d.capture.Report()
	if err != nil {
		return seen, err
	}
	return seen, seen.Clean()
}

func lookAtUnderlay(ctx context.Context, d *demo) (string, error) {
	seen, err := d.look(ctx)
	if err != nil {
		return "", err
	}
	if seen.WireGuard == 0 {
		return "", fmt.Errorf("no WireGuard packet among them: %s", seen)
	}
	return fmt.Sprintf("%d packets, %d WireGuard, %d with the payload, %d with a pod's address",
		seen.Packets, seen.WireGuard, seen.WithMarker, seen.Plain), nil
}

func showStatus(ctx context.Context, d *demo) (string, error) {
	n := d.cluster.Nodes[0]
	if err := d.cluster.AwaitConverged(ctx); err != nil {
		return "", err
	}
	text, err := n.Wgcnid(ctx, "status")
	if err != nil {
		return "", err
	}
	d.show(text)
	s, err := n.Status(ctx)
	if err != nil {
		return "", err
	}
	connected := 0
	for _, p := range s.Peers {
		if p.State == "connected" {
			connected++
		}
	}
	if !s.OK || connected != nodeCount-1 || s.Pods != podsPerNode {
		return "", fmt.Errorf("%s: %d peers of %d connected, %d pods of %d", s.Verdict, connected, nodeCount-1, s.Pods, podsPerNode)
	}
	return fmt.Sprintf("%d of %d peers connected", connected, nodeCount-1), nil
}
