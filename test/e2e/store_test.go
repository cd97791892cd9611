package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/test/cluster"
)

// A damaged store is replaced and filled again from the runtime's cache, whoever
// finds it first, and the pods outside of the prefix stay protected meanwhile.
func TestDamagedStoreIsFilledAgain(t *testing.T) {
	c := cluster.NewT(t, 1)
	n := c.Nodes[0]
	outside := cluster.NetworkOptions{Stanza: map[string]any{"podCIDRs": []string{"10.244.200.0/24"}}}
	if err := n.Configure(outside); err != nil {
		t.Fatal(err)
	}
	other, err := n.Conflist(cluster.NetworkOptions{
		Stanza:  outside.Stanza,
		Primary: map[string]any{"bridge": "cni1", "ipam": map[string]any{"type": "host-local", "subnet": "10.244.77.0/24"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.WriteConflist("20-other.conflist", strings.Replace(other, `"name": "pods"`, `"name": "other"`, 1)); err != nil {
		t.Fatal(err)
	}
	helper := startHelper(t, n)
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	var addrs []string
	for i, network := range []string{"pods", "other"} {
		p, err := n.AddPod(t.Context(), network, fmt.Sprintf("pod%d", i), cluster.PodOptions{})
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, p.IPv4().String())
	}
	check := func(name string) {
		elements := run(t, n, "nft", "list", "set", "inet", "wgcni", "pods4")
		for _, a := range addrs {
			if !strings.Contains(elements, a) {
				t.Errorf("found %s: %s is not in the set:\n%s", name, a, elements)
			}
			if strings.Contains(helper.Log.String(), "-"+a) {
				t.Errorf("found %s: the helper took %s out for a while:\n%s", name, a, helper.Log)
			}
		}
	}
	path := n.Path("/run/wgcni/attachments.db")
	for name, find := range map[string]func() error{
		"by the helper": func() error { return nil }, // the write itself wakes it
		"by the plugin": func() error { // while the helper is stopped, see below
			p, err := n.AddPod(t.Context(), "pods", "finder", cluster.PodOptions{})
			if err != nil {
				return err
			}
			return p.Delete(t.Context())
		},
	} {
		if name == "by the plugin" {
			stopHelper(t, helper)
		}
		if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := find(); err != nil {
			t.Fatal(err)
		}
		if name == "by the plugin" {
			check(name)
			helper = startHelper(t, n)
		}
		err := cluster.Poll(t.Context(), "the store to be filled again, found "+name, func() error {
			s, err := n.Status(t.Context())
			if err == nil && s.Pods != 2 {
				err = fmt.Errorf("%d pods", s.Pods)
			}
			return err
		})
		if err != nil {
			t.Fatal(err, helper.Log)
		}
		check(name)
	}
}
