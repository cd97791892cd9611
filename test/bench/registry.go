package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// writeRegistry writes a registry file with this many nodes, each with a /25 of
// 10.64.0.0/10 and an endpoint of 198.18.0.0/15 (RFC 2544) that nobody answers at.
func writeRegistry(path string, nodes int) error {
	type document struct {
		Version int                        `json:"version"`
		Nodes   map[string]registry.Record `json:"nodes"`
	}
	doc := document{1, map[string]registry.Record{}}
	since := time.Now()
	for i := range nodes {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			return fmt.Errorf("make peer %d: %w", i, err)
		}
		r := registry.Record{
			Name:      fmt.Sprintf("peer-%04d", i),
			PublicKey: key.PublicKey(),
			Endpoints: []string{netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 51820).String()},
			Prefixes:  []mesh.Claim{{Prefix: peerPrefix(i), Since: since}},
			Since:     since,
			Revision:  1,
		}
		if err := r.Validate(); err != nil {
			return fmt.Errorf("make peer %d: %w", i, err)
		}
		doc.Nodes[r.Name] = r
	}
	text, err := json.MarshalIndent(doc, "", "  ")
	if err == nil {
		err = os.WriteFile(path, text, 0o644)
	}
	if err != nil {
		return fmt.Errorf("write the registry of %d peers: %w", nodes, err)
	}
	return nil
}

// peerPrefix is the i-th /25 from 10.64.0.0 on.
func peerPrefix(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(64 + i>>9), byte(i >> 1), byte(i&1) << 7}), 25)
}
