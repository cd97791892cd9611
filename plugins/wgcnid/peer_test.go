package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// newPeerMesh is the mesh of nodes a, b and c, with ranges for peers.
func newPeerMesh(t *testing.T, secrets int, peerCIDRs ...string) *testMesh {
	t.Helper()
	m := newMesh(t, secrets)
	if len(peerCIDRs) == 0 {
		peerCIDRs = []string{"10.99.0.0/29", "fc99::/64"}
	}
	m.configure(t, "peerCIDRs", peerCIDRs)
	m.publish(entryRecord("a", 1), entryRecord("b", 2), entryRecord("c", 3))
	return m
}

// configure sets a key of the stanza.
func (m *testMesh) configure(t *testing.T, key string, value any) {
	t.Helper()
	text, err := os.ReadFile(m.conf)
	m.must(err)
	var stanza map[string]any
	m.must(json.Unmarshal(text, &stanza))
	stanza[key] = value
	text, err = json.Marshal(stanza)
	m.must(err)
	m.must(os.WriteFile(m.conf, text, 0o600))
}

var joinedAt = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func entryRecord(name string, n byte) registry.Record {
	since := joinedAt
	claim := func(p string) mesh.Claim { return mesh.Claim{Prefix: netip.MustParsePrefix(p), Since: since} }
	d := string('0' + n)
	return registry.Record{
		Name: name, PublicKey: wgtypes.Key{n}, Since: since, Revision: 1,
		Endpoints: []string{"192.0.2." + d + ":51820"}, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2." + d)},
		Prefixes: []mesh.Claim{claim("10.244." + d + ".0/24"), claim("fd00:244:" + d + "::/64")},
	}
}

func (m *testMesh) addPeer(args ...string) (file string) {
	m.t.Helper()
	out, _, err := m.run(append([]string{"peer", "add"}, args...)...)
	m.must(err)
	return out
}

func TestPeerAdd(t *testing.T) {
	m := newPeerMesh(t, 1)
	out, errs, err := m.run("peer", "add", "laptop", "--via", "a", "--via", "b")
	m.must(err)
	r := m.stored("laptop")
	want := registry.Record{
		Name: "laptop", PublicKey: r.PublicKey, Since: r.Since, Revision: r.Revision, Seal: r.Seal,
		Prefixes: []mesh.Claim{{Prefix: netip.MustParsePrefix("10.99.0.1/32"), Since: r.Since}, {Prefix: netip.MustParsePrefix("fc99::1/128"), Since: r.Since}},
		Place:    registry.Place{Via: []string{"a", "b"}},
	}
	equalTo(t, want, r)
	private := regexp.MustCompile(`(?m)^PrivateKey = (.*)$`).FindStringSubmatch(out)
	if private == nil {
		t.Fatal("no private key in the file")
	}
	key, err := identity.ParsePrivateKey(private[1])
	if err != nil || key.Public() != r.PublicKey {
		t.Errorf("the private key is of another public one, or %v", err)
	}
	psk := func(n byte) string {
		return m.trust.Secrets[0].PresharedKey(wgtypes.Key{n}, r.PublicKey).String()
	}
	hooks := regexp.MustCompile(`(?m)^(PostUp|PreDown) = .*$`)
	for _, hook := range hooks.FindAllString(out, -1) {
		// '#' begins a comment in wg-quick's files, and its save mangles '&'.
		if strings.ContainsAny(hook, "#&\\") {
			t.Errorf("a hook has characters that wg-quick treats as its own: %s", hook)
		}
	}
	if diff := cmp.Diff(strings.NewReplacer("PRIVATE", private[1], "PSK-A", psk(1), "PSK-B", psk(2)).Replace(`# wgcni peer laptop
[Interface]
PrivateKey = PRIVATE
Address = 10.99.0.1/32, fc99::1/128
MTU = 1420
# Watches the entry node in use, and goes on to the next when that is gone for about 6 s.
HOOK
HOOK

# a
[Peer]
PublicKey = AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
PresharedKey = PSK-A
Endpoint = 192.0.2.1:51820
PersistentKeepalive = 25
AllowedIPs = 10.244.1.0/32, fd00:244:1::/128, 10.99.0.0/29, 10.244.0.0/16, fc99::/64, fd00::/16

# b
[Peer]
PublicKey = AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
PresharedKey = PSK-B
Endpoint = 192.0.2.2:51820
PersistentKeepalive = off
AllowedIPs = 10.244.2.0/32, fd00:244:2::/128
`), hooks.ReplaceAllString(out, "HOOK")); diff != "" {
		t.Errorf("the file (-want +got):\n%s", diff)
	}
	for _, want := range []string{"laptop is added: 10.99.0.1/32 fc99::1/128, by a, then b.", "wg-quick up wgcni", "not shown again"} {
		if !strings.Contains(errs, want) {
			t.Errorf("%q does not say %q", errs, want)
		}
	}
	if strings.Contains(errs, private[1]) {
		t.Error("the private key is on stderr")
	}
	again, errs, err := m.run("peer", "config", "laptop")
	if err != nil || errs != "" || strings.Contains(again, private[1]) {
		t.Errorf("again: %q, %v", errs, err)
	}
	if want := strings.Replace(out, "PrivateKey = "+private[1], `# Put the private key here: the one of the machine's old file. Until then wg-quick
# refuses this file. Nobody has kept it, where it was made by wgcnid.
PrivateKey = THE-PRIVATE-KEY-OF-laptop`, 1); again != want {
		t.Error(cmp.Diff(want, again))
	}
	keyFile := filepath.Join(t.TempDir(), "laptop.key")
	m.must(os.WriteFile(keyFile, []byte(private[1]+"\n"), 0o600))
	if again, _, err = m.run("peer", "config", "laptop", "--private-key-file", keyFile); err != nil || again != out {
		t.Errorf("with the private key: %v, %s", err, cmp.Diff(out, again))
	}
}

