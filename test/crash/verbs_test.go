package crash

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/test/cluster"
)

// podAddress is that of the pod which a verb is about. It lies outside of the node's
// prefix, so that the kernel is told of it.
const podAddress = "10.244.77.5"

// plugin is a call of the plugin, as a runtime makes it.
func (w *world) plugin(verb string, keys map[string]any) *exec.Cmd {
	w.t.Helper()
	conf := maps.Clone(w.stanza)
	conf["cniVersion"], conf["name"] = "1.1.0", "pods"
	maps.Copy(conf, keys)
	text, err := json.Marshal(conf)
	w.must(err)
	w.must(os.WriteFile(w.path("stdin"), text, 0o600))
	stdin, err := os.Open(w.path("stdin"))
	w.must(err)
	cmd := exec.Command(w.bin("wgcni"))
	cmd.Dir, cmd.Stdin = "/", stdin
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=pod0", "CNI_NETNS=" + cluster.NetnsPath("pod0"), "CNI_IFNAME=eth0", "CNI_PATH=" + w.path("bin")}
	return cmd
}

func (w *world) add() *exec.Cmd {
	return w.plugin("ADD", map[string]any{"prevResult": map[string]any{
		"cniVersion": "1.1.0",
		"interfaces": []any{map[string]any{"name": "veth0"}, map[string]any{"name": "eth0", "sandbox": cluster.NetnsPath("pod0")}},
		"ips":        []any{map[string]any{"address": podAddress + "/24", "gateway": "10.244.77.1", "interface": 1}},
	}})
}

// withPod makes a node that is in the mesh and has a pod that no verb was called for.
func (w *world) withPod() {
	w.t.Helper()
	w.kernel = true
	w.stanza["podCIDRs"] = []string{"10.244.1.0/24"}
	w.joined()
	_, err := w.node.AddPod(w.t.Context(), "", "pod0", cluster.PodOptions{})
	w.must(err)
	_, err = w.node.Batch(w.t.Context(), "link add veth0 type veth peer name eth0 netns pod0\nlink set veth0 up", "ip", "-batch", "-")
	w.must(err)
	for _, args := range [][]string{{"link", "set", "eth0", "up"}, {"addr", "add", podAddress + "/24", "dev", "eth0"}} {
		_, err = w.node.Run(w.t.Context(), "ip", append([]string{"-n", "pod0"}, args...)...)
		w.must(err)
	}
}

// attached reads the store as the helper does.
func (w *world) attached(want ...string) error {
	data, err := os.ReadFile(store.AttachmentsPath(w.run))
	if err != nil {
		return err
	}
	dir := w.t.TempDir() // the store's lock is held by the program
	if err := os.WriteFile(store.AttachmentsPath(dir), data, 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s, err := store.OpenAttachments(ctx, dir)
	if err != nil {
		return err
	}
	defer s.Close()
	all, err := s.All()
	if damaged := s.Damaged(); damaged != nil {
		err = errors.Join(err, damaged)
	}
	var got []string
	for _, a := range all {
		got = append(got, a.ContainerID)
	}
	if err == nil && want != nil && !slices.Equal(got, want) {
		err = fmt.Errorf("the store has %q, want %q", got, want)
	}
	return err
}

// guarded compares the filter's set of pods with what is wanted.
func (w *world) guarded(want bool) error {
	set, err := w.node.Run(context.Background(), "nft", "list", "set", "inet", "wgcni", "pods4")
	if err == nil && strings.Contains(set, podAddress) != want {
		err = fmt.Errorf("the pod is in the filter's set: %v, want %v", !want, want)
	}
	return err
}

// none are the attachments of an empty store.
var none = []string{}

func storeSound(w *world) error { return w.attached() }

func TestADD(t *testing.T) {
	campaign(t, subject{
		name:    t.Name(),
		old:     (*world).withPod,
		cmd:     (*world).add,
		powered: true,
		sound:   storeSound,
		done:    func(w *world) error { return errors.Join(w.attached("pod0"), w.guarded(true)) },
		lesser:  func(path string) bool { return strings.HasSuffix(path, "verbs.log") },
	})
}

// DEL succeeds whatever happens: what it could not do is the helper's.
func TestDEL(t *testing.T) {
	del := func(w *world) *exec.Cmd { return w.plugin("DEL", nil) }
	campaign(t, subject{
		name: t.Name(),
		old: func(w *world) {
			w.withPod()
			if e := w.trace(w.add(), patience, goOn); e.Code != 0 {
				w.t.Fatal(e.out)
			}
		},
		cmd:      del,
		powered:  true,
		sound:    storeSound,
		done:     func(w *world) error { return errors.Join(w.attached(none...), w.guarded(false)) },
		lesser:   func(string) bool { return true },
		mustPass: true,
	})
}

func TestGC(t *testing.T) {
	campaign(t, subject{
		name: t.Name(),
		old: func(w *world) {
			w.withPod()
			if e := w.trace(w.add(), patience, goOn); e.Code != 0 {
				w.t.Fatal(e.out)
			}
		},
		cmd:     func(w *world) *exec.Cmd { return w.plugin("GC", map[string]any{"cni.dev/valid-attachments": []any{}}) },
		powered: true,
		sound:   storeSound,
		done:    func(w *world) error { return errors.Join(w.attached(none...), w.guarded(false)) },
		lesser:  func(path string) bool { return strings.HasSuffix(path, "verbs.log") },
	})
}
