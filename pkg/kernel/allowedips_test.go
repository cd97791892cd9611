package kernel

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/pkg/mesh"
)

func TestIntervalsRoundTrip(t *testing.T) {
	for _, want := range [][]netip.Prefix{
		nil,
		{netip.MustParsePrefix("10.0.0.0/8")},
		{netip.MustParsePrefix("10.0.0.0/25"), netip.MustParsePrefix("10.0.0.128/26")}, // one ends where the next begins
		{netip.MustParsePrefix("0.0.0.0/1"), netip.MustParsePrefix("255.255.255.0/24")},
		{netip.MustParsePrefix("fd00::/8"), netip.MustParsePrefix("ff00::/8")}, // up to the last address there is
	} {
		var elements []nftables.SetElement
		for _, p := range want {
			elements = append(elements, interval(p)...)
		}
		slices.Reverse(elements) // the kernel lists them in no order of ours
		if got := decodeIntervals(elements); !slices.Equal(got, want) {
			t.Errorf("%v came back as %v", want, got)
		}
	}
}

// removalHere is what is to be expected of the running kernel.
func removalHere(t *testing.T) removal {
	t.Helper()
	if !HasWireGuard() {
		return byUAPI
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		t.Fatalf("kernel release %q: %v", release, err)
	}
	if major > 6 || major == 6 && minor >= 16 {
		return byFlag
	}
	return byDecoy
}

// The kernels of `make test-kernel` take the other ways.
func TestSingleAllowedIPsAreRemoved(t *testing.T) {
	const name = "wg-remove"
	want := removalHere(t)
	t.Run(string(want), func(t *testing.T) {
		var err error
		if want == byUAPI {
			err = userspace.Start(name, 1400, t.TempDir()+"/tunnel.log")
		} else {
			err = netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: name}})
		}
		if err != nil {
			t.Fatal(err)
		}
		k, err := Open(Config{Interface: name})
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		defer func() {
			if err := k.removeLink(name); err != nil {
				t.Error(err)
			}
		}()
		var stay, gone []netip.Prefix
		for i := range 2 * (allowedIPsPerMessage + 1) { // more than one message's
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)}), 32)
			if i%2 == 0 {
				stay = append(stay, p)
			} else {
				gone = append(gone, p)
			}
		}
		stay = append(stay, netip.MustParsePrefix("fd00:244::/64"))
		gone = append(gone, netip.MustParsePrefix("fd00:244::/48"))
		key := wgtypes.Key{1}
		peer := wgtypes.PeerConfig{PublicKey: key}
		for _, p := range slices.Concat(stay, gone) {
			peer.AllowedIPs = append(peer.AllowedIPs, *netipx.PrefixIPNet(p))
		}
		if err := k.wg.configure(name, wgtypes.Config{Peers: []wgtypes.PeerConfig{peer}}); err != nil {
			t.Fatal(err)
		}
		got, err := k.removeAllowedIPs(mesh.SetPeer{Link: name, PublicKey: key, Remove: gone})
		if err != nil || got != want {
			t.Errorf("removed %s: %v; want %s", got, err, want)
		}
		d, err := k.wg.device(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(d.Peers) != 1 {
			t.Fatalf("%d peers, want the one", len(d.Peers))
		}
		var left []netip.Prefix
		for _, n := range d.Peers[0].AllowedIPs {
			p, _ := netipx.FromStdIPNet(&n)
			left = append(left, p)
		}
		slices.SortFunc(left, netip.Prefix.Compare)
		slices.SortFunc(stay, netip.Prefix.Compare)
		if diff := cmp.Diff(stay, left, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("what is left (-want +got):\n%s", diff)
		}
	})
}
