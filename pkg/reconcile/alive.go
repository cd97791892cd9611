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
	// A lock that others can ask about without taking it for a moment, as flock(2)
	// would have them do: a helper that starts just then would be refused.
	switch err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES): // fcntl(2) may return either
		f.Close() //nolint:errcheck // nothing was written
		return nil, fmt.Errorf("%w: %s is locked", ErrRunning, helperLock(runDir))
	case err != nil:
		f.Close() //nolint:errcheck // nothing was written
		return nil, fmt.Errorf("lock %s: %w", helperLock(runDir), err)
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
	lock := unix.Flock_t{Type: unix.F_RDLCK}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock) == nil && lock.Type != unix.F_UNLCK
}
