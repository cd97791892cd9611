package kernel_test

import (
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Whom one greets hears it, each time, with no traffic between the two.
func TestGreetIsHeard(t *testing.T) {
	near, far := twoEnds(t, 1, 1)
	if err := near.ping(1); err != nil { // a session
		t.Fatal(err)
	}
	heard := func() (bytes int64) {
		far.in(t, func() {
			handshakes, err := far.k.Handshakes()
			if err != nil || len(handshakes) != 1 {
				t.Fatalf("handshakes %v, %v; want those of one peer", handshakes, err)
			}
			bytes = handshakes[near.facts.Self.PublicKey].Received
		})
		return bytes
	}
	for range 3 {
		before := heard()
		near.in(t, func() {
			if err := near.k.Greet([]wgtypes.Key{far.facts.Self.PublicKey}, mesh.GatewayKeepalive); err != nil {
				t.Fatal(err)
			}
		})
		until(t, "the greeting to be heard", func() bool { return heard() > before })
	}
	if got := near.peer(t).Keepalive; got != 3*time.Second {
		t.Errorf("keepalive %v is left behind, want that of the plan", got)
	}
}

// A cable that is pulled leaves the default route where it is.
func TestUplink(t *testing.T) {
	k := open(t)
	uplink := func(when string, want bool) {
		t.Helper()
		if got, err := k.Uplink(); got != want || err != nil {
			t.Errorf("%s: %v, %v; want %v", when, got, err, want)
		}
	}
	uplink("no default route", false)
	sh(t, `ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up
ip addr add 192.0.2.7/24 dev up0; ip route add default via 192.0.2.1`)
	defer sh(t, "ip link del up0")
	uplink("all is well", true)
	sh(t, "ip link set up1 down")
	uplink("the other end is down", false)
	sh(t, "ip link set up1 up")
	uplink("the other end is up again", true)
	sh(t, "ip link set up0 down")
	uplink("down", false)
}
