package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// demoMarker makes the test binary the demo. Its value, which all processes of
// that demo inherit, tells them from those of others.
const demoMarker = "WGCNI_DEMO_TEST"

func TestMain(m *testing.M) {
	cluster.Init()
	if os.Getenv(demoMarker) != "" {
		os.Exit(run(os.Stdout, os.Stderr, false))
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the demo makes network namespaces: run its tests as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// demoProcess is a demo under test.
type demoProcess struct {
	cmd    *exec.Cmd
	log    *cluster.Log
	marker string
	tmp    string // its TMPDIR
}

func startDemo(t *testing.T) *demoProcess {
	t.Helper()
	p := &demoProcess{log: &cluster.Log{}, tmp: t.TempDir()}
	p.marker = demoMarker + "=" + p.tmp
	p.cmd = exec.Command("/proc/self/exe")
	p.cmd.Env = append(os.Environ(), p.marker, "TMPDIR="+p.tmp)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil { // the test has failed before it waited
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
	})
	return p
}

// exitStatus waits for the demo's end.
func (p *demoProcess) exitStatus(t *testing.T) int {
	t.Helper()
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return p.cmd.ProcessState.ExitCode()
}

// processes lists the demo's processes, those inside its namespaces too.
func (p *demoProcess) processes() (pids []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, f := range files {
		environ, err := os.ReadFile(f)
		if err == nil && slices.Contains(strings.Split(string(environ), "\x00"), p.marker) {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

// namespaces lists those of the demo's processes that are not the test's own.
// They are held until the test's end: the kernel would give their numbers to
// namespaces of others.
func (p *demoProcess) namespaces(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	for _, pid := range p.processes() {
		for _, kind := range []string{"mnt", "net", "pid", "uts", "ipc"} {
			ours, _ := os.Readlink(filepath.Join("/proc/self/ns", kind))
			f, err := os.Open(filepath.Join("/proc", pid, "ns", kind))
			if err != nil {
				continue // the process has ended
			}
			id, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
			if err != nil || id == ours || found[id] {
				_ = f.Close() // opened to look only
				continue
			}
			found[id] = true
			t.Cleanup(func() { _ = f.Close() })
		}
	}
	return found
}

// checkGone fails the test if a process or file of the demo stays, or if any
// process is in one of the namespaces.
func (p *demoProcess) checkGone(t *testing.T, namespaces map[string]bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	// An nsenter ends a moment after what it has entered.
	err := cluster.Poll(ctx, "all that the demo made to vanish", func() error {
		if left := p.processes(); len(left) > 0 {
			return fmt.Errorf("processes %v", left)
		}
		links, _ := filepath.Glob("/proc/[0-9]*/ns/*")
		for _, l := range links {
			if id, err := os.Readlink(l); err == nil && namespaces[id] {
				return fmt.Errorf("namespace %s at %s", id, l)
			}
		}
		files, err := os.ReadDir(p.tmp)
		if len(files) > 0 {
			return fmt.Errorf("files %v in TMPDIR", files)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestDemo(t *testing.T) {
	p := startDemo(t)
	status := p.exitStatus(t)
	out := p.log.String()
	if status != 0 {
		t.Fatalf("exit status %d:\n%s", status, out)
	}
	for i := range steps {
		if !strings.Contains(out, fmt.Sprintf("\n%2d. %s ...", i+1, steps[i].title)) {
			t.Errorf("step %d is missing", i+1)
		}
	}
	if strings.ContainsFunc(out, func(r rune) bool { return r > 0x7e || r < ' ' && r != '\n' }) {
		t.Error("the output is not plain ASCII, though nobody is at a terminal")
	}
	if t.Failed() {
		t.Log(out)
	}
	p.checkGone(t, nil)
}

// TestInterrupted sends a signal in the middle of steps that differ in what
// they have under way: machines, cnitool, a stream, helpers.
func TestInterrupted(t *testing.T) {
	for _, tt := range []struct {
		step   int
		signal os.Signal
	}{{1, unix.SIGINT}, {5, unix.SIGINT}, {9, unix.SIGTERM}} {
		t.Run(fmt.Sprintf("%v in step %d", tt.signal, tt.step), func(t *testing.T) {
			p := startDemo(t)
			if err := p.log.WaitFor(t.Context(), fmt.Sprintf("%2d. ", tt.step)); err != nil {
				t.Fatal(err)
			}
			namespaces := p.namespaces(t)
			if tt.step > 1 && len(namespaces) < 5*(nodeCount+1) {
				t.Errorf("found only %d namespaces of %d machines", len(namespaces), nodeCount+1)
			}
			if err := p.cmd.Process.Signal(tt.signal); err != nil {
				t.Fatal(err)
			}
			if status := p.exitStatus(t); status != exitInterrupted {
				t.Errorf("exit status %d:\n%s", status, p.log)
			}
			if out := p.log.String(); strings.Contains(out, "ok: traffic goes on") {
				t.Errorf("the signal came too late:\n%s", out)
			}
			p.checkGone(t, namespaces)
		})
	}
}

func TestNotRoot(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), demoMarker+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	_ = cmd.Run() // its exit status is checked
	want := "demo: it makes network namespaces, so it must run as root: sudo make demo\n"
	if got := cmd.ProcessState.ExitCode(); got != 1 || stderr.String() != want {
		t.Errorf("exit status %d, %q", got, stderr.String())
	}
}

func TestDiff(t *testing.T) {
	before := state{"rule a", "rule a", "link b", "file c"}
	for _, tt := range []struct {
		name  string
		after state
		want  []string
	}{
		{"same", before, nil},
		{"other order", state{"file c", "rule a", "link b", "rule a"}, nil},
		{"one more of two equal lines", append(state{"rule a"}, before...), []string{"+ rule a"}},
		{"one less of two equal lines", before[1:], []string{"- rule a"}},
		{"changed", state{"rule a", "rule a", "link d", "file c"}, []string{"+ link d", "- link b"}},
	} {
		if d := cmp.Diff(tt.want, diff(before, tt.after)); d != "" {
			t.Errorf("%s: -want +got:\n%s", tt.name, d)
		}
	}
}

func TestEntryLines(t *testing.T) {
	got, err := entryLines(`{"plugins": [{"type": "bridge"}, {"registry": {"type": "file", "path": "/x"}, "type": "wgcni",
		"clusterCIDRs": [ "10.0.0.0/8" ]}]}`)
	want := []string{`+ { "type": "wgcni",`, `+   "clusterCIDRs": ["10.0.0.0/8"],`, `+   "registry": {"path":"/x","type":"file"} }`}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%v, -want +got:\n%s", err, d)
	}
}
