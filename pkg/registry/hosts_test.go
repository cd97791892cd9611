package registry_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// A version that does not know hosts reads them as one of the Extra fields, and
// must find the same seal: the stored form has them exactly where it puts those.
func TestHostsStandAmongTheExtraFields(t *testing.T) {
	r := registrytest.Record("node-a", 7)
	r.Hosts = []mesh.Claim{{Prefix: netip.MustParsePrefix("192.0.2.7/32"), Since: r.Since.Add(time.Microsecond)}}
	r.Extra = map[string]json.RawMessage{"aaa": json.RawMessage(`1`), "zzz": json.RawMessage(`"\u003c"`)}
	got, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	older := r
	older.Hosts = nil
	older.Extra = map[string]json.RawMessage{
		"aaa": r.Extra["aaa"], "zzz": r.Extra["zzz"],
		"hosts": json.RawMessage(`[{"prefix":"192.0.2.7/32","since":"2026-03-01T12:00:00.25Z"}]`),
	}
	want, err := json.Marshal(older)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("(-older +this):\n%s", diff)
	}
	if !strings.HasSuffix(string(got), `"revision":7,"aaa":1,"hosts":[{"prefix":"192.0.2.7/32","since":"2026-03-01T12:00:00.25Z"}],"zzz":"\u003c"}`) {
		t.Errorf("stored form: %s", got)
	}
	back, err := registry.Decode("node-a", got)
	if err != nil || !back.Equal(r) || len(back.Extra) != 2 || len(back.Hosts) != 1 {
		t.Errorf("decoded: %+v, %v", back, err)
	}
	if back.Hosts = nil; back.Equal(r) {
		t.Error("a record without the hosts is equal")
	}
}

func TestValidateHosts(t *testing.T) {
	claim := mesh.Claim{Prefix: netip.MustParsePrefix("192.0.2.7/32"), Since: registrytest.Record("a", 1).Since}
	for _, tt := range []struct {
		name   string
		change func(*registry.Record)
		want   string
	}{
		{"good", func(*registry.Record) {}, ""},
		{"no single address", func(r *registry.Record) { r.Hosts[0].Prefix = netip.MustParsePrefix("192.0.2.0/24") }, ""}, // for mesh.Owners
		{"none", func(r *registry.Record) { r.Hosts[0].Prefix = netip.Prefix{} }, "hosts[0]: prefix invalid Prefix"},
		{"no time", func(r *registry.Record) { r.Hosts[0].Since = time.Time{} }, "hosts[0]: since: in the year 1:"},
		{"too many", func(r *registry.Record) { r.Hosts = make([]mesh.Claim, 65) }, "hosts: 65 of them: want at most 64"},
		{"in a tombstone", func(r *registry.Record) { *r = registry.Record{Name: "a", Revision: 1, Left: true, Hosts: r.Hosts} }, "left: a tombstone has"},
	} {
		r := registrytest.Record("node-a", 1)
		r.Hosts = []mesh.Claim{claim}
		tt.change(&r)
		if err := r.Validate(); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.want)
		}
	}
}
