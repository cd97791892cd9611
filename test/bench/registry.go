package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/test/cluster"
)

// makeRecords returns the records of this many nodes, each with a /25 of
// 10.64.0.0/10 and an endpoint of 198.18.0.0/15 (RFC 2544) that nobody answers at.
func makeRecords(nodes int, trust registry.Trust) ([]registry.Record, error) {
	records := make([]registry.Record, 0, nodes)
	now := time.Now()
	for i := range nodes {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			return nil, fmt.Errorf("make peer %d: %w", i, err)
		}
		c := config.Config{
			NodeName: fmt.Sprintf("peer-%04d", i),
			PodCIDRs: []netip.Prefix{peerPrefix(i)},
		}
		c.ClusterCIDRs, c.ListenPort = []netip.Prefix{netip.MustParsePrefix(clusterCIDR)}, config.DefaultListenPort
		own := []netip.Addr{netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})}
		r := reconcile.SelfRecord(c, key.PublicKey(), kernel.Underlay{Addresses: own, All: own}, nil, nil, registry.Record{}, now)
		r.Revision = registry.NextRevision(0, now)
		if r, err = trust.Seal(r); err == nil {
			err = r.Validate()
		}
		if err != nil {
			return nil, fmt.Errorf("make peer %d: %w", i, err)
		}
		records = append(records, r)
	}
	return records, nil
}

// peerPrefix is the i-th /25 from 10.64.0.0 on.
func peerPrefix(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(64 + i>>9), byte(i >> 1), byte(i&1) << 7}), 25)
}

// writeRegistry writes a registry file with this many nodes.
func writeRegistry(path string, nodes int) error {
	records, err := makeRecords(nodes, registry.Trust{})
	if err != nil {
		return err
	}
	return inFile(path).fill(context.Background(), records)
}

// shelf is where the records of a mesh lie.
type shelf interface {
	// registry is the "registry" of a stanza.
	registry() map[string]any
	// fill puts the first records.
	fill(context.Context, []registry.Record) error
	// put replaces the record of one node.
	put(context.Context, registry.Record) error
}

// inFile is a registry file, by its path.
type inFile string

func (path inFile) registry() map[string]any {
	return map[string]any{"type": "file", "path": string(path)}
}

func (path inFile) fill(_ context.Context, records []registry.Record) error {
	type document struct {
		Version int                        `json:"version"`
		Nodes   map[string]registry.Record `json:"nodes"`
	}
	doc := document{1, map[string]registry.Record{}}
	for _, r := range records {
		doc.Nodes[r.Name] = r
	}
	text, err := json.MarshalIndent(doc, "", "  ")
	if err == nil {
		err = os.WriteFile(string(path), text, 0o644)
	}
	if err != nil {
		return fmt.Errorf("write the registry of %d nodes: %w", len(records), err)
	}
	return nil
}

func (path inFile) put(ctx context.Context, r registry.Record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write record %s: %w", r.Name, err)
	}
	return file.New(string(path)).Update(ctx, r.Name, func([]byte) ([]byte, error) { return text, nil })
}

// inEtcd is the folder of a mesh in etcd.
type inEtcd struct {
	etcd   *cluster.Etcd
	client *clientv3.Client
	prefix string
}

func (e inEtcd) registry() map[string]any {
	return e.etcd.Registry(map[string]any{"prefix": e.prefix})
}

// putsPerTransaction stays below etcd's --max-txn-ops, 128 by default.
const putsPerTransaction = 100

func (e inEtcd) fill(ctx context.Context, records []registry.Record) error {
	var puts []clientv3.Op
	for i, r := range records {
		text, err := json.Marshal(r)
		if err != nil {
			return fmt.Errorf("write record %s: %w", r.Name, err)
		}
		puts = append(puts, clientv3.OpPut(e.prefix+"nodes/"+r.Name, string(text)))
		if len(puts) == putsPerTransaction || i == len(records)-1 {
			if _, err := e.client.Txn(ctx).Then(puts...).Commit(); err != nil {
				return fmt.Errorf("put %d records: %w", len(puts), err)
			}
			puts = nil
		}
	}
	return nil
}

func (e inEtcd) put(ctx context.Context, r registry.Record) error {
	return e.fill(ctx, []registry.Record{r})
}
