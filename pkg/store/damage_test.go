package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// overflowAt is where a page's header says how many more pages it takes, in 4 bytes.
const overflowAt = 12

// damages are what becomes of files: power cuts, full disks, other programs.
// None is found by looking at the first page only.
var damages = []struct {
	name string
	do   func(t *testing.T, path string)
}{
	{"garbage", func(t *testing.T, path string) {
		overwrite(t, path, bytes.Repeat([]byte("no database at all "), 2000))
	}},
	{"short garbage", func(t *testing.T, path string) { overwrite(t, path, []byte("x")) }},
	{"random bytes behind the meta pages", func(t *testing.T, path string) {
		b := read(t, path)
		r := rand.NewChaCha8([32]byte{1})
		_, _ = r.Read(b[2*os.Getpagesize():])
		overwrite(t, path, b)
	}},
	{"cut in the middle", func(t *testing.T, path string) { overwrite(t, path, read(t, path)[:len(read(t, path))/2]) }},
	{"cut to two pages", func(t *testing.T, path string) { overwrite(t, path, read(t, path)[:2*os.Getpagesize()]) }},
	{"cut to one page", func(t *testing.T, path string) { overwrite(t, path, read(t, path)[:os.Getpagesize()]) }},
	{"cut to 100 bytes", func(t *testing.T, path string) { overwrite(t, path, read(t, path)[:100]) }},
	{"all zero", func(t *testing.T, path string) { overwrite(t, path, make([]byte, len(read(t, path)))) }},
	{"zero behind the meta pages", func(t *testing.T, path string) {
		b := read(t, path)
		clear(b[2*os.Getpagesize():])
		overwrite(t, path, b)
	}},
	{"page numbers that lead out of the file", func(t *testing.T, path string) {
		b := read(t, path)
		for i := 2 * os.Getpagesize(); i+os.Getpagesize() <= len(b); i += os.Getpagesize() {
			for j := i + 16; j < i+256; j++ { // elements; the page's header stays
				b[j] = 0x7f
			}
		}
		overwrite(t, path, b)
	}},
	{"pages that go on for ever", func(t *testing.T, path string) {
		b := read(t, path)
		for i := 2 * os.Getpagesize(); i+os.Getpagesize() <= len(b); i += os.Getpagesize() {
			copy(b[i+overflowAt:], "\xff\xff\xff\xff")
		}
		overwrite(t, path, b)
	}},
	{"a value that is no JSON", func(t *testing.T, path string) { putRaw(t, path, "container-3\x00eth0", "{not json") }},
}

// valueDamages hold for the attachments alone: JSON that says nothing of one.
var valueDamages = map[string]string{
	"an array":                `[]`,
	"a string":                `"x"`,
	"null":                    `null`,
	"an empty object":         `{}`,
	"addresses of no kind":    `{"containerID":"container-3","ifname":"eth0","addresses":"x"}`,
	"an address that is none": `{"containerID":"container-3","ifname":"eth0","addresses":["10.244.1.300"]}`,
	"another container's":     `{"containerID":"container-4","ifname":"eth0"}`,
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func overwrite(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func putRaw(t *testing.T, path, key, value string) {
	t.Helper()
	inDB(t, path, func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return b.Put([]byte(key), []byte(value)) })
	})
}

func inDB(t *testing.T, path string, do func(*bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(do); err != nil {
		t.Fatal(err)
	}
}

// filled is a store with so many attachments that it has several pages.
func filled(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	with(t, dir, func(s *Attachments) {
		for i := range 200 {
			if err := s.Put(pod(i)); err != nil {
				t.Fatal(err)
			}
		}
	})
	return dir
}

// TestDamagedStoreIsReplaced: whatever has become of the file, an ADD and a DEL
// after it work, and the damaged file is kept aside.
func TestDamagedStoreIsReplaced(t *testing.T) {
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			dir := filled(t)
			d.do(t, AttachmentsPath(dir))
			damaged := read(t, AttachmentsPath(dir))
			checkReplaced(t, dir, damaged)
		})
	}
	for name, value := range valueDamages {
		t.Run("a value that is "+name, func(t *testing.T) {
			dir := filled(t)
			putAttachment(t, AttachmentsPath(dir), "container-3\x00eth0", value)
			checkReplaced(t, dir, read(t, AttachmentsPath(dir)))
		})
	}
}

func putAttachment(t *testing.T, path, key, value string) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error { return tx.Bucket(attachmentsBucket).Put([]byte(key), []byte(value)) })
	if err != nil {
		t.Fatal(err)
	}
}

