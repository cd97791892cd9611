package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Bounds of a record, so that a hostile one cannot exhaust the memory of every
// node that reads it. They are far above what an honest node needs.
const (
	MaxEndpoints   = 64
	MaxClaims      = 4096 // of prefixes and pods together
	MaxAddresses   = 256
	MaxRecordBytes = 1 << 20 // of its JSON form, as stored
	// MaxRevision is the largest integer that every JSON reader keeps exact
	// (RFC 8259, section 6). In milliseconds it lasts for 285,000 years; without
	// it, one record with the largest uint64 could never be followed by another.
	MaxRevision = 1<<53 - 1
)

// Record is what a node publishes about itself. All of it is public.
//
// Its JSON form has times in RFC 3339 form, in UTC, cut to the millisecond,
// the key in base64 as `wg` prints it, and leaves empty fields out. Fields that
// a newer version added are ignored.
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
	// Addresses are the machine's own.
	Addresses []netip.Addr
	// Since is when the node joined the mesh.
	Since time.Time
	// Revision grows with every change and never goes back; see NextRevision.
	Revision uint64
	// Left makes the record a tombstone: the node has left or was forgotten.
	// Only Name and Revision are then set.
	Left bool
}

// NextRevision returns the revision that follows last: one more, or now in
// milliseconds since 1970 if that is greater. The clock's part lets a node that
// lost its state still go forward; last's part lets one whose clock was set
// back do so.
func NextRevision(last uint64, now time.Time) uint64 {
	return max(last+1, uint64(max(now.UnixMilli(), 0)))
}

