package kernel

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/mesh"
)

const (
	srcValidMark = "net/ipv4/conf/all/src_valid_mark"
	// A counter of our nftables table remembers what the sysctl was before: the
	// table outlives a userspace interface, and both end with the boot.
	srcValidMarkWas = "src_valid_mark-was-"
)

// strictReversePath reports whether some interface drops what would not be
// answered by the same one. The greater of all and the interface's own counts
// (IN_DEV_RPFILTER), where 1 is strict and 2 is loose.
func strictReversePath() bool {
	all := readSysctl("net/ipv4/conf/all/rp_filter")
	if all == "1" || all == "2" {
		return all == "1"
	}
	files, _ := filepath.Glob("/proc/sys/net/ipv4/conf/*/rp_filter")
	return slices.ContainsFunc(files, func(f string) bool {
		text, _ := os.ReadFile(f)
		return strings.TrimSpace(string(text)) == "1"
	})
}

// rememberedSrcValidMark is what the sysctl was, or "" if it was never switched on.
func rememberedSrcValidMark(c *nftables.Conn) string {
	for _, was := range []string{"0", "1"} {
		if _, err := c.GetObject(counter(srcValidMarkWas + was)); err == nil {
			return was
		}
	}
	return ""
}

func (k *Kernel) observeSrcValidMark(s *mesh.State) error {
	if s.Filter.Interface == "" && !s.Filter.Broken { // no table, no memory
		return nil
	}
	c, err := k.nftConn()
	if err != nil {
		return err
	}
	s.SrcValidMark = rememberedSrcValidMark(c) != "" && (readSysctl(srcValidMark) == "1" || !strictReversePath())
	return nil
}

// setSrcValidMark needs the table. Where the sysctl cannot be written nothing
// depends on it, unless the reverse path filter is strict.
func (k *Kernel) setSrcValidMark(on bool) error {
	c, err := k.nftConn()
	if err != nil {
		return err
	}
	was := rememberedSrcValidMark(c)
	if !on {
		return k.restoreSrcValidMark(c, was)
	}
	if was == "" {
		was = readSysctl(srcValidMark)
		c.AddObj(counter(srcValidMarkWas + was))
		if err := c.Flush(); err != nil {
			return fmt.Errorf("remember what it was: %w", err)
		}
	}
	if readSysctl(srcValidMark) == "1" {
		return nil
	}
	if err := writeSysctl(srcValidMark, "1"); err != nil && strictReversePath() {
		return err
	}
	return nil
}

func (k *Kernel) restoreSrcValidMark(c *nftables.Conn, was string) error {
	if was == "" {
		return nil
	}
	if was == "0" && readSysctl(srcValidMark) == "1" {
		if err := writeSysctl(srcValidMark, "0"); err != nil {
			return err
		}
	}
	c.DeleteObject(counter(srcValidMarkWas + was))
	return ignoring(c.Flush(), unix.ENOENT)
}

// Forwards reports whether this network namespace forwards packets of a family
// from one interface to another.
func Forwards(ipv6 bool) bool {
	if ipv6 {
		return readSysctl("net/ipv6/conf/all/forwarding") == "1"
	}
	return readSysctl("net/ipv4/ip_forward") == "1"
}
