package registry

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

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
		if !r.Equal(Record{Name: r.Name, PublicKey: r.PublicKey, Revision: r.Revision, Left: true, Extra: r.Extra, Seal: r.Seal}) {
			return errors.New("left: a tombstone has no endpoints, prefixes, pods, hosts, addresses or since; want them empty")
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
	if err := validClaims("hosts", r.Hosts); err != nil {
		return err
	}
	if err := r.validPlace(); err != nil {
		return err
	}
	if err := r.validRotation(); err != nil {
		return err
	}
	return validClaims("pods", r.Pods)
}

func (r Record) validRotation() error {
	if r.Stage != mesh.Resting && r.Stage != mesh.Out && r.Stage != mesh.Back {
		return fmt.Errorf("rotation: %s: want out, back or none", quote(string(r.Stage)))
	}
	none := r.Next == (wgtypes.Key{})
	switch {
	case none && r.Stage == mesh.Out:
		return errors.New("next: none in the middle of a rotation; want the public key that the node changes to")
	case r.Next == r.PublicKey && r.Stage != mesh.Back:
		return errors.New("next: the same as publicKey; want another key")
	case !none && r.SparePort == 0:
		return errors.New("sparePort: none beside a next key; want 1 to 65535")
	case none && r.SparePort != 0 && r.Stage != mesh.Back:
		return fmt.Errorf("sparePort: %d without a next key; want none", r.SparePort)
	}
	for _, t := range []struct {
		field string
		at    time.Time
	}{{"keySince", r.KeySince}, {"rotateAll", r.RotateAll}} {
		if t.at.IsZero() {
			continue
		}
		if err := validTime(t.at); err != nil {
			return fmt.Errorf("%s: %w", t.field, err)
		}
	}
	return nil
}

func (p Place) validPlace() error {
	const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
	if p.Location != "" && (len(p.Location) > 63 || !validLabel(p.Location, alphabet)) {
		return fmt.Errorf("location: %s: want lower case letters, digits and '-'", quote(p.Location))
	}
	if p.Role != mesh.RoleNode && p.Role != mesh.RoleGateway && p.Role != mesh.RoleSpoke {
		return fmt.Errorf("role: %s: want gateway, spoke or none", quote(string(p.Role)))
	}
	for i, s := range p.Segments {
		if len(s) > 63 || !validLabel(s, alphabet) {
			return fmt.Errorf("segments[%d]: %s: want lower case letters, digits and '-'", i, quote(s))
		}
	}
	for i, name := range p.Via {
		if err := validName(name); err != nil {
			return fmt.Errorf("via[%d]: %s: %w", i, quote(name), err)
		}
	}
	for i, s := range p.Silent {
		if err := validName(s.Node); err != nil {
			return fmt.Errorf("silent[%d]: %s: %w", i, quote(s.Node), err)
		}
		if err := validTime(s.Since); err != nil {
			return fmt.Errorf("silent[%d]: since: %w", i, err)
		}
	}
	return nil
}

func (r Record) validCounts() error {
	for _, c := range []struct {
		field     string
		have, max int
	}{
		{"endpoints", len(r.Endpoints), MaxEndpoints},
		{"prefixes and pods", len(r.Prefixes) + len(r.Pods), MaxClaims},
		{"hosts", len(r.Hosts), MaxHosts},
		{"segments", len(r.Segments), MaxNames},
		{"via", len(r.Via), MaxNames},
		{"silent", len(r.Silent), MaxNames},
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