func checkReplaced(t *testing.T, dir string, damaged []byte) {
	t.Helper()
	with(t, dir, func(s *Attachments) {
		all, err := s.All()
		if err != nil || len(all) != 0 {
			t.Fatalf("%d attachments, %v", len(all), err)
		}
		d := s.Damaged()
		if d == nil {
			t.Fatal("nobody is told of the damage")
		}
		if !IsDamage(d) || !IsDamage(fmt.Errorf("wrapped: %w", d)) || !strings.Contains(d.Error(), d.Path) {
			t.Errorf("the damage says %v", d)
		}
		if aside := read(t, d.Path); !bytes.Equal(aside, damaged) {
			t.Errorf("%s holds %d bytes, want the %d of the damaged file", d.Path, len(aside), len(damaged))
		}
		if err := s.Put(pod(1)); err != nil {
			t.Error(err)
		}
		if _, ok, err := s.Applied(); ok || err != nil {
			t.Errorf("a plan is said to be applied (%v), %v: nobody would apply the whole plan again", ok, err)
		}
	})
	with(t, dir, func(s *Attachments) {
		if all, err := s.All(); err != nil || len(all) != 1 || s.Damaged() != nil {
			t.Errorf("the next one finds %d attachments, %v, %v", len(all), s.Damaged(), err)
		}
	})
}

// TestDamagedAppliedIsForgotten: the whole plan is then applied once more.
func TestDamagedAppliedIsForgotten(t *testing.T) {
	dir := filled(t)
	for _, value := range []string{`"x"`, `[]`, `{"prefixes": 5}`} {
		db, err := bolt.Open(AttachmentsPath(dir), 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bolt.Tx) error { return tx.Bucket(metaBucket).Put(appliedKey, []byte(value)) })
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		with(t, dir, func(s *Attachments) {
			if _, ok, err := s.Applied(); ok || err != nil {
				t.Errorf("%s: %v, %v", value, ok, err)
			}
			if all, err := s.All(); err != nil || len(all) != 200 {
				t.Errorf("%s: %d attachments, %v", value, len(all), err)
			}
		})
	}
}

// One page that goes on for ever costs bbolt minutes where it is written anew, and all
// memory.
func TestOnePageGoesOnForEver(t *testing.T) {
	good := read(t, AttachmentsPath(filled(t)))
	for at := 2 * os.Getpagesize(); at < len(good); at += os.Getpagesize() {
		for _, found := range []string{"when opened", "when written"} {
			t.Run(fmt.Sprintf("page %d, %s", at/os.Getpagesize(), found), func(t *testing.T) {
				dir, b := t.TempDir(), bytes.Clone(good)
				copy(b[at+overflowAt:], "\xff\xff\xff\xff")
				overwrite(t, AttachmentsPath(dir), good)
				if found == "when opened" {
					overwrite(t, AttachmentsPath(dir), b)
				}
				hold(t, dir, func(a *Attachments) {
					overwrite(t, AttachmentsPath(dir), b)
					for i := range 200 { // each page is somebody's
						if err := a.Put(pod(i)); err != nil && !IsDamage(err) {
							t.Error(err)
						}
					}
				})
			})
		}
	}
}

