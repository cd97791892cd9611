package mesh_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

var (
	primaryB, spareB = wgtypes.Key{1}, wgtypes.Key{2}
	primaryC, spareC = wgtypes.Key{3}, wgtypes.Key{4}
)

func peerState(peers, spare []mesh.Peer) mesh.State {
	return mesh.State{Peers: peers, Spare: mesh.SpareLink{Peers: spare}}
}

func TestBothPlanes(t *testing.T) {
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	first, second := netip.MustParseAddrPort("192.0.2.2:51820"), netip.MustParseAddrPort("192.0.2.2:51821")
	planned := peerState(
		[]mesh.Peer{{Name: "b", PublicKey: primaryB}, {Name: "c", PublicKey: primaryC}},
		[]mesh.Peer{{Name: "b", PublicKey: spareB}, {Name: "c", PublicKey: spareC}},
	)
	b := mesh.Peer{PublicKey: primaryB, Endpoint: first, LastHandshake: noon, ReceiveBytes: 1, TransmitBytes: 2}
	c := mesh.Peer{PublicKey: primaryC, ReceiveBytes: 5}
	onSpare := mesh.Peer{PublicKey: spareB, Endpoint: second, LastHandshake: noon.Add(time.Second), ReceiveBytes: 10, TransmitBytes: 20}
	before := onSpare
	before.LastHandshake = noon.Add(-time.Second)
	for _, tt := range []struct {
		name    string
		planned mesh.State
		have    mesh.State
		want    []mesh.Peer
	}{
		{"none", planned, mesh.State{}, nil},
		{"no second interface", planned, peerState([]mesh.Peer{b, c}, nil), []mesh.Peer{b, c}},
		{"one that nobody planned", peerState(planned.Peers, nil), peerState([]mesh.Peer{b}, []mesh.Peer{onSpare}), []mesh.Peer{b}},
		{"moved", planned, peerState([]mesh.Peer{b, c}, []mesh.Peer{onSpare, {PublicKey: wgtypes.Key{9}, ReceiveBytes: 7}}), []mesh.Peer{
			{PublicKey: primaryB, Endpoint: second, LastHandshake: noon.Add(time.Second), ReceiveBytes: 11, TransmitBytes: 22}, c,
		}},
		{"not yet", planned, peerState([]mesh.Peer{b}, []mesh.Peer{before}), []mesh.Peer{
			{PublicKey: primaryB, Endpoint: first, LastHandshake: noon, ReceiveBytes: 11, TransmitBytes: 22},
		}},
		{"on the second alone", planned, peerState([]mesh.Peer{c}, []mesh.Peer{onSpare}), []mesh.Peer{c}},
	} {
		unchanged := peerState(append([]mesh.Peer(nil), tt.have.Peers...), tt.have.Spare.Peers)
		same := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
		if diff := cmp.Diff(tt.want, mesh.BothPlanes(tt.planned, tt.have), same); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
		if diff := cmp.Diff(unchanged.Peers, tt.have.Peers, same); diff != "" {
			t.Errorf("%s: the state was changed: %s", tt.name, diff)
		}
	}
}

func TestPeerFor(t *testing.T) {
	prefix := netip.MustParsePrefix
	allowed := func(key wgtypes.Key, prefixes ...netip.Prefix) mesh.Peer {
		return mesh.Peer{PublicKey: key, AllowedIPs: prefixes}
	}
	s := peerState(
		[]mesh.Peer{allowed(primaryB, prefix("10.244.2.0/24")), allowed(primaryC, prefix("10.244.3.0/24"), prefix("10.244.2.7/32"))},
		[]mesh.Peer{allowed(spareC, prefix("10.244.3.0/24"), prefix("10.244.2.7/32"))},
	)
	s.Routes = []mesh.Route{
		{Prefix: prefix("10.244.0.0/16"), Type: mesh.Unreachable},
		{Prefix: prefix("10.244.2.0/24"), Type: mesh.ViaLink},
		{Prefix: prefix("10.244.3.0/24"), Type: mesh.ViaLink, Plane: mesh.Spare},
		{Prefix: prefix("10.244.2.7/32"), Type: mesh.ViaLink, Plane: mesh.Spare},
		{Prefix: prefix("10.244.9.0/24"), Type: mesh.ViaLink},
		{Prefix: prefix("10.244.2.8/32"), Type: mesh.Throw},
	}
	for address, want := range map[string]wgtypes.Key{"10.244.2.1": primaryB, "10.244.2.7": spareC, "10.244.3.1": spareC, "10.244.2.8": {}, "10.244.4.1": {}, "10.244.9.1": {}, "fd00::1": {}} {
		p, ok := s.PeerFor(netip.MustParseAddr(address))
		if ok != (want != wgtypes.Key{}) || ok && p.PublicKey != want {
			t.Errorf("%s: %v, %v, want %v", address, p, ok, want)
		}
	}
}

func TestTakePresharedKeys(t *testing.T) {
	keyed := func(key wgtypes.Key, f byte) mesh.Peer {
		return mesh.Peer{PublicKey: key, PresharedKey: mesh.Fingerprint{f}}
	}
	planned := peerState([]mesh.Peer{keyed(primaryB, 1), keyed(primaryC, 1)}, []mesh.Peer{keyed(spareB, 1)})
	shared := planned.Peers
	planned.TakePresharedKeys(peerState([]mesh.Peer{keyed(primaryB, 5)}, []mesh.Peer{keyed(spareB, 6)}))
	want := peerState([]mesh.Peer{keyed(primaryB, 5), keyed(primaryC, 0)}, []mesh.Peer{keyed(spareB, 6)})
	if diff := cmp.Diff(want, planned, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" || shared[0].PresharedKey != (mesh.Fingerprint{1}) {
		t.Error(diff)
	}
}
