package store

import (
	"net/netip"

	current "github.com/containernetworking/cni/pkg/types/100"
	"go4.org/netipx"
)

// ResultAddresses are the addresses that a CNI result gives to an interface. One
// that names no interface (CNI 0.2.0 and before) has but one to give them to.
func ResultAddresses(result *current.Result, ifname string) []netip.Addr {
	var out []netip.Addr
	for _, ip := range result.IPs {
		if i := ip.Interface; i != nil && (*i < 0 || *i >= len(result.Interfaces) || result.Interfaces[*i].Name != ifname) {
			continue
		}
		if a, ok := netipx.FromStdIP(ip.Address.IP); ok {
			out = append(out, a)
		}
	}
	return out
}
