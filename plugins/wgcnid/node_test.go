package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

// plugins stands in for the plugins' processes: each prints this result.
type plugins struct {
	invoke.Exec
	result string
}

func (p *plugins) ExecPlugin(context.Context, string, []byte, []string) ([]byte, error) {
	return []byte(p.result), nil
}

func (p *plugins) FindInPath(plugin string, _ []string) (string, error) { return "/bin/" + plugin, nil }

func (p *plugins) Decode([]byte) (version.PluginInfo, error) { return version.All, nil }

// runtime is a container runtime, whose cache libcni itself writes.
type runtime struct {
	*libcni.CNIConfig
	t       *testing.T
	plugins *plugins
	cache   string
}

func newRuntime(t *testing.T) *runtime {
	t.Helper()
	p, cache := &plugins{}, t.TempDir()
	return &runtime{libcni.NewCNIConfigWithCacheDir([]string{"/bin"}, cache, p), t, p, cache}
}

// add runs a network's plugins, which give eth0 these addresses.
func (r *runtime) add(cniVersion, network, pluginTypes, container, netns string, addresses ...string) {
	r.t.Helper()
	var list []string
	for _, name := range strings.Fields(pluginTypes) {
		list = append(list, fmt.Sprintf(`{"type": %q}`, name))
	}
	conf, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion": %q, "name": %q, "plugins": [%s]}`, cniVersion, network, strings.Join(list, ", ")))
	if err != nil {
		r.t.Fatal(err)
	}
	r.plugins.result = resultText(cniVersion, addresses)
	rt := &libcni.RuntimeConf{ContainerID: container, NetNS: netns, IfName: "eth0"}
	if _, err := r.AddNetworkList(r.t.Context(), conf, rt); err != nil {
		r.t.Fatal(err)
	}
}

// resultText is a bridge's result: the bridge, the veth and the pod's end of it.
func resultText(cniVersion string, addresses []string) string {
	if cniVersion == "0.2.0" {
		return fmt.Sprintf(`{"cniVersion": "0.2.0", "ip4": {"ip": %q}}`, addresses[0])
	}
	var ips []string
	for _, a := range append(addresses, "10.244.1.1/24") {
		family, owner := "4", 2
		if strings.Contains(a, ":") {
			family = "6"
		}
		if a == "10.244.1.1/24" {
			owner = 0 // of the bridge, not of the pod
		}
		ips = append(ips, fmt.Sprintf(`{"version": %q, "interface": %d, "address": %q}`, family, owner, a))
	}
	return fmt.Sprintf(`{"cniVersion": %q, "interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "x"}], "ips": [%s]}`,
		cniVersion, strings.Join(ips, ", "))
}

// ownNetns stands for a pod's namespace that is alive.
const ownNetns = "/proc/self/ns/net"

// Pods that existed before the plugin stay unmanaged elsewhere.
func TestAdoptable(t *testing.T) {
	r := newRuntime(t)
	r.add("1.0.0", "pods", "bridge wgcni", "new", ownNetns, "10.244.1.5/24", "fd00:244:0:1::5/64")
	r.add("0.4.0", "pods", "bridge", "older-than-wgcni", ownNetns, "10.244.1.6/24")
	r.add("0.2.0", "pods", "bridge", "oldest", ownNetns, "10.244.1.7/24")
	r.add("1.0.0", "others", "ptp wgcni", "chained-elsewhere", ownNetns, "10.244.200.7/32")
	r.add("1.0.0", "others", "ptp", "not-ours", ownNetns, "10.9.9.9/32")
	r.add("1.0.0", "pods", "bridge wgcni", "gone", "/var/run/netns/gone", "10.244.1.8/24")
	got, err := adoptable(r.cache, config.Config{Name: "pods"})
	if err != nil {
		t.Fatal(err)
	}
	at := func(network, container string, addresses ...string) store.Attachment {
		out := store.Attachment{Network: network, ContainerID: container, IfName: "eth0", Sandbox: ownNetns, SandboxID: kernel.SandboxID(ownNetns)}
		for _, a := range addresses {
			out.Addresses = append(out.Addresses, netip.MustParseAddr(a))
		}
		return out
	}
	want := []store.Attachment{
		at("others", "chained-elsewhere", "10.244.200.7"), at("pods", "new", "10.244.1.5", "fd00:244:0:1::5"),
		at("pods", "older-than-wgcni", "10.244.1.6"), at("pods", "oldest", "10.244.1.7"),
	}
	byContainer := cmpopts.SortSlices(func(a, b store.Attachment) int { return strings.Compare(a.ContainerID, b.ContainerID) })
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}), byContainer, cmpopts.IgnoreFields(store.Attachment{}, "Since")); diff != "" {
		t.Errorf("attachments (-want +got):\n%s", diff)
	}
	for _, a := range got { // a pod that has moved since must not look newer than it is
		info, err := os.Stat(filepath.Join(r.cache, "results", a.Network+"-"+a.ContainerID+"-eth0"))
		if err != nil || !a.Since.Equal(info.ModTime()) {
			t.Errorf("%s: since %v, the result was cached at %v (%v)", a.ContainerID, a.Since, info.ModTime(), err)
		}
	}
}

