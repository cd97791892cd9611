package mesh

import (
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// BothPlanes returns the peers that an interface has, each of which stands for all of
// its pair: the bytes are those of both planes, and endpoint and handshake are of
// the one that has shaken hands last. planned says which of the spare plane's is
// whose. Neither state is changed.
func BothPlanes(planned, have State) []Peer {
	if len(planned.Spare.Peers) == 0 || len(have.Spare.Peers) == 0 {
		return have.Peers
	}
	spares := make(map[wgtypes.Key]Peer, len(have.Spare.Peers))
	for _, p := range have.Spare.Peers {
		spares[p.PublicKey] = p
	}
	byName := make(map[string]Peer, len(planned.Spare.Peers))
	for _, p := range planned.Spare.Peers {
		if spare, there := spares[p.PublicKey]; there {
			byName[p.Name] = spare
		}
	}
	byKey := make(map[wgtypes.Key]Peer, len(byName))
	for _, p := range planned.Peers {
		if spare, there := byName[p.Name]; there {
			byKey[p.PublicKey] = spare
		}
	}
	out := slices.Clone(have.Peers)
	for i := range out {
		out[i] = out[i].with(byKey[out[i].PublicKey])
	}
	return out
}

// with is a peer and the same machine on the other plane.
func (p Peer) with(spare Peer) Peer {
	p.ReceiveBytes += spare.ReceiveBytes
	p.TransmitBytes += spare.TransmitBytes
	if spare.LastHandshake.After(p.LastHandshake) {
		p.LastHandshake, p.Endpoint = spare.LastHandshake, spare.Endpoint
	}
	return p
}

// TakePresharedKeys plans with the preshared keys that an interface has, for those
// who do not know which there should be.
func (s *State) TakePresharedKeys(have State) {
	s.Peers = takePresharedKeys(s.Peers, have.Peers)
	s.Spare.Peers = takePresharedKeys(s.Spare.Peers, have.Spare.Peers)
}

func takePresharedKeys(planned, have []Peer) []Peer {
	by := make(map[wgtypes.Key]Fingerprint, len(have))
	for _, p := range have {
		by[p.PublicKey] = p.PresharedKey
	}
	out := slices.Clone(planned)
	for i, p := range out {
		out[i].PresharedKey = by[p.PublicKey]
	}
	return out
}

// PeerFor returns the peer that the routes send an address's packets to, on the
// plane that they choose; false if there is none.
func (s State) PeerFor(a netip.Addr) (peer Peer, ok bool) {
	var best *Route
	for i, r := range s.Routes {
		if r.Prefix.Contains(a) && r.Metric == 0 && (best == nil || r.Prefix.Bits() > best.Prefix.Bits()) {
			best = &s.Routes[i]
		}
	}
	if best == nil || best.Type != ViaLink {
		return peer, false
	}
	peers := s.Peers
	if best.Plane == Spare {
		peers = s.Spare.Peers
	}
	return Taker(peers, a)
}

// Taker returns the peer to whom WireGuard sends what is for an address: the one with
// the longest allowed IP that holds it.
func Taker(peers []Peer, a netip.Addr) (peer Peer, ok bool) {
	bits := -1
	for _, p := range peers {
		for _, q := range p.AllowedIPs {
			if q.Contains(a) && q.Bits() > bits {
				peer, bits = p, q.Bits()
			}
		}
	}
	return peer, bits >= 0
}
