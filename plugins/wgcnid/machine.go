package main

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

// MachineStatus is what there is to say of a machine with no CNI.
type MachineStatus struct {
	// Hosts are its own addresses at which others reach it through the tunnel.
	Hosts []netip.Addr `json:"hosts,omitempty"`
	// Hint says what is likely to be missing in its configuration; "" if nothing is.
	Hint string `json:"hint,omitempty"`
}

// machineStatus is nil for a node of a cluster.
func machineStatus(c config.Config, o reconcile.Outcome, known store.Known) *MachineStatus {
	if !c.Bare {
		return nil
	}
	return &MachineStatus{Hosts: o.Plan.Filter.Nodes.Own, Hint: machineHint(c, known)}
}

// machineHint looks at the machine's own addresses: whether they are meant to be
// reached through the tunnel, and whether others do so.
func machineHint(c config.Config, known store.Known) string {
	external := func(a netip.Addr) bool {
		return slices.ContainsFunc(c.ExternalCIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	if !c.EncryptNodes {
		behind := func(a netip.Addr) bool { // as its bridge's is, which goes by the tunnel
			return slices.ContainsFunc(known.Self.Prefixes, func(c mesh.Claim) bool { return c.Prefix.Contains(a) })
		}
		if i := slices.IndexFunc(known.Self.Addresses, func(a netip.Addr) bool { return external(a) && !behind(a) }); i >= 0 {
			return fmt.Sprintf("pods reach %s in the clear: set \"encryptNodes\": true", known.Self.Addresses[i])
		}
		if len(known.Self.Prefixes) == 0 {
			return "nothing here can be reached: set \"encryptNodes\": true for the machine itself, \"subnets\" for what is behind it"
		}
		return ""
	}
	for _, h := range known.Self.Hosts {
		if !external(h.Prefix.Addr()) {
			return fmt.Sprintf("nodes without encryptNodes do not take %s for this machine: add it to \"externalCIDRs\" on every machine", h.Prefix.Addr())
		}
	}
	return ""
}

// head is the line about this machine.
func (s Status) head() string {
	if s.Machine == nil {
		return fmt.Sprintf("node       %s, %d pods, prefixes %s", s.Node, s.Pods, list(s.Prefixes))
	}
	line := fmt.Sprintf("machine    %s, reached at %s, subnets behind it %s", s.Node, few(texts(s.Machine.Hosts), "none of its own addresses"), list(s.Prefixes))
	if s.Machine.Hint != "" {
		line += "\n           " + s.Machine.Hint
	}
	return line
}
