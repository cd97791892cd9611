package install

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// victimEnv makes the test binary install, or with uninstallEnv uninstall, and be killed.
const (
	victimEnv    = "WGCNI_INSTALL_TEST_OPTIONS"
	uninstallEnv = "WGCNI_INSTALL_TEST_UNINSTALL"
)

func TestMain(m *testing.M) {
	if text := os.Getenv(victimEnv); text != "" {
		if err := victim(text, os.Getenv(uninstallEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func victim(text, stateDir string) error {
	var o Options
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	fmt.Println("begun")
	ctx := context.Background()
	if stateDir == "" {
		_, err := Install(ctx, o)
		return err
	}
	m, err := BeginRemoval(ctx, stateDir)
	if err != nil {
		return err
	}
	if _, err := m.TakeOut(ctx); err != nil {
		return err
	}
	_, err = m.Finish(true)
	return err
}

// killed runs an installation, or the end of one, and kills it after a while. It
// reports whether it was still at work, and how long that took.
func (n *node) killed(uninstall bool, after time.Duration) (alive bool, took time.Duration) {
	n.t.Helper()
	text, err := json.Marshal(map[string]any{
		"CNIDir": n.CNIDir, "BinDir": n.BinDir, "Plugin": n.Plugin, "Entry": n.Entry, "InPlace": n.InPlace,
	})
	n.must(err)
	cmd := exec.CommandContext(n.t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+string(text), "GORACE=atexit_sleep_ms=0")
	if uninstall {
		cmd.Env = append(cmd.Env, uninstallEnv+"="+n.state)
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	n.must(err)
	n.must(cmd.Start())
	_, err = out.Read(make([]byte, 1))
	n.must(err)
	begun := time.Now()
	killer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() }) // it may have ended
	err = cmd.Wait()
	killer.Stop()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return true, time.Since(begun)
	}
	n.must(err)
	return false, time.Since(begun)
}

// sound checks what holds at any moment: the primary's file is whole, and an entry
// has its binary.
func (n *node) sound() {
	n.t.Helper()
	f, err := readFolder(n.CNIDir, nil)
	n.must(err)
	if len(f.networks) == 0 {
		n.t.Fatal("there is no network")
	}
	for _, c := range f.networks {
		if c.fault != nil {
			n.t.Errorf("%s: %v", c.file, c.fault)
		}
		if Chains(c.list) {
			if data, err := os.ReadFile(n.path("opt/bin/wgcni")); err != nil || !strings.HasPrefix(string(data), "the plugin") {
				n.t.Errorf("%s has the entry, and the plugin is %.20q, %v", c.file, data, err)
			}
		}
		rest, err := Remove(c.data)
		n.must(err)
		if diff := cmp.Diff(primary, string(rest)); diff != "" {
			n.t.Errorf("%s:\n%s", c.file, diff)
		}
	}
}

// Killed at any moment, an installation and a removal leave a node on which pods
// start, and the next run completes them.
func TestKilled(t *testing.T) {
	plugin := "the plugin" + strings.Repeat(" and more of it", 1<<15)
	for _, inPlace := range []bool{false, true} {
		t.Run(fmt.Sprintf("in place %v", inPlace), func(t *testing.T) {
			n := newNode(t)
			n.InPlace = inPlace
			n.write("usr/wgcni", plugin)
			before := n.files()
			n.install()
			installed := n.files()
			n.uninstall(true)
			n.same(before)
			for _, uninstall := range []bool{false, true} {
				n.restore(uninstall, before, installed)
				alive, whole := n.killed(uninstall, time.Minute)
				if alive {
					t.Fatal("it takes more than a minute")
				}
				cut := 0
				for i := range points {
					n.restore(uninstall, before, installed)
					if alive, _ := n.killed(uninstall, whole*time.Duration(i)/points); alive {
						cut++
					}
					n.sound()
				}
				n.restore(uninstall, before, installed)
				if cut < points/4 {
					t.Errorf("uninstall %v: cut short %d times of %d: this proves nothing", uninstall, cut, points)
				}
			}
		})
	}
}

// points are the moments at which a run is killed.
const points = 16

// restore completes what was cut short, and makes the node ready for the next time.
func (n *node) restore(uninstall bool, before, installed map[string]string) {
	n.t.Helper()
	if !uninstall {
		n.install()
		n.same(installed)
		n.uninstall(true)
		n.same(before)
		return
	}
	if _, err := os.Stat(filepath.Join(n.state, RecordFile)); err == nil {
		n.uninstall(true)
	}
	n.must(FinishRemoval(n.state, n.CNIDir, true)) // of one that was killed with the record already gone
	n.same(before)
	n.install()
}