// Addresses are the lowest free ones, those of whoever was removed among them.
func TestPeerAddresses(t *testing.T) {
	m := newPeerMesh(t, 0)
	addresses := func(name string) string { return strings.Join(texts(claimed(m.stored(name))), " ") }
	for _, step := range []struct{ do, name, want string }{
		{"add", "one", "10.99.0.1/32 fc99::1/128"},
		{"add", "two", "10.99.0.2/32 fc99::2/128"},
		{"add", "three --address 10.99.0.4", "10.99.0.4/32"},
		{"add", "four", "10.99.0.3/32 fc99::3/128"},
		{"remove", "two", ""},
		{"add", "five", "10.99.0.2/32 fc99::2/128"},
		{"add", "six", "10.99.0.5/32 fc99::4/128"},
		{"add", "seven --address fc99::77 --address 10.99.0.6/32", "fc99::77/128 10.99.0.6/32"},
		{"add", "two --address fc99::78", "fc99::78/128"},
	} {
		_, _, err := m.run(append([]string{"peer", step.do}, strings.Fields(step.name)...)...)
		if name, _, _ := strings.Cut(step.name, " "); err != nil || addresses(name) != step.want {
			t.Errorf("%s %s: %q, %v; want %q", step.do, step.name, addresses(name), err, step.want)
		}
	}
	_, _, err := m.run("peer", "add", "nine")
	if want := "all addresses of peerCIDRs (10.99.0.0/29 fc99::/64) are taken"; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%v, want %s", err, want)
	}
}

// Many are added at one moment, on several nodes: each has addresses of its own.
func TestPeersAtOneMoment(t *testing.T) {
	m := newPeerMesh(t, 1, "10.99.0.0/24")
	const many = 12
	var wg sync.WaitGroup
	errs := make([]error, many)
	for i := range many {
		wg.Go(func() {
			root := rootCommand()
			root.SetOut(new(bytes.Buffer))
			root.SetErr(new(bytes.Buffer))
			root.SetArgs([]string{"peer", "add", "peer-" + string(rune('a'+i)), "--config", m.conf})
			errs[i] = root.ExecuteContext(t.Context())
		})
	}
	wg.Wait()
	owner := map[netip.Prefix]string{}
	for i, err := range errs {
		name := "peer-" + string(rune('a'+i))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, p := range claimed(m.stored(name)) {
			if owner[p] != "" {
				t.Errorf("%s has %s as well as %s", name, p, owner[p])
			}
			owner[p] = name
		}
	}
	if len(owner) != many {
		t.Errorf("%d addresses of %d", len(owner), many)
	}
}

