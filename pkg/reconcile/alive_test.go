package reconcile_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/wgcni/wgcni/pkg/reconcile"
)

func TestHelperLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run", "wgcni")
	if reconcile.HelperAlive(dir) {
		t.Error("alive in a folder that is not there")
	}
	first, err := reconcile.HoldHelperLock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !reconcile.HelperAlive(dir) {
		t.Error("not alive while the lock is held")
	}
	second, err := reconcile.HoldHelperLock(dir)
	if !errors.Is(err, reconcile.ErrRunning) || second != nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second helper: %v, want ErrRunning that names the file", err)
	}
	if !reconcile.HelperAlive(dir) {
		t.Error("the second attempt ended the first")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if reconcile.HelperAlive(dir) {
		t.Error("alive after the helper has ended")
	}
	again, err := reconcile.HoldHelperLock(dir)
	if err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	defer again.Close()
}

// The runtime asks every few seconds (STATUS), people do (status): whoever asks
// must never be the reason why a helper does not start.
func TestAskingDoesNotTakeTheLock(t *testing.T) {
	dir := t.TempDir()
	var asking sync.WaitGroup
	done := make(chan struct{})
	for range 2 {
		asking.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					reconcile.HelperAlive(dir)
				}
			}
		})
	}
	for range 500 {
		f, err := reconcile.HoldHelperLock(dir)
		if err != nil {
			t.Error(err)
			break
		}
		if !reconcile.HelperAlive(dir) {
			t.Error("not alive while the lock is held")
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	close(done)
	asking.Wait()
}

func TestHelperLockFolder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := reconcile.HoldHelperLock(file); err == nil || errors.Is(err, reconcile.ErrRunning) {
		t.Errorf("error %v, want one that is not ErrRunning", err)
	}
}
