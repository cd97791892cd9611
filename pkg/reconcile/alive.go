package reconcile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrRunning says that a helper holds the run folder already.
var ErrRunning = errors.New("wgcnid runs already")

func helperLock(runDir string) string { return filepath.Join(runDir, "wgcnid.lock") }

// HoldHelperLock makes this process the one helper of a run folder, until the
// file is closed or the process ends, however it ends.
func HoldHelperLock(runDir string) (*os.File, error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(helperLock(runDir), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close() //nolint:errcheck // nothing was written
		return nil, fmt.Errorf("%w: %s is locked", ErrRunning, helperLock(runDir))
	}
	return f, nil
}

// HelperAlive reports whether some process is the helper of a run folder.
func HelperAlive(runDir string) bool {
	f, err := os.Open(helperLock(runDir))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}
