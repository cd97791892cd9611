package chaos

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// TestLoss has pods that nobody touches talk steadily, while everything about other
// pods and other peers changes: not one datagram is lost, there or back. It looks for
// the losses of others: lists of allowed IPs that are emptied first (cilium#34612),
// whole configurations replaced (kilo#34, #39, #82), helpers that start anew
// (cilium#31979), keys that change (cilium#25492, #35644).
//
// No tunnel is killed here: where WireGuard is a process its end must lose what it
// held, and its sessions.
func TestLoss(t *testing.T) {
	c := newCampaign(t, "loss")
	sealed := c.random("seal").IntN(2) == 0
	t.Logf("sealed: %v", sealed)
	a := newArena(c, 3, sealed, false)
	a.addRogues(4)
	a.deepen()
	streams := a.streams()
	keys := a.keyWitness()
	queues := a.queues()

	workers := map[string][]action{}
	var churns []*churn
	for _, n := range a.Nodes {
		churn := a.newChurn(n, 4, 0)
		churns = append(churns, churn)
		workers["pods of "+n.Name] = []action{{1, churn.call}}
	}
	guests := &guests{arena: a}
	workers["cnitool"] = []action{{1, guests.call}}
	workers["faults"] = []action{
		{3, a.restartHelper(unix.SIGKILL, "killed")},
		{2, a.restartHelper(unix.SIGTERM, "restarted")},
		{2, a.sync},
	}
	workers["registry"] = append(a.fileOutages(), action{8, a.joins}, action{4, a.leaves}, action{6, a.conflict}, action{3, a.alone})
	if a.knowsRotation(t.Context()) {
		workers["keys"] = a.rotations(0)
	}
	c.run(1, workers)

	for _, churn := range churns {
		if err := churn.settle(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if err := guests.settle(t.Context()); err != nil {
		t.Error(err)
	}
	a.settle()
	c.Done["keys changed"] += keys()
	lost, sent := a.lost(streams)
	if lost > 0 {
		t.Logf("where packets are dropped otherwise, before:\n%s\nand after:\n%s", queues, a.queues())
	}
	c.finish(lost, "lost", sent, "datagrams sent, each there and back")
}

// tunnelQueue is what may wait for a tunnel process that is not scheduled, as
// [cluster.StartStream] sees to for its own sockets: on two cores that three nodes,
// all their pods and other tests share, half a second is common, and the 1,024
// packets that wait by themselves are a fifth of one.
const tunnelQueue = 10_000

// deepen gives all tunnels such a queue, and those that come while keys are rotated,
// until the test ends.
func (a *arena) deepen() {
	ctx, cancel := context.WithCancel(a.t.Context())
	var running sync.WaitGroup
	for _, n := range a.Nodes {
		running.Go(func() {
			for ctx.Err() == nil {
				// An interface that is not there has no queue.
				_ = n.Do(func() error {
					for _, name := range []string{cluster.Interface, cluster.Interface + "x"} {
						link, err := netlink.LinkByName(name)
						if err != nil || link.Attrs().TxQLen >= tunnelQueue {
							continue
						}
						if err := netlink.LinkSetTxQLen(link, tunnelQueue); err != nil {
							return err
						}
					}
					return nil
				})
				select {
				case <-ctx.Done():
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	a.t.Cleanup(func() {
		cancel()
		running.Wait()
	})
}

// lossRate is that of each stream: the short form is for machines that do a lot else.
func lossRate(length time.Duration) int {
	if length > time.Minute {
		return 1000
	}
	return 200
}

// streams lets each pod send to the next, by both families in turn, and waits until
// all have had their first handshake.
func (a *arena) streams() (streams []*cluster.Stream) {
	a.t.Helper()
	rate := lossRate(time.Duration(a.c.Length))
	a.t.Logf("%d datagrams per second and stream", rate)
	for i, from := range a.pods {
		to := a.pods[(i+1)%len(a.pods)]
		addr := []netip.Addr{to.IPv4(), to.IPv6()}[i%2]
		s, err := cluster.StartStream(from, netip.AddrPortFrom(addr, cluster.EchoPort), cluster.StreamOptions{Rate: rate})
		if err != nil {
			a.t.Fatal(err)
		}
		a.t.Cleanup(func() { s.Stop() })
		streams = append(streams, s)
	}
	for i, s := range streams {
		before := s.Report().Received
		err := cluster.Poll(a.t.Context(), "the stream from "+a.pods[i].String()+" to flow", func() error {
			if got := s.Report().Received - before; got < rate {
				return fmt.Errorf("%d answers", got)
			}
			return nil
		})
		if err != nil {
			a.t.Fatal(err)
		}
	}
	for _, s := range streams {
		s.Reset()
	}
	return streams
}

// lost is how many datagrams did not come back, but for those that the harness's own
// sockets had no room for.
func (a *arena) lost(streams []*cluster.Stream) (lost, sent int) {
	a.t.Helper()
	overflowed := 0
	for _, s := range a.servers {
		n, err := s.Overflowed()
		if err != nil {
			a.t.Fatal(err)
		}
		overflowed += n
	}
	for i, s := range streams {
		n, err := s.Overflowed()
		if err != nil {
			a.t.Fatal(err)
		}
		overflowed += n
		r := s.Stop()
		lost, sent = lost+r.Lost, sent+r.Sent
		a.t.Logf("%s to the next: %s", a.pods[i], r)
		for _, l := range s.Losses(20) {
			a.t.Logf("lost: %s", l)
		}
	}
	if overflowed > 0 {
		a.t.Logf("%d datagrams found a socket of the harness full, and do not count", overflowed)
	}
	return max(0, lost-overflowed), sent
}

// queues shows the counters of what else drops packets: the CPUs' backlogs, the
// tunnels' own sockets and interfaces, and neighbours that do not answer.
func (a *arena) queues() string {
	var b strings.Builder
	softnet, err := os.ReadFile("/proc/net/softnet_stat")
	fmt.Fprintf(&b, "softnet_stat (the second column): %v\n%s", err, softnet)
	for _, n := range a.Nodes {
		out, err := n.Run(a.t.Context(), "sh", "-c", "grep ^Udp: /proc/net/snmp; ip -s -o link show "+cluster.Interface)
		fmt.Fprintf(&b, "%s: %v\n%s", n, err, out)
	}
	return b.String()
}
