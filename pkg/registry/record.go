package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// Bounds of a record, so that a hostile one cannot exhaust the memory of every
// node that reads it. They are far above what an honest node needs.
const (
	MaxEndpoints   = 64
	MaxClaims      = 4096 // of prefixes and pods together
	MaxAddresses   = 256
	MaxHosts       = 64
	MaxNames       = 64      // of segments, of entry nodes, and of silent gateways
	MaxRecordBytes = 1 << 20 // of its JSON form, as stored
	// MaxRevision is the largest integer that every JSON reader keeps exact
	// (RFC 8259, section 6). In milliseconds it lasts for 285,000 years; without
	// it, one record with the largest uint64 could never be followed by another.
	MaxRevision = 1<<53 - 1
)

// Record is what a node publishes about itself. All of it is public.
//
// Its JSON form has times in RFC 3339 form, in UTC, cut to the millisecond,
// the key in base64 as `wg` prints it, and leaves empty fields out.
type Record struct {
	// Name of the node: an RFC 1123 subdomain of at most 253 characters, the
	// form that Kubernetes demands of node names.
	Name      string
	PublicKey wgtypes.Key
	// Endpoints are where its WireGuard can be reached, the preferred one first:
	// "host:port", where host is an IPv4 address, an IPv6 address in brackets or
	// a DNS name. None for a node that can only call others.
	Endpoints []string
	// Prefixes and Pods are the addresses behind the node; see mesh.Node.
	Prefixes []mesh.Claim
	Pods     []mesh.Claim
	// Hosts are those of the machine's addresses that are reached through the
	// tunnel; see mesh.Node. In the stored form they stand where a version that
	// does not know them keeps them, among the Extra: the seal is the same for both.
	Hosts []mesh.Claim
	// Addresses are the machine's own.
	Addresses []netip.Addr
	// Since is when the node joined the mesh.
	Since time.Time
	// Place has what later versions of this code have added. In the stored form its
	// fields stand among the Extra, as Hosts does.
	Place
	// Rotation stands there too.
	Rotation
	// Revision grows with every change and never goes back; see NextRevision.
	Revision uint64
	// Left makes the record a tombstone: the node has left or was forgotten. Only
	// Name, Revision and Seal are then set, and PublicKey if the node was
	// forgotten: that key is revoked, under whatever name.
	Left bool
	// Extra are the fields that a newer version added beside these, in their
	// JSON form. They are kept, and sealed with the rest. What cannot be added in
	// this way needs a new version of the record.
	Extra map[string]json.RawMessage
	// Seal vouches for all of the above; see Trust.
	Seal identity.Seal
}

// Place is where a machine stands in the mesh; see mesh.Node.
type Place struct {
	Location     string
	Role         mesh.Role
	Segments     []string
	CalledInside bool
	Silent       []mesh.Silence
	Via          []string
	Masqueraded  bool
}

// Rotation is how a machine replaces its key; see mesh.Plane. A record of a version
// that does not is without all of it.
type Rotation struct {
	// Next is the key of its spare interface: the one that it changes to at the next
	// rotation, while Stage is mesh.Back the one that it has changed to.
	Next      wgtypes.Key
	SparePort uint16 // UDP, where the spare interface listens
	Stage     mesh.Stage
	KeySince  time.Time // when PublicKey came into use
	// RotateAll is an order to all machines: those whose key is older are to rotate it.
	RotateAll time.Time
}

// recordVersion is the latest that this code reads. A record without a version
// is of version 1.
const recordVersion = 1

// ErrVersion is what a record of a newer version is refused with: half of what
// it says is not to be acted upon.
var ErrVersion = errors.New("newer version")

// NextRevision returns the revision that follows last: one more, or now in
// milliseconds since 1970 if that is greater. The clock's part lets a node that
// lost its state still go forward; last's part lets one whose clock was set
// back do so.
func NextRevision(last uint64, now time.Time) uint64 {
	return max(last+1, uint64(max(now.UnixMilli(), 0)))
}

