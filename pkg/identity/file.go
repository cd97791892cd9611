package identity

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// ReadSecretFile reads a file that nobody but its owner may touch: a key, a
// password, the cluster secret. It follows symbolic links, since Kubernetes
// mounts its secrets as such. It refuses a file with more permissions than 0600,
// one of more than limit bytes, and what is no regular file; these errors and
// those of opening it name the path, and none of them what is in it. A missing
// file is fs.ErrNotExist.
func ReadSecretFile(path string, limit int64) ([]byte, error) {
	// O_NONBLOCK keeps a named pipe in the file's place from hanging the open.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat() // of what is then read, whatever the path leads to by now
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file: name the file itself", path)
	}
	if mode := info.Mode().Perm(); mode&^0o600 != 0 {
		return nil, fmt.Errorf("%s is open to others (mode %04o): run `chmod 600 %s`, or give its Kubernetes volume `defaultMode: 0400`", path, mode, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes: it cannot be the right file", path, limit)
	}
	return data, nil
}
