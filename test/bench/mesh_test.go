package main

import (
	"encoding/json"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/file"
)

// TestRecords: every node takes all of them, or a mesh would be smaller than it
// claims to be.
func TestRecords(t *testing.T) {
	secret, err := identity.NewSecret(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	trust := registry.Trust{Secrets: identity.Secrets{secret}}
	records, err := makeRecords(200, trust)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "mesh.json")
	if err := inFile(path).fill(t.Context(), records); err != nil {
		t.Fatal(err)
	}
	// One that is put takes the place of the one before.
	records[7].Revision++
	if records[7], err = trust.Seal(records[7]); err != nil {
		t.Fatal(err)
	}
	if err := inFile(path).put(t.Context(), records[7]); err != nil {
		t.Fatal(err)
	}
	s, err := registry.New(file.New(path), trust).Snapshot(t.Context())
	if err != nil || len(s.Invalid) > 0 || !s.Equal(registry.NewSnapshot(records...)) {
		t.Errorf("%d of %d records, %v, refused: %.1000v", len(s.Nodes), len(records), err, s.Invalid)
	}
}

// TestPeerPrefixes: no two nodes claim the same, and none what is outside of the
// cluster or belongs to the node that holds the mesh.
func TestPeerPrefixes(t *testing.T) {
	inside := netip.MustParsePrefix(clusterCIDR)
	seen := map[netip.Prefix]bool{netip.MustParsePrefix("10.244.0.0/16"): true}
	for i := range budgetNodes {
		p := peerPrefix(i)
		if p != p.Masked() || !inside.Contains(p.Addr()) || seen[p] || seen[netip.PrefixFrom(p.Addr(), 16).Masked()] {
			t.Fatalf("the prefix of node %d is %s", i, p)
		}
		seen[p] = true
	}
}

// TestRecordSize: records of another size would make another mesh.
func TestRecordSize(t *testing.T) {
	secret, err := identity.NewSecret(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	records, err := makeRecords(1, registry.Trust{Secrets: identity.Secrets{secret}})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(records[0])
	if err != nil || len(text) < 300 || len(text) > 500 {
		t.Errorf("%d bytes, %v: %s", len(text), err, text)
	}
}

func TestMeshSection(t *testing.T) {
	h := func(nodes int, cold, change float64, settled int64) *holder {
		return &holder{
			name: "x", nodes: nodes, settled: settled, cold: beginning{cpu: seconds(cold)}, warm: beginning{cpu: seconds(1)},
			change: verb{elapsed: samples{0.1}, cpu: samples{9, change, 0}},
		}
	}
	for _, tt := range []struct {
		name       string
		holder     *holder
		missed, of int
	}{
		{"both budgets kept", h(budgetNodes, 1, 0.01, 64<<20), 0, 2},
		{"a change costs too much", h(budgetNodes, 1, 0.02, 64<<20), 1, 2},
		{"too much memory", h(budgetNodes, 1, 0.01, 70<<20), 1, 2},
		{"the budgets are for another size", h(1000, 1, 0.9, 70<<20), 0, 0},
	} {
		n, of := missed([]section{meshSection([]*holder{tt.holder})})
		if n != tt.missed || of != tt.of {
			t.Errorf("%s: %d of %d missed, want %d of %d", tt.name, n, of, tt.missed, tt.of)
		}
	}
}

func TestAnnounceSection(t *testing.T) {
	for _, tt := range []struct {
		name                string
		alone, etcd, shared samples
		want                []float64 // the ratios that have budgets
		missed              int
	}{
		{"kept", samples{1, 2, 3}, samples{5, 4, 3}, samples{0.025}, []float64{2, 1}, 0},
		{"etcd is late", samples{1}, samples{2.1}, samples{0.0125}, []float64{2.1, 0.5}, 1},
		{"the file is late", samples{1}, samples{1}, samples{0.05}, []float64{1, 2}, 1},
		{"before the verb has ended", samples{1}, samples{-0.5}, samples{-0.025}, []float64{-0.5, -1}, 0},
	} {
		s := announceSection(&bare{seen: tt.alone}, &pair{announced: tt.etcd}, &pair{announced: tt.shared})
		var got []float64
		for _, r := range s.rows {
			if r.budget != (budget{}) {
				got = append(got, r.ratio)
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: ratios (-want +got):\n%s", tt.name, diff)
		}
		if n, _ := missed([]section{s}); n != tt.missed {
			t.Errorf("%s: %d budgets missed, want %d", tt.name, n, tt.missed)
		}
	}
}

func TestJoinSection(t *testing.T) {
	j := &crowd{took: samples{1, 2, 3}, cpu: 30 * time.Millisecond, etcd: time.Millisecond, tunnels: 60 * time.Millisecond, revisions: 3}
	j.nodes = append(j.nodes, nil, nil, nil)
	want := `3 nodes join at once, etcd                      time  revisions       cpu  ratio  to                 budget
  until half of the nodes have all peers  2000.00 ms
  until the last node has all peers       3000.00 ms
  etcd                                                        3   1.00 ms   1.00  one for each node
  wgcnid, of each node                                           10.00 ms
  userspace tunnel, of each node                                 20.00 ms
  all                                                            91.00 ms
`
	s := j.section()
	s.notes = nil
	if diff := cmp.Diff(want+"\n", text([]section{s})); diff != "" {
		t.Error(diff)
	}
}

func TestRoom(t *testing.T) {
	for _, tt := range []struct{ wanted, free, each, want int }{
		{100, 500, 2, 100},
		{100, 116, 2, 50},
		{100, 116, 1, 100},
		{100, spareInotify + 1, 2, 0},
		{100, 0, 2, 0},
	} {
		if got := room(tt.wanted, tt.free, tt.each); got != tt.want {
			t.Errorf("room(%d, %d, %d) = %d, want %d", tt.wanted, tt.free, tt.each, got, tt.want)
		}
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
