// Package version says which wgcni this is.
package version

import "runtime/debug"

// version is set by the linker: -X github.com/wgcni/wgcni/pkg/version.version=v1.2.3.
var version string

// String is the release, else the revision that was built, else "unknown".
func String() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return "unknown"
}
