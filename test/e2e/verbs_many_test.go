package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/wgcni/wgcni/test/cluster"
)

// TestManyAtOnce: 150 ADDs and 350 DELs through libcni, up to 16 at a time, with
// the helper at work beside them. Then the store, the kernel and IPAM agree. A
// runtime deletes the network namespace after a DEL; where a machine is too slow
// for a DEL's one second, it says so, and the helper forgets the pod then.
func TestManyAtOnce(t *testing.T) {
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	helperUp(t, n)
	half, parallel := cluster.Fewer(50), 16
	var names []string
	for i := range 3 * half {
		names = append(names, fmt.Sprintf("p%03d", i))
	}
	netns(t, n, names...)
	calls := func(verb string, names []string) (out []netCall) {
		for _, name := range names {
			out = append(out, netCall{Verb: verb, Container: name})
		}
		return out
	}
	do := func(calls []netCall) (replies []netReply) {
		t.Helper()
		replies = runtime(t, n, cluster.NetworkOptions{}, parallel, calls...)
		for i, r := range replies {
			if r.Error != "" {
				t.Errorf("%s %s: %s", calls[i].Verb, calls[i].Container, r.Error)
			}
		}
		return replies
	}
	late := map[string]bool{}
	left := func(replies []netReply, calls []netCall) {
		t.Helper()
		for i, r := range replies {
			if container := calls[i].Container; strings.Contains(r.Warning, "left to wgcnid") && !late[container] {
				t.Logf("%s %s: %s", calls[i].Verb, container, r.Warning)
				late[container] = true
				removeNetns(t, n, container)
			}
		}
		err := cluster.Poll(t.Context(), "the helper to forget what was left to it", func() error {
			at, err := stored(t.Context(), n)
			for container := range late {
				if _, there := at[container]; there {
					err = errors.Join(err, fmt.Errorf("%s is there", container))
				}
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	check := func(live []string) {
		t.Helper()
		if got := containers(t, n); !slices.Equal(got, live) {
			t.Errorf("%d attachments, want %d: %v", len(got), len(live), got)
		}
		if got := leases(t, n); len(got) != 2*len(live) {
			t.Errorf("%d leases, want %d: %v", len(got), 2*len(live), got)
		}
		agrees(t, n)
	}

	addresses := map[string]bool{}
	for _, r := range do(calls("ADD", names[:2*half])) {
		var result cluster.Result
		if err := json.Unmarshal(r.Result, &result); err != nil {
			t.Fatal(err)
		}
		for _, ip := range result.IPs {
			addresses[ip.Address.String()] = true
		}
	}
	if len(addresses) != 4*half {
		t.Errorf("%d addresses for %d pods", len(addresses), 2*half)
	}
	check(names[:2*half])

	// Half of them go while others come, one by one in turn.
	var mixed []netCall
	dels, adds := calls("DEL", names[:half]), calls("ADD", names[2*half:])
	for i := range half {
		mixed = append(mixed, dels[i], adds[i])
	}
	left(do(mixed), mixed)
	check(names[half:])

	last := calls("DEL", append(slices.Clone(names), names...)) // each twice, as containerd does
	left(do(last), last)
	check(nil)
}

// TestAllCNIVersions: GC and STATUS come with 1.1.0 only, DEL has a prevResult from
// 0.4.0 on, and an older sibling may not know the newest. The whole chain in each
// version of the specification that was released, and the result in that version's form.
func TestAllCNIVersions(t *testing.T) {
	versions := []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
	if got := version.All.SupportedVersions(); !slices.Equal(got, versions) {
		t.Fatalf("the CNI library knows %v", got)
	}
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	helperUp(t, n)

	r := plugin(t, n, call{verb: "VERSION"})
	var said struct {
		SupportedVersions []string `json:"supportedVersions"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &said); err != nil || r.code != 0 || !slices.Equal(said.SupportedVersions, versions) {
		t.Errorf("VERSION: %+v, %v", r, err)
	}
	if r := plugin(t, n, call{verb: "ADD", container: "x", netns: "/run/netns/x", ifname: "eth0", stdin: stanza(t, n, map[string]any{"cniVersion": "9.9.9"})}); r.err.Code != types.ErrIncompatibleCNIVersion {
		t.Errorf("a version to come: %+v", r.err)
	}

	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			o := cluster.NetworkOptions{CNIVersion: v}
			name := "v" + strings.ReplaceAll(v, ".", "-")
			netns(t, n, name)
			defer removeNetns(t, n, name)
			r := runtime(t, n, o, 1, netCall{Verb: "ADD", Container: name})[0]
			if r.Error != "" {
				t.Fatal(r.Error)
			}
			var result struct {
				CNIVersion string           `json:"cniVersion"`
				IP4        *json.RawMessage `json:"ip4"`
				IP6        *json.RawMessage `json:"ip6"`
				IPs        []struct {
					Version string `json:"version"`
				} `json:"ips"`
				Interfaces []struct {
					Sandbox string `json:"sandbox"`
					MTU     int    `json:"mtu"`
				} `json:"interfaces"`
			}
			if err := json.Unmarshal(r.Result, &result); err != nil || result.CNIVersion != v {
				t.Fatalf("%v: %s", err, r.Result)
			}
			ips, named, mtu := 2, "", 0
			switch {
			case v < "0.3.0":
				ips = 0
				if result.IP4 == nil || result.IP6 == nil {
					t.Errorf("no ip4 or ip6: %s", r.Result)
				}
			case v < "1.0.0":
				named = "4"
			default: // the field came with 1.1.0; the CNI library prints it in 1.0.0 as well
				mtu = 1420
			}
			if len(result.IPs) != ips || ips > 0 && result.IPs[0].Version != named {
				t.Errorf("addresses: %s", r.Result)
			}
			for _, i := range result.Interfaces {
				if i.Sandbox != "" && i.MTU != mtu {
					t.Errorf("MTU %d, want %d", i.MTU, mtu)
				}
			}
			if a := attachments(t, n)[name]; len(a.Addresses) != 2 {
				t.Errorf("recorded: %+v", a)
			}
			if v >= "0.4.0" {
				if r := runtime(t, n, o, 1, netCall{Verb: "CHECK", Container: name})[0]; r.Error != "" {
					t.Errorf("CHECK: %s", r.Error)
				}
			}
			again := netCall{Verb: "DEL", Container: name}
			for _, r := range runtime(t, n, o, 1, again, again) {
				if r.Error != "" {
					t.Errorf("DEL: %s", r.Error)
				}
			}
			if got := containers(t, n); len(got) != 0 {
				t.Errorf("left: %v", got)
			}
			if got := leases(t, n); len(got) != 0 {
				t.Errorf("leaked: %v", got)
			}
		})
	}
	agrees(t, n)
}

// TestMalformedStanza: what the plugin says of a wrong configuration. All the
// cases are in pkg/config's tests; these go through the real binary.
func TestMalformedStanza(t *testing.T) {
	c := configured(t, 1, cluster.NetworkOptions{})
	n := c.Nodes[0]
	netns(t, n, "pod")
	for name, tt := range map[string]struct {
		keys map[string]any
		text string // instead of keys
		code uint
		says []string
	}{
		"missing":           {keys: map[string]any{"clusterCIDRs": nil}, code: types.ErrInvalidNetworkConfig, says: []string{"clusterCIDRs", "missing"}},
		"wrong type":        {keys: map[string]any{"mtu": "1420"}, code: types.ErrInvalidNetworkConfig, says: []string{"mtu", "string", "whole number"}},
		"wrong value":       {keys: map[string]any{"encryption": "always"}, code: types.ErrInvalidNetworkConfig, says: []string{"encryption", "always", "required", "preferred"}},
		"unknown key":       {keys: map[string]any{"clusterCidr": []string{"10.244.0.0/16"}}, code: types.ErrInvalidNetworkConfig, says: []string{"clusterCidr", `"clusterCIDRs"`}},
		"unknown, nested":   {keys: map[string]any{"registry": map[string]any{"type": "file", "file": "/x"}}, code: types.ErrInvalidNetworkConfig, says: []string{"registry.file", `"registry.`}},
		"mark of another":   {keys: map[string]any{"fwmark": "0x4000"}, code: types.ErrInvalidNetworkConfig, says: []string{"fwmark", "kube-proxy"}},
		"no name":           {keys: map[string]any{"name": nil}, code: types.ErrInvalidNetworkConfig, says: []string{"name"}},
		"broken JSON":       {text: `{"name": "pods", "cniVersion": "1.0.0",`, code: types.ErrDecodingFailure},
		"no JSON":           {text: "hello", code: types.ErrDecodingFailure},
		"nothing":           {text: " ", code: types.ErrDecodingFailure},
		"prevResult broken": {keys: map[string]any{"prevResult": []any{}}, code: types.ErrDecodingFailure, says: []string{"prevResult"}},
	} {
		t.Run(name, func(t *testing.T) {
			in := tt.text
			if in == "" {
				keys := map[string]any{"prevResult": prevResult("/run/netns/pod", "eth0", "10.244.1.5/24")}
				for k, v := range tt.keys {
					keys[k] = v
				}
				in = stanza(t, n, keys)
			}
			r := plugin(t, n, call{verb: "ADD", container: "pod", netns: "/run/netns/pod", ifname: "eth0", stdin: in})
			if r.code != 1 || r.err.Code != tt.code || r.err.Msg == "" {
				t.Errorf("exit status %d, %+v, want code %d", r.code, r.err, tt.code)
			}
			for _, s := range tt.says {
				if !strings.Contains(r.err.Msg, s) {
					t.Errorf("%q does not say %q", r.err.Msg, s)
				}
			}
		})
	}
	if got := containers(t, n); len(got) != 0 {
		t.Errorf("recorded: %v", got)
	}
}
