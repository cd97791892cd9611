package registry_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

func TestSealSurvivesStorage(t *testing.T) {
	trust := registrytest.Secrets(t, 1)
	r := registrytest.Record("node-a", 7)
	r.Since = r.Since.Add(999 * time.Microsecond).In(time.FixedZone("", -7200)) // cut when it is stored
	r.Extra = map[string]json.RawMessage{"labels": json.RawMessage(`{"html":"\u003c\u0026\u003e"}`)}
	for name, r := range map[string]registry.Record{
		"record":    r,
		"tombstone": {Name: "node-a", PublicKey: r.PublicKey, Revision: 8, Left: true},
	} {
		r = registrytest.Seal(t, trust, r)
		if again := registrytest.Seal(t, trust, r); !again.Equal(r) {
			t.Errorf("%s: sealing it again makes another seal", name)
		}
		for _, form := range []func(any) ([]byte, error){json.Marshal, func(v any) ([]byte, error) { return json.MarshalIndent(v, "    ", "  ") }} {
			stored, err := form(r)
			if err != nil {
				t.Fatal(err)
			}
			back, err := registry.Decode("node-a", stored)
			if err != nil || !back.Equal(r) {
				t.Errorf("%s: %s is read as %+v, error %v", name, stored, back, err)
			}
			if err := trust.Check(back); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// A record sealed by a newer version, with fields that this one does not know,
// is good; one of them altered is not.
func TestSealCoversUnknownFields(t *testing.T) {
	trust := registrytest.Secrets(t, 1)
	r := registrytest.Record("node-a", 7)
	r.Extra = map[string]json.RawMessage{"site": json.RawMessage(`"Ulm"`), "hops": json.RawMessage(`[1,{"a":2}]`)}
	stored, err := json.Marshal(registrytest.Seal(t, trust, r))
	if err != nil {
		t.Fatal(err)
	}
	reordered := strings.Replace(string(stored), `"site":"Ulm",`, "", 1)
	reordered = strings.Replace(reordered, "{", `{ "site" : "Ulm" ,`, 1)
	for _, c := range []struct {
		text string
		want error
	}{
		{string(stored), nil},
		{reordered, nil},
		{strings.Replace(string(stored), "Ulm", "Rom", 1), identity.ErrForged},
		{strings.Replace(string(stored), `"site":"Ulm",`, "", 1), identity.ErrForged},
		{strings.Replace(string(stored), "{", `{"new":1,`, 1), identity.ErrForged},
		{strings.Replace(string(stored), `"seal"`, `"seal2"`, 1), identity.ErrUnsealed},
	} {
		r, err := registry.Decode("node-a", []byte(c.text))
		if err == nil {
			err = trust.Check(r)
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", c.text, err, c.want)
		}
	}
}

// Whatever one changes in a sealed record that means something, it is refused.
func TestEveryAlterationIsFound(t *testing.T) {
	trust := registrytest.Secrets(t, 1)
	good := registrytest.Seal(t, trust, registrytest.Record("node-a", 7))
	stored, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 3000 {
		text := append([]byte(nil), stored...)
		switch i := random.IntN(len(text)); random.IntN(3) {
		case 0:
			text[i] ^= 1 << random.IntN(8)
		case 1:
			text = text[:i]
		default:
			text = append(text[:i], text[i+1:]...)
		}
		r, err := registry.Decode("node-a", text)
		if err == nil {
			err = trust.Check(r)
		}
		if err == nil && !r.Equal(good) {
			t.Errorf("accepted: %s", text)
		}
	}
	for name, alter := range map[string]func(*registry.Record){
		"revision": func(r *registry.Record) { r.Revision++ },
		"endpoint": func(r *registry.Record) { r.Endpoints = []string{"198.51.100.66:51820"} },
		"prefix":   func(r *registry.Record) { r.Prefixes[0].Prefix = netip.MustParsePrefix("10.244.2.0/24") },
		"since":    func(r *registry.Record) { r.Prefixes[0].Since = r.Prefixes[0].Since.Add(-time.Hour) },
		"name":     func(r *registry.Record) { r.Name = "node-b" },
		"left":     func(r *registry.Record) { *r = registry.Record{Name: r.Name, Revision: 8, Left: true, Seal: r.Seal} },
	} {
		r := registrytest.Record("node-a", 7)
		r.Seal = good.Seal
		alter(&r)
		if err := trust.Check(r); !errors.Is(err, identity.ErrForged) {
			t.Errorf("%s altered: error %v", name, err)
		}
	}
}

func TestTrust(t *testing.T) {
	two := registrytest.Secrets(t, 2)
	first, second := registry.Trust{Secrets: two.Secrets[:1]}, registry.Trust{Secrets: two.Secrets[1:]}
	swapped := registry.Trust{Secrets: identity.Secrets{two.Secrets[1], two.Secrets[0]}}
	rollout := registry.Trust{Secrets: two.Secrets[:1], AcceptUnsealed: true}
	record := registrytest.Record("node-a", 7)
	for _, c := range []struct {
		name          string
		sealed, check registry.Trust
		want          error
	}{
		{"no secret anywhere", registry.Trust{}, registry.Trust{}, nil},
		{"sealed, read by a node without a secret", first, registry.Trust{}, nil},
		{"not sealed", registry.Trust{}, first, identity.ErrUnsealed},
		{"not sealed, while changing over", registry.Trust{}, rollout, nil},
		{"sealed, while changing over", first, rollout, nil},
		{"sealed by others, while changing over", second, rollout, identity.ErrUnknownSecret},
		{"another secret", second, first, identity.ErrUnknownSecret},
		{"old secret, both known", first, two, nil},
		{"new secret, both known", swapped, two, nil},
		{"old secret, both known and the new one seals", first, swapped, nil},
		{"old secret, given up", first, second, identity.ErrUnknownSecret},
	} {
		r, err := c.sealed.Seal(record)
		if err != nil {
			t.Fatal(err)
		}
		err = c.check.Check(r)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", c.name, err, c.want)
		}
		if err != nil && !strings.Contains(err.Error(), "record node-a: ") {
			t.Errorf("%s: the error does not name the record: %v", c.name, err)
		}
		for _, s := range two.Secrets {
			if strings.Contains(fmt.Sprintf("%v %+v %#v", err, r, c.check), s.Reveal()) {
				t.Errorf("%s: a secret is shown", c.name)
			}
		}
	}
}
