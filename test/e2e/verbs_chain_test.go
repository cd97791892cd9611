package e2e

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/wgcni/wgcni/test/cluster"
)

// TestPrimariesThatBypassTheNode: a pod whose packets never reach the node's
// routing would be unencrypted in silence. The real plugins are refused; of
// ipvlan this kernel has none (CONFIG_IPVLAN is not set), so that its place is
// taken by prevResults on links of other kinds that are not one end of a pair.
func TestPrimariesThatBypassTheNode(t *testing.T) {
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	helperDown(t, helperUp(t, n))
	address := map[string]any{"type": "static", "addresses": []any{map[string]any{"address": "10.244.99.5/24"}}}
	mustRun(t, n, "ip", "link", "add", "spare0", "link", "eth0", "type", "macvlan", "mode", "bridge")

	for kind, primary := range map[string]map[string]any{
		"macvlan":     {"type": "macvlan", "master": "eth0", "ipam": address},
		"host-device": {"type": "host-device", "device": "spare0", "ipam": address},
	} {
		t.Run(kind, func(t *testing.T) {
			netns(t, n, kind)
			defer removeNetns(t, n, kind)
			r := runtime(t, n, cluster.NetworkOptions{Primary: primary}, 1, netCall{Verb: "ADD", Container: kind})[0]
			refused(t, r.Code, r.Error, "macvlan")
			if r := runtime(t, n, cluster.NetworkOptions{Primary: primary}, 1, netCall{Verb: "DEL", Container: kind})[0]; r.Error != "" {
				t.Errorf("DEL: %s", r.Error)
			}
			if got := containers(t, n); len(got) != 0 {
				t.Errorf("recorded: %v", got)
			}
		})
	}
	for _, kind := range []string{"ifb", "bridge", "vxlan"} {
		t.Run("a link of kind "+kind, func(t *testing.T) {
			netns(t, n, kind)
			defer removeNetns(t, n, kind)
			args := []string{"-n", kind, "link", "add", "eth0", "type", kind}
			if kind == "vxlan" {
				args = append(args, "id", "7", "dstport", "4789")
			}
			mustRun(t, n, "ip", args...)
			path := cluster.NetnsPath(kind)
			r := plugin(t, n, call{
				verb: "ADD", container: kind, netns: path, ifname: "eth0",
				stdin: stanza(t, n, map[string]any{"prevResult": prevResult(path, "eth0", "10.244.1.5/24")}),
			})
			refused(t, r.err.Code, r.err.Error(), kind)
			if got := containers(t, n); len(got) != 0 {
				t.Errorf("recorded: %v", got)
			}
		})
	}
	agrees(t, n)
}

func refused(t *testing.T, code uint, text, kind string) {
	t.Helper()
	if code != types.ErrInvalidNetworkConfig {
		t.Errorf("code %d: %s", code, text)
	}
	for _, want := range []string{`"` + kind + `"`, "bypass", "chain wgcni after", "bridge"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q does not say %q", text, want)
		}
	}
}

// siblings are plugins that commonly stand in a chain beside us.
func siblings() []any {
	return []any{
		map[string]any{"type": "tuning", "sysctl": map[string]any{"net.ipv4.conf.eth0.log_martians": "1"}, "mtu": 1400},
		map[string]any{"type": "portmap", "capabilities": map[string]any{"portMappings": true}, "runtimeConfig": map[string]any{
			"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": echoPort, "protocol": "tcp"}},
		}},
		map[string]any{"type": "bandwidth", "ingressRate": 1000000000, "ingressBurst": 1000000000, "egressRate": 1000000000, "egressBurst": 1000000000},
		map[string]any{"type": "firewall", "backend": "iptables"},
	}
}

