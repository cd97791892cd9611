package operate

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/test/cluster"
)

// manifest is as much of an object as a container is started by.
type manifest struct {
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name string `yaml:"name"`
	} `yaml:"metadata"`
	Data       map[string]string `yaml:"data"`
	StringData map[string]string `yaml:"stringData"`
	Spec       struct {
		Template struct {
			Spec podSpec `yaml:"spec"`
		} `yaml:"template"`
	} `yaml:"spec"`
}

type podSpec struct {
	InitContainers []container `yaml:"initContainers"`
	Containers     []container `yaml:"containers"`
	Volumes        []struct {
		Name     string `yaml:"name"`
		HostPath *struct {
			Path string `yaml:"path"`
		} `yaml:"hostPath"`
		ConfigMap *struct {
			Name string `yaml:"name"`
		} `yaml:"configMap"`
		Secret *struct {
			SecretName  string      `yaml:"secretName"`
			DefaultMode fs.FileMode `yaml:"defaultMode"`
		} `yaml:"secret"`
	} `yaml:"volumes"`
}

type container struct {
	Name string   `yaml:"name"`
	Args []string `yaml:"args"`
	Env  []struct {
		Name      string `yaml:"name"`
		ValueFrom struct {
			FieldRef struct {
				FieldPath string `yaml:"fieldPath"`
			} `yaml:"fieldRef"`
		} `yaml:"valueFrom"`
	} `yaml:"env"`
	SecurityContext struct {
		RunAsUser                int   `yaml:"runAsUser"`
		AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
		ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
		Capabilities             struct {
			Add  []string `yaml:"add"`
			Drop []string `yaml:"drop"`
		} `yaml:"capabilities"`
	} `yaml:"securityContext"`
	VolumeMounts []struct {
		Name             string `yaml:"name"`
		MountPath        string `yaml:"mountPath"`
		ReadOnly         bool   `yaml:"readOnly"`
		MountPropagation string `yaml:"mountPropagation"`
	} `yaml:"volumeMounts"`
	StartupProbe   *probe `yaml:"startupProbe"`
	ReadinessProbe *probe `yaml:"readinessProbe"`
	LivenessProbe  *probe `yaml:"livenessProbe"`
}

type probe struct {
	HTTPGet struct {
		Host string `yaml:"host"`
		Port int    `yaml:"port"`
		Path string `yaml:"path"`
	} `yaml:"httpGet"`
}

// kubelet does on nodes what the manifests say.
type kubelet struct {
	t       *testing.T
	objects map[string]manifest // by kind
	image   map[string]string
	program string
}

func newKubelet(t *testing.T, c *cluster.Cluster) *kubelet {
	t.Helper()
	k := &kubelet{t: t, objects: map[string]manifest{}, image: map[string]string{}}
	k.apply("wgcni.yaml")
	k.apply("config.yaml")
	text, err := os.ReadFile("../../scripts/Containerfile")
	if err != nil {
		t.Fatal(err)
	}
	entrypoint := regexp.MustCompile(`(?m)^ENTRYPOINT \["(.*)"\]$`).FindSubmatch(text)
	if entrypoint == nil {
		t.Fatal("the Containerfile has no entry point")
	}
	k.program = string(entrypoint[1])
	for _, name := range []string{"wgcni", "wgcnid"} {
		k.image[filepath.Join(filepath.Dir(k.program), name)] = filepath.Join(c.BinDir, name)
	}
	return k
}

func (k *kubelet) apply(file string) {
	k.t.Helper()
	text, err := os.ReadFile(filepath.Join("../../conflist/kubernetes", file))
	if err != nil {
		k.t.Fatal(err)
	}
	for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var m manifest
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			k.t.Fatalf("%s: %v", file, err)
		}
		k.objects[m.Kind] = m
	}
}

func (k *kubelet) pod() podSpec { return k.objects["DaemonSet"].Spec.Template.Spec }

// nodeName is no host name of any machine: on some clouds it is another as well.
func nodeName(n *cluster.Node) string { return n.Name + ".internal.example" }

