package main

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

func TestSealNote(t *testing.T) {
	two := registrytest.Secrets(t, 2)
	one, open := registry.Trust{Secrets: two.Secrets[:1]}, registry.Trust{Secrets: two.Secrets, AcceptUnsealed: true}
	records := registry.NewSnapshot(
		registrytest.Seal(t, one, registrytest.Record("a", 1)), registrytest.Record("c", 1), registrytest.Record("b", 1), tombstone("d", 1),
	)
	unread := errors.New("cluster secret: open /etc/wgcni/secret: no such file\nor so")
	for _, tt := range []struct {
		name    string
		trust   registry.Trust
		err     error
		stopped bool
		want    string
	}{
		{"none", registry.Trust{}, nil, false, "none: whoever can write to the registry is trusted; see `wgcnid secret --help`"},
		{"one", one, nil, false, "by secret 11111111"},
		{"two", two, nil, false, "by secret 11111111, accepted as well: 22222222"},
		{"preferred", open, nil, false, `by secret 11111111, accepted as well: 22222222; a record without a seal counts too ("seal" is "preferred"), not sealed yet: 2: b c`},
		{"unreadable", registry.Trust{}, unread, false, "the secrets cannot be read, and wgcnid goes on with those it has: cluster secret: open /etc/wgcni/secret: no such file; or so"},
		{"unreadable, no helper", registry.Trust{}, unread, true, "the secrets cannot be read, and wgcnid will not start: cluster secret: open /etc/wgcni/secret: no such file; or so"},
	} {
		got := sealNote(Status{Helper: !tt.stopped, Seal: sealStatus(tt.trust, tt.err, records)})
		for i, s := range two.Secrets {
			got = strings.ReplaceAll(got, string(s.ID()), strings.Repeat(string(rune('1'+i)), 8))
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// Without the secrets, a kernel that holds all else as planned holds the plan.
func TestTakePresharedKeys(t *testing.T) {
	trust := registrytest.Secrets(t, 1)
	prefix := netip.MustParsePrefix("10.244.2.0/24")
	facts := mesh.Facts{
		Settings: mesh.Settings{ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, Interface: "wgcni0", ListenPort: 51820, MTU: 1420, FwMark: 4, Table: 7, RulePriority: 110},
		Self:     mesh.Node{Name: "a", PublicKey: keyA},
		Nodes:    []mesh.Node{{Name: "b", PublicKey: keyB, Endpoint: placeB, Prefixes: []mesh.Claim{{Prefix: prefix, Since: now}}}},
	}
	plan := mesh.NewPlan(facts)
	facts.Nodes[0].PresharedKey = mesh.FingerprintOf(trust.Secrets[0].PresharedKey(keyA, keyB))
	held := mesh.NewPlan(facts).State
	c := mesh.Context{Now: now}
	o := reconcile.Outcome{Observed: held, Plan: plan, Ops: mesh.Diff(held, plan.State, c)}
	if len(o.Ops) == 0 {
		t.Fatal("a key too many is no difference")
	}
	takePresharedKeys(&o, c)
	if len(o.Ops) > 0 {
		t.Errorf("it differs by\n%s", mesh.Text(o.Ops))
	}
	if s := peerStatuses(o, now); len(s) != 1 || !s[0].PresharedKey {
		t.Errorf("peers %+v", s)
	}
	if plan.Peers[0].PresharedKey != (mesh.Fingerprint{}) {
		t.Error("the plan of before was altered")
	}
	o.Observed.Peers = []mesh.Peer{{PublicKey: wgtypes.Key{9}}}
	takePresharedKeys(&o, c)
	if !strings.Contains(mesh.Text(o.Ops), keyB.String()) {
		t.Errorf("a peer that is missing is not missed:\n%s", mesh.Text(o.Ops))
	}
}

// The whole command answers although the secret cannot be read.
func TestStatusWithoutSecret(t *testing.T) {
	m := newMesh(t, 1)
	m.cache(registrytest.Record("b", 1))
	key, err := identity.LoadOrCreate(m.config.StateDir)
	m.must(err)
	m.must(os.Remove(m.secretFile()))
	out, errs := m.apart("status", "--config", m.conf)
	want := "seal       the secrets cannot be read, and wgcnid will not start: cluster secret: open " + m.secretFile() + ": no such file or directory: copy it"
	if !strings.HasPrefix(out, "No. Pod traffic to other nodes is dropped: interface wgcni0 is missing") || !strings.Contains(out, want) || errs != "" {
		t.Errorf("%s%s", out, errs)
	}
	out, _ = m.apart("status", "--json", "--config", m.conf)
	var s Status
	m.must(json.Unmarshal([]byte(out), &s))
	if s.Seal == nil || !strings.Contains(s.Seal.Error, m.secretFile()) || len(s.Peers) != 1 || s.PublicKey != key.Public().String() {
		t.Errorf("%+v", s)
	}
}

// A node whose key was revoked says so.
func TestStatusForgotten(t *testing.T) {
	m := newMesh(t, 1)
	key, err := identity.LoadOrCreate(m.config.StateDir)
	m.must(err)
	m.cache(registry.Record{Name: "a", PublicKey: key.Public(), Left: true, Revision: 2}, registrytest.Record("b", 1))
	out, errs := m.apart("status", "--config", m.conf)
	if !strings.HasPrefix(out, "No. Pod traffic to other nodes is dropped: the mesh has forgotten this node and revoked its key. To join again, stop wgcnid") || errs != "" {
		t.Errorf("%s%s", out, errs)
	}
	if _, err := os.Stat(filepath.Join(m.config.StateDir, "private.key")); err != nil {
		t.Error(err)
	}
}

// A node's life, with the real tunnel: none of it needs a process that can be
// dumped, and the secret is not needed to say what the kernel holds.
func TestNodeWithoutSecret(t *testing.T) {
	m := newMesh(t, 1, "endpoint", "192.0.2.1:51820")
	b := registrytest.Record("b", 1)
	b.Endpoints, b.Prefixes[0].Prefix, b.Pods = b.Endpoints[1:2], podsB[0], nil
	m.publish(b)
	steps := m.inside(`
		"$wgcnid" sync --config "$conf"; echo --
		"$wgcnid" status --config "$conf"; echo --
		"$wgcnid" status --config "$conf" --json; echo --
		rm "$secret"
		"$wgcnid" status --config "$conf"; echo --
		"$wgcnid" leave --force --config "$conf" 2>&1; echo --
		ip -o link show type tun; ip rule list | grep 30567 || true`)
	const encrypted = "Yes. Pod traffic to the other node is encrypted; nothing leaves in the clear.\n"
	for i, want := range []string{"preshared-key (hidden)", encrypted, `"presharedKey": true`, encrypted, "a has left the mesh"} {
		if !strings.Contains(steps[i], want) {
			t.Errorf("step %d: no %s in\n%s", i, want, steps[i])
		}
	}
	if !strings.Contains(steps[3], m.secretFile()) || strings.Contains(steps[3], "pending") {
		t.Errorf("without the secret:\n%s", steps[3])
	}
	if left := strings.TrimSpace(steps[5]); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	if got := m.stored("a"); got.PublicKey == (wgtypes.Key{}) || got.Seal.Secret != m.trust.Secrets.Current() {
		t.Errorf("its record is %+v", got)
	}
}
