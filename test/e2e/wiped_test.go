package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// beyondNode gives a node a second network, whose pods are announced one by one.
func beyondNode(t *testing.T, n *cluster.Node, stanza map[string]any) {
	t.Helper()
	text, err := n.Conflist(cluster.NetworkOptions{
		Stanza: stanza,
		Primary: map[string]any{"bridge": "cni1", "ipam": map[string]any{
			"type": "host-local", "subnet": beyond, "routes": []any{map[string]any{"dst": "0.0.0.0/0"}},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.WriteConflist("20-beyond.conflist", strings.Replace(text, `"name": "pods"`, `"name": "beyond"`, 1)); err != nil {
		t.Fatal(err)
	}
}

// What a node keeps is removed from under a running helper, one and all: the pods do
// not notice, what is lost is there again, and pods go on to be announced at once.
func TestStoresRemovedWhileRunning(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	a, b := m.Nodes[0], m.Nodes[1]
	beyondNode(t, a, nil)
	stopHelper(t, m.helpers[0])
	helper, err := a.Start(bin("wgcnid"), "--config", cluster.ConfDir+"/"+cluster.ConflistFile, "run", "--resync", "500ms")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	routeAroundTunnel(t, m.Cluster)
	outside := addPod(t, a, "beyond", "outside", cluster.PodOptions{})
	for _, p := range append(m.pods, outside) {
		serve(t, p)
	}
	awaitAllowed(t, b, outside.IPv4().String()+"/32")
	talkSoon(t, outside, m.pods[1])
	capture := watchUnderlay(t, m.Cluster)
	flows := newFlows(t, func() []*cluster.Stream {
		return []*cluster.Stream{
			stream(t, m.pods[0], m.pods[1].IPv4(), 100), stream(t, m.pods[1], m.pods[0].IPv6(), 100),
			stream(t, m.pods[1], outside.IPv4(), 100), stream(t, outside, m.pods[1].IPv4(), 100),
		}
	})
	attachments, peers := "/run/wgcni/attachments.db", "/var/lib/wgcni/peers.db"
	for i, gone := range [][]string{{attachments}, {peers}, {attachments, peers}, {"/run/wgcni"}, {"/run/wgcni", peers, peers + ".lock"}} {
		for _, p := range gone {
			// Somebody may write into the folder meanwhile.
			if err := cluster.Poll(t.Context(), p+" to be removed", func() error { return os.RemoveAll(a.Path(p)) }); err != nil {
				t.Fatal(err)
			}
		}
		awaitStatus(t, a, fmt.Sprintf("its pods and its helper, without %v", gone), func(s cluster.Status) bool {
			return s.OK && s.Helper && s.Pods == 2 && len(s.Peers) == 1
		})
		err := cluster.Poll(t.Context(), "what was removed to be there again", func() error {
			var errs []error
			for _, p := range []string{attachments, peers, "/run/wgcni/helper.json", "/run/wgcni/announced.json"} {
				_, err := os.Stat(a.Path(p))
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		})
		if err != nil {
			t.Fatal(err)
		}
		guarded := run(t, a, "nft", "list", "set", "inet", "wgcni", "pods4")
		if !strings.Contains(guarded, outside.IPv4().String()) {
			t.Errorf("without %v: %s is not guarded:\n%s", gone, outside, guarded)
		}
		if out, err := a.Wgcnid(t.Context(), "run"); err == nil || !strings.Contains(out+err.Error(), "runs already") {
			t.Errorf("without %v: a second helper: %v, %s", gone, err, out)
		}
		begun := time.Now()
		late := addPod(t, a, "beyond", fmt.Sprintf("late%d", i), cluster.PodOptions{})
		serve(t, late)
		talkSoon(t, m.pods[1], late)
		t.Logf("without %v: a pod is added and reached within %v", gone, time.Since(begun))
		deletePod(t, late)
	}
	if strings.Contains(helper.Log.String(), "-"+outside.IPv4().String()) {
		t.Errorf("the helper took %s out for a while:\n%s", outside, helper.Log)
	}
	flows.lossless(t)
	mustBeClean(t, capture)
}

// A node's state folder is wiped, its key with all else: after the helper's restart
// it is the same node by another key, and the others take that for it.
func TestStateWiped(t *testing.T) {
	m := newMesh(t, 2, 1, cluster.NetworkOptions{})
	a, b := m.Nodes[0], m.Nodes[1]
	routeAroundTunnel(t, m.Cluster)
	serveAll(t, m.pods)
	capture := watchUnderlay(t, m.Cluster)
	s := stream(t, m.pods[0], m.pods[1].IPv4(), 200)
	flowing(t, s)
	old, err := publicKeyOf(a)
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(a.Path("/var/lib/wgcni") + "/*")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	flowing(t, s) // the kernel has all it needs
	stopHelper(t, m.helpers[0])
	flowing(t, s)
	before := s.Report()
	startHelper(t, a)
	awaitStatus(t, b, "node-a to have another key", func(st cluster.Status) bool {
		return st.OK && len(st.Peers) == 1 && st.Peers[0].PublicKey != old
	})
	flowing(t, s)
	r := s.Stop()
	t.Logf("a new key: %d datagrams of 5 ms lost; %s", r.Lost-before.Lost, r)
	if r.LongestGap > cluster.Patience(8*time.Second) {
		t.Errorf("a new key: %s; want at most 8 s without traffic", r)
	}
	if err := m.AwaitConverged(t.Context()); err != nil {
		t.Error(err)
	}
	if keys := strings.Fields(run(t, b, "wg", "show", cluster.Interface, "peers")); slices.Contains(keys, old) {
		t.Errorf("node-b still has the key that is gone: %s", keys)
	}
	mustBeClean(t, capture)
}