// container is one of the DaemonSet's, on a node, without the capabilities in without.
func (k *kubelet) container(n *cluster.Node, c container, without ...string) cluster.Container {
	k.t.Helper()
	s := c.SecurityContext
	if diff := cmp.Diff([]string{"ALL"}, s.Capabilities.Drop); diff != "" || !s.ReadOnlyRootFilesystem {
		k.t.Errorf("%s keeps capabilities, or may write to its root", c.Name)
	}
	out := cluster.Container{
		Image: k.image, Args: append([]string{k.program}, c.Args...), UID: s.RunAsUser,
		Capabilities: slices.DeleteFunc(slices.Clone(s.Capabilities.Add), func(name string) bool { return slices.Contains(without, name) }),
		NoNewPrivs:   s.AllowPrivilegeEscalation != nil && !*s.AllowPrivilegeEscalation,
	}
	for _, e := range c.Env {
		if e.ValueFrom.FieldRef.FieldPath != "spec.nodeName" {
			k.t.Errorf("%s: the value of %s is not known here", c.Name, e.Name)
		}
		out.Env = append(out.Env, e.Name+"="+nodeName(n))
	}
	for _, m := range c.VolumeMounts {
		out.Mounts = append(out.Mounts, cluster.ContainerMount{
			Source: k.volume(n, m.Name), Target: m.MountPath, ReadOnly: m.ReadOnly, Propagates: m.MountPropagation == "HostToContainer",
		})
	}
	if !kernel.HasWireGuard() { // what a userspace tunnel needs, and no container has
		out.Devices = []string{"/dev/net/tun"}
		out.Mounts = append(out.Mounts, cluster.ContainerMount{Source: "/run/wireguard", Target: "/var/run/wireguard"})
	}
	return out
}

// volume returns the folder of the node that holds a volume.
func (k *kubelet) volume(n *cluster.Node, name string) string {
	k.t.Helper()
	write := func(values map[string]string, perm fs.FileMode) string {
		dir := "/run/kubelet/" + name
		for file, text := range values {
			if err := n.WriteFile(filepath.Join(dir, file), text, perm); err != nil {
				k.t.Fatal(err)
			}
		}
		return dir
	}
	for _, v := range k.pod().Volumes {
		switch {
		case v.Name != name:
		case v.HostPath != nil:
			return v.HostPath.Path
		case v.ConfigMap != nil:
			return write(k.objects["ConfigMap"].Data, 0o644)
		case v.Secret != nil:
			return write(k.objects["Secret"].StringData, v.Secret.DefaultMode)
		}
	}
	k.t.Fatalf("no volume %s", name)
	return ""
}

