package mesh_test

import (
	"fmt"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// at is the time n minutes into the tests' world.
func at(n int) time.Time { return epoch.Add(time.Duration(n) * time.Minute) }

// key makes public keys that sort as their numbers do. The zero key is none.
func key(n int) wgtypes.Key { return wgtypes.Key{0: byte(n >> 8), 1: byte(n)} }

// keyName prints key(n) as "kn", for golden text.
func keyName(k wgtypes.Key) string { return fmt.Sprintf("k%d", int(k[0])<<8|int(k[1])) }

// psk makes fingerprints of preshared keys. That of 0 is none.
func psk(n int) mesh.Fingerprint { return mesh.Fingerprint{7: byte(n)} }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrs(in ...string) (out []netip.Addr) {
	for _, s := range in {
		out = append(out, addr(s))
	}
	return out
}

func prefixes(in ...string) (out []netip.Prefix) {
	for _, s := range in {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// claims makes claims that have held since at(since).
func claims(since int, in ...string) (out []mesh.Claim) {
	for _, p := range prefixes(in...) {
		out = append(out, mesh.Claim{Prefix: p, Since: at(since)})
	}
	return out
}

func endpoint(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// settings are those of every test that does not say otherwise.
func settings(clusterCIDRs ...string) mesh.Settings {
	return mesh.Settings{
		ClusterCIDRs: prefixes(clusterCIDRs...),
		Interface:    "wgcni0", ListenPort: 51820, MTU: 1420,
		FwMark: 0x1000000, Table: 5182, RulePriority: 5182,
	}
}
