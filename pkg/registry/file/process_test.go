package file

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/registrytest"
)

// TestMain lets the test binary be a writer in a process of its own: with
// WGCNI_WRITER="path name first last" it publishes these revisions and says
// each one on its standard output when it is done.
func TestMain(m *testing.M) {
	if args := strings.Fields(os.Getenv("WGCNI_WRITER")); len(args) == 4 {
		if err := writer(args[0], args[1], args[2], args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func writer(path, name, first, last string) error {
	from, err := strconv.ParseUint(first, 10, 64)
	if err != nil {
		return err
	}
	to, err := strconv.ParseUint(last, 10, 64)
	if err != nil {
		return err
	}
	r := open(path)
	for rev := from; rev <= to; rev++ {
		if err := r.Publish(context.Background(), registrytest.Record(name, rev), rev-1); err != nil {
			return err
		}
		fmt.Println(rev)
	}
	return nil
}

func writerCommand(t *testing.T, path, name string, first, last uint64) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), fmt.Sprintf("WGCNI_WRITER=%s %s %d %d", path, name, first, last))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	return cmd, &out
}

func TestFiftyProcesses(t *testing.T) {
	r := newTest(t)
	const writers, revisions = 50, 4
	var want []registry.Record
	var wg sync.WaitGroup
	for i := range writers {
		name := fmt.Sprintf("node-%02d", i)
		want = append(want, registrytest.Record(name, revisions))
		cmd, _ := writerCommand(t, r.store.path, name, 1, revisions)
		wg.Go(func() {
			if err := cmd.Run(); err != nil {
				t.Errorf("writer %s: %v", name, err)
			}
		})
	}
	wg.Wait()
	registrytest.Expect(t, r, want...)
}

// A writer that is killed at any moment leaves a document that can be read, with
// every record that was ever published, and the next one tidies up after it.
func TestKilledWriters(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	r := newTest(t)
	others := []registry.Record{registrytest.Record("node-a", 1), registrytest.Record("node-b", 1)}
	registrytest.Publish(t, r, others...)

	var known uint64
	midway := 0
	for range 25 {
		cmd, out := writerCommand(t, r.store.path, "victim", known+1, known+1_000_000)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// A random moment: before its first revision, or up to 20 ms after it has begun.
		if moment := random.IntN(25); moment > 0 {
			awaitRevision(t, r, known+1)
			time.Sleep(time.Duration(random.Int64N(int64(20 * time.Millisecond))))
		}
		cmd.Process.Kill()
		cmd.Wait() // killed, as wanted

		s, err := r.Snapshot(t.Context())
		if err != nil {
			t.Fatalf("after the kill: %v", err)
		}
		for _, o := range others {
			if got, _ := s.Record(o.Name); !got.Equal(o) {
				t.Fatalf("record of %s: %+v", o.Name, got)
			}
		}
		var said uint64 // the last revision whose Publish had returned
		if lines := strings.Fields(out.String()); len(lines) > 0 {
			said, _ = strconv.ParseUint(lines[len(lines)-1], 10, 64)
		}
		victim, _ := s.Record("victim")
		if got := victim.Revision; got < max(known, said) {
			t.Fatalf("revision %d is stored; it was %d before, and the writer had published %d", got, known, said)
		}
		known = victim.Revision
		n := len(leftovers(t, r))
		midway += n
		if n > 1 {
			t.Fatalf("%d leftover files: a writer has not removed those of the one before", n)
		}
	}
	t.Logf("%d of the kills left a file behind", midway)
	write(t, filepath.Join(filepath.Dir(r.store.path), ".mesh.json123"), "left behind")
	write(t, filepath.Join(filepath.Dir(r.store.path), ".mesh.json.swp"), "an editor's")
	registrytest.Publish(t, r, registrytest.Record("node-a", 2))
	if left := leftovers(t, r); len(left) != 1 || left[0] != ".mesh.json.swp" {
		t.Errorf("left over: %v; want the editor's file and nothing else", left)
	}
}

func awaitRevision(t *testing.T, r handle, revision uint64) {
	t.Helper()
	for deadline := time.Now().Add(registrytest.Deadline); ; time.Sleep(time.Millisecond) {
		s, err := r.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if victim, _ := s.Record("victim"); victim.Revision >= revision {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the writer has not published revision %d within %v", revision, registrytest.Deadline)
		}
	}
}

func leftovers(t *testing.T, r handle) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(r.store.path))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			out = append(out, e.Name())
		}
	}
	return out
}
