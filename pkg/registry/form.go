package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
)

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
	Version   int          `json:"version,omitempty"`
	// Seal is last, before it Extra with the later fields among them; see MarshalJSON.
	laterJSON
	Seal identity.Seal `json:"seal,omitzero"`
}

// laterJSON are the fields that version 1 had not from the start.
type laterJSON struct {
	Hosts        []mesh.Claim   `json:"hosts,omitempty"`
	Location     string         `json:"location,omitempty"`
	Role         mesh.Role      `json:"role,omitempty"`
	Segments     []string       `json:"segments,omitempty"`
	CalledInside bool           `json:"calledInside,omitempty"`
	Silent       []mesh.Silence `json:"silent,omitempty"`
	Via          []string       `json:"via,omitempty"`
	Masqueraded  bool           `json:"masqueraded,omitempty"`
	Next         string         `json:"next,omitempty"`
	SparePort    uint16         `json:"sparePort,omitempty"`
	Stage        mesh.Stage     `json:"rotation,omitempty"`
	KeySince     time.Time      `json:"keySince,omitzero"`
	RotateAll    time.Time      `json:"rotateAll,omitzero"`
}

func (r Record) later() laterJSON {
	j := laterJSON{
		Hosts: r.Hosts, Location: r.Location, Role: r.Role, Segments: r.Segments, CalledInside: r.CalledInside, Silent: r.Silent, Via: r.Via, Masqueraded: r.Masqueraded,
		SparePort: r.SparePort, Stage: r.Stage, KeySince: r.KeySince, RotateAll: r.RotateAll,
	}
	if r.Next != (wgtypes.Key{}) {
		j.Next = r.Next.String()
	}
	return j
}

// knownKeys are those of recordJSON.
var knownKeys = func() (keys []string) {
	for _, field := range reflect.VisibleFields(reflect.TypeFor[recordJSON]()) {
		if key, _, _ := strings.Cut(field.Tag.Get("json"), ","); key != "" {
			keys = append(keys, key)
		}
	}
	return keys
}()

// MarshalJSON returns the stored form: one and the same for equal records.
func (r Record) MarshalJSON() ([]byte, error) {
	r = r.normal()
	j := recordJSON{
		Name: r.Name, Endpoints: r.Endpoints, Prefixes: r.Prefixes, Pods: r.Pods, Addresses: r.Addresses,
		Since: r.Since, Revision: r.Revision, Left: r.Left,
	}
	if r.PublicKey != (wgtypes.Key{}) {
		j.PublicKey = r.PublicKey.String()
	}
	text, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	behind, err := r.behind()
	if err != nil || len(behind) == 0 && r.Seal.IsZero() {
		return text, err
	}
	text = text[:len(text)-1] // the closing brace
	add := func(key string, value any) error {
		k, err := json.Marshal(key)
		if err != nil {
			return err
		}
		v, err := json.Marshal(value)
		text = append(append(append(append(text, ','), k...), ':'), v...)
		return err
	}
	for _, key := range slices.Sorted(maps.Keys(behind)) {
		if err := add(key, behind[key]); err != nil {
			return nil, fmt.Errorf("field %s: %w", quote(key), err)
		}
	}
	if !r.Seal.IsZero() {
		if err := add("seal", r.Seal); err != nil {
			return nil, err
		}
	}
	return append(text, '}'), nil
}

// behind are the fields that stand behind the first ones, sorted by their keys: the
// later ones, and those that this version does not know. A version that does not
// know the later ones either finds the same seal.
func (r Record) behind() (map[string]json.RawMessage, error) {
	text, err := json.Marshal(r.later())
	if err != nil {
		return nil, err
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		return nil, err
	}
	maps.Copy(fields, r.Extra)
	return fields, nil
}

// sealed is what a record's seal covers: its stored form without the seal.
func (r Record) sealed() ([]byte, error) {
	r.Seal = identity.Seal{}
	return r.MarshalJSON()
}

// UnmarshalJSON reads the stored form. It does not Validate.
func (r *Record) UnmarshalJSON(data []byte) error {
	if len(data) > MaxRecordBytes {
		return fmt.Errorf("record of %d bytes: at most %d are accepted", len(data), MaxRecordBytes)
	}
	var j recordJSON
	err := json.Unmarshal(data, &j)
	// A newer version may have other types below; Unmarshal goes on after those.
	if wrongType := (*json.UnmarshalTypeError)(nil); j.Version > recordVersion && (err == nil || errors.As(err, &wrongType)) {
		return fmt.Errorf("version %d is a %w than %d, which this wgcni reads: upgrade wgcni on this node", j.Version, ErrVersion, recordVersion)
	}
	if err != nil {
		return err
	}
	if j.Version < 0 {
		return fmt.Errorf("version: %d: want 1, or none", j.Version)
	}
	out := Record{
		Name: j.Name, Endpoints: j.Endpoints, Prefixes: j.Prefixes, Pods: j.Pods, Hosts: j.Hosts, Addresses: j.Addresses,
		Since: j.Since, Revision: j.Revision, Left: j.Left, Seal: j.Seal,
		Place:    Place{j.Location, j.Role, j.Segments, j.CalledInside, j.Silent, j.Via, j.Masqueraded},
		Rotation: Rotation{SparePort: j.SparePort, Stage: j.Stage, KeySince: j.KeySince, RotateAll: j.RotateAll},
	}
	if out.Extra, err = extraFields(data); err != nil {
		return err
	}
	if out.PublicKey, err = publicKey("publicKey", j.PublicKey); err != nil {
		return err
	}
	if out.Next, err = publicKey("next", j.Next); err != nil {
		return err
	}
	if j.Next != "" && out.Next == (wgtypes.Key{}) {
		return errors.New("next: want a key, or none")
	}
	*r = out.normal()
	return nil
}

// publicKey reads a key; the zero key if there is none.
func publicKey(field, text string) (wgtypes.Key, error) {
	if text == "" {
		return wgtypes.Key{}, nil
	}
	key, err := wgtypes.ParseKey(text)
	if err != nil {
		return key, fmt.Errorf("%s: want 32 bytes in base64, as `wg pubkey` prints them", field)
	}
	return key, nil
}

// extraFields returns what a record has besides the known fields, in the one
// form that writing and reading it again does not change.
func extraFields(data []byte) (map[string]json.RawMessage, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, err
	}
	for key, value := range all {
		i := slices.IndexFunc(knownKeys, func(known string) bool { return strings.EqualFold(key, known) })
		switch {
		case i >= 0 && key == knownKeys[i]:
			delete(all, key)
			continue
		case i >= 0: // encoding/json has taken it for the known one
			return nil, fmt.Errorf("field %s: want %s", quote(key), knownKeys[i])
		}
		var compact, escaped bytes.Buffer
		if err := json.Compact(&compact, value); err != nil {
			return nil, err
		}
		json.HTMLEscape(&escaped, compact.Bytes())
		all[key] = escaped.Bytes()
	}
	if len(all) == 0 {
		return nil, nil
	}
	return all, nil
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
