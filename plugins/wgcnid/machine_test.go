package main

import (
	"net/netip"
	"testing"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// What is said of a machine with no CNI, by what it is set up for.
func TestMachineHint(t *testing.T) {
	address, elsewhere := netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("203.0.113.9")
	claim := func(a netip.Addr) []mesh.Claim { return []mesh.Claim{{Prefix: netip.PrefixFrom(a, 32)}} }
	subnet := []mesh.Claim{{Prefix: netip.MustParsePrefix("172.17.0.0/16")}}
	for _, tt := range []struct {
		name         string
		encryptNodes bool
		self         registry.Record
		want         string
	}{
		{"reached at its address", true, registry.Record{Addresses: []netip.Addr{address}, Hosts: claim(address)}, ""},
		{"subnets only", false, registry.Record{Addresses: []netip.Addr{elsewhere, netip.MustParseAddr("172.17.0.1")}, Prefixes: subnet}, ""},
		{
			"its address is in the clear", false,
			registry.Record{Addresses: []netip.Addr{elsewhere, address}, Prefixes: subnet},
			`pods reach 192.0.2.200 in the clear: set "encryptNodes": true`,
		},
		{
			"nothing announced", false,
			registry.Record{Addresses: []netip.Addr{elsewhere}},
			`nothing here can be reached: set "encryptNodes": true for the machine itself, "subnets" for what is behind it`,
		},
		{
			"outside of externalCIDRs", true,
			registry.Record{Addresses: []netip.Addr{elsewhere}, Hosts: claim(elsewhere)},
			`nodes without encryptNodes do not take 203.0.113.9 for this machine: add it to "externalCIDRs" on every machine`,
		},
	} {
		c := config.Config{Bare: true, Settings: mesh.Settings{
			EncryptNodes: tt.encryptNodes, ExternalCIDRs: []netip.Prefix{netip.MustParsePrefix("192.0.2.192/26"), netip.MustParsePrefix("172.17.0.0/16")},
		}}
		if got := machineHint(c, store.Known{Self: tt.self}); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestMachineHead(t *testing.T) {
	s := Status{Node: "vm", Machine: &MachineStatus{Hosts: []netip.Addr{netip.MustParseAddr("192.0.2.200")}}}
	if got, want := s.head(), "machine    vm, reached at 192.0.2.200, subnets behind it none"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	s.Machine = &MachineStatus{Hint: "something is missing"}
	s.Prefixes = []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16")}
	if got, want := s.head(), "machine    vm, reached at none of its own addresses, subnets behind it 172.17.0.0/16\n           something is missing"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
