package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

var (
	now           = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	keyA          = wgtypes.Key{1}
	keyB          = wgtypes.Key{2}
	podsB         = []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}
	placeB        = netip.MustParseAddrPort("192.0.2.2:51820")
	exampleConfig = config.Config{NodeName: "a", Settings: mesh.Settings{Interface: "wgcni0"}}
)

// observedPeer is b as the kernel shows it.
func observedPeer(change func(*mesh.Peer)) mesh.Peer {
	p := mesh.Peer{
		PublicKey: keyB, Endpoint: placeB, AllowedIPs: podsB,
		LastHandshake: now.Add(-42 * time.Second), ReceiveBytes: 1 << 20, TransmitBytes: 1536,
	}
	change(&p)
	return p
}

// newStatus is the status of node a, which plans the peer b and has these.
func newStatus(has ...mesh.Peer) Status {
	o := reconcile.Outcome{Observed: mesh.State{Peers: has}}
	o.Plan.Peers = []mesh.Peer{{Name: "b", PublicKey: keyB, Endpoint: placeB, AllowedIPs: podsB}}
	return Status{
		Time: now, Node: "a", PublicKey: keyA.String(), Helper: true, Registry: "file:/srv/shared/mesh.json",
		Interface: &LinkStatus{Name: "wgcni0", MTU: 1440, Up: true, ListenPort: 51820},
		Pods:      3, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, Peers: peerStatuses(o, now),
	}
}

func connected() Status { return newStatus(observedPeer(func(*mesh.Peer) {})) }

func outcast(s Status) Status {
	s.Report = &reconcile.Report{Forgotten: true}
	return s
}

const head = `
node       a, 3 pods, prefixes 10.244.1.0/24
interface  wgcni0, UDP port 51820, MTU 1440, public key AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
helper     running
registry   file:/srv/shared/mesh.json
seal       none: whoever can write to the registry is trusted; see ` + "`wgcnid secret --help`" + `
dropped    0 plaintext packets on their way out, 0 on their way in

`

const connectedTable = `PEER  ENDPOINT         HANDSHAKE  RECEIVED  SENT      PREFIXES       STATE
b     192.0.2.2:51820  42s ago    1.00 MiB  1.50 KiB  10.244.2.0/24  connected
`

