package registry

import (
	"fmt"
	"slices"

	"github.com/wgcni/wgcni/pkg/identity"
)

// Trust decides whose word counts. The zero value takes every record as it is:
// then whoever may write to the registry is trusted.
type Trust struct {
	// Secrets are the cluster's: the first seals this node's record, and a
	// record that none of them has sealed is refused.
	Secrets identity.Secrets
	// AcceptUnsealed takes records without a seal as well. It is meant for the
	// time in which a mesh changes over to seals.
	AcceptUnsealed bool
}

// Equal reports whether both trust alike and seal alike.
func (t Trust) Equal(o Trust) bool {
	return t.AcceptUnsealed == o.AcceptUnsealed &&
		slices.EqualFunc(t.Secrets, o.Secrets, func(a, b identity.Secret) bool { return a.ID() == b.ID() })
}

// Seal returns the record with the seal that it needs.
func (t Trust) Seal(r Record) (Record, error) {
	message, err := r.sealed()
	if err != nil {
		return r, fmt.Errorf("seal record %s: %w", r.Name, err)
	}
	r.Seal = t.Secrets.Seal(message)
	return r, nil
}

// Check returns why the record is refused: an error that is
// identity.ErrUnsealed, identity.ErrUnknownSecret or identity.ErrForged.
func (t Trust) Check(r Record) error {
	if len(t.Secrets) == 0 || t.AcceptUnsealed && r.Seal.IsZero() {
		return nil
	}
	message, err := r.sealed()
	if err == nil {
		err = t.Secrets.Check(message, r.Seal)
	}
	if err != nil {
		return fmt.Errorf("record %s: %w", r.Name, err)
	}
	return nil
}

// decode reads the record that is stored under name, and checks it.
func (t Trust) decode(name string, data []byte) (Record, error) {
	r, err := Decode(name, data)
	if err == nil {
		err = t.Check(r)
	}
	return r, err
}
