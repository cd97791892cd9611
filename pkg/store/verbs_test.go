package store_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/store"
)

func drain(t testing.TB, l *store.VerbLog, dir string) []store.Verb {
	t.Helper()
	out, err := l.Drain(dir)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestVerbLog(t *testing.T) {
	dir := t.TempDir()
	var l store.VerbLog
	defer l.Close()
	if got := drain(t, &l, dir); len(got) > 0 {
		t.Errorf("before there was any: %v", got)
	}
	want := []store.Verb{
		{Name: "ADD", Took: 4123 * time.Microsecond},
		{Name: "ADD", Failed: true, Took: time.Second},
		{Name: "STATUS"},
	}
	for _, v := range want {
		store.LogVerb(dir, v)
	}
	if info, err := os.Stat(store.VerbsPath(dir)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if diff := cmp.Diff(want, drain(t, &l, dir)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := drain(t, &l, dir); len(got) > 0 {
		t.Errorf("they are counted again: %v", got)
	}
	store.LogVerb(dir, want[0])
	if diff := cmp.Diff(want[:1], drain(t, &l, dir)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// A verb that has the file open while the helper takes it away is not lost, nor
// one of which a part was there.
func TestVerbLogLate(t *testing.T) {
	dir := t.TempDir()
	var l store.VerbLog
	defer l.Close()
	store.LogVerb(dir, store.Verb{Name: "ADD"})
	f, err := os.OpenFile(store.VerbsPath(dir), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("DEL o"); err != nil {
		t.Fatal(err)
	}
	if got := drain(t, &l, dir); len(got) != 1 {
		t.Errorf("%v", got)
	}
	if _, err := f.WriteString("k 7\nGC ok 8\n"); err != nil {
		t.Fatal(err)
	}
	store.LogVerb(dir, store.Verb{Name: "CHECK"})
	want := []store.Verb{{Name: "DEL", Took: 7 * time.Microsecond}, {Name: "GC", Took: 8 * time.Microsecond}, {Name: "CHECK"}}
	if diff := cmp.Diff(want, drain(t, &l, dir)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Verbs and the helper are at it at the same time, and none is lost or counted twice.
// A verb is over before the helper looks for the second time, as it is where the
// helper looks every few seconds.
func TestVerbLogTogether(t *testing.T) {
	dir := t.TempDir()
	var l store.VerbLog
	defer l.Close()
	const writers, each = 4, 300
	var writing sync.WaitGroup
	var written [writers]atomic.Int64
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				store.LogVerb(dir, store.Verb{Name: "ADD", Took: time.Duration(w*each+i) * time.Microsecond})
				written[w].Add(1)
			}
		})
	}
	awaitEach := func() {
		for w := range writers {
			for before := written[w].Load(); before < each && written[w].Load() == before; {
				runtime.Gosched()
			}
		}
	}
	done := make(chan struct{})
	go func() { writing.Wait(); close(done) }()
	var got []store.Verb
	for reading := true; reading; {
		select {
		case <-done:
			reading = false
		default:
		}
		got = append(got, drain(t, &l, dir)...)
		awaitEach()
	}
	got = append(got, drain(t, &l, dir)...)
	slices.SortFunc(got, func(a, b store.Verb) int { return int(a.Took - b.Took) })
	if len(got) != writers*each {
		t.Fatalf("%d verbs, want %d", len(got), writers*each)
	}
	for i, v := range got {
		if v.Took != time.Duration(i)*time.Microsecond {
			t.Fatalf("verb %d is %v", i, v)
		}
	}
}

// Whatever lies there, a verb neither fails, nor waits, nor fills the disk.
func TestVerbLogHostile(t *testing.T) {
	for name, prepare := range map[string]func(path string) error{
		"no folder": func(path string) error { return os.Remove(filepath.Dir(path)) },
		"a folder":  func(path string) error { return os.Mkdir(path, 0o700) },
		"a pipe":    func(path string) error { return unix.Mkfifo(path, 0o600) },
		"a link": func(path string) error {
			return os.Symlink(filepath.Join(filepath.Dir(filepath.Dir(path)), "target"), path)
		},
		"a device": func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 7))) }, // full
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			dir := filepath.Join(root, "run")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := prepare(store.VerbsPath(dir)); err != nil {
				t.Fatal(err)
			}
			var l store.VerbLog
			defer l.Close()
			begun := time.Now()
			for range 3 {
				store.LogVerb(dir, store.Verb{Name: "ADD"})
				_, _ = l.Drain(dir) // may well fail
			}
			if d := time.Since(begun); d > 10*time.Second {
				t.Errorf("it took %s", d)
			}
			if _, err := os.Stat(filepath.Join(root, "target")); err == nil {
				t.Error("it wrote where the link leads")
			}
		})
	}
	dir := t.TempDir()
	for range 20_000 {
		store.LogVerb(dir, store.Verb{Name: "STATUS", Took: time.Second})
	}
	info, err := os.Stat(store.VerbsPath(dir))
	if err != nil || info.Size() > 300<<10 {
		t.Errorf("%v bytes, %v", info.Size(), err)
	}
	var l store.VerbLog
	defer l.Close()
	if got := drain(t, &l, dir); len(got) < 10_000 {
		t.Errorf("%d verbs", len(got))
	}
}

func TestVerbLogGarbage(t *testing.T) {
	dir := t.TempDir()
	text := "\n\nADD\nADD ok\nADD ok x\nADD ok -1\nADD ok 99999999999999\nADD maybe 1\nNOD ok 1\n\x00\xff\nADD ok 5\n" + fmt.Sprintf("ADD ok %0300d\n", 1) + "CHECK error 6"
	if err := os.WriteFile(store.VerbsPath(dir), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var l store.VerbLog
	defer l.Close()
	got := append(drain(t, &l, dir), drain(t, &l, dir)...)
	for _, v := range got {
		if v.Name != "ADD" || v.Failed || v.Took > 5*time.Microsecond {
			t.Errorf("%v is taken for a verb", v)
		}
	}
	if len(got) == 0 {
		t.Error("the good line is lost")
	}
}

func BenchmarkLogVerb(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		store.LogVerb(dir, store.Verb{Name: "ADD", Took: time.Millisecond})
	}
}

func FuzzVerbLog(f *testing.F) {
	f.Add([]byte("ADD ok 5\nDEL error 7\n"))
	f.Add([]byte("ADD ok 5\nADD ok"))
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(store.VerbsPath(dir), text, 0o600); err != nil {
			t.Fatal(err)
		}
		var l store.VerbLog
		defer l.Close()
		for _, v := range append(drain(t, &l, dir), drain(t, &l, dir)...) {
			if !slices.Contains(store.VerbNames, v.Name) || v.Took < 0 || v.Took > time.Hour {
				t.Errorf("%q: %v", text, v)
			}
		}
	})
}