// run runs an init container to its end.
func (k *kubelet) run(ctx context.Context, n *cluster.Node, c container, without ...string) (string, error) {
	k.t.Helper()
	cmd, err := n.Contain(ctx, k.container(n, c, without...))
	if err != nil {
		k.t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (k *kubelet) start(n *cluster.Node, c container, without ...string) *cluster.Process {
	k.t.Helper()
	cmd, err := n.Contain(context.Background(), k.container(n, c, without...))
	if err != nil {
		k.t.Fatal(err)
	}
	p, err := cluster.StartCommand(cmd)
	if err != nil {
		k.t.Fatal(err)
	}
	return p
}

// configure puts into config.yaml what an operator would.
func (k *kubelet) configure(endpoints []string) {
	k.t.Helper()
	var entry map[string]any
	data := k.objects["ConfigMap"].Data
	if err := json.Unmarshal([]byte(data["entry.json"]), &entry); err != nil {
		k.t.Fatal(err)
	}
	entry["clusterCIDRs"] = []string{"10.244.0.0/16", "fd00:244::/32"}
	entry["encryption"] = "required"
	entry["encryptNodes"] = true
	entry["registry"] = map[string]any{"type": "etcd", "endpoints": endpoints}
	text, err := json.MarshalIndent(entry, "", "  ")
	if err != nil {
		k.t.Fatal(err)
	}
	secret, err := identity.NewSecret(time.Now())
	if err != nil {
		k.t.Fatal(err)
	}
	data["entry.json"] = string(text)
	k.objects["Secret"].StringData["secret"] = secret.Reveal() + "\n"
}

// purposes are what goes wrong without a capability, as `wgcnid run` says it, and
// for what an operator runs in the container, that command.
var purposes = map[string]string{
	"NET_ADMIN": "subscribe to nftables",
	"SYS_ADMIN": "links of pods do not follow the tunnel's MTU",
	"NET_RAW":   "",
}

// ask is `kubectl exec daemonset/wgcni -- wgcnid ...`.
func (k *kubelet) ask(n *cluster.Node, c container) {
	k.t.Helper()
	for command, want := range map[string]string{"status": "Yes", "verify": "", "explain 10.244.1.2 10.244.2.2": "Encrypted"} {
		c.Args = strings.Fields(command)
		if out, err := k.run(k.t.Context(), n, c); err != nil || !strings.HasPrefix(out, want) {
			k.t.Errorf("wgcnid %s: %v\n%s", command, err, out)
		}
	}
	c.Args = []string{"verify"}
	if out, err := k.run(k.t.Context(), n, c, "NET_RAW"); err == nil || !strings.Contains(out, "operation not permitted") {
		k.t.Errorf("wgcnid verify needs no NET_RAW: %v\n%s", err, out)
	}
}

// The manifests are executed on nodes: what they ask for is enough, and no
// capability can be left out.
func TestDaemonSet(t *testing.T) {
	c := cluster.NewT(t, 2)
	etcd, err := c.StartEtcd(t.Context(), cluster.EtcdOptions{})
	if err != nil {
		t.Fatal(err)
	}
	k := newKubelet(t, c)
	install, helper := k.pod().InitContainers[0], k.pod().Containers[0]

	// Nodes as they are before: a network, and a pod that runs.
	before := map[*cluster.Node]map[string]string{}
	var early []*cluster.Pod
	for _, n := range c.Nodes {
		prepareNode(t, n)
		p, err := n.AddPod(t.Context(), cluster.NetworkName, "early-"+n.Name, cluster.PodOptions{})
		if err != nil {
			t.Fatal(err)
		}
		early = append(early, p)
		before[n] = nodeFiles(t, n)
	}
	// As config.yaml is, it does no harm: the secret in it is none.
	if out, err := k.run(t.Context(), c.Nodes[0], install); err == nil || !strings.Contains(out, "/etc/wgcni-secret/secret") {
		t.Errorf("install with the secret of config.yaml: %v\n%s", err, out)
	}
	if diff := cmp.Diff(before[c.Nodes[0]], nodeFiles(t, c.Nodes[0])); diff != "" {
		t.Errorf("files of a node that nothing was installed on (-before +after):\n%s", diff)
	}
	k.configure(etcd.Endpoints())
	var helpers []*cluster.Process
	for _, n := range c.Nodes {
		if out, err := k.run(t.Context(), n, install); err != nil {
			t.Fatalf("install on %s: %v\n%s", n.Name, err, out)
		}
		// Once more, as when the pod is restarted.
		if out, err := k.run(t.Context(), n, install); err != nil || !strings.Contains(out, "Nothing to do") {
			t.Errorf("install again on %s: %v\n%s", n.Name, err, out)
		}
	}
	for i, n := range c.Nodes {
		if i == 0 {
			k.lacking(n, helper)
		}
		helpers = append(helpers, k.start(n, helper))
	}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, helpers[0].Log)
	}
	k.talk(c, early)
	for i, n := range c.Nodes {
		if got, err := n.Run(t.Context(), "sysctl", "-n", "net.ipv4.conf.all.src_valid_mark"); err != nil || strings.TrimSpace(got) != "1" {
			t.Errorf("%s: src_valid_mark is %q, %v: the container does not reach the node's sysctls\n%s", n.Name, got, err, helpers[i].Log)
		}
		k.probe(n, helper)
		k.ask(n, helper)
		k.changeSecret(n)
	}
	// What update and deletion of the pod do.
	for i, n := range c.Nodes {
		if err := helpers[i].Stop(t.Context()); err != nil {
			t.Errorf("%s: %v\n%s", n.Name, err, helpers[i].Log)
		}
	}
	k.uninstall(c, before)
}

