package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/test/cluster"
)

// TestFlannelComesLateAndGoes: as at a boot, wgcnid runs before flanneld has said
// what the node's ranges are. And flanneld may end and come back.
func TestFlannelComesLateAndGoes(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	o := network{version: "0.3.1", primary: flannelPrimary} // that of flannel's own manifest
	if err := b.configure(ctx, o, dual); err != nil {
		t.Fatal(err)
	}
	for _, n := range b.Nodes {
		awaitOK(t, n)
	}
	flannel, err := b.newFlannel(ctx, "vxlan", dual)
	if err != nil {
		t.Fatal(err)
	}
	var daemon *cluster.Process
	for _, n := range b.Nodes {
		if daemon, err = flannel.Start(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	pods, servers, err := b.attach(ctx, o, dual)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range servers {
		defer s.Close()
	}
	if err := b.awaitKnown(ctx, pods); err != nil {
		t.Fatal(err)
	}
	capture := watchUnderlay(t, b.Cluster)
	from, to := pods[0], pods[2]
	// Slow enough for the sockets' buffers while flanneld's start takes an emulated computer's CPUs.
	streams := []*cluster.Stream{stream(t, from, to.IPv4(), 50), stream(t, from, to.IPv6(), 50)}
	for _, s := range streams {
		flowing(t, s)
	}
	lost := []int{streams[0].Report().Lost, streams[1].Report().Lost}
	// The file is found with the first pod, and not at some look later.
	awaitAllowedIPs(t, b.Nodes[0], to.Result.IPs[0].Address.Masked(), to.Result.IPs[1].Address.Masked())
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGTERM} {
		if err := daemon.Signal(ctx, sig); err != nil {
			t.Fatal(err)
		}
		_ = daemon.Wait(ctx) // it was told to end
		for _, s := range streams {
			flowing(t, s)
		}
		if daemon, err = flannel.Start(ctx, b.Nodes[1]); err != nil {
			t.Fatal(err)
		}
		for _, s := range streams {
			flowing(t, s)
		}
	}
	for i, s := range streams {
		if r := s.Stop(); r.Lost > lost[i] {
			t.Errorf("%s; at first it lost %d", r, lost[i])
		}
	}
	mustBeClean(t, capture)
}

func awaitAllowedIPs(t *testing.T, n *cluster.Node, want ...netip.Prefix) {
	t.Helper()
	err := cluster.Poll(t.Context(), fmt.Sprintf("%s to allow %v", n.Name, want), func() error {
		s, err := n.Status(t.Context())
		if err != nil || len(s.Peers) != 1 {
			return fmt.Errorf("%d peers, %w", len(s.Peers), err)
		}
		if got := s.Peers[0].AllowedIPs; !slices.Equal(got, want) {
			return fmt.Errorf("allowed are %v", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestResultsOfOtherPrimaries: results as other projects' plugins give them, in
// the CNI version that they speak.
func TestResultsOfOtherPrimaries(t *testing.T) {
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	helperUp(t, n)
	p := addPod(t, n, cluster.NetworkName, "pod", cluster.PodOptions{Sysctls: noDAD})
	defer deletePod(t, p)
	list := func(values ...any) []any { return values }
	type object = map[string]any
	inside, outside := object{"name": "eth0", "sandbox": p.Netns, "mac": "02:00:00:00:00:09"}, object{"name": "eni5f3a", "mac": "02:00:00:00:00:08"}
	for _, tt := range []struct {
		name, version string
		result        object
		want          []string // none: refused
	}{
		{"before there were interfaces", "0.2.0", object{"ip4": object{"ip": "10.244.99.1/24"}, "ip6": object{"ip": "fd00:244:99::1/64"}}, []string{"10.244.99.1", "fd00:244:99::1"}},
		{"flannel", "0.3.1", object{"interfaces": list(object{"name": "cni0"}, outside, inside), "ips": list(object{"version": "4", "interface": 2, "address": "10.244.99.2/24", "gateway": "10.244.99.1"})}, []string{"10.244.99.2"}},
		{"Calico: the node's end alone, and no index", "0.3.1", object{"interfaces": list(object{"name": "cali1a2b"}), "ips": list(object{"version": "4", "address": "10.244.99.3/32"}, object{"version": "6", "address": "fd00:244:99::3/128"})}, []string{"10.244.99.3", "fd00:244:99::3"}},
		{"AWS VPC CNI: a third, dummy interface", "0.4.0", object{"interfaces": list(outside, inside, object{"name": "dummy5f3a", "mac": "0", "sandbox": "0"}), "ips": list(object{"version": "4", "interface": 1, "address": "10.244.99.4/32"})}, []string{"10.244.99.4"}},
		{"Azure: no sandbox", "1.0.0", object{"interfaces": list(object{"name": "eth0"}), "ips": list(object{"interface": 0, "address": "10.244.99.5/16"})}, []string{"10.244.99.5"}},
		{"no interfaces at all, several addresses", "1.1.0", object{"ips": list(object{"address": "10.244.99.6/24"}, object{"address": "10.244.98.6/24"}, object{"address": "fd00:244:99::6/64"})}, []string{"10.244.99.6", "10.244.98.6", "fd00:244:99::6"}},
		{"another interface's address beside", "1.1.0", object{"interfaces": list(inside, object{"name": "net1", "sandbox": p.Netns}), "ips": list(object{"interface": 1, "address": "10.244.99.8/24"}, object{"interface": 0, "address": "10.244.99.7/24"})}, []string{"10.244.99.7"}},
		{"another interface's address alone", "1.0.0", object{"interfaces": list(inside, outside), "ips": list(object{"interface": 1, "address": "10.244.99.9/24"})}, nil},
		{"an index of nothing", "1.0.0", object{"interfaces": list(inside), "ips": list(object{"interface": 7, "address": "10.244.99.9/24"})}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.result["cniVersion"] = tt.version
			x := call{container: "other", netns: p.Netns, ifname: "eth0", stdin: stanza(t, n, object{"cniVersion": tt.version, "prevResult": tt.result})}
			x.verb = "ADD"
			r := plugin(t, n, x)
			if tt.want == nil {
				if r.err.Code != types.ErrInvalidNetworkConfig || !strings.Contains(r.err.Error(), "no address") {
					t.Errorf("%+v, want a refusal", r)
				}
				return
			}
			if r.code != 0 || !strings.Contains(r.stdout, `"cniVersion": "`+tt.version+`"`) {
				t.Fatalf("%+v", r)
			}
			var got []string
			for _, a := range attachments(t, n)["other"].Addresses {
				got = append(got, a.String())
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("addresses (-want +got):\n%s", d)
			}
			if x.verb = "CHECK"; tt.version > "0.4" { // the first that has it
				if r := plugin(t, n, x); r.code != 0 {
					t.Errorf("CHECK: %+v", r)
				}
			}
			del(t, n, x)
			if _, there := attachments(t, n)["other"]; there {
				t.Error("it is still attached after DEL")
			}
		})
	}
}

// TestADDBesideAStartingTunnel: at a boot the runtime and the helper start
// together. A userspace tunnel's interface is there before its process answers.
func TestADDBesideAStartingTunnel(t *testing.T) {
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	mustRun(t, n, "ip", "tuntap", "add", "wgcni0", "mode", "tun")
	added := make(chan error, 1)
	go func() {
		p, err := n.AddPod(t.Context(), cluster.NetworkName, "pod", cluster.PodOptions{Sysctls: noDAD})
		if err == nil {
			err = p.Delete(t.Context())
		}
		added <- err
	}()
	err := cluster.Poll(t.Context(), "the pod to be recorded", func() error {
		all, err := stored(t.Context(), n)
		if err == nil && len(all) == 0 {
			err = errors.New("it is not")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	mustRun(t, n, "ip", "link", "delete", "wgcni0") // for this ADD as good as that it answers
	if err := <-added; err != nil {
		t.Error(err)
	}
}