// normal returns the value that survives being stored.
func (r Record) normal() Record {
	r.Endpoints = orNil(r.Endpoints)
	r.Addresses = orNil(r.Addresses)
	r.Prefixes = normalClaims(r.Prefixes)
	r.Pods = normalClaims(r.Pods)
	r.Hosts = normalClaims(r.Hosts)
	r.Segments, r.Via = orNil(r.Segments), orNil(r.Via)
	r.Silent = orNil(slices.Clone(r.Silent))
	for i := range r.Silent {
		r.Silent[i].Since = mesh.ClaimTime(r.Silent[i].Since)
	}
	r.Since, r.KeySince, r.RotateAll = mesh.ClaimTime(r.Since), mesh.ClaimTime(r.KeySince), mesh.ClaimTime(r.RotateAll)
	return r
}

func normalClaims(claims []mesh.Claim) []mesh.Claim {
	out := orNil(slices.Clone(claims))
	for i := range out {
		out[i].Since = mesh.ClaimTime(out[i].Since)
	}
	return out
}

func orNil[S ~[]E, E any](s S) S {
	if len(s) == 0 {
		return nil
	}
	return s
}

// Equal reports whether both records have the same stored form.
func (r Record) Equal(o Record) bool {
	return r.Name == o.Name && r.PublicKey == o.PublicKey && r.Revision == o.Revision && r.Left == o.Left &&
		mesh.ClaimTime(r.Since).Equal(mesh.ClaimTime(o.Since)) &&
		slices.Equal(r.Endpoints, o.Endpoints) && slices.Equal(r.Addresses, o.Addresses) &&
		slices.EqualFunc(r.Prefixes, o.Prefixes, sameClaim) && slices.EqualFunc(r.Pods, o.Pods, sameClaim) &&
		slices.EqualFunc(r.Hosts, o.Hosts, sameClaim) && r.samePlace(o.Place) && r.sameRotation(o.Rotation) &&
		maps.EqualFunc(r.Extra, o.Extra, func(a, b json.RawMessage) bool { return bytes.Equal(a, b) }) && r.Seal == o.Seal
}

func (p Place) samePlace(o Place) bool {
	return p.Location == o.Location && p.Role == o.Role && p.CalledInside == o.CalledInside && p.Masqueraded == o.Masqueraded &&
		slices.Equal(p.Segments, o.Segments) && slices.Equal(p.Via, o.Via) &&
		slices.EqualFunc(p.Silent, o.Silent, func(a, b mesh.Silence) bool {
			return a.Node == b.Node && mesh.ClaimTime(a.Since).Equal(mesh.ClaimTime(b.Since))
		})
}

func (r Rotation) sameRotation(o Rotation) bool {
	return r.Next == o.Next && r.SparePort == o.SparePort && r.Stage == o.Stage &&
		mesh.ClaimTime(r.KeySince).Equal(mesh.ClaimTime(o.KeySince)) && mesh.ClaimTime(r.RotateAll).Equal(mesh.ClaimTime(o.RotateAll))
}

// SameContent reports whether both records say the same: all but the revision,
// and the part of the seal that depends on it, is equal.
func (r Record) SameContent(o Record) bool {
	r.Revision, r.Seal.MAC = o.Revision, o.Seal.MAC
	return r.Equal(o)
}

// SpareKey is that of the machine's spare interface; zero if it has none.
func (r Record) SpareKey() wgtypes.Key {
	if r.Stage == mesh.Back && r.Next == (wgtypes.Key{}) {
		return r.PublicKey
	}
	return r.Next
}

// Revoked returns the key that a tombstone revokes, if it does.
func (r Record) Revoked() (wgtypes.Key, bool) {
	return r.PublicKey, r.Left && r.PublicKey != wgtypes.Key{}
}

// Enters reports whether the record is of a plain machine that enters by the named
// node; see mesh.Node.
func (r Record) Enters(node string) bool { return !r.Left && slices.Contains(r.Via, node) }

func sameClaim(a, b mesh.Claim) bool {
	return a.Prefix == b.Prefix && mesh.ClaimTime(a.Since).Equal(mesh.ClaimTime(b.Since))
}
