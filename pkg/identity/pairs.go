package identity

import (
	"errors"
	"sync"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Pairs are the preshared keys between one node and its peers. Each is derived
// once. It is safe for concurrent use and prints itself as "(hidden)". Nil is a
// node without a secret: it has no preshared keys.
type Pairs struct {
	mute
	self    wgtypes.Key
	secrets Secrets

	mu    sync.Mutex
	known map[pair]concealed[wgtypes.Key]
}

type pair struct {
	secret SecretID
	peer   wgtypes.Key
}

// NewPairs returns the preshared keys of the node with this public key.
func NewPairs(self wgtypes.Key, s Secrets) *Pairs {
	return &Pairs{self: self, secrets: s, known: map[pair]concealed[wgtypes.Key]{}}
}

// For returns those that the node has by another key of its own.
func (p *Pairs) For(self wgtypes.Key) *Pairs {
	if p == nil || p.self == self {
		return p
	}
	return NewPairs(self, p.secrets)
}

// Current names the secret that seals this node's records, "" for none.
func (p *Pairs) Current() SecretID {
	if p == nil {
		return ""
	}
	return p.secrets.Current()
}

// PresharedKey is that of the tunnel to the node with the public key peer, where
// this node's record is sealed by own and the peer's by theirs. It is false if
// their tunnel has none, see Secrets.ForPair.
func (p *Pairs) PresharedKey(own, theirs SecretID, peer wgtypes.Key) (psk wgtypes.Key, ok bool) {
	if p == nil {
		return wgtypes.Key{}, false
	}
	s, ok := p.secrets.ForPair(own, theirs)
	if !ok {
		return wgtypes.Key{}, false
	}
	return p.by(s, peer), true
}

// ByFingerprint finds the preshared key with this fingerprint among those that
// the secrets give for the node with the public key peer. It is false if none has it.
func (p *Pairs) ByFingerprint(peer wgtypes.Key, f mesh.Fingerprint) (wgtypes.Key, bool) {
	if p == nil || f == (mesh.Fingerprint{}) {
		return wgtypes.Key{}, false
	}
	for _, s := range p.secrets {
		if psk := p.by(s, peer); mesh.FingerprintOf(psk) == f {
			return psk, true
		}
	}
	return wgtypes.Key{}, false
}

// Reveal is ByFingerprint for the kernel package, which asks for a key only when
// it configures a peer.
func (p *Pairs) Reveal(peer wgtypes.Key, f mesh.Fingerprint) (wgtypes.Key, error) {
	psk, ok := p.ByFingerprint(peer, f)
	if !ok {
		return psk, errors.New("the cluster secret has changed since the plan was made; the next pass will use it")
	}
	return psk, nil
}

func (p *Pairs) by(s Secret, peer wgtypes.Key) wgtypes.Key {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := pair{s.ID(), peer}
	psk, ok := p.known[at]
	if !ok {
		psk = conceal(s.PresharedKey(p.self, peer))
		p.known[at] = psk
	}
	return psk.value()
}