// libcni before 1.2, which containerd 1 has, does not cache where a pod is; its
// result says it.
func TestAdoptableOfOldLibcni(t *testing.T) {
	r := newRuntime(t)
	for container, netns := range map[string]string{"alive": ownNetns, "gone": "/var/run/netns/gone"} {
		r.add("1.0.0", "pods", "bridge", container, netns, "10.244.1.5/24")
		file := filepath.Join(r.cache, "results", "pods-"+container+"-eth0")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		old := strings.NewReplacer(fmt.Sprintf(`"netns":%q`, netns), `"none":""`, `"sandbox":"x"`, fmt.Sprintf(`"sandbox":%q`, netns)).Replace(string(text))
		if strings.Contains(old, `"netns"`) || !strings.Contains(old, `"sandbox":"`+netns) {
			t.Fatalf("libcni cached in another way than it did: %s", old)
		}
		if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := adoptable(r.cache, config.Config{Name: "pods"})
	if err != nil || len(got) != 1 || got[0].ContainerID != "alive" || got[0].Sandbox != ownNetns || got[0].SandboxID != kernel.SandboxID(ownNetns) {
		t.Errorf("adopted %+v, %v; want the one that is alive", got, err)
	}
}

// One bad entry costs no other pod, and is named.
func TestAdoptableBesideBadEntries(t *testing.T) {
	r := newRuntime(t)
	r.add("1.0.0", "pods", "bridge wgcni", "good", ownNetns, "10.244.1.5/24")
	r.add("1.0.0", "pods", "bridge wgcni", "bad", ownNetns, "10.244.1.6/24")
	path := filepath.Join(r.cache, "results", "pods-bad-eth0")
	var entry map[string]any
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &entry); err != nil {
		t.Fatal(err)
	}
	entry["config"] = []byte("{") // in base64, as libcni does
	if text, err = json.Marshal(entry); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.cache, "results", "pods-torn-eth0"), []byte(`{"kind`), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := adoptable(r.cache, config.Config{Name: "pods"})
	if len(got) != 1 || got[0].ContainerID != "good" {
		t.Errorf("attachments %+v", got)
	}
	if err == nil || !strings.Contains(err.Error(), "bad") {
		t.Errorf("error %v, want one that names the container", err)
	}
}

func TestAdoptableWithoutCache(t *testing.T) {
	if got, err := adoptable(filepath.Join(t.TempDir(), "none"), config.Config{Name: "pods"}); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestReport(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	if _, err := readReport(dir); !os.IsNotExist(err) {
		t.Errorf("before the first: %v", err)
	}
	want := reconcile.Report{
		At: now, RegistryError: "away", RegistrySince: now, PublishError: "full", PublishSince: now, SecretsError: "gone", Rival: true, Forgotten: true,
		Conflicts:    []mesh.Conflict{{Node: "b", What: "x", Reason: "y"}},
		Refused:      []reconcile.Refusal{{Node: "c", Kind: reconcile.KindForged, Reason: "z", Since: now}},
		RefusedTotal: map[string]uint64{reconcile.KindForged: 2},
	}
	writeReport(dir, reconcile.Report{Error: "before"}, logger)
	writeReport(dir, want, logger)
	got, err := readReport(dir)
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("error %v, report (-want +got):\n%s", err, diff)
	}
	writeReport(filepath.Join(dir, "none"), want, logger)
	if !strings.Contains(log.String(), "cannot write the report") {
		t.Errorf("a failure is not logged: %s", &log)
	}
}
