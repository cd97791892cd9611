package kernel_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/pkg/mesh"
)

func TestRead(t *testing.T) {
	near, far := twoEnds(t, 1, 1)
	read := func() (r kernel.Reading, unallowed uint64) {
		t.Helper()
		near.in(t, func() {
			var err error
			if r, err = near.k.Read(); err != nil {
				t.Fatal(err)
			}
		})
		if r.Userspace != (r.Unallowed == nil) {
			t.Fatalf("userspace %v, and the kernel counts %v", r.Userspace, r.Unallowed)
		}
		if r.Unallowed != nil {
			return r, *r.Unallowed
		}
		c, err := userspace.ReadCounts(near.logs + "/tunnel-wgcni0.log")
		if err != nil {
			t.Fatal(err)
		}
		return r, c.UnallowedSource
	}
	if err := near.ping(1); err != nil {
		t.Fatal(err)
	}
	r, unallowed := read()
	if r.Name != "wgcni0" || !r.Up || r.MTU < 1280 || len(r.Peers) != 1 || unallowed != 0 {
		t.Fatalf("%+v, %d not allowed", r, unallowed)
	}
	p := r.Peers[0]
	if p.PublicKey != far.facts.Self.PublicKey || time.Since(p.LastHandshake).Abs() > time.Minute || p.ReceiveBytes == 0 || p.TransmitBytes == 0 || len(p.AllowedIPs) > 0 {
		t.Errorf("%+v", p)
	}

	// The other end's addresses are no longer its own.
	moved := far.facts.Self
	moved.Prefixes = []mesh.Claim{{Prefix: netip.MustParsePrefix("10.244.3.0/24")}}
	near.apply(t, sharing(1, moved))
	for range 5 {
		if _, err := far.conn.WriteToUDP([]byte("x"), near.address()); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "its packets to be counted", func() bool { _, n := read(); return n == 5 })
	near.apply(t)
	near.in(t, func() { apply(t, near.k, mesh.State{}) })
	near.in(t, func() {
		if r, err := near.k.Read(); err != nil || r.Name != "" || r.Up {
			t.Errorf("without an interface: %+v, %v", r, err)
		}
	})
}