// prepareNode makes the network's configuration, and what systemd has done at boot.
func prepareNode(t *testing.T, n *cluster.Node) {
	t.Helper()
	list, err := n.Conflist(cluster.NetworkOptions{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.WriteConflist(cluster.ConflistFile, list); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{
		{"mount", "-t", "tmpfs", "-o", "mode=755", "opt", "/opt"}, // the node's own
		{"mkdir", "-p", "/opt/cni/bin"},
		{"mount", "--make-shared", "/run"},
		{"sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"},
	} {
		if _, err := n.Run(t.Context(), command[0], command[1:]...); err != nil {
			t.Fatal(err)
		}
	}
}

// lacking starts the container without each of its capabilities in turn.
func (k *kubelet) lacking(n *cluster.Node, c container) {
	k.t.Helper()
	for _, capability := range c.SecurityContext.Capabilities.Add {
		want, known := purposes[capability]
		if !known {
			k.t.Errorf("what is %s for?", capability)
		}
		if want == "" {
			continue
		}
		p := k.start(n, c, capability)
		err := cluster.Poll(k.t.Context(), c.Name+" to miss "+capability, func() error {
			for line := range strings.Lines(p.Log.String()) {
				if strings.Contains(line, want) && strings.Contains(line, "operation not permitted") {
					return nil
				}
			}
			return errors.New(p.Log.String())
		})
		if err != nil {
			k.t.Error(err)
		}
		_ = p.Stop(k.t.Context()) // it may have ended with an error
	}
}

// talk has pods of before and pods of now talk, encrypted, over links of the right MTU.
func (k *kubelet) talk(c *cluster.Cluster, early []*cluster.Pod) {
	t := k.t
	t.Helper()
	marker := []byte("plaintext-marker-0123456789")
	capture, err := cluster.StartCapture(c.Underlay, cluster.Bridge, cluster.CaptureOptions{
		Markers: [][]byte{marker}, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")},
	})
	if err != nil {
		t.Fatal(err)
	}
	pods := slices.Clone(early)
	for _, n := range c.Nodes {
		p, err := n.AddPod(t.Context(), cluster.NetworkName, "late-"+n.Name, cluster.PodOptions{})
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	for _, p := range pods {
		cluster.ServeT(t, p)
	}
	for _, from := range pods {
		for _, to := range pods {
			if from.Node == to.Node {
				continue
			}
			if err := cluster.Talk(t.Context(), from, to, marker); err != nil {
				t.Error(err)
			}
		}
		if err := cluster.Poll(t.Context(), "the MTU of "+from.Name, func() error {
			out, err := from.Node.Run(t.Context(), "ip", "-n", from.Name, "link", "show", "eth0")
			if err == nil && !strings.Contains(out, "mtu 1420 ") { // 1500 less 80
				err = errors.New(out)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	report, err := capture.Stop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := report.Clean(); err != nil || report.WireGuard == 0 {
		t.Errorf("%v: %s", err, report)
	}
	for _, p := range pods[len(early):] {
		if err := p.Delete(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// probe asks what kubelet would.
func (k *kubelet) probe(n *cluster.Node, c container) {
	k.t.Helper()
	for _, p := range []*probe{c.StartupProbe, c.ReadinessProbe, c.LivenessProbe} {
		at := net.JoinHostPort(p.HTTPGet.Host, strconv.Itoa(p.HTTPGet.Port))
		if at != cluster.HelperHTTP {
			k.t.Errorf("%s is asked at %s, and served at %s", p.HTTPGet.Path, at, cluster.HelperHTTP)
		}
		if err := cluster.Poll(k.t.Context(), p.HTTPGet.Path, func() error {
			status, body, err := n.Get(k.t.Context(), p.HTTPGet.Path)
			if err == nil && (status < 200 || status > 399) { // what kubelet takes for success
				err = fmt.Errorf("%d: %s", status, body)
			}
			return err
		}); err != nil {
			k.t.Error(err)
		}
	}
}

// changeSecret adds a secret to the Secret's, which kubelet brings to the nodes by
// renaming, and waits until the node has it.
func (k *kubelet) changeSecret(n *cluster.Node) {
	k.t.Helper()
	more, err := identity.NewSecret(time.Now())
	if err != nil {
		k.t.Fatal(err)
	}
	want := k.objects["Secret"].StringData["secret"] + more.Reveal() + "\n"
	for _, v := range k.pod().Volumes {
		if v.Secret == nil {
			continue
		}
		file := filepath.Join(k.volume(n, v.Name), "secret")
		if err := errors.Join(n.WriteFile(file+".new", want, v.Secret.DefaultMode), os.Rename(n.Path(file+".new"), n.Path(file))); err != nil {
			k.t.Fatal(err)
		}
	}
	if err := cluster.Poll(k.t.Context(), "the new secret on "+n.Name, func() error {
		got, err := n.ReadFile(cluster.SecretFile)
		if err == nil && got != want {
			err = errors.New("it has the old one")
		}
		return err
	}); err != nil {
		k.t.Error(err)
	}
}

// uninstall applies the other DaemonSet.
func (k *kubelet) uninstall(c *cluster.Cluster, before map[*cluster.Node]map[string]string) {
	t := k.t
	t.Helper()
	k.apply("uninstall.yaml")
	uninstall, done := k.pod().InitContainers[0], k.pod().Containers[0]
	for _, n := range c.Nodes {
		for _, capability := range uninstall.SecurityContext.Capabilities.Add {
			if out, err := k.run(t.Context(), n, uninstall, capability); err == nil || !strings.Contains(out, "operation not permitted") {
				t.Errorf("it needs no %s: %v\n%s", capability, err, out)
			}
		}
		for range 2 { // as when the pod is restarted
			if out, err := k.run(t.Context(), n, uninstall); err != nil {
				t.Errorf("uninstall on %s: %v\n%s", n.Name, err, out)
			}
		}
		if diff := cmp.Diff(before[n], nodeFiles(t, n)); diff != "" {
			t.Errorf("files of %s (-before +after):\n%s", n.Name, diff)
		}
		if out, err := n.Run(t.Context(), "sh", "-c", "ip -o link; ip rule; nft list tables"); err != nil || strings.Contains(out, "wgcni") || strings.Contains(out, "30567") {
			t.Errorf("%s still has, %v:\n%s", n.Name, err, out)
		}
		p := k.start(n, done)
		if err := p.WaitFor(t.Context(), "Done"); err != nil {
			t.Error(err)
		}
		if err := p.Signal(t.Context(), unix.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := p.Wait(t.Context()); err != nil {
			t.Errorf("%v\n%s", err, p.Log)
		}
	}
}

// nodeFiles are those below the folders that the DaemonSets have of a node, with their content.
func nodeFiles(t *testing.T, n *cluster.Node) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range []string{"/etc/cni", "/opt", "/etc/wgcni", "/run/wgcni", "/var/lib/wgcni"} {
		root := n.Path(dir)
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || err == nil && d.IsDir() {
				return nil
			}
			if err != nil {
				return err
			}
			text, err := os.ReadFile(path)
			out[dir+strings.TrimPrefix(path, root)] = string(text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// The image is built from what the Containerfile copies, and holds what the
// manifests start.
func TestContainerfile(t *testing.T) {
	text, err := os.ReadFile("../../scripts/Containerfile")
	if err != nil {
		t.Fatal(err)
	}
	build, final, two := strings.Cut(string(text), "\nFROM scratch\n")
	if !two || !strings.Contains(final, "COPY --from=build /image/ /\n") {
		t.Fatalf("the image is not made of /image:\n%s", text)
	}
	source, image := t.TempDir(), t.TempDir()
	var command string
	for line := range strings.Lines(strings.ReplaceAll(build, "\\\n", " ")) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		switch words[0] {
		case "COPY": // the last word is where to
			for _, name := range words[1 : len(words)-1] {
				if out, err := exec.CommandContext(t.Context(), "cp", "-r", filepath.Join("../..", name), filepath.Join(source, name)).CombinedOutput(); err != nil {
					t.Fatalf("%s: %v: %s", line, err, out)
				}
			}
		case "RUN":
			command = strings.TrimSpace(strings.TrimPrefix(line, "RUN"))
		}
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", strings.ReplaceAll(command, "/image", image))
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "TARGETOS=linux", "TARGETARCH="+runtime.GOARCH, "VERSION=v1.2.3-test")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	for _, name := range []string{"wgcni", "wgcnid"} {
		file := filepath.Join(image, "usr/local/bin", name)
		program, err := elf.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		if libraries, err := program.ImportedLibraries(); err != nil || len(libraries) > 0 {
			t.Errorf("%s needs %q, %v: the image has no libraries", name, libraries, err)
		}
		program.Close()
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(image, "usr/local/bin/wgcnid"), "version").Output()
	if err != nil || !strings.Contains(string(out), "v1.2.3-test") {
		t.Errorf("it is %s, %v", out, err)
	}
}
