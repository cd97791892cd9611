package store

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

var joined = time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)

func record(name string, n byte) registry.Record {
	return registry.Record{
		Name: name, PublicKey: wgtypes.Key{n}, Endpoints: []string{"192.0.2." + string('0'+n) + ":51820"},
		Prefixes:  []mesh.Claim{{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, n, 0}), 24), Since: joined}},
		Pods:      []mesh.Claim{{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, 99, n}), 32), Since: joined}},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, n})},
		Since:     joined, Revision: uint64(n),
	}
}

func known() Known {
	return Known{
		Self:    record("node-a", 1),
		Records: registry.NewSnapshot(record("node-b", 2), record("node-c", 3), registry.Record{Name: "node-d", Left: true, Revision: 4}),
		Endpoints: map[string]netip.AddrPort{
			"node-b": netip.MustParseAddrPort("192.0.2.2:51820"), "node-c": netip.MustParseAddrPort("[2001:db8:1::3]:51820"),
		},
		MTU: 1420,
	}
}

func save(t *testing.T, dir string, before, now Known) {
	t.Helper()
	if err := SaveKnown(t.Context(), dir, before, now); err != nil {
		t.Fatal(err)
	}
}

func load(t *testing.T, dir string) (Known, *Damaged) {
	t.Helper()
	k, damaged, err := LoadKnown(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return k, damaged
}

func TestKnownRoundTrip(t *testing.T) {
	dir := t.TempDir()
	empty, damaged := load(t, dir)
	if damaged != nil || len(empty.Records.Nodes) != 0 || empty.MTU != 0 || !empty.Self.Since.IsZero() {
		t.Errorf("a new store knows %+v, %v", empty, damaged)
	}
	first := known()
	save(t, dir, empty, first)
	if got, _ := load(t, dir); !got.Equal(first) {
		t.Errorf("got %+v, want %+v", got, first)
	}

	second := first.Clone()
	second.Records.Nodes["node-c"] = new(registry.Record{Name: "node-c", Left: true, Revision: 9})
	delete(second.Records.Nodes, "node-d")
	delete(second.Endpoints, "node-c")
	second.Endpoints["node-b"] = netip.MustParseAddrPort("192.0.2.22:51820")
	second.Self.Revision, second.MTU = 77, 1440
	if first.Equal(second) || len(first.Endpoints) != 2 {
		t.Fatal("the clone shares a map with its origin")
	}
	save(t, dir, first, second)
	if got, _ := load(t, dir); !got.Equal(second) {
		t.Errorf("got %+v, want %+v", got, second)
	}
	if info, err := os.Stat(KnownPath(dir)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// TestSaveKnownWritesChangesOnly: what has not changed is not touched, so that
// one node's news among 5,000 cost one page and not all.
func TestSaveKnownWritesChangesOnly(t *testing.T) {
	dir := t.TempDir()
	before := known()
	save(t, dir, Known{}, before)
	mark := func(bucket []byte, key, value string) {
		db, err := bolt.Open(KnownPath(dir), 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), []byte(value)) }); err != nil {
			t.Fatal(err)
		}
	}
	written := func(bucket []byte, key string) (v string) {
		db, err := bolt.Open(KnownPath(dir), 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		_ = db.View(func(tx *bolt.Tx) error { v = string(tx.Bucket(bucket).Get([]byte(key))); return nil })
		return v
	}
	marker, err := json.Marshal(record("node-b", 9))
	if err != nil {
		t.Fatal(err)
	}
	mark(recordsBucket, "node-b", string(marker))
	mark(endpointsBucket, "node-b", `"192.0.2.99:1"`)
	now := before.Clone()
	now.Records.Nodes["node-c"] = new(record("node-c", 5))
	now.Endpoints["node-c"] = netip.MustParseAddrPort("192.0.2.5:51820")
	save(t, dir, before, now)
	if got := written(recordsBucket, "node-b"); got != string(marker) {
		t.Errorf("the record that has not changed was written: %s", got)
	}
	if got := written(endpointsBucket, "node-b"); got != `"192.0.2.99:1"` {
		t.Errorf("the endpoint that has not changed was written: %s", got)
	}
	if got, _ := load(t, dir); !got.Records.Nodes["node-c"].Equal(*now.Records.Nodes["node-c"]) || got.Endpoints["node-c"] != now.Endpoints["node-c"] {
		t.Errorf("what has changed was not written: %+v", got)
	}
}

// TestKnownSkipsWhatItCannotRead: a record of a newer version, or of nobody, is
// fetched anew from the registry; the others are known.
func TestKnownSkipsWhatItCannotRead(t *testing.T) {
	dir := t.TempDir()
	save(t, dir, Known{}, known())
	db, err := bolt.Open(KnownPath(dir), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for bucket, value := range map[string]string{"records": `{"name": 5}`, "endpoints": `{}`, "node": `"x"`} {
			for _, key := range []string{"node-c", "self", "mtu"} {
				if err := tx.Bucket([]byte(bucket)).Put([]byte(key), []byte(value)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if cerr := db.Close(); err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
	got, damaged := load(t, dir)
	if _, ok := got.Records.Nodes["node-c"]; ok || damaged != nil || !got.Records.Nodes["node-b"].Equal(record("node-b", 2)) {
		t.Errorf("got %+v, %v", got, damaged)
	}
	if _, ok := got.Endpoints["node-c"]; ok || got.MTU != 0 || got.Self.Name != "" {
		t.Errorf("got %+v", got)
	}
}

// TestDamagedKnown: a node that has lost its last snapshot says so, asks the
// registry, and saves all of what it then knows, not the changes alone.
func TestDamagedKnown(t *testing.T) {
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			dir := t.TempDir()
			many := known()
			for i := range 100 {
				r := record("node-x"+strings.Repeat("x", i), 6)
				many.Records.Nodes[r.Name] = &r
			}
			save(t, dir, Known{}, many)
			d.do(t, KnownPath(dir))
			before := read(t, KnownPath(dir))

			now := many.Clone()
			now.MTU = 1300
			save(t, dir, many, now)
			if got, damaged := load(t, dir); !got.Equal(now) || damaged != nil {
				t.Errorf("after saving on a damaged store %d records are known, want %d; %v", len(got.Records.Nodes), len(now.Records.Nodes), damaged)
			}

			d.do(t, KnownPath(dir))
			k, damaged := load(t, dir)
			if damaged == nil || len(k.Records.Nodes) != 0 {
				t.Fatalf("%d records, %v", len(k.Records.Nodes), damaged)
			}
			if aside := read(t, damaged.Path); len(aside) == 0 || len(aside) != len(read(t, damaged.Path)) || bytes.Equal(before, nil) {
				t.Errorf("%s is empty", damaged.Path)
			}
		})
	}
}

func TestKnownLocked(t *testing.T) {
	dir := t.TempDir()
	save(t, dir, Known{}, known())
	lock, err := lockFile(t.Context(), KnownPath(dir)+".lock")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, err := LoadKnown(ctx, dir); err == nil {
		t.Error("read under somebody's lock")
	}
	if err := SaveKnown(ctx, dir, Known{}, known()); err == nil {
		t.Error("written under somebody's lock")
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if got, _ := load(t, dir); !got.Equal(known()) {
		t.Errorf("got %+v", got)
	}
}

// A file that somebody else found damaged, and replaced, is filled again with
// all there is: what the saver knows the old file to hold is not in it.
func TestSaveOnReplacedFile(t *testing.T) {
	dir := t.TempDir()
	before := Known{Self: record("node-a", 1), Records: registry.NewSnapshot(record("node-a", 1), record("node-b", 1))}
	if err := SaveKnown(t.Context(), dir, Known{}, before); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(KnownPath(dir), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, damaged := load(t, dir); damaged == nil {
		t.Fatal("the file is not seen to be damaged")
	}
	now := before.Clone()
	now.Records.Nodes["node-c"] = new(record("node-c", 1))
	if err := SaveKnown(t.Context(), dir, before, now); err != nil {
		t.Fatal(err)
	}
	if got, damaged := load(t, dir); len(got.Records.Nodes) != 3 || damaged != nil {
		t.Errorf("%d records are known, want 3; %v", len(got.Records.Nodes), damaged)
	}
}

// TestSaveLooksAtWhatWasNoted: of thousands of records those that have been noted are
// looked at, and all of them where the file is somebody else's, or gone.
func TestSaveLooksAtWhatWasNoted(t *testing.T) {
	dir := t.TempDir()
	now := known()
	f := NewKnownFile(dir, Known{})
	keep := func() Known {
		t.Helper()
		if err := f.Save(t.Context(), now.Clone()); err != nil {
			t.Fatal(err)
		}
		k, _ := load(t, dir)
		return k
	}
	if got := keep(); !got.Equal(now) {
		t.Fatalf("at first: %+v, want %+v", got, now)
	}
	was := now.Clone()
	now.Records.Nodes["node-c"] = new(record("node-c", 5))
	delete(now.Endpoints, "node-b")
	if got := keep(); !got.Equal(was) {
		t.Errorf("nothing was noted, and something written: %+v", got)
	}
	f.Note("node-c")
	was.Records.Nodes["node-c"] = now.Records.Nodes["node-c"]
	if got := keep(); !got.Equal(was) {
		t.Errorf("with node-c noted: %+v, want %+v", got, was)
	}
	f.NoteAll()
	if got := keep(); !got.Equal(now) {
		t.Errorf("with all noted: %+v, want %+v", got, now)
	}
	f.Note("node-b")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	now.Endpoints["node-b"] = netip.MustParseAddrPort("192.0.2.22:51820")
	lock, err := lockFile(t.Context(), KnownPath(dir)+".lock")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Save(ctx, now.Clone()); err == nil {
		t.Error("saved while another holds the file")
	}
	lock.Close()
	if got := keep(); !got.Equal(now) {
		t.Errorf("after a Save that failed: %+v, want %+v", got, now)
	}
	if err := os.Remove(KnownPath(dir)); err != nil {
		t.Fatal(err)
	}
	if got := keep(); !got.Equal(now) {
		t.Errorf("after the file was removed: %+v, want %+v", got, now)
	}
}
