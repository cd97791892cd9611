package main

import (
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
)

// SealStatus says what the registry's records must be sealed with.
type SealStatus struct {
	SealedBy        identity.SecretID   `json:"sealedBy"`           // what seals this node's record
	Accepted        []identity.SecretID `json:"accepted"`           // what may seal the others'
	AcceptsUnsealed bool                `json:"acceptsUnsealed"`    // a record without a seal counts as well
	Unsealed        []string            `json:"unsealed"`           // the nodes that have such a one
	OldPeers        []string            `json:"oldPeers,omitempty"` // plain machines whose keys depend on another secret than SealedBy
	Error           string              `json:"error,omitempty"`    // why the secrets cannot be read
}

// takePresharedKeys plans with the preshared keys that the kernel has: without
// the secrets nobody can say which they should be. Whether pod traffic is
// encrypted does not depend on it: a tunnel with different ones at its ends has
// no handshake, and lets nothing through.
func takePresharedKeys(o *reconcile.Outcome, c mesh.Context) {
	o.Plan.TakePresharedKeys(o.Observed)
	o.Ops = mesh.Diff(o.Observed, o.Plan.State, c)
}

// sealStatus is nil where no secret is configured. err is why none can be read.
func sealStatus(trust registry.Trust, err error, records registry.Snapshot) *SealStatus {
	s := &SealStatus{
		SealedBy: trust.Secrets.Current(), Accepted: []identity.SecretID{},
		AcceptsUnsealed: trust.AcceptUnsealed, Unsealed: []string{},
	}
	if err != nil {
		s.Error = err.Error()
		return s
	}
	if len(trust.Secrets) == 0 {
		return nil
	}
	for _, secret := range trust.Secrets {
		s.Accepted = append(s.Accepted, secret.ID())
	}
	for _, r := range records.Records() {
		if !r.Left && r.Seal.IsZero() {
			s.Unsealed = append(s.Unsealed, r.Name)
		}
	}
	s.OldPeers = behindSecrets(trust, records)
	return s
}

func sealNote(s Status) string {
	switch seal := s.Seal; {
	case seal == nil:
		return "none: whoever can write to the registry is trusted; see `wgcnid secret --help`"
	case seal.Error != "" && s.Helper:
		return "the secrets cannot be read, and wgcnid goes on with those it has: " + oneLine(seal.Error)
	case seal.Error != "":
		return "the secrets cannot be read, and wgcnid will not start: " + oneLine(seal.Error)
	}
	note := "by secret " + string(s.Seal.SealedBy)
	if others := s.Seal.Accepted[1:]; len(others) > 0 {
		note += ", accepted as well:"
		for _, id := range others {
			note += " " + string(id)
		}
	}
	if s.Seal.AcceptsUnsealed {
		note += "; a record without a seal counts too (\"seal\" is \"preferred\"), not sealed yet: " + names(s.Seal.Unsealed)
	}
	if old := behindNote(s.Seal.OldPeers); old != "" {
		note += "; " + old
	}
	return note
}
