package operate

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// routesAround gives every node ordinary routes to the others' pods, as the routing
// of any cluster does: whatever is not held back arrives in the clear.
func (m *runtimeMesh) routesAround(t *testing.T) {
	t.Helper()
	for i, n := range m.Nodes {
		other := m.Nodes[1-i]
		for k, p := range other.PodCIDRs() {
			via := []netip.Addr{other.IPv4, other.IPv6}[k]
			if _, err := n.Run(t.Context(), "ip", "route", "replace", p.String(), "via", via.String()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// try sends something to a pod that serves. With a kernel's own WireGuard it even
// arrives, since the first ADD builds the tunnel: the capture tells what is right.
func try(t *testing.T, from, to *cluster.Sandbox) {
	t.Helper()
	for _, addr := range []netip.Addr{to.IPv4(), to.IPv6()} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, _ = cluster.UDP(ctx, from, netip.AddrPortFrom(addr, cluster.EchoPort), secretOfPods)
		cancel()
	}
}

// Pods that containerd made before wgcni was installed are taken in, from the
// results that it cached: they talk encrypted, and are detached as the others are.
func TestContainerdPodsBeforeWgcni(t *testing.T) {
	m := newRuntimes(t)
	m.routesAround(t)
	a, b := m.runPods(t, "old")
	if _, err := cluster.Ping(t.Context(), a, b.IPv4(), nil); err != nil {
		t.Fatalf("without wgcni: %v", err)
	}
	m.install(t)
	m.join(t)
	for _, n := range m.Nodes {
		if s, err := n.Status(t.Context()); err != nil || s.Pods != 1 {
			t.Errorf("%s knows %d pods, want 1 that was there before: %v", n.Name, s.Pods, err)
		}
	}
	mustBeEncrypted := m.watch(t)
	talkBothWays(t, a, b)
	c, d := m.runPods(t, "new")
	talkBothWays(t, a, d)
	talkBothWays(t, c, b)
	mustBeEncrypted()
	for _, p := range []*cluster.Sandbox{a, b} {
		if err := p.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		mustBeFree(t, p.Node, p.ID)
	}
}

// A node is rebooted. containerd is back before wgcnid, with the sandboxes of
// before, which are dead; kubelet removes these, while their network namespaces
// are gone, and makes new ones.
func TestContainerdNodeReboot(t *testing.T) {
	m := newRuntimeMesh(t)
	a, b := m.runPods(t, "before")
	talkBothWays(t, a, b)
	pods := []*cluster.Sandbox{a, b}
	for i, n := range m.Nodes {
		old, there := pods[i], pods[1-i]
		if err := n.Reboot(t.Context()); err != nil {
			t.Fatal(err)
		}
		skipDAD(t, n)
		m.routesAround(t)
		mustBeEncrypted := m.watch(t)
		r := m.runtimes[i]
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		early := m.runPod(t, i, "early")
		cluster.ServeT(t, early)
		try(t, early, there)
		known, err := r.Sandboxes(t.Context())
		if err != nil || !slices.Contains(known, old.ID) {
			t.Fatalf("containerd has forgotten the sandbox of before the reboot: %v, %v", known, err)
		}
		if err := old.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		dels := delsOf(t, old)
		if len(dels) == 0 || slices.ContainsFunc(dels, func(v cluster.Verb) bool { return v.Netns != "" }) {
			t.Errorf("%s: DELs after the reboot: %+v; want some, without netns", old, dels)
		}
		mustBeFree(t, old.Node, old.ID)
		if m.helpers[i], err = n.StartHelper(); err != nil {
			t.Fatal(err)
		}
		if err := m.AwaitConverged(t.Context()); err != nil {
			t.Fatal(err)
		}
		talkBothWays(t, early, there)
		mustBeEncrypted()
		pods[i] = early
	}
}

// The DEL of a pod comes while wgcnid is down. It comes late, since containerd was
// killed when the pod was attached and containerd had not recorded that
// (containerd#12923). And it never comes, since nobody knows the pod.
func TestContainerdPodsGoWithoutHelper(t *testing.T) {
	m := newRuntimeMesh(t)
	a, b := m.runPods(t, "stays")
	for i, n := range m.Nodes {
		if err := m.helpers[i].Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		gone := m.runPod(t, i, "gone")
		if err := gone.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		mustBeFree(t, n, gone.ID)

		lost := m.loseSandbox(t, i)
		if err := m.runtimes[i].Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := m.runtimes[i].DeletePod(t.Context(), lost.ContainerID); err != nil {
			t.Error(err)
		}
		mustBeFree(t, n, lost.ContainerID)

		lost = m.loseSandbox(t, i)
		if out, err := n.Run(t.Context(), "ip", "netns", "delete", filepath.Base(lost.Netns)); err != nil {
			t.Fatal(err, out)
		}
		if s, err := n.Status(t.Context()); err != nil || s.Pods != 2 {
			t.Errorf("%s: wgcni knows %d pods, want 2 with the one that nobody knows: %v", n.Name, s.Pods, err)
		}
		var err error
		if m.helpers[i], err = n.StartHelper(); err != nil {
			t.Fatal(err)
		}
		err = cluster.Poll(t.Context(), "wgcnid to forget the lost pod", func() error {
			s, err := n.Status(t.Context())
			if err == nil && s.Pods != 1 {
				err = fmt.Errorf("it knows %d pods", s.Pods)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	talkBothWays(t, a, b)
}

// loseSandbox kills containerd when it has attached a pod to the network and not yet
// to its loopback interface, for which it waits.
func (m *runtimeMesh) loseSandbox(t *testing.T, node int) (lost cluster.Verb) {
	t.Helper()
	n, r := m.Nodes[node], m.runtimes[node]
	loopback, hold := n.Path(filepath.Join(cluster.RuntimeBinDir, "loopback")), n.Path("/run/hold")
	plugin, err := os.Readlink(loopback)
	script := fmt.Sprintf("#!/bin/sh\nwhile [ -e /run/hold ]; do sleep 0.02; done\nexec %s\n", plugin)
	if err := errors.Join(err, os.Remove(loopback), os.WriteFile(loopback, []byte(script), 0o755), os.WriteFile(hold, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	before, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = r.RunPod(t.Context(), "lost") // it is killed meanwhile
	}()
	err = cluster.Poll(t.Context(), "the pod to be attached", func() error {
		s, err := n.Status(t.Context())
		if err == nil && s.Pods != before.Pods+1 {
			err = fmt.Errorf("%d pods", s.Pods)
		}
		return err
	})
	if err := errors.Join(err, r.Kill()); err != nil {
		t.Fatal(err)
	}
	<-ended
	if err := errors.Join(os.Remove(hold), os.Remove(loopback), os.Symlink(plugin, loopback)); err != nil {
		t.Fatal(err)
	}
	verbs, err := n.Verbs()
	if err != nil || len(verbs) == 0 || verbs[len(verbs)-1].Command != "ADD" {
		t.Fatalf("%s: want an ADD as the last verb: %+v, %v", n.Name, verbs, err)
	}
	return verbs[len(verbs)-1]
}

// A containerd that knows CNI 1.1 asks wgcni whether the node can serve pods, and
// kubelet reads the answer: a node without its tunnel is not ready.
func TestContainerdStatus(t *testing.T) {
	m := newRuntimes(t)
	m.install(t)
	ready := func(want bool, about string) {
		t.Helper()
		err := cluster.Poll(t.Context(), fmt.Sprintf("NetworkReady to be %v", want), func() error {
			got, message, err := m.runtimes[1].Ready(t.Context())
			if err == nil && (got != want || !strings.Contains(message, about)) {
				err = fmt.Errorf("ready %v: %q; want %v, %q", got, message, want, about)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	ready(false, "start wgcnid on this node")
	// containerd 1 has no STATUS, and takes a node with a conflist for ready.
	if got, why, err := m.runtimes[0].Ready(t.Context()); !got {
		t.Errorf("containerd 1 says that its network is not ready: %s, %v", why, err)
	}
	m.join(t)
	ready(true, "")
	if err := m.helpers[1].Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.runPod(t, 1, "cut-off") // where ADD could build the tunnel, it is the pods that are cut off
	ready(true, "")
	if _, err := m.Nodes[1].LoseTunnel(t.Context()); err != nil {
		t.Fatal(err)
	}
	ready(false, cluster.Interface)
	if _, err := m.Nodes[1].StartHelper(); err != nil {
		t.Fatal(err)
	}
	ready(true, "")
	verbs, err := m.Nodes[1].Verbs()
	if !slices.ContainsFunc(verbs, func(v cluster.Verb) bool { return v.Command == "STATUS" }) {
		t.Errorf("containerd 2 sent no STATUS: %v, %v", verbs, err)
	}
}

// wgcni is removed from under containerd: pods go on, those that it had attached
// are detached without it, and new ones are the primary's alone.
func TestContainerdUninstall(t *testing.T) {
	m := newRuntimeMesh(t)
	m.routesAround(t)
	a, b := m.runPods(t, "old")
	talkBothWays(t, a, b)
	for i, n := range m.Nodes {
		if out, err := n.Wgcnid(t.Context(), "uninstall"); err != nil {
			t.Fatal(err, out)
		}
		m.awaitNetwork(t, i, false)
	}
	if _, err := cluster.Ping(t.Context(), a, b.IPv4(), nil); err != nil {
		t.Errorf("the removal cut the pods off: %v", err)
	}
	c, d := m.runPods(t, "new")
	if _, err := cluster.Ping(t.Context(), c, d.IPv4(), nil); err != nil {
		t.Errorf("pods made after the removal: %v", err)
	}
	for _, p := range []*cluster.Sandbox{a, b} {
		if err := p.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		mustHoldNothing(t, p.Node, p.ID)
	}
}
