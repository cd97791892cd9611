// Package sources holds the faults that systems of this kind had in the field to the
// tests that keep them from here: each source below stands in some test's name or
// comment.
package sources

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// faults are public sources, and what went wrong there.
var faults = []struct{ source, fault string }{
	{"CVE-2025-32793", "Cilium: a terminating pod's last packets in the clear"},
	{"flannel deletes its device", "the tunnel goes, and traffic follows the default route"},
	{"calico#3760", "unknown peer: plaintext"},
	{"cilium#25626", "what comes in unencrypted is not dropped"},
	{"cilium#46864", "a node's replies in the clear"},

	{"cilium PR 34612", "allowed IPs replaced: EHOSTUNREACH meanwhile"},
	{"kilo#34", "the whole configuration replaced at each reconcile"},
	{"kilo#39", "the same"},
	{"kilo#82", "the same"},
	{"felix#2535", "the same peer twice, an allowed IP that moves there and back"},
	{"cilium#31979", "an agent's restart cuts live flows"},
	{"cilium#25492", "a key change taken for none"},
	{"cilium#35644", "node addresses lost after a key change"},
	{"same millisecond", "Calico: handshakes that collide"},
	{"from IPv4 to IPv6 lost 0.4 s", "a live peer's endpoint changes its family"},
	{"Node.Ready", "kilo: a clock off or the API away for a minute empties the mesh"},
	{"60 s", "the same"},

	{"ipMasq", "bridge: what leaves the pod's subnet is masqueraded"},
	{"antrea#2697", "masqueraded service traffic refused"},
	{"felix#2781", "a strict rp_filter drops outer packets"},
	{"felix#2820", "the same"},
	{"kilo#408", "a route's wrong src"},

	{"talos#4836", "a mark of full width"},
	{"3d5b83b", "felix: mark -1 and family 0 in rule lists"},
	{"NetworkManager", "the WireGuard device taken for the interface of the node"},

	{"cilium PR 30329", "WireGuard's padding"},
	{"talos#13457", "a VXLAN inside a tunnel"},
	{"talos#12311", "an MSS clamp without TCP's options"},
	{"cilium#23917", "an IPv6 underlay needs 20 bytes more"},

	{"calico#5125", "the control plane unreachable after a reboot"},
	{"wesher", "keys made anew at each start"},
	{"cilium#36491", "pod addresses learned as endpoints"},
	{"stay unmanaged", "pods that existed before the plugin"},

	{"containerd#12130", "a failing DEL stops the chain's"},
	{"cilium#8313", "the same"},
	{"ipmasq_nftables_linux.go", "ADD x for A, ADD x for B, DEL A"},
	{"containerd#12923", "a crash between ADD and the save: no DEL"},
	{"GC and STATUS come with 1.1.0 only", "libcni"},
	{"bandwidth plugin's crashed", "CHECK on a missing configuration"},
	{"portmap plugin's took a lock", "DEL with nothing to do"},
	{"istio#55894", "ADD that needs the API server"},

	{"istio#14327", "the primary rewrites its conflist"},
	{"istio#60882", "the same"},
	{"d213597", "linkerd: the binary removed while the conflist names it"},
	{"9215ddf", "linkerd: a watcher that misses MOVED_TO"},
	{"e2eeeb1", "linkerd: a watcher that dies at the inotify limit"},
	{"text file busy", "a binary overwritten in place"},

	{"KubeSpan's O(n²)", "every process watches everything"},
	{"kilo#113", "a process for each rule"},
	{"kilo#304", "the same"},
	{"flannel#2554", "routes of a dead process"},
	{"one netlink message a peer", "wgctrl above 32 peers"},
}

// tests are all tests' texts, but this one, without their line breaks inside comments.
func tests(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root, d.IsDir() && d.Name() == "sources":
			return filepath.SkipDir
		case !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(path)
		all.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`\n\s*// `).ReplaceAllString(all.String(), " ")
}

func TestEveryFaultHasATest(t *testing.T) {
	all := tests(t)
	for _, f := range faults {
		whole := regexp.MustCompile(regexp.QuoteMeta(f.source) + `([^0-9]|$)`)
		if !whole.MatchString(all) {
			t.Errorf("no test names %s (%s)", f.source, f.fault)
		}
	}
}