// recordJSON is the stored form. The mesh's Claim already has the right keys.
type recordJSON struct {
	Name      string       `json:"name"`
	PublicKey string       `json:"publicKey,omitempty"`
	Endpoints []string     `json:"endpoints,omitempty"`
	Prefixes  []mesh.Claim `json:"prefixes,omitempty"`
	Pods      []mesh.Claim `json:"pods,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Since     time.Time    `json:"since,omitzero"`
	Revision  uint64       `json:"revision"`
	Left      bool         `json:"left,omitempty"`
}

// MarshalJSON returns the stored form.
func (r Record) MarshalJSON() ([]byte, error) {
	r = r.normal()
	j := recordJSON{
		Name: r.Name, Endpoints: r.Endpoints, Prefixes: r.Prefixes, Pods: r.Pods, Addresses: r.Addresses,
		Since: r.Since, Revision: r.Revision, Left: r.Left,
	}
	if r.PublicKey != (wgtypes.Key{}) {
		j.PublicKey = r.PublicKey.String()
	}
	return json.Marshal(j)
}

// UnmarshalJSON reads the stored form. It does not Validate.
func (r *Record) UnmarshalJSON(data []byte) error {
	if len(data) > MaxRecordBytes {
		return fmt.Errorf("record of %d bytes: at most %d are accepted", len(data), MaxRecordBytes)
	}
	var j recordJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	out := Record{
		Name: j.Name, Endpoints: j.Endpoints, Prefixes: j.Prefixes, Pods: j.Pods, Addresses: j.Addresses,
		Since: j.Since, Revision: j.Revision, Left: j.Left,
	}
	if j.PublicKey != "" {
		key, err := wgtypes.ParseKey(j.PublicKey)
		if err != nil {
			return errors.New("publicKey: want 32 bytes in base64, as `wg pubkey` prints them")
		}
		out.PublicKey = key
	}
	*r = out.normal()
	return nil
}

// Decode reads and validates the record that is stored under name.
func Decode(name string, data []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return Record{}, fmt.Errorf("record of %s: %w", quote(name), err)
	}
	if err := r.Validate(); err != nil {
		return Record{}, err
	}
	if r.Name != name {
		return Record{}, fmt.Errorf("record %s: name: it is stored under %s; want the same name in both places", r.Name, quote(name))
	}
	return r, nil
}

// normal returns the value that survives being stored.
func (r Record) normal() Record {
	r.Endpoints = orNil(r.Endpoints)
	r.Addresses = orNil(r.Addresses)
	r.Prefixes = normalClaims(r.Prefixes)
	r.Pods = normalClaims(r.Pods)
	r.Since = normalTime(r.Since)
	return r
}

func normalTime(t time.Time) time.Time { return t.UTC().Truncate(time.Millisecond) }

func normalClaims(claims []mesh.Claim) []mesh.Claim {
	out := orNil(slices.Clone(claims))
	for i := range out {
		out[i].Since = normalTime(out[i].Since)
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
		normalTime(r.Since).Equal(normalTime(o.Since)) &&
		slices.Equal(r.Endpoints, o.Endpoints) && slices.Equal(r.Addresses, o.Addresses) &&
		slices.EqualFunc(r.Prefixes, o.Prefixes, sameClaim) && slices.EqualFunc(r.Pods, o.Pods, sameClaim)
}

func sameClaim(a, b mesh.Claim) bool {
	return a.Prefix == b.Prefix && normalTime(a.Since).Equal(normalTime(b.Since))
}

// Validate returns the first thing that is wrong with the record: the field,
// its value and what would be right. Whether a claim may be honoured is not
// decided here but in mesh.Owners, where one bad claim does not cost the others.
func (r Record) Validate() error {
	if err := validName(r.Name); err != nil {
		return fmt.Errorf("record %s: name: %w", quote(r.Name), err)
	}
	if err := r.validFields(); err != nil {
		return fmt.Errorf("record %s: %w", r.Name, err)
	}
	return nil
}

func (r Record) validFields() error {
	if r.Revision == 0 || r.Revision > MaxRevision {
		return fmt.Errorf("revision: %d: want 1 to %d", r.Revision, uint64(MaxRevision))
	}
	if r.Left {
		if !r.Equal(Record{Name: r.Name, Revision: r.Revision, Left: true}) {
			return errors.New("left: a tombstone has a name and a revision only; want the other fields empty")
		}
		return nil
	}
	if r.PublicKey == (wgtypes.Key{}) {
		return errors.New("publicKey: none; want the node's WireGuard public key")
	}
	if err := validTime(r.Since); err != nil {
		return fmt.Errorf("since: %w", err)
	}
	if err := r.validCounts(); err != nil {
		return err
	}
	for i, e := range r.Endpoints {
		if err := validEndpoint(e); err != nil {
			return fmt.Errorf("endpoints[%d]: %s: %w", i, quote(e), err)
		}
	}
	for i, a := range r.Addresses {
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() {
			return fmt.Errorf("addresses[%d]: %s: want an IPv4 or IPv6 address, without a zone", i, quote(a.String()))
		}
	}
	if err := validClaims("prefixes", r.Prefixes); err != nil {
		return err
	}
	return validClaims("pods", r.Pods)
}

func (r Record) validCounts() error {
	for _, c := range []struct {
		field     string
		have, max int
	}{
		{"endpoints", len(r.Endpoints), MaxEndpoints},
		{"prefixes and pods", len(r.Prefixes) + len(r.Pods), MaxClaims},
		{"addresses", len(r.Addresses), MaxAddresses},
	} {
		if c.have > c.max {
			return fmt.Errorf("%s: %d of them: want at most %d", c.field, c.have, c.max)
		}
	}
	return nil
}

func validClaims(field string, claims []mesh.Claim) error {
	for i, c := range claims {
		if !c.Prefix.IsValid() || c.Prefix.Addr().Is4In6() {
			return fmt.Errorf("%s[%d]: prefix %s: want an IPv4 or IPv6 prefix", field, i, c.Prefix)
		}
		if m := c.Prefix.Masked(); m != c.Prefix {
			return fmt.Errorf("%s[%d]: prefix %s: has bits set behind its length; want %s", field, i, c.Prefix, m)
		}
		// A forgotten time would be the oldest of all, and win every dispute.
		if err := validTime(c.Since); err != nil {
			return fmt.Errorf("%s[%d]: since: %w", field, i, err)
		}
	}
	return nil
}

// validTime bounds what RFC 3339 can write, and finds the time that was never
// set. A machine without a battery clock does start in 1970.
func validTime(t time.Time) error {
	if y := t.UTC().Year(); y < 1970 || y > 9999 {
		return fmt.Errorf("in the year %d: want a time from 1970 to 9999", y)
	}
	return nil
}

func validName(name string) error {
	if len(name) == 0 || len(name) > 253 {
		return fmt.Errorf("%d characters: want 1 to 253", len(name))
	}
	for label := range strings.SplitSeq(name, ".") {
		if !validLabel(label, "abcdefghijklmnopqrstuvwxyz0123456789") {
			return errors.New("want lower case letters, digits, '-' and '.', with a letter or digit around each '.' (RFC 1123 subdomain)")
		}
	}
	return nil
}

func validLabel(label, alphabet string) bool {
	return label != "" && label[0] != '-' && label[len(label)-1] != '-' && strings.Trim(label, alphabet+"-") == ""
}

func validEndpoint(endpoint string) error {
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		return errors.New("want host:port, with an IPv6 address in brackets")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("port %s: want 1 to 65535", quote(port))
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Zone() != "" || a.IsUnspecified() {
			return errors.New("want an address that other nodes can reach, without a zone")
		}
		return nil
	}
	if !validHost(host) {
		return fmt.Errorf("host %s: want an IP address or a DNS name", quote(host))
	}
	return nil
}

// validHost accepts DNS names (RFC 1123, section 2.1), and underscores since
// internal zones do have them. A name whose last label is all digits is a
// mistyped address, never a name.
func validHost(host string) bool {
	host = strings.TrimSuffix(host, ".")
	if len(host) > 253 {
		return false
	}
	labels := strings.Split(host, ".")
	for _, label := range labels {
		if len(label) > 63 || !validLabel(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") {
			return false
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

// quote shows a value from a record in an error, whatever it contains.
func quote(s string) string {
	if len(s) > 80 {
		return strconv.Quote(s[:80]) + "..."
	}
	return strconv.Quote(s)
}