func TestPrintStatus(t *testing.T) {
	const encrypted = "Yes. Pod traffic to the other node is encrypted; nothing leaves in the clear.\n"
	const rejoins = " To join again, stop wgcnid, run `wgcnid leave --purge` and start it.\n"
	preferred := exampleConfig
	preferred.Encryption = mesh.Preferred
	long := now.Add(-time.Hour)
	for _, tt := range []struct {
		name   string
		config config.Config
		status func() Status
		ok     bool
		want   string
	}{
		{"connected", exampleConfig, connected, true, encrypted + head + connectedTable},
		{"two peers", exampleConfig, func() Status {
			s := connected()
			s.Peers = append(s.Peers, PeerStatus{Name: "c", State: stateWaiting})
			return s
		}, true, "Yes. Pod traffic to all 2 other nodes is encrypted; nothing leaves in the clear.\n" + head + `PEER  ENDPOINT         HANDSHAKE  RECEIVED  SENT      PREFIXES       STATE         REASON
b     192.0.2.2:51820  42s ago    1.00 MiB  1.50 KiB  10.244.2.0/24  connected
c     -                never      0 B       0 B       none           no handshake  nothing was sent yet; the first packet starts a handshake
`},
		{"no peers", exampleConfig, func() Status {
			s := newStatus()
			s.Peers = []PeerStatus{}
			return s
		}, true, "Nothing to encrypt. No other node has joined yet; pod traffic to other nodes is dropped, nothing leaves in the clear.\n" + head +
			"PEER  ENDPOINT  HANDSHAKE  RECEIVED  SENT  PREFIXES  STATE\n"},
		{"fragments", exampleConfig, func() Status {
			s := connected()
			s.Interface.Fragments = "packets of more than 1220 bytes leave in fragments: mend it"
			return s
		}, true, encrypted + strings.Replace(head, "helper ", "           packets of more than 1220 bytes leave in fragments: mend it\nhelper ", 1) + connectedTable},
		{"rotation", exampleConfig, func() Status {
			s := connected()
			s.Report = &reconcile.Report{Rotation: &reconcile.RotationReport{Stage: mesh.Out, Pairs: 5, Moved: 3, Waiting: []reconcile.RotationWait{
				{Node: "node-c", Why: "no handshake on UDP port 51821"}, {Node: "d", Why: "x"}, {Node: "e", Why: "y"}, {Node: "f", Why: "z"},
			}}}
			return s
		}, true, encrypted + strings.Replace(head, "helper ", "rotation   of this node's key: moving to the new key: 3 of 5 pairs moved; waits for node-c: no handshake on UDP port 51821; "+
			"waits for d: x; waits for e: y; and for 1 more, which `wgcnid key show` lists\nhelper ", 1) + connectedTable},
		{"rotation of a helper that is gone", exampleConfig, func() Status {
			s := connected()
			s.Helper = false
			s.Report = &reconcile.Report{At: now, Rotation: &reconcile.RotationReport{Stage: mesh.Back}}
			return s
		}, true, encrypted + strings.Replace(strings.Replace(head, "helper ", "rotation   of this node's key: the new key is in use, moving back to the first interface "+
			"(as wgcnid saw it last, at 2026-01-02 03:04:05; it goes on when it runs)\nhelper ", 1), "running", "NOT running: traffic flows, changes are not followed", 1) + connectedTable},
		{"idle", exampleConfig, func() Status {
			return newStatus(observedPeer(func(p *mesh.Peer) { p.LastHandshake = now.Add(-time.Hour) }))
		}, true, encrypted + head + `PEER  ENDPOINT         HANDSHAKE   RECEIVED  SENT      PREFIXES       STATE  REASON
b     192.0.2.2:51820  1h0m0s ago  1.00 MiB  1.50 KiB  10.244.2.0/24  idle   nothing was sent lately; the next packet starts a handshake
`},
		{"never a handshake", exampleConfig, func() Status {
			return newStatus(observedPeer(func(p *mesh.Peer) {
				p.LastHandshake, p.ReceiveBytes, p.TransmitBytes = time.Time{}, 0, 148
			}))
		}, true, "No. Pod traffic to the other node is held back: there is no handshake with b; nothing leaves in the clear.\n" + head + `PEER  ENDPOINT         HANDSHAKE  RECEIVED  SENT   PREFIXES       STATE         REASON
b     192.0.2.2:51820  never      0 B       148 B  10.244.2.0/24  no handshake  nothing comes back from 192.0.2.2:51820: see that wgcnid runs there, and that UDP port 51820 is open on the way; run ` + "`wgcnid doctor b`" + `
`},
		{"behind NAT", exampleConfig, func() Status {
			return newStatus(observedPeer(func(p *mesh.Peer) {
				*p = mesh.Peer{PublicKey: keyB, AllowedIPs: podsB}
			}))
		}, true, encrypted + head + `PEER  ENDPOINT  HANDSHAKE  RECEIVED  SENT  PREFIXES       STATE        REASON
b     -         never      0 B       0 B   10.244.2.0/24  no endpoint  it is behind NAT and has not called yet: see that wgcnid runs there
`},
		{"missing peer", exampleConfig, func() Status {
			s := newStatus()
			s.Pending = []string{"wg set wgcni0 peer x"}
			return s
		}, false, "Partly. The kernel differs from the plan; wgcnid mends it within seconds, if it runs.\n" + head + `PEER  ENDPOINT         HANDSHAKE  RECEIVED  SENT  PREFIXES       STATE    REASON
b     192.0.2.2:51820  never      0 B       0 B   10.244.2.0/24  missing  wgcnid is about to add it; if it stays, its log says why
pending: wg set wgcni0 peer x
`},
		{"helper not running", exampleConfig, func() Status {
			s := connected()
			s.Helper = false
			return s
		}, true, encrypted + strings.Replace(head, "running", "NOT running: traffic flows, changes are not followed", 1) + connectedTable},
		{"registry away", exampleConfig, func() Status {
			s := connected()
			s.Report = &reconcile.Report{RegistryError: "no such folder\nno wonder", RegistrySince: long, PublishError: "no such folder", PublishSince: long}
			return s
		}, true, encrypted + strings.Replace(head, "mesh.json", "mesh.json, away since 2026-01-02 02:04:05: no such folder; no wonder", 1) + connectedTable},
		{"registry away, as the helper saw it last", exampleConfig, func() Status {
			s := connected()
			s.Helper = false
			s.Report = &reconcile.Report{At: now.Add(-time.Minute), RegistryError: "no such folder", RegistrySince: long}
			return s
		}, true, encrypted + strings.NewReplacer(
			"running", "NOT running: traffic flows, changes are not followed",
			"mesh.json", "mesh.json, away since 2026-01-02 02:04:05: no such folder (as wgcnid saw it last, at 2026-01-02 03:03:05)",
		).Replace(head) + connectedTable},
		{"registry full", exampleConfig, func() Status {
			s := connected()
			s.Report = &reconcile.Report{PublishError: "no space left on device", PublishSince: long}
			return s
		}, true, encrypted + strings.Replace(head, "mesh.json", "mesh.json, refuses this node's record since 2026-01-02 02:04:05: no space left on device", 1) + connectedTable},
		{"what the helper found", exampleConfig, func() Status {
			s := connected()
			s.Dropped.Out.Packets, s.Dropped.In.Packets = 7, 1
			s.Report = &reconcile.Report{
				At: now, Error: "wg set: busy\nip route: busy", SecretsError: "cluster secret: gone", Rival: true,
				Conflicts: []mesh.Conflict{{Node: "c", What: "10.244.2.0/25", Reason: "b has held 10.244.2.0/24 longer"}},
				Refused: []reconcile.Refusal{
					{Node: "d", Kind: reconcile.KindMalformed, Reason: "record d: revision: 0", Since: long},
					{Node: "e", Kind: reconcile.KindForged, Reason: "record e: \x1b[2J\u202e", Since: now},
				},
				RefusedTotal: map[string]uint64{reconcile.KindReplayed: 3, reconcile.KindForged: 1, reconcile.KindMalformed: 1},
			}
			return s
		}, true, encrypted + strings.Replace(head, "0 plaintext packets on their way out, 0", "7 plaintext packets on their way out, 1", 1) + connectedTable +
			`the last pass failed: wg set: busy; ip route: busy
conflict: c: 10.244.2.0/25 refused: b has held 10.244.2.0/24 longer
conflict: another node publishes as a: set "nodeName" so that each node has its own
refused since 2026-01-02 02:04:05: record d: revision: 0
refused since 2026-01-02 03:04:05: record e: \u001b[2J\u202e
refused in all since wgcnid's start: 1 forged, 1 malformed, 3 replayed
wgcnid goes on with the secrets that it read last: cluster secret: gone
`},
		{"what the helper found last", exampleConfig, func() Status {
			s := connected()
			s.Helper = false
			s.Report = &reconcile.Report{At: long, SecretsError: "cluster secret: gone", RefusedTotal: map[string]uint64{reconcile.KindForged: 1}}
			return s
		}, true, encrypted + strings.Replace(head, "running", "NOT running: traffic flows, changes are not followed", 1) + connectedTable +
			`As wgcnid saw it last, at 2026-01-02 02:04:05:
refused in all since wgcnid's start: 1 forged
`},
		{"no secret", exampleConfig, func() Status {
			s := connected()
			s.Seal = &SealStatus{Error: "cluster secret: gone"}
			s.Report = &reconcile.Report{SecretsError: "cluster secret: gone"}
			return s
		}, true, encrypted + strings.Replace(head, "none: whoever can write to the registry is trusted; see `wgcnid secret --help`",
			"the secrets cannot be read, and wgcnid goes on with those it has: cluster secret: gone", 1) + connectedTable},
		{"a flood of refused records", exampleConfig, func() Status {
			s := connected()
			s.Report = &reconcile.Report{}
			for range manyRefused + 5000 {
				s.Report.Refused = append(s.Report.Refused, reconcile.Refusal{Reason: "record x: " + strings.Repeat("9", 1<<10), Since: now})
			}
			return s
		}, true, encrypted + head + connectedTable +
			strings.Repeat("refused since 2026-01-02 03:04:05: record x: "+strings.Repeat("9", 555)+"...\n", manyRefused) +
			"refused: 5000 records more; `wgcnid nodes` lists all\n"},
		{
			"preferred", preferred, connected, true,
			"Partly. Pod traffic to the other node of the mesh is encrypted; to nodes that have not joined it flows in the clear (encryption is \"preferred\").\n" + head + connectedTable,
		},
		{"preferred, no peers", preferred, func() Status {
			s := newStatus()
			s.Peers = nil
			return s
		}, true, "Nothing to encrypt. No other node has joined yet; pod traffic to other nodes flows in the clear (encryption is \"preferred\").\n" + head +
			"PEER  ENDPOINT  HANDSHAKE  RECEIVED  SENT  PREFIXES  STATE\n"},
		{
			"forgotten", exampleConfig, func() Status { return outcast(connected()) }, false,
			"No. Pod traffic to other nodes is dropped: the mesh has forgotten this node and revoked its key." + rejoins + head + connectedTable,
		},
		{
			"forgotten, preferred", preferred, func() Status { return outcast(connected()) }, false,
			"No. Pod traffic is NOT encrypted: the mesh has forgotten this node and revoked its key." + rejoins + head + connectedTable,
		},
		{"not joined", exampleConfig, func() Status {
			s := newStatus()
			s.PublicKey, s.Interface, s.Peers, s.Helper, s.Prefixes = "", nil, nil, false, nil
			return s
		}, false, `No. Pod traffic to other nodes is dropped: this node has not joined yet. Start wgcnid.

node       a, 3 pods, prefixes none
helper     NOT running: traffic flows, changes are not followed
registry   file:/srv/shared/mesh.json
seal       none: whoever can write to the registry is trusted; see ` + "`wgcnid secret --help`" + `
dropped    0 plaintext packets on their way out, 0 on their way in

PEER  ENDPOINT  HANDSHAKE  RECEIVED  SENT  PREFIXES  STATE
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := tt.status()
			s.Encryption = tt.config.Encryption
			forgotten := s.Report != nil && s.Report.Forgotten
			s.OK, s.Answer, s.Verdict = verdict(s, tt.config, forgotten)
			for i, p := range s.Peers {
				s.Peers[i].Reason = peerReason(p, nil, s.Helper)
			}
			var b strings.Builder
			if err := printStatus(&b, s, false); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, b.String()); diff != "" {
				t.Errorf("status (-want +got):\n%s", diff)
			}
			if s.OK != tt.ok {
				t.Errorf("ok is %v, want %v", s.OK, tt.ok)
			}
		})
	}
}

// A tunnel that is gone is never called encrypted.
func TestVerdictWithoutInterface(t *testing.T) {
	for encryption, want := range map[mesh.Encryption]string{
		mesh.Required:  "Pod traffic to other nodes is dropped: interface wgcni0 is missing. Is wgcnid running?",
		mesh.Preferred: "Pod traffic is NOT encrypted: interface wgcni0 is missing. Is wgcnid running?",
	} {
		c, s := exampleConfig, connected()
		c.Encryption, s.Interface = encryption, nil
		if ok, _, got := verdict(s, c, false); ok || got != want {
			t.Errorf("%v: ok %v, %q, want %q", encryption, ok, got, want)
		}
		s.PublicKey = ""
		want, _, _ = strings.Cut(want, ":")
		if ok, _, got := verdict(s, c, false); ok || got != want+": this node has not joined yet. Start wgcnid." {
			t.Errorf("%v, not joined: ok %v, %q", encryption, ok, got)
		}
	}
}

// A clock that was set back makes no peer look lost, and prints no negative age.
// While keys are replaced, a peer is one line: of the interface that it is heard by,
// with the bytes of both.
func TestPeerOfBothPlanes(t *testing.T) {
	spareKey := wgtypes.Key{7}
	o := reconcile.Outcome{Observed: mesh.State{Peers: []mesh.Peer{observedPeer(func(p *mesh.Peer) { p.LastHandshake = now.Add(-time.Hour) })}}}
	o.Observed.Spare.Peers = []mesh.Peer{observedPeer(func(p *mesh.Peer) {
		p.PublicKey, p.Endpoint = spareKey, netip.AddrPortFrom(placeB.Addr(), 51821)
	})}
	o.Plan.Peers = []mesh.Peer{{Name: "b", PublicKey: keyB, Endpoint: placeB, AllowedIPs: podsB}}
	o.Plan.Spare.Peers = []mesh.Peer{{Name: "b", PublicKey: spareKey}}
	want := []PeerStatus{{
		Name: "b", PublicKey: keyB.String(), Endpoint: netip.MustParseAddrPort("192.0.2.2:51821"), LastHandshake: now.Add(-42 * time.Second),
		ReceiveBytes: 2 << 20, TransmitBytes: 3072, AllowedIPs: podsB, State: stateConnected,
	}}
	if diff := cmp.Diff(want, peerStatuses(o, now), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestHandshakeInTheFuture(t *testing.T) {
	s := newStatus(observedPeer(func(p *mesh.Peer) { p.LastHandshake = now.Add(time.Minute) }))
	if s.Peers[0].State != stateConnected || ago(now, s.Peers[0].LastHandshake) != "0s ago" {
		t.Errorf("%s, %s", s.Peers[0].State, ago(now, s.Peers[0].LastHandshake))
	}
}

func TestPeersAreSorted(t *testing.T) {
	var o reconcile.Outcome
	for i, name := range []string{"c", "a", "b"} { // a plan has them by key
		o.Plan.Peers = append(o.Plan.Peers, mesh.Peer{Name: name, PublicKey: wgtypes.Key{byte(i)}})
	}
	var names []string
	for _, p := range peerStatuses(o, now) {
		names = append(names, p.Name)
	}
	if !slices.IsSorted(names) {
		t.Errorf("peers %v", names)
	}
}

// The keys of the JSON form are what scripts rely on; an added one is added here.
func TestStatusJSON(t *testing.T) {
	private, err := identity.LoadOrCreate(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := connected()
	s.PublicKey = private.Public().String()
	s.Pending = []string{mesh.ConfigureLink{Link: mesh.Link{Name: "wgcni0", PublicKey: private.Public()}}.String()}
	s.Report = &reconcile.Report{At: now, Conflicts: []mesh.Conflict{{Node: "c"}}, Refused: []reconcile.Refusal{{Node: hostile}}}
	trust := registrytest.Secrets(t, 1)
	s.Seal = sealStatus(trust, nil, registry.Snapshot{})
	var out bytes.Buffer
	if err := printStatus(&out, s, true); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	if strings.Contains(text, private.Reveal().String()) || strings.Contains(text, trust.Secrets[0].Reveal()) {
		t.Error("a secret is printed")
	}
	for _, r := range text {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("%U is printed", r)
		}
	}
	if !strings.Contains(text, s.PublicKey) || !strings.Contains(text, "(hidden)") {
		t.Errorf("no public key, or no sign of a hidden one:\n%s", text)
	}
	var top map[string]any
	if err := json.Unmarshal(out.Bytes(), &top); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what  string
		value any
		want  string
	}{
		{"status", top, "answer encryption helperRunning interface node nodeTraffic ok peers pending plaintextDropped pods prefixes publicKey registry report seal time verdict"},
		{"peer", top["peers"].([]any)[0], "allowedIPs endpoint lastHandshake name presharedKey publicKey receiveBytes state transmitBytes"},
		{"interface", top["interface"], "listenPort mtu name up"},
		{"report", top["report"], "at conflicts refused"},
		{"refused record", top["report"].(map[string]any)["refused"].([]any)[0], "kind node reason since"},
		{"seal", top["seal"], "accepted acceptsUnsealed sealedBy unsealed"},
		{"plaintextDropped", top["plaintextDropped"], "in out"},
	} {
		keys := slices.Sorted(maps.Keys(tt.value.(map[string]any)))
		if diff := cmp.Diff(tt.want, strings.Join(keys, " ")); diff != "" {
			t.Errorf("keys of %s (-want +got):\n%s", tt.what, diff)
		}
	}
}

// Scripts iterate over .peers: it is a list even where there are none.
func TestStatusJSONOfNothing(t *testing.T) {
	var out bytes.Buffer
	if err := printStatus(&out, Status{Peers: peerStatuses(reconcile.Outcome{}, now)}, true); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"peers": []`, `"interface": null`, `"seal": null`, `"encryption": "required"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %s in\n%s", want, &out)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1: "1 B", 1023: "1023 B", 1024: "1.00 KiB", 1536: "1.50 KiB", 1 << 20: "1.00 MiB",
		5 << 30: "5.00 GiB", 1 << 40: "1.00 TiB", 1 << 50: "1.00 PiB", math.MaxInt64: "8192.00 PiB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestAgo(t *testing.T) {
	for then, want := range map[time.Time]string{
		{}:                                      "never",
		now:                                     "0s ago",
		now.Add(-1400 * time.Millisecond):       "1s ago",
		now.Add(-125 * time.Second):             "2m5s ago",
		now.Add(-26*time.Hour - 30*time.Second): "26h0m30s ago",
	} {
		if got := ago(now, then); got != want {
			t.Errorf("ago(%v) = %s, want %s", then, got, want)
		}
	}
}

func TestList(t *testing.T) {
	all := []netip.Prefix{}
	for i := range 6 {
		all = append(all, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24))
	}
	for n, want := range map[int]string{
		0: "none", 1: "10.0.0.0/24", 4: "10.0.0.0/24 10.0.1.0/24 10.0.2.0/24 10.0.3.0/24",
		6: "10.0.0.0/24 10.0.1.0/24 10.0.2.0/24 10.0.3.0/24 and 2 more",
	} {
		if got := list(all[:n]); got != want {
			t.Errorf("list of %d = %q, want %q", n, got, want)
		}
	}
}
