package registry_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// rotation is that of a record in which every field of it is set.
var rotation = registry.Rotation{
	Next: wgtypes.Key{9}, SparePort: 51821, Stage: mesh.Out,
	KeySince:  time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
	RotateAll: time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC),
}

// A version that does not know rotations keeps their fields among the Extra, and
// must find the same seal.
func TestRotationStandsAmongTheExtraFields(t *testing.T) {
	r := registrytest.Record("node-a", 7)
	older, err := json.Marshal(r)
	if err != nil || strings.Contains(string(older), "next") || strings.Contains(string(older), "otat") || strings.Contains(string(older), "keySince") {
		t.Errorf("a record without a rotation: %s, %v", older, err)
	}
	r.Rotation = rotation
	r.KeySince = r.KeySince.Add(time.Microsecond).In(time.FixedZone("", 7200))
	r.Extra = map[string]json.RawMessage{"oo": json.RawMessage(`1`)}
	got, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	const want = `"revision":7,"keySince":"2026-03-01T12:00:00Z","next":"CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",` +
		`"oo":1,"rotateAll":"2026-03-02T12:00:00Z","rotation":"out","sparePort":51821}`
	if !strings.HasSuffix(string(got), want) {
		t.Errorf("stored form: %s", got)
	}
	back, err := registry.Decode("node-a", got)
	if err != nil || !back.Equal(r) || !back.SameContent(r) || len(back.Extra) != 1 {
		t.Errorf("decoded: %+v, %v", back, err)
	}
	if diff := cmp.Diff(rotation, back.Rotation); diff != "" {
		t.Error(diff)
	}
	for name, change := range map[string]func(*registry.Rotation){
		"next": func(o *registry.Rotation) { o.Next = wgtypes.Key{8} }, "port": func(o *registry.Rotation) { o.SparePort++ },
		"stage": func(o *registry.Rotation) { o.Stage = mesh.Back }, "since": func(o *registry.Rotation) { o.KeySince = o.KeySince.Add(time.Second) },
		"order": func(o *registry.Rotation) { o.RotateAll = time.Time{} },
	} {
		other := r
		if change(&other.Rotation); other.Equal(r) || other.SameContent(r) {
			t.Errorf("a record with another %s is equal", name)
		}
	}
}

func TestValidateRotation(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*registry.Record)
		want   string
	}{
		{"good", func(*registry.Record) {}, ""},
		{"at rest", func(r *registry.Record) { r.Stage, r.RotateAll = mesh.Resting, time.Time{} }, ""},
		{"of an older version", func(r *registry.Record) { r.Rotation = registry.Rotation{} }, ""},
		{"that cannot rotate", func(r *registry.Record) { r.Rotation = registry.Rotation{KeySince: r.KeySince} }, ""},
		{"back, with the key that was the next", func(r *registry.Record) { r.Stage, r.Next = mesh.Back, r.PublicKey }, ""},
		{"back, with no next", func(r *registry.Record) { r.Stage, r.Next = mesh.Back, wgtypes.Key{} }, ""},
		{"no such stage", func(r *registry.Record) { r.Stage = "up" }, `rotation: "up": want out, back or none`},
		{"out to no key", func(r *registry.Record) { r.Next = wgtypes.Key{} }, "next: none in the middle"},
		{"out to the same key", func(r *registry.Record) { r.Next = r.PublicKey }, "next: the same as publicKey"},
		{"at rest with one key", func(r *registry.Record) { r.Stage, r.Next = mesh.Resting, r.PublicKey }, "next: the same as publicKey"},
		{"no port", func(r *registry.Record) { r.SparePort = 0 }, "sparePort: none"},
		{"a port for nothing", func(r *registry.Record) { r.Stage, r.Next = mesh.Resting, wgtypes.Key{} }, "sparePort: 51821 without"},
		{"a key of no time", func(r *registry.Record) { r.KeySince = time.Unix(-1e10, 0) }, "keySince: in the year 1653"},
		{"an order of no time", func(r *registry.Record) { r.RotateAll = time.Unix(1e12, 0) }, "rotateAll: in the year 33658"},
		{"in a tombstone", func(r *registry.Record) {
			*r = registry.Record{Name: "a", Revision: 1, Left: true, Rotation: rotation}
		}, "left: a tombstone has"},
	} {
		r := registrytest.Record("node-a", 1)
		r.Rotation = rotation
		tt.change(&r)
		if err := r.Validate(); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.want)
		}
	}
	good, err := json.Marshal(registrytest.Record("node-a", 1))
	if err != nil {
		t.Fatal(err)
	}
	for field, want := range map[string]string{
		`"next": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "sparePort": 1`: "next: want a key, or none",
		`"next": "CQ==", "sparePort": 1`:                                         "next: want 32 bytes in base64",
		`"next": 5`:                                                              "next",
		`"sparePort": 65536`:                                                     "sparePort",
		`"sparePort": -1`:                                                        "sparePort",
		`"rotation": true`:                                                       "rotation",
		`"rotation": "Out"`:                                                      `rotation: "Out"`,
		`"keySince": "today"`:                                                    "today",
		`"Next": "x"`:                                                            "want next",
	} {
		text := strings.TrimSuffix(string(good), "}") + "," + field + "}"
		if _, err := registry.Decode("node-a", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", field, err, want)
		}
	}
}
