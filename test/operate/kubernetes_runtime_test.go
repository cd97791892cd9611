package operate

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/test/cluster"
)

// What TestDaemonSet leaves out is a container runtime's: its seccomp profile, its
// own notion of mounts, read-only paths and devices, and pods whose namespaces it
// makes after the container has started. Here containerd runs the manifests.
func TestDaemonSetInContainerd(t *testing.T) {
	c := cluster.NewT(t, 1)
	n := c.Nodes[0]
	etcd, err := c.StartEtcd(t.Context(), cluster.EtcdOptions{})
	if err != nil {
		t.Fatal(err)
	}
	prepareNode(t, n)
	// containerd has its plugins in one folder, which is the one of the manifests.
	if _, err := n.Run(t.Context(), "sh", "-ec", "mkdir -p "+cluster.RuntimeBinDir+" && mount --bind "+cluster.RuntimeBinDir+" /opt/cni/bin"); err != nil {
		t.Fatal(err)
	}
	runtime, err := n.StartContainerd(t.Context(), cluster.ContainerdOptions{})
	if err != nil {
		t.Fatalf("%v\n%s", err, runtime.Log)
	}
	k := newKubelet(t, c)
	k.configure(etcd.Endpoints())
	const image = "wgcni.test/wgcni:1"
	install, helper := k.pod().InitContainers[0], k.pod().Containers[0]
	if err := runtime.AddImage(t.Context(), image, k.container(n, install)); err != nil {
		t.Fatal(err)
	}
	once := func(c container) {
		t.Helper()
		r, err := runtime.StartContainer(t.Context(), c.Name, image, k.container(n, c))
		if err != nil {
			t.Fatal(err)
		}
		if status, err := r.Wait(t.Context()); err != nil || status != 0 {
			t.Fatalf("%s: exit status %d, %v\n%s", c.Name, status, err, r.Log())
		}
		if err := r.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	before := nodeFiles(t, n)
	early, err := runtime.RunPod(t.Context(), "early")
	if err != nil {
		t.Fatal(err)
	}
	once(install)
	r, err := runtime.StartContainer(t.Context(), helper.Name, image, k.container(n, helper))
	if err != nil {
		t.Fatal(err)
	}
	k.probe(n, helper)
	// That it ran under what it was asked to: proc(5) has the numbers.
	confined, err := n.Run(t.Context(), "sh", "-ec", `pid=$(ctr --namespace k8s.io task ls | awk -v id=$0 '$1 == id {print $2}'); cat /proc/$pid/status`, r.ID)
	for _, want := range []string{"Seccomp:\t2\n", "CapEff:\t0000000000203000\n", "CapBnd:\t0000000000203000\n"} {
		if err != nil || !strings.Contains(confined, want) {
			t.Errorf("%v: want %q in\n%s", err, want, confined)
		}
	}
	if got, err := n.Run(t.Context(), "sysctl", "-n", "net.ipv4.conf.all.src_valid_mark"); err != nil || strings.TrimSpace(got) != "1" {
		t.Errorf("src_valid_mark is %q, %v\n%s", got, err, r.Log())
	}
	if err := cluster.Poll(t.Context(), "containerd to take the copy of the configuration", func() error {
		text, err := runtime.Network(t.Context())
		if err == nil && !strings.Contains(text, "wgcni") {
			err = errors.New(text)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	late, err := runtime.RunPod(t.Context(), "late")
	if err != nil {
		t.Fatal(err)
	}
	// A smaller underlay: the helper enters both pods' namespaces, also the one that
	// is newer than its container.
	if _, err := n.Run(t.Context(), "ip", "link", "set", "eth0", "mtu", "1480"); err != nil {
		t.Fatal(err)
	}
	for _, pod := range []*cluster.Sandbox{early, late} {
		if err := cluster.Poll(t.Context(), "the MTU of "+pod.Name, func() error {
			out, err := n.Run(t.Context(), "nsenter", "--net="+pod.Netns, "ip", "link", "show", "eth0")
			if err == nil && !strings.Contains(out, "mtu 1400 ") {
				err = errors.New(out)
			}
			return err
		}); err != nil {
			t.Errorf("%v\n%s", err, r.Log())
		}
	}
	if s, err := n.Status(t.Context()); err != nil || !s.OK || !s.Helper || s.Pods != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	if strings.Contains(r.Log(), "not permitted") || strings.Contains(r.Log(), "denied") {
		t.Errorf("something is not permitted:\n%s", r.Log())
	}
	if err := r.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	k.apply("uninstall.yaml")
	once(k.pod().InitContainers[0])
	for _, pod := range []*cluster.Sandbox{early, late} {
		if err := pod.Delete(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(before, nodeFiles(t, n)); diff != "" {
		t.Errorf("files (-before +after):\n%s", diff)
	}
}