func TestPeerRefused(t *testing.T) {
	key := wgtypes.Key{200}.String()
	for _, tt := range []struct {
		args string
		prep func(m *testMesh)
		want string
	}{
		{"add", nil, "name one peer: `wgcnid peer add NAME`"},
		{"add Laptop", nil, `record "Laptop": name: want lower case`},
		{"add b", nil, "b is the name of a node: choose another"},
		{"add phone", nil, "there is a peer phone: print its file again"},
		{"add b --replace", nil, "b is the name of a node: choose another"},
		{"add laptop --address 10.98.0.1", nil, "--address: 10.98.0.1 is not inside peerCIDRs (10.99.0.0/29 fc99::/64)"},
		{"add laptop --address 10.99.0.0", nil, "--address: 10.99.0.0 is the first or the last of 10.99.0.0/29"},
		{"add laptop --address 10.99.0.7", nil, "--address: 10.99.0.7 is the first or the last"},
		{"add laptop --address 10.99.0.1", nil, "--address: 10.99.0.1 is taken: phone has 10.99.0.1/32"},
		{"add laptop --address 10.99.0.5", nil, "--address: 10.99.0.5 is taken: 10.99.0.5 is an address of node-d"},
		{"add laptop --address 10.99.0.6", nil, "--address: 10.99.0.6 is taken: 10.99.0.6:51820 is the endpoint of node-d"},
		{"add laptop --address 10.99.0.3 --address 10.99.0.4", nil, "--address: at most one of each family"},
		{"add laptop --address 10.99.0.0/30", nil, `--address: "10.99.0.0/30" is no single address`},
		{"add laptop --via node-e", nil, `--via: no node "node-e": did you mean "node-d"?`},
		{"add laptop --via phone", nil, "--via: phone is a peer itself"},
		{"add laptop --via gone", nil, "--via: gone has left the mesh"},
		{"add laptop --via shy", nil, "--via: shy has no endpoint"},
		{"add laptop --via a --via a", nil, "--via: a is named twice"},
		{"add laptop --via a --segment lab", nil, "--via: a is in segments that laptop is not in (it has none), and would let others"},
		{"add laptop --endpoint 203.0.113.1", nil, `record laptop: endpoints[0]: "203.0.113.1": want host:port`},
		{"add laptop --endpoint 10.244.2.9:51820", nil, "--endpoint: 10.244.2.9:51820 lies inside 10.244.2.0/24 of b"},
		{"add laptop --subnet 192.168.1.0/24", nil, "--subnet: only with --nat"},
		{"add laptop --nat --segment lab", nil, "--segment: with --nat"},
		{"add laptop --nat --subnet 10.244.77.0/24", nil, "--subnet: 10.244.77.0/24 overlaps 10.244.0.0/16 of clusterCIDRs"},
		{"add laptop --nat --subnet 192.168.1.7/24", nil, `--subnet: "192.168.1.7/24" is no range`},
		{"add laptop --nat --subnet 192.168.0.0/16", nil, "--subnet: 192.168.0.0/16 overlaps 192.168.1.0/24 of site, which enters by a too"},
		{"add laptop --nat --subnet 192.0.2.0/24", nil, "--subnet: 192.0.2.0/24 has the address 192.0.2.1 of its entry a in it"},
		{"add laptop --public-key " + key[1:], nil, "--public-key: not a key as `wg pubkey` prints it"},
		{"add laptop --public-key " + wgtypes.Key{2}.String(), nil, "--public-key: b has the same"},
		{"add laptop --public-key " + wgtypes.Key{9}.String(), nil, "--public-key: it was revoked when thief was removed"},
		{"add laptop --key-path /etc/x", nil, "--key-path: the private key is made here"},
		{"add laptop --key-path x.key --public-key " + key, nil, `--key-path: "x.key" goes into a command line`},
		{"add laptop --key-path /x;reboot --public-key " + key, nil, `--key-path: "/x;reboot" goes into a command line`},
		{"add laptop --allowed-ips 10.0.0.0/8,x", nil, `--allowed-ips: "x" is no range`},
		{"add laptop", func(m *testMesh) { m.configure(m.t, "peerCIDRs", nil) }, `"peerCIDRs" is not set, and the machine needs an address: set it`},
		{"add laptop", func(m *testMesh) { m.must(os.RemoveAll(filepath.Dir(m.path))) }, "the registry is away: "},
		{"config laptop", nil, "no peer \"laptop\": `wgcnid peer list` lists all"},
		{"config phobe", nil, `no peer "phobe": did you mean "phone"?`},
		{"config b", nil, "b is a node, which runs wgcnid"},
		{"config gone", nil, "gone is no peer any more"},
		{"config phone --qr", nil, "--qr: a phone can do nothing without the private key"},
		{"config phone --via b", nil, "--via: phone does not enter by b, but by a"},
		{"config phone --private-key-file /missing", nil, "--private-key-file: open /missing"},
		{"config phone --renew", nil, "--renew: this node has no cluster secret"},
		{"remove b", nil, "b is a node, which runs wgcnid: `wgcnid nodes` lists them, and `wgcnid forget` removes one"},
		{"remove phobe", nil, `no peer "phobe": did you mean "phone"?`},
	} {
		t.Run(tt.args, func(t *testing.T) {
			m := newPeerMesh(t, 0)
			d, shy := entryRecord("node-d", 4), entryRecord("shy", 5)
			d.Endpoints, d.Addresses = []string{"10.99.0.6:51820"}, []netip.Addr{netip.MustParseAddr("10.99.0.5")}
			shy.Endpoints = nil
			m.publish(d, shy, tombstone("gone", 1), registry.Record{Name: "thief", PublicKey: wgtypes.Key{9}, Left: true, Revision: 1})
			m.addPeer("phone")
			m.addPeer("site", "--nat", "--subnet", "192.168.1.0/24")
			if tt.prep != nil {
				tt.prep(m)
			}
			before, _ := os.ReadFile(m.path)
			out, _, err := m.run(append([]string{"peer"}, strings.Fields(tt.args)...)...)
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("%v, want %s", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), key[1:]) {
				t.Errorf("%v quotes what may be a private key", err)
			}
			if after, _ := os.ReadFile(m.path); out != "" || !bytes.Equal(before, after) {
				t.Errorf("it was done all the same: %s", out)
			}
		})
	}
}

