// Package containerd reads what containerd's configuration says of CNI.
package containerd

import (
	"os"
	"regexp"
	"strconv"
)

// File is where containerd reads its configuration.
const File = "/etc/containerd/config.toml"

// DefaultBinDir is where the plugins of CNI are, unless somebody says otherwise, as
// Debian's containerd does.
const DefaultBinDir = "/opt/cni/bin"

// Config is as much of the configuration as matters to a CNI plugin. What
// its "imports" say is not looked at.
type Config struct {
	File       string // "": there is none
	MaxConfNum int    // how many networks it uses at once; -1: not set
	ConfDir    string // of the network configurations; "": not set
	BinDir     string // of the plugins, the first of several; "": not set
}

// The keys are in no other section: plugins."io.containerd.grpc.v1.cri".cni up to
// containerd 1, plugins."io.containerd.cri.v1.runtime".cni in containerd 2, which
// knows bin_dirs as well.
var (
	maxConfNum = regexp.MustCompile(`(?m)^\s*max_conf_num\s*=\s*(\d+)`)
	confDir    = regexp.MustCompile(`(?m)^\s*conf_dir\s*=\s*["']([^"']*)["']`)
	binDir     = regexp.MustCompile(`(?m)^\s*bin_dirs?\s*=\s*\[?\s*["']([^"']+)["']`)
)

// Read takes the keys from the file; where it cannot be read none is set.
func Read(file string) Config {
	text, err := os.ReadFile(file)
	if err != nil {
		return Config{MaxConfNum: -1}
	}
	find := func(r *regexp.Regexp) string {
		if m := r.FindSubmatch(text); m != nil {
			return string(m[1])
		}
		return ""
	}
	c := Config{File: file, MaxConfNum: -1, ConfDir: find(confDir), BinDir: find(binDir)}
	if n, err := strconv.Atoi(find(maxConfNum)); err == nil {
		c.MaxConfNum = n
	}
	return c
}
