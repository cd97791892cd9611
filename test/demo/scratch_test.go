package main

import (
	"context"
	"net/netip"
	"testing"
	"time"
	"os"

	"github.com/wgcni/wgcni/test/cluster"
)

func TestMain(m *testing.M) { cluster.Init(); os.Exit(m.Run()) }

func TestScratch(t *testing.T) {
	ctx := context.Background()
	d := &demo{narrator: newNarrator(os.Stdout, false)}
	defer d.close()
	if err := d.play(ctx, []step{steps[0]}); err != nil { t.Fatal(err) }
	for _, n := range d.cluster.Nodes { n.Configure(cluster.NetworkOptions{Plain: true}) }
	start := time.Now()
	d.addPods(ctx, 1)
	t.Log("pods", time.Since(start))
	for i, from := range d.pods {
		to := d.pods[(i+1)%len(d.pods)]
		for _, ip := range []netip.Addr{to.IPv4(), to.IPv6()} {
	start := time.Now()
			_, err := cluster.UDP(ctx, from, netip.AddrPortFrom(ip, echoPort), []byte(payload))
	t.Log(from, ip, time.Since(start), err)
	}
	}
	start = time.Now()
	d.deletePods(ctx)
	t.Log("pods del", time.Since(start))
	start = time.Now()
	d.readStates(ctx)
	t.Log("state", time.Since(start))
}