// Another machine in its place has its addresses and none of the rest.
func TestPeerReplaced(t *testing.T) {
	m := newPeerMesh(t, 1)
	m.addPeer("other")
	m.addPeer("laptop", "--via", "a")
	before := m.stored("laptop")
	m.addPeer("laptop", "--replace", "--via", "b", "--via", "c")
	after := m.stored("laptop")
	if !slices.Equal(claimed(after), claimed(before)) || after.PublicKey == before.PublicKey || !slices.Equal(after.Via, []string{"b", "c"}) || !after.Since.After(before.Since) {
		t.Errorf("it was %+v and is %+v", before, after)
	}
	m.publish(tombstone("b", 5))
	file, errs, err := m.run("peer", "config", "laptop")
	if err != nil || strings.Count(file, "[Peer]") != 1 || !strings.Contains(errs, "b, by which laptop enters, is no member any more") {
		t.Errorf("%v, %q\n%s", err, errs, file)
	}
	m.publish(tombstone("c", 5))
	if _, _, err = m.run("peer", "config", "laptop"); err == nil || !strings.Contains(err.Error(), "wgcnid peer add laptop --replace --via NODE") {
		t.Errorf("error %v", err)
	}
}

// By default the gateways are the entry nodes.
func TestPeerEntersByGateways(t *testing.T) {
	m := newPeerMesh(t, 0)
	for _, name := range []string{"b", "c"} {
		r := m.stored(name)
		r.Role, r.Revision = mesh.RoleGateway, 2
		m.publish(r)
	}
	file := m.addPeer("laptop")
	if got := m.stored("laptop").Via; !slices.Equal(got, []string{"b", "c"}) {
		t.Errorf("it enters by %v", got)
	}
	if strings.Count(file, "[Peer]") != 2 {
		t.Errorf("the file is\n%s", file)
	}
	plain, _, err := m.run("peer", "config", "laptop", "--no-failover", "--via", "c")
	if err != nil || strings.Count(plain, "[Peer]") != 1 || !strings.Contains(plain, "192.0.2.3:") || strings.Contains(plain, "PostUp") {
		t.Errorf("%v\n%s", err, plain)
	}
}
