package registry_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

func TestRecordJSON(t *testing.T) {
	r := registrytest.Record("node-a", 7)
	r.Since = r.Since.Add(999 * time.Microsecond).In(time.FixedZone("", -7200))
	got, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	want := `{
 "name": "node-a",
 "publicKey": "bm9kZS1hAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
 "endpoints": [
  "node-a.example.net:51820",
  "192.0.2.7:51820",
  "[2001:db8::7]:51820"
 ],
 "prefixes": [
  {
   "prefix": "10.244.1.0/24",
   "since": "2026-03-01T12:00:00.25Z"
  }
 ],
 "pods": [
  {
   "prefix": "fd00::7/128",
   "since": "2026-03-01T12:01:00.25Z"
  }
 ],
 "addresses": [
  "192.0.2.7",
  "2001:db8::7"
 ],
 "since": "2026-03-01T12:00:00.25Z",
 "revision": 7
}`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
	back, err := registry.Decode("node-a", []byte(strings.Replace(want, `"name"`, `"addedLater": {"a": [1]}, "name"`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	r.Extra = map[string]json.RawMessage{"addedLater": json.RawMessage(`{"a":[1]}`)}
	if diff := cmp.Diff(r, back); diff != "" {
		t.Error(diff)
	}
	if _, err := registry.Decode("node-b", got); err == nil || !strings.Contains(err.Error(), `stored under "node-b"`) {
		t.Errorf("another's name: error %v", err)
	}
}

func TestValidate(t *testing.T) {
	prefix := netip.MustParsePrefix
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name   string
		change func(r *registry.Record)
		want   string // part of the error; empty for none
	}{
		{"good", func(*registry.Record) {}, ""},
		{"name with dots", func(r *registry.Record) { r.Name = "ip-10-0-0-1.eu-west-1.compute.internal" }, ""},
		{"no name", func(r *registry.Record) { r.Name = "" }, `record "": name: 0 characters: want 1 to 253`},
		{"long name", func(r *registry.Record) { r.Name = strings.Repeat("a", 254) }, "name: 254 characters"},
		{"upper case", func(r *registry.Record) { r.Name = "Node-A" }, `record "Node-A": name: want lower case`},
		{"path as name", func(r *registry.Record) { r.Name = "../x" }, "name: want"},
		{"hyphen first", func(r *registry.Record) { r.Name = "a.-b" }, "name: want"},
		{"no key", func(r *registry.Record) { r.PublicKey = wgtypes.Key{} }, "publicKey: none"},
		{"no revision", func(r *registry.Record) { r.Revision = 0 }, "revision: 0: want 1 to"},
		{"last revision", func(r *registry.Record) { r.Revision = math.MaxUint64 }, "revision: 18446744073709551615"},
		{"no since", func(r *registry.Record) { r.Since = time.Time{} }, "since: in the year 1:"},
		{"since beyond RFC 3339", func(r *registry.Record) { r.Since = now.AddDate(8000, 0, 0) }, "since: in the year 10026"},
		{"no endpoints", func(r *registry.Record) { r.Endpoints = nil }, ""},
		{"endpoint without port", func(r *registry.Record) { r.Endpoints[1] = "192.0.2.7" }, `endpoints[1]: "192.0.2.7": want host:port`},
		{"endpoint without brackets", func(r *registry.Record) { r.Endpoints[0] = "2001:db8::1:51820" }, "want host:port"},
		{"port 0", func(r *registry.Record) { r.Endpoints[0] = "a:0" }, `port "0": want 1 to 65535`},
		{"port 65536", func(r *registry.Record) { r.Endpoints[0] = "a:65536" }, `port "65536"`},
		{"no host", func(r *registry.Record) { r.Endpoints[0] = ":51820" }, "want an IP address or a DNS name"},
		{"mistyped address", func(r *registry.Record) { r.Endpoints[0] = "192.0.2.256:51820" }, "want an IP address or a DNS name"},
		{"unreachable address", func(r *registry.Record) { r.Endpoints[0] = "[::]:51820" }, "that other nodes can reach"},
		{"zone", func(r *registry.Record) { r.Endpoints[0] = "[fe80::1%eth0]:51820" }, "without a zone"},
		{"host with space", func(r *registry.Record) { r.Endpoints[0] = "a b:51820" }, `host "a b"`},
		{"65 endpoints", func(r *registry.Record) { r.Endpoints = make([]string, 65) }, "endpoints: 65 of them: want at most 64"},
		{"4097 claims", func(r *registry.Record) { r.Pods = make([]mesh.Claim, 4096) }, "prefixes and pods: 4097 of them"},
		{"257 addresses", func(r *registry.Record) { r.Addresses = make([]netip.Addr, 257) }, "addresses: 257 of them"},
		{"no address", func(r *registry.Record) { r.Addresses[1] = netip.Addr{} }, "addresses[1]:"},
		{"unmasked", func(r *registry.Record) { r.Prefixes[0].Prefix = prefix("10.244.1.1/24") }, "prefixes[0]: prefix 10.244.1.1/24: has bits set behind its length; want 10.244.1.0/24"},
		{"no prefix", func(r *registry.Record) { r.Pods[0].Prefix = netip.Prefix{} }, "pods[0]: prefix invalid Prefix: want"},
		{"mapped prefix", func(r *registry.Record) { r.Pods[0].Prefix = prefix("::ffff:10.0.0.0/104") }, "pods[0]: prefix"},
		{"claim without time", func(r *registry.Record) { r.Pods[0].Since = time.Time{} }, "pods[0]: since: in the year 1:"},
		{"tombstone", func(r *registry.Record) { *r = registry.Record{Name: "a", Revision: 1, Left: true} }, ""},
		{"tombstone that revokes", func(r *registry.Record) {
			*r = registry.Record{Name: "a", PublicKey: r.PublicKey, Revision: 1, Left: true}
		}, ""},
		{"tombstone with more", func(r *registry.Record) { r.Left = true }, "left: a tombstone has"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := registrytest.Record("node-a", 1)
			c.change(&r)
			err := r.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	good, err := json.Marshal(registrytest.Record("node-a", 1))
	if err != nil {
		t.Fatal(err)
	}
	with := func(field string) string { return string(good[:len(good)-1]) + "," + field + "}" }
	for _, c := range []struct{ name, text, want string }{
		{"truncated", string(good[:len(good)/2]), `record of "node-a": unexpected end of JSON input`},
		{"empty", "", `record of "node-a"`},
		{"newer version", with(`"version": 2`), `record of "node-a": version 2 is a newer version than 1, which this wgcni reads: upgrade wgcni on this node`},
		{"newer version with other types", `{"name": ["a"], "version": 3}`, "version 3 is a newer version"},
		{"no version of ours", with(`"version": -1`), "version: -1: want 1, or none"},
		{"a field in other letters", with(`"Revision": 9`), `field "Revision": want revision`},
		{"a seal of another form", with(`"seal": "v9:abc"`), "seal"},
	} {
		r, err := registry.Decode("node-a", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %+v, error %v; want %q", c.name, r, err, c.want)
		}
		if newer := strings.HasPrefix(c.name, "newer"); newer != errors.Is(err, registry.ErrVersion) {
			t.Errorf("%s: ErrVersion is %v", c.name, !newer)
		}
	}
	if _, err := registry.Decode("node-a", []byte(with(`"version": 1`))); err != nil {
		t.Errorf("version 1: %v", err)
	}
}

// The largest record that is valid must fit into what is decoded.
func TestLargestRecord(t *testing.T) {
	r := registrytest.Record("node-a", registry.MaxRevision)
	r.Name = strings.Repeat("a", 253)
	r.Endpoints, r.Addresses, r.Prefixes, r.Pods = nil, nil, nil, nil
	for range registry.MaxEndpoints {
		r.Endpoints = append(r.Endpoints, strings.Repeat("a.", 126)+"a:65535")
	}
	for range registry.MaxAddresses {
		r.Addresses = append(r.Addresses, netip.MustParseAddr("2001:db8:1111:2222:3333:4444:5555:6666"))
	}
	for range registry.MaxClaims {
		r.Pods = append(r.Pods, mesh.Claim{Prefix: netip.MustParsePrefix("2001:db8:1111:2222:3333:4444:5555:6666/128"), Since: r.Since})
	}
	data, err := json.MarshalIndent(r, "    ", "  ") // as in the file
	if err != nil {
		t.Fatal(err)
	}
	if _, err := registry.Decode(r.Name, data); err != nil {
		t.Errorf("%d bytes: %v", len(data), err)
	}
	if _, err := registry.Decode(r.Name, fmt.Appendf(nil, `{"endpoints": [%s""]}`, strings.Repeat(`"",`, registry.MaxRecordBytes))); err == nil {
		t.Error("a record of 3 MiB is decoded")
	}
}

func TestNextRevision(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	for _, c := range []struct {
		name string
		last uint64
		now  time.Time
		want uint64
	}{
		{"first", 0, now, 1_700_000_000_000},
		{"time has passed", 1_600_000_000_000, now, 1_700_000_000_000},
		{"twice in a millisecond", 1_700_000_000_000, now, 1_700_000_000_001},
		{"clock set back", 1_800_000_000_000, now, 1_800_000_000_001},
		{"clock before 1970", 5, time.UnixMilli(-1), 6},
	} {
		if got := registry.NextRevision(c.last, c.now); got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}

// FuzzRecord: decoding does not panic, and what is valid survives being stored.
func FuzzRecord(f *testing.F) {
	for _, r := range []registry.Record{registrytest.Record("node-a", 1), {Name: "b", Revision: 2, Left: true}} {
		data, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	rotating := registrytest.Record("node-a", 1)
	rotating.Rotation = rotation
	data, err := json.Marshal(rotating)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"name":"a","left":true,"revision":1,"version":1,"seal":"0badcafe:AAAA","x":"<\u2028","y":[1e999, {"z":null}]}`))
	f.Add([]byte(`{"name":"a","publicKey":"AAAA","since":"9999-12-31T23:59:59-23:59","revision":1e3}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r registry.Record
		if err := json.Unmarshal(data, &r); err != nil || r.Validate() != nil {
			return
		}
		stored, err := json.Marshal(r)
		if err != nil {
			t.Fatalf("%+v is valid, but: %v", r, err)
		}
		back, err := registry.Decode(r.Name, stored)
		if err != nil || !back.Equal(r) {
			t.Fatalf("%s became %+v, error %v", stored, back, err)
		}
		again, err := json.Marshal(back)
		if err != nil || string(again) != string(stored) {
			t.Fatalf("%s became %s, error %v", stored, again, err)
		}
	})
}
