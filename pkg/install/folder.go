package install

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxFileBytes bounds what is read of a network configuration.
const maxFileBytes = 1 << 20

// copyName is that of the copy; copies has it with all prefixes.
const (
	copyName   = "wgcni.conflist"
	copyPrefix = "00-"
)

var copies = regexp.MustCompile(`^(?:00-)+wgcni\.conflist$`)

// network is one file of the folder of network configurations.
type network struct {
	file string // its name in the folder
	data []byte
	// list is data, or for a single plugin's file what a runtime makes of it.
	list []byte
	// fault says why wgcni cannot be chained to it.
	fault error
}

// folder is what the runtimes see, in the order in which they see it.
type folder struct {
	path     string
	networks []network
	// own is the name of the copy as the record has it: whatever has become of that
	// file, it is no network of somebody else's.
	own string
}

// extensions are those that containerd and CRI-O take (libcni.ConfFiles).
var extensions = []string{".conf", ".conflist", ".json"}

// readFolder reads all network configurations. A folder that is not there has none.
// Had is the record of what was installed, if there is one.
func readFolder(path string, had *Record) (folder, error) {
	f := folder{path: path}
	if had != nil && had.Mode == Copy && copies.MatchString(had.Target) {
		f.own = had.Target
	}
	entries, err := os.ReadDir(path) // sorted by name
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	for _, e := range entries {
		if e.IsDir() || !slices.Contains(extensions, filepath.Ext(e.Name())) {
			continue
		}
		data, err := readFile(filepath.Join(path, e.Name()))
		if errors.Is(err, fs.ErrNotExist) { // deleted since, or a link to nowhere
			continue
		}
		n := judge(e.Name(), data)
		if err != nil {
			n.fault = err
		}
		f.networks = append(f.networks, n)
	}
	return f, nil
}

// readFile reads a regular file, and does not hang on what is none.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err == nil && len(data) > maxFileBytes {
		err = fmt.Errorf("%s has more than %d bytes: it is no network configuration", path, maxFileBytes)
	}
	return data, err
}

func judge(name string, data []byte) network {
	n := network{file: name, data: data, list: data}
	if filepath.Ext(name) != ".conflist" {
		if n.list, n.fault = Wrap(data); n.fault != nil {
			return n
		}
	}
	l, err := scan(n.list)
	switch {
	case err != nil:
		n.fault = err
	case len(l.ours(n.list)) == len(l.plugins):
		n.fault = ErrNoPrimary
	}
	return n
}

// single reports whether the file is the configuration of one plugin.
func (n network) single() bool { return filepath.Ext(n.file) != ".conflist" }

// copied reports whether the file is a copy of ours: the record says so, or its
// name does, and somebody else's network of that name would hardly chain wgcni.
func (f folder) copied(n network) bool {
	return n.file == f.own || copies.MatchString(n.file) && Chains(n.data)
}

// loopback reports whether the network has nothing but the plugin loopback. Such
// a file lies beside the pods' network on many machines (99-loopback.conf).
func (n network) loopback() bool {
	l, err := scan(n.list)
	return err == nil && len(l.plugins) == 1 && typeOf(l.plugins[0].of(n.list)) == "loopback"
}

func (n network) primary() string {
	l, err := scan(n.list)
	if err != nil || len(l.plugins) == 0 {
		return ""
	}
	return typeOf(l.plugins[0].of(n.list))
}

// find returns the file of that name.
func (f folder) find(name string) (network, bool) {
	i := slices.IndexFunc(f.networks, func(n network) bool { return n.file == name })
	if i < 0 {
		return network{}, false
	}
	return f.networks[i], true
}

// first returns the network that the runtime would take if there were no copy.
func (f folder) first() (network, bool) {
	i := slices.IndexFunc(f.networks, func(n network) bool { return !f.copied(n) && !n.loopback() })
	if i < 0 {
		return network{}, false
	}
	return f.networks[i], true
}

// copies returns the names of the copies that are there.
func (f folder) copies() (names []string) {
	for _, n := range f.networks {
		if f.copied(n) {
			names = append(names, n.file)
		}
	}
	return names
}

// nameCopy returns a name for the copy that sorts before all other files: the one
// that it has, if that does. A name that no prefix comes before is an error.
func (f folder) nameCopy(present string) (string, error) {
	foremost := ""
	for _, n := range f.networks {
		if !f.copied(n) {
			foremost = n.file // the first, since they are sorted
			break
		}
	}
	if copies.MatchString(present) && (foremost == "" || present < foremost) {
		return present, nil
	}
	for i := 1; i <= 8; i++ {
		if name := strings.Repeat(copyPrefix, i) + copyName; foremost == "" || name < foremost {
			return name, nil
		}
	}
	return "", fmt.Errorf("no copy can sort before %s: rename that file, for example to 10-%s, or install with --in-place", foremost, strings.TrimLeft(foremost, "-. _!"))
}

// source returns the network to chain wgcni to: the one of that name, or else the
// first. The error Is ErrUnready while it may still come.
func (f folder) source(name string) (network, error) {
	n, ok := f.find(name)
	if name == "" {
		n, ok = f.first()
	}
	switch {
	case !ok && name != "":
		return n, fmt.Errorf("%w: %s is not there", ErrUnready, filepath.Join(f.path, name))
	case !ok && len(f.copies()) > 0:
		return n, fmt.Errorf("%w: %s has no network configuration but %s, which is taken for a copy that wgcnid made: it is waiting for the one that the primary plugin's agent writes", ErrUnready, f.path, f.copies()[0])
	case !ok:
		return n, fmt.Errorf("%w: %s has no network configuration yet: it is written by the primary plugin's agent (flannel, …) or by hand", ErrUnready, f.path)
	case n.fault != nil:
		return n, fmt.Errorf("%s: %w", filepath.Join(f.path, n.file), n.fault)
	}
	return n, nil
}
