package cluster

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
)

func bridgeConflist(i int) string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0", "name": "pods", "plugins": [
  { "type": "bridge", "bridge": "cni0", "isGateway": true,
    "ipam": { "type": "host-local",
      "ranges": [ [{ "subnet": "10.244.%[1]d.0/24" }], [{ "subnet": "fd00:10:244:%[1]d::/64" }] ],
      "routes": [ { "dst": "0.0.0.0/0" }, { "dst": "::/0" } ] } } ] }`, i)
}

func TestPods(t *testing.T) {
	c := newCluster(t, 2)
	var pods []*Pod
	for i, n := range c.Nodes {
		if err := n.WriteConflist("10-pods.conflist", bridgeConflist(i+1)); err != nil {
			t.Fatal(err)
		}
		p, err := n.AddPod(t.Context(), "pods", "web", PodOptions{Args: map[string]string{"IgnoreUnknown": "1", "K8S_POD_NAME": "web"}})
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
		want := netip.MustParseAddr(fmt.Sprintf("10.244.%d.2", i+1))
		want6 := netip.MustParseAddr(fmt.Sprintf("fd00:10:244:%d::2", i+1))
		if p.IPv4() != want || p.IPv6() != want6 {
			t.Errorf("%s has %s and %s, want %s and %s; result: %s", p, p.IPv4(), p.IPv6(), want, want6, p.Raw)
		}
		if _, err := p.CNI(t.Context(), "check"); err != nil {
			t.Error(err)
		}
		if _, err := n.ReadFile("/var/lib/cni/results/pods-" + p.ContainerID() + "-eth0"); err != nil {
			t.Errorf("the container ID is not cnitool's: %v", err)
		}
	}
	// Without a mesh, the underlay's gateway knows no pods; routes by hand do.
	for i, n := range c.Nodes {
		peer := c.Nodes[1-i]
		mustRun(t, n.Machine, "ip", "route", "add", fmt.Sprintf("10.244.%d.0/24", 2-i), "via", peer.IPv4.String())
		mustRun(t, n.Machine, "ip", "route", "add", fmt.Sprintf("fd00:10:244:%d::/64", 2-i), "via", peer.IPv6.String())
	}
	s := serve(t, pods[1], 7000)
	inside, err := StartCapture(pods[1], "eth0", CaptureOptions{Markers: [][]byte{[]byte("hello")}})
	if err != nil {
		t.Fatal(err)
	}
	for _, ends := range [][2]netip.Addr{{pods[0].IPv4(), pods[1].IPv4()}, {pods[0].IPv6(), pods[1].IPv6()}} {
		to := addrPort(ends[1], s.Port)
		if seen, err := TCP(t.Context(), pods[0], to, []byte("hello")); err != nil || seen.Addr() != ends[0] {
			t.Errorf("TCP: seen %v, %v", seen, err)
		}
		if seen, err := UDP(t.Context(), pods[0], to, []byte("hello")); err != nil || seen.Addr() != ends[0] {
			t.Errorf("UDP: seen %v, %v", seen, err)
		}
		if _, err := Ping(t.Context(), pods[0], ends[1], nil); err != nil {
			t.Error(err)
		}
	}
	if r, err := inside.Stop(t.Context()); err != nil || r.WithMarker != 8 {
		t.Errorf("capture in the pod: %v: %s", err, r)
	}
	if out, err := pods[0].Run(t.Context(), "ip", "-o", "-4", "addr", "show", "eth0"); err != nil || !strings.Contains(out, pods[0].IPv4().String()) {
		t.Errorf("addresses in the pod: %q, %v", out, err)
	}
	if err := pods[0].Delete(t.Context()); err != nil {
		t.Error(err)
	}
	if out := mustRun(t, c.Nodes[0].Machine, "sh", "-c", "ip netns; ls /var/lib/cni/networks/pods | grep 10.244 || :"); out != "" {
		t.Errorf("the deleted pod has left %q", out)
	}
}

func TestFailingAddLeavesNoPod(t *testing.T) {
	c := newCluster(t, 1)
	n := c.Nodes[0]
	if err := n.WriteConflist("10-pods.conflist", strings.Replace(bridgeConflist(1), "host-local", "no-such-ipam", 1)); err != nil {
		t.Fatal(err)
	}
	_, err := n.AddPod(t.Context(), "pods", "web", PodOptions{})
	if err == nil || !strings.Contains(err.Error(), "no-such-ipam") || strings.Contains(err.Error(), "Usage") {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(n.Path("/run/netns/web")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace of the failed pod: %v", err)
	}
}