// A page that leads back, to itself or to one above it, would be followed for ever.
// The store of more than a few pods has a page that leads to others, that of
// thousands has levels of them.
func TestPagesLeadBack(t *testing.T) {
	path := AttachmentsPath(filled(t))
	inDB(t, path, func(tx *bolt.Tx) error {
		for i := range 3000 {
			at := pod(i)
			value, err := json.Marshal(at)
			if err == nil {
				err = tx.Bucket(attachmentsBucket).Put(attachmentKey(at.ContainerID, at.IfName), value)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	good := read(t, path)
	var branches []int
	inDB(t, path, func(tx *bolt.Tx) error {
		for id := 0; ; id++ {
			p, err := tx.Page(id)
			if p == nil || err != nil {
				return err
			}
			if p.Type == "branch" {
				branches = append(branches, id)
			}
		}
	})
	if len(branches) < 3 {
		t.Fatalf("pages that lead to others: %v", branches)
	}
	for _, from := range branches {
		for _, to := range branches {
			b := bytes.Clone(good)
			binary.NativeEndian.PutUint64(b[from*os.Getpagesize()+pageHeader+branchChild:], uint64(to))
			if bytes.Equal(b, good) {
				continue
			}
			t.Run(fmt.Sprintf("%d to %d", from, to), func(t *testing.T) {
				dir := t.TempDir()
				overwrite(t, AttachmentsPath(dir), b)
				checkReplaced(t, dir, b)
			})
		}
	}
}

// A store that grows to levels of pages and shrinks again, by several openings, is
// never taken for a damaged one.
func TestGrowthIsNoDamage(t *testing.T) {
	dir := t.TempDir()
	const most = 2000
	var pods []Attachment
	for i := range most {
		at := pod(i)
		at.Sandbox = strings.Repeat("/netns", 40) // few to a page
		pods = append(pods, at)
	}
	r := rand.New(rand.NewPCG(3, 4))
	for _, live := range []int{most, most / 2, most, 10, most / 4, 0, 300} {
		with(t, dir, func(s *Attachments) {
			r.Shuffle(most, func(i, j int) { pods[i], pods[j] = pods[j], pods[i] })
			for _, at := range pods[:min(live, 200)] {
				if err := s.Put(at); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.update(func(tx *bolt.Tx) error {
				for _, at := range pods[:live] {
					if err := putJSON(tx.Bucket(attachmentsBucket), attachmentKey(at.ContainerID, at.IfName), at); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if err := s.Delete(pods[live:]...); err != nil {
				t.Fatal(err)
			}
		})
		with(t, dir, func(s *Attachments) {
			if all, err := s.All(); err != nil || len(all) != live || s.Damaged() != nil {
				t.Fatalf("%d attachments, want %d; %v, %v", len(all), live, err, s.Damaged())
			}
		})
	}
}

// TestRandomDamage overwrites stretches of a good file. Whatever a reader makes
// of it, it neither dies nor hands out what it cannot have.
func TestRandomDamage(t *testing.T) {
	dir := filled(t)
	path := AttachmentsPath(dir)
	good := read(t, path)
	r := rand.New(rand.NewPCG(1, 2))
	replaced := 0
	for round := range 100 {
		b := bytes.Clone(good)
		at, n := r.IntN(len(b)), 1+r.IntN(3000)
		for i := at; i < min(at+n, len(b)); i++ {
			b[i] = byte(r.Uint32())
		}
		overwrite(t, path, b)
		with(t, dir, func(s *Attachments) {
			all, err := s.All()
			if err != nil && !IsDamage(err) {
				t.Errorf("round %d, %d bytes at %d: %v", round, n, at, err)
			}
			if s.Damaged() != nil {
				replaced++
			}
			for _, a := range all {
				if !strings.HasPrefix(a.ContainerID, "container-") {
					t.Errorf("round %d: %+v", round, a)
				}
			}
			if err := s.Put(pod(round)); err != nil && !IsDamage(err) {
				t.Errorf("round %d, %d bytes at %d: %v", round, n, at, err)
			}
		})
		aside, _ := filepath.Glob(path + ".damaged-*")
		for _, f := range aside {
			_ = os.Remove(f)
		}
	}
	if replaced == 0 {
		t.Error("no round has damaged anything")
	}
}

// TestDamageWhileOpen has the file break under a holder who is about to write.
// bbolt may then keep its own locks for ever; the store comes back all the same.
func TestDamageWhileOpen(t *testing.T) {
	good := read(t, AttachmentsPath(filled(t)))
	for _, damage := range damages {
		if strings.HasPrefix(damage.name, "a value") { // made through bbolt, which waits for the holder
			continue
		}
		for name, write := range map[string]func(*Attachments) error{
			"put":    func(a *Attachments) error { return a.Put(pod(500)) },
			"delete": func(a *Attachments) error { return a.Delete(pod(3)) },
			"read":   func(a *Attachments) error { _, err := a.All(); return err },
		} {
			t.Run(damage.name+"/"+name, func(t *testing.T) {
				dir := t.TempDir()
				overwrite(t, AttachmentsPath(dir), good)
				hold(t, dir, func(a *Attachments) {
					damage.do(t, AttachmentsPath(dir))
					_ = write(a) // whether it fails depends on the pages that it touches
				})
				for range 2 { // the first may find the damage
					hold(t, dir, func(a *Attachments) {
						if err := a.Put(pod(501)); err != nil && !IsDamage(err) {
							t.Error(err)
						}
					})
				}
				hold(t, dir, func(a *Attachments) {
					if _, ok, err := a.Get(pod(501).ContainerID, "eth0"); !ok || err != nil {
						t.Errorf("what was put is there: %v, %v", ok, err)
					}
				})
			})
		}
	}
}

// A transaction that bbolt has lost keeps its Close waiting.
func TestCloseThatNeverEnds(t *testing.T) {
	dir := filled(t)
	hold(t, dir, func(a *Attachments) {
		if _, err := a.db.Begin(true); err != nil {
			t.Error(err)
		}
		_ = a.guarded(func() error { panic("a page makes no sense") })
	})
	if aside, _ := filepath.Glob(AttachmentsPath(dir) + ".damaged-*"); len(aside) != 1 {
		t.Errorf("moved aside: %v", aside)
	}
	with(t, dir, func(a *Attachments) {
		if err := a.Put(pod(501)); err != nil {
			t.Error(err)
		}
	})
}

// hold opens the store and closes it, whatever it has become, and fails where that hangs.
func hold(t *testing.T, dir string, f func(*Attachments)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		a, err := OpenAttachments(ctx, dir)
		if err != nil {
			t.Error(err)
			return
		}
		f(a)
		if err := a.Close(); err != nil && !IsDamage(err) {
			t.Error(err)
		}
	}()
	select {
	case <-done:
	case <-ctx.Done():
		t.Fatal("it hangs")
	}
}
