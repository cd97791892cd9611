package chaos

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// TestLeak has everything go wrong, while pods send to each other that could do so
// in the clear: no packet of theirs is seen on the underlay. It looks for the leaks
// of others: a pod's last packets (Cilium CVE-2025-32793), a tunnel that died, a
// peer that nobody knows (calico#3760), what comes back (cilium#46864).
func TestLeak(t *testing.T) {
	c := newCampaign(t, "leak")
	sealed := c.random("seal").IntN(2) == 0
	t.Logf("sealed: %v", sealed)
	var bad, of int
	for _, phase := range []struct {
		part   float64
		onEtcd bool
	}{{0.75, false}, {0.25, true}} {
		a := newArena(c, 3, sealed, phase.onEtcd)
		report := a.leak(phase.part)
		if err := a.Close(); err != nil { // two at once would be more than is needed
			t.Error(err)
		}
		bad, of = bad+leaked(t, report), of+report.Packets
		if bad > 0 {
			t.Log(report)
		}
	}
	c.finish(bad, "plaintext", of, "packets captured")
}

// leak is a part of the campaign, on one mesh.
func (a *arena) leak(part float64) cluster.CaptureReport {
	a.t.Helper()
	t, c, ctx := a.t, a.c, a.t.Context()
	a.addRogues(4)
	capture := a.watch()
	keys := a.keyWitness()
	workers := map[string][]action{}
	var churns []*churn
	for _, n := range a.Nodes {
		churn := a.newChurn(n, 5, 40)
		churns = append(churns, churn)
		workers["pods of "+n.Name] = []action{{1, churn.call}}
	}
	guests := &guests{arena: a, rate: 200}
	workers["cnitool"] = []action{{1, guests.call}}
	workers["faults"] = []action{
		{3, a.restartHelper(unix.SIGKILL, "killed")},
		{1, a.restartHelper(unix.SIGTERM, "restarted")},
		{4, a.tunnelLost},
		{2, a.bothLost},
		{1, a.sync},
	}
	outages := a.fileOutages
	if a.etcd != nil {
		outages = a.etcdOutages
	}
	workers["registry"] = append(outages(), action{4, a.joins}, action{2, a.leaves}, action{4, a.conflict}, action{2, a.robbery}, action{2, a.alone})
	if a.knowsRotation(ctx) {
		workers["keys"] = a.rotations(1)
	}
	c.run(part, workers)

	for _, churn := range churns {
		if err := churn.settle(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := guests.settle(ctx); err != nil {
		t.Fatal(err)
	}
	a.settle()
	c.Done["keys changed"] += keys()
	report, err := capture.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if report.WireGuard == 0 {
		t.Error("the capture saw no WireGuard packet: it proves nothing")
	}
	return report
}

// watch captures all frames of the underlay from now on.
func (a *arena) watch() *cluster.Capture {
	a.t.Helper()
	capture, err := cluster.StartCapture(a.Underlay, cluster.Bridge, cluster.CaptureOptions{Prefixes: cluster.PodRanges, Markers: [][]byte{marker}})
	if err != nil {
		a.t.Fatal(err)
	}
	return capture
}

// leaked is how many packets were in the clear. That there are none says nothing if
// some were not looked at.
func leaked(t *testing.T, r cluster.CaptureReport) int {
	t.Helper()
	if r.Dropped > 0 {
		t.Errorf("the capture has missed %d packets", r.Dropped)
	}
	return max(r.Plain, r.WithMarker)
}

// TestLeakIsSeen: with the guard taken away, what TestLeak does shows.
func TestLeakIsSeen(t *testing.T) {
	a := newArena(newCampaign(t, "leak"), 2, false, false)
	ctx := t.Context()
	churn := a.newChurn(a.Nodes[0], 1, 200)
	p := churn.pods[0]
	if err := errors.Join(p.SetAddresses(spots[0]...), p.Call(ctx, "ADD")); err != nil {
		t.Fatal(err)
	}
	capture := a.watch()
	// The tunnel alone may be lost.
	if err := a.endHelper(ctx, 0, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := a.loseTunnel(ctx, 0); err != nil {
		t.Fatal(err)
	}
	before := churn.sends[0].Sent()
	err := cluster.Poll(ctx, "the pod to send into nowhere", func() error {
		if n := churn.sends[0].Sent() - before; n < 60 {
			return fmt.Errorf("it has sent %d", n)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := capture.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	report, err := capture.Report()
	if err != nil {
		t.Fatal(err)
	}
	if n := leaked(t, report); n > 0 {
		t.Fatalf("%d packets in the clear with the guard in place", n)
	}
	guard := "nft delete table inet wgcni; for f in -4 -6; do ip $f route flush table 30567 type unreachable; done"
	if _, err := a.Nodes[0].Run(ctx, "sh", "-ec", guard); err != nil {
		t.Fatal(err)
	}
	err = cluster.Poll(ctx, "packets in the clear", func() error {
		report, err = capture.Report()
		if err == nil && (report.Plain < 20 || report.WithMarker < 20) {
			err = fmt.Errorf("%s", report)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := leaked(t, report); n < 20 {
		t.Errorf("%d leaked: %s", n, report)
	}
}