// TestBesideOtherPlugins: wgcni before and after those, on one node each.
func TestBesideOtherPlugins(t *testing.T) {
	c := configured(t, 2, cluster.NetworkOptions{Chain: siblings()})
	a, b := c.Nodes[0], c.Nodes[1]
	text, err := b.Conflist(cluster.NetworkOptions{Chain: siblings()})
	if err != nil {
		t.Fatal(err)
	}
	var list map[string]any
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatal(err)
	}
	entries := list["plugins"].([]any)
	last := []any{entries[0]}
	last = append(last, entries[2:]...)
	list["plugins"] = append(last, entries[1])
	out, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.WriteConflist(cluster.ConflistFile, string(out)); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		helperUp(t, n)
	}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, q := addPod(t, a, cluster.NetworkName, "first", cluster.PodOptions{}), addPod(t, b, cluster.NetworkName, "last", cluster.PodOptions{})
	serve(t, p)
	serve(t, q)
	marker := []byte("marker-of-a-chain")
	capture, err := cluster.StartCapture(c.Underlay, cluster.Bridge, cluster.CaptureOptions{Markers: [][]byte{marker}, Prefixes: podRanges})
	if err != nil {
		t.Fatal(err)
	}
	for _, pair := range [][2]*cluster.Pod{{p, q}, {q, p}} {
		if err := talk(t.Context(), pair[0], pair[1], marker); err != nil {
			t.Error(err)
		}
	}
	mustBeClean(t, capture)
	for _, pod := range []*cluster.Pod{p, q} {
		// tuning asks for less than the tunnel carries, before us or after us.
		if out, err := pod.Run(t.Context(), "cat", "/proc/sys/net/ipv4/conf/eth0/log_martians"); err != nil || strings.TrimSpace(out) != "1" {
			t.Errorf("%s: tuning has not done its part: %q, %v", pod, out, err)
		}
		mtu := linkMTU(t, func(s string, args ...string) string {
			out, err := pod.Run(t.Context(), s, args...)
			if err != nil {
				t.Fatal(err)
			}
			return out
		}, "eth0")
		if mtu != 1400 {
			t.Errorf("%s: MTU %d, want tuning's", pod, mtu)
		}
		if _, err := pod.CNI(t.Context(), "check"); err != nil {
			t.Error(err)
		}
	}
	deletePod(t, p)
	deletePod(t, q)
	for _, n := range c.Nodes {
		agrees(t, n)
		if got := leases(t, n); len(got) != 0 {
			t.Errorf("%s: leaked %v", n, got)
		}
		if got := containers(t, n); len(got) != 0 {
			t.Errorf("%s: attached %v", n, got)
		}
	}
}

// TestKeyIsNowhere: the private key is in its own file and in no other, nor in
// any output, result, error or log.
func TestKeyIsNowhere(t *testing.T) {
	c := configured(t, 2, cluster.NetworkOptions{})
	a, b := c.Nodes[0], c.Nodes[1]
	logs := []*cluster.Process{helperUp(t, a), helperUp(t, b)}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	text, err := a.ReadFile("/var/lib/wgcni/private.key")
	if err != nil {
		t.Fatal(err)
	}
	key := strings.TrimSpace(text)
	raw, err := base64.StdEncoding.DecodeString(key)
	if err != nil || len(raw) != 32 {
		t.Fatalf("%d bytes, %v", len(raw), err)
	}
	var said strings.Builder
	p := addPod(t, a, cluster.NetworkName, "pod", cluster.PodOptions{})
	said.WriteString(p.Raw)
	say := func(out string, err error) {
		said.WriteString(out)
		if err != nil {
			said.WriteString(err.Error())
		}
	}
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"sync"}, {"version"}, {"run"}} { // a second run is refused
		say(a.Wgcnid(t.Context(), args...))
	}
	mustRun(t, a, "ip", "link", "set", "wgcni0", "mtu", "1300") // a difference to print
	for _, verb := range []string{"CHECK", "STATUS", "GC", "ADD", "DEL"} {
		for _, keys := range []map[string]any{nil, {"prevResult": prevResult(p.Netns, "eth0", "10.244.1.99/24")}, {"mtu": 5}, {"stateDir": "/var/lib/wgcni/private.key"}} {
			r := plugin(t, a, call{verb: verb, container: "key", netns: p.Netns, ifname: "eth0", stdin: stanza(t, a, keys)})
			said.WriteString(r.stdout + r.stderr)
		}
	}
	// The very key with one character too many: the message must not quote it.
	if err := a.WriteFile("/var/lib/wgcni/private.key", key+"x\n", 0o600); err != nil {
		t.Fatal(err)
	}
	r := plugin(t, a, call{verb: "STATUS", stdin: stanza(t, a, nil)})
	if r.code == 0 || !strings.Contains(r.stdout, "wg genkey") {
		t.Errorf("a broken key: %+v", r)
	}
	said.WriteString(r.stdout + r.stderr)
	say(a.Wgcnid(t.Context(), "status"))
	if err := a.WriteFile("/var/lib/wgcni/private.key", text, 0o600); err != nil {
		t.Fatal(err)
	}
	deletePod(t, p)
	for _, h := range logs {
		helperDown(t, h)
		said.WriteString(h.Log.String())
	}
	secrets := []string{key, key[:20], string(raw), hex.EncodeToString(raw), strings.Trim(fmt.Sprintf("%d", raw[:6]), "[]")}
	hides := func(where, text string) {
		t.Helper()
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("%s holds the key", where)
				return
			}
		}
	}
	hides("some output", said.String())
	files := 0
	for _, root := range []string{a.Path("/run/wgcni"), a.Path("/var/lib/wgcni"), a.Path("/var/lib/cni"), c.Shared, b.Path("/run/wgcni"), b.Path("/var/lib/wgcni")} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || path == a.Path("/var/lib/wgcni/private.key") {
				return err
			}
			b, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			files++
			hides(path, string(b))
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	if files < 6 || said.Len() < 2000 {
		t.Errorf("%d files and %d bytes of output looked at: it proves nothing", files, said.Len())
	}
}
