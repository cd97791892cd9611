package config

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// list is a conflist of a primary plugin and more, with wgcni's stanza.
func list(name string, plugins ...string) string {
	return `{"cniVersion": "1.0.0", "name": "` + name + `", "plugins": [` + strings.Join(plugins, ", ") + `]}`
}

const (
	ours   = `{"type": "wgcni", "nodeName": "node-a", ` + minimal + `}`
	bridge = `{"type": "bridge", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.7.0/24"}]]}}`
	tuning = `{"type": "tuning"}`
)

func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestLoadFromFolder(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string // the network's name; empty: ErrNotChained
	}{
		{"one", map[string]string{"10-a.conflist": list("a", bridge, ours)}, "a"},
		{"the first by name", map[string]string{"20-b.conflist": list("b", bridge, ours), "10-a.conflist": list("a", bridge, ours)}, "a"},
		{"the first that chains wgcni", map[string]string{"05-loopback.conflist": list("lo", `{"type": "loopback"}`), "10-a.conflist": list("a", bridge, ours)}, "a"},
		{"in any place of the chain", map[string]string{"10-a.conflist": list("a", bridge, tuning, ours, tuning)}, "a"},
		{"after one that is broken", map[string]string{"05-x.conflist": `{"plugins": [`, "10-a.conflist": list("a", bridge, ours)}, "a"},
		{"after one without plugins", map[string]string{"05-x.conflist": `{"plugins": []}`, "06-y.conflist": `{}`, "10-a.conflist": list("a", bridge, ours)}, "a"},
		{"no other ending", map[string]string{"10-a.conf": list("a", bridge, ours), "11-b.json": list("b", bridge, ours), "12-c.conflist.bak": list("c", bridge, ours)}, ""},
		{"not chained", map[string]string{"10-a.conflist": list("a", bridge, tuning)}, ""},
		{"empty", nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := folder(t, tt.files)
			if err := os.Mkdir(filepath.Join(dir, "00-folder.conflist"), 0o700); err != nil {
				t.Fatal(err)
			}
			c, err := Load("", dir)
			if tt.want == "" {
				if !errors.Is(err, ErrNotChained) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "--config") {
					t.Errorf("%v, %v", c, err)
				}
				return
			}
			if err != nil || c.Name != tt.want || c.CNIVersion != "1.0.0" {
				t.Errorf("%v, %v", c, err)
			}
			if broken := tt.name == "after one that is broken"; broken != (c.PassedOver == filepath.Join(dir, "05-x.conflist")) || !broken && c.PassedOver != "" {
				t.Errorf("passed over %q", c.PassedOver)
			}
		})
	}
	missing := filepath.Join(t.TempDir(), "net.d")
	if _, err := Load("", missing); !errors.Is(err, ErrNotChained) || !strings.Contains(err.Error(), missing) || !strings.Contains(err.Error(), "--config") {
		t.Errorf("a folder that is missing: %v", err)
	}
}

func TestLoadFile(t *testing.T) {
	dir := folder(t, map[string]string{
		"bare.json": ours, "list.conflist": list("pods", bridge, ours), "plain.conflist": list("pods", bridge),
		"wrong.conflist": list("pods", bridge, `{"type": "wgcni", "mtu": 5, `+minimal+`}`), "broken": `{`,
	})
	if c, err := Load(filepath.Join(dir, "bare.json"), ""); err != nil || c.Name != "" || c.NodeName != "node-a" || c.PodCIDRs != nil || !c.Bare {
		t.Errorf("a bare stanza: %v, %v", c, err)
	}
	if c, err := Load(filepath.Join(dir, "list.conflist"), "/nonexistent"); err != nil || c.Name != "pods" || len(c.PodCIDRs) != 1 {
		t.Errorf("a conflist: %v, %v", c, err)
	}
	if _, err := Load(filepath.Join(dir, "plain.conflist"), ""); !errors.Is(err, ErrNotChained) || !strings.Contains(err.Error(), "wgcni") {
		t.Errorf("one that does not chain wgcni: %v", err)
	}
	var invalid *Error
	if _, err := Load(filepath.Join(dir, "wrong.conflist"), ""); !errors.As(err, &invalid) || invalid.Key != "mtu" || !strings.Contains(err.Error(), "wrong.conflist") {
		t.Errorf("a wrong one: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "broken"), ""); err == nil || !strings.Contains(err.Error(), "not valid JSON") || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a broken one: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "none"), ""); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}

func TestPodCIDRs(t *testing.T) {
	hostLocal := func(ipam string) string { return `{"type": "ptp", "ipam": {"type": "host-local", ` + ipam + `}}` }
	for _, tt := range []struct {
		name    string
		plugins []string
		want    []string
		err     string
	}{
		{"ranges", []string{hostLocal(`"ranges": [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:244:1::/64"}]]`), ours}, []string{"10.244.1.0/24", "fd00:244:1::/64"}, ""},
		{"several in a set", []string{hostLocal(`"ranges": [[{"subnet": "10.244.1.0/25", "rangeStart": "10.244.1.5"}, {"subnet": "10.244.1.128/25"}]]`), ours}, []string{"10.244.1.0/25", "10.244.1.128/25"}, ""},
		{"subnet", []string{hostLocal(`"subnet": "10.244.1.0/24"`), ours}, []string{"10.244.1.0/24"}, ""},
		{"both", []string{hostLocal(`"subnet": "10.244.1.0/24", "ranges": [[{"subnet": "10.244.2.0/24"}]]`), ours}, []string{"10.244.1.0/24", "10.244.2.0/24"}, ""},
		{"an address in it", []string{hostLocal(`"subnet": "10.244.1.7/24"`), ours}, []string{"10.244.1.0/24"}, ""},
		{"a part of a shared subnet", []string{hostLocal(`"ranges": [[{"subnet": "192.0.2.0/24", "rangeStart": "192.0.2.64", "rangeEnd": "192.0.2.95"}, {"subnet": "192.0.2.0/24", "rangeStart": "192.0.2.200"}], [{"subnet": "fd00:244:1::/64"}]]`), ours}, []string{"fd00:244:1::/64"}, ""},
		{"half of a subnet", []string{hostLocal(`"subnet": "10.244.1.0/24", "rangeStart": "10.244.1.128"`), ours}, nil, ""},
		{"most of a subnet", []string{hostLocal(`"subnet": "10.244.1.0/24", "rangeStart": "10.244.1.10", "rangeEnd": "10.244.1.250"`), ours}, []string{"10.244.1.0/24"}, ""},
		{"most of a subnet, in two parts", []string{hostLocal(`"ranges": [[{"subnet": "fd00::/120", "rangeEnd": "fd00::40"}, {"subnet": "fd00::/120", "rangeStart": "fd00::80", "rangeEnd": "fd00::c8"}]]`), ours}, []string{"fd00::/120"}, ""},
		{"a range outside of its subnet", []string{hostLocal(`"subnet": "10.244.1.0/24", "rangeStart": "10.245.1.200", "rangeEnd": "x"`), ours}, []string{"10.244.1.0/24"}, ""},
		{"no range", []string{hostLocal(`"ranges": [[]]`), ours}, nil, ""},
		{"another IPAM", []string{`{"type": "bridge", "ipam": {"type": "static", "ranges": [[{"subnet": "10.244.1.0/24"}]]}}`, ours}, nil, ""},
		{"no IPAM", []string{`{"type": "bridge"}`, ours}, nil, ""},
		{"an IPAM of another form", []string{`{"type": "cloud", "ipam": "on"}`, ours}, nil, ""},
		{"not the primary's", []string{`{"type": "cloud"}`, bridge, ours}, nil, ""},
		{"no subnet", []string{hostLocal(`"subnet": "pods"`), ours}, nil, "pods"},
		{"configured", []string{bridge, `{"type": "wgcni", "nodeName": "node-a", "podCIDRs": ["10.244.9.0/24"], ` + minimal + `}`}, []string{"10.244.9.0/24"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := folder(t, map[string]string{"10-pods.conflist": list("pods", tt.plugins...)})
			c, err := Load("", dir)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("%v, want one that says %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			checkPrefixes(t, tt.want, c.PodCIDRs)
			if tt.name == "configured" {
				return
			}
			// The plugin has its own stanza only, and finds the same by the network's name.
			found, err := FindPodCIDRs("pods", dir)
			if err != nil {
				t.Fatal(err)
			}
			checkPrefixes(t, tt.want, found)
		})
	}
}

func checkPrefixes(t *testing.T, want []string, got []netip.Prefix) {
	t.Helper()
	var text []string
	for _, p := range got {
		text = append(text, p.String())
	}
	if diff := cmp.Diff(want, text, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestFindPodCIDRs(t *testing.T) {
	dir := folder(t, map[string]string{
		"05-broken.conflist": `{`, "06-other.conflist": list("other", strings.ReplaceAll(bridge, "244.7", "244.8"), ours),
		"07-plain.conflist": list("pods", strings.ReplaceAll(bridge, "244.7", "244.9")), "10-pods.conflist": list("pods", bridge, ours),
	})
	got, err := FindPodCIDRs("pods", dir)
	if err != nil {
		t.Fatal(err)
	}
	checkPrefixes(t, []string{"10.244.7.0/24"}, got)
	for network, dir := range map[string]string{"none": dir, "pods": filepath.Join(dir, "missing")} {
		if got, err := FindPodCIDRs(network, dir); err != nil || got != nil {
			t.Errorf("%s in %s: %v, %v", network, dir, got, err)
		}
	}
}

func TestFlannelSubnets(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string
		err        bool
	}{
		{"as flanneld writes it", "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.5.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n", []string{"10.244.5.0/24"}, false},
		{"dual stack", "FLANNEL_SUBNET=10.244.5.1/24\nFLANNEL_IPV6_NETWORK=fd00:244::/56\nFLANNEL_IPV6_SUBNET=fd00:244:5::1/64\n", []string{"10.244.5.0/24", "fd00:244:5::/64"}, false},
		{"several", "FLANNEL_SUBNET=10.244.5.1/24,10.244.6.1/24", []string{"10.244.5.0/24", "10.244.6.0/24"}, false},
		{"empty", "", nil, false},
		{"of no subnet", "FLANNEL_SUBNET=here\n", nil, true},
	} {
		path := filepath.Join(folder(t, map[string]string{"subnet.env": tt.text}), "subnet.env")
		got, err := flannelSubnets(path)
		if (err != nil) != tt.err {
			t.Errorf("%s: %v", tt.name, err)
		}
		if err != nil && (!strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "FLANNEL_SUBNET")) {
			t.Errorf("%s: the error does not name file and key: %v", tt.name, err)
		}
		checkPrefixes(t, tt.want, got)
	}
	// Before flanneld's first start there is none: the next look finds it.
	if got, err := flannelSubnets(filepath.Join(t.TempDir(), "subnet.env")); !errors.Is(err, errNoSubnetFile) || got != nil {
		t.Errorf("%v, %v", got, err)
	}
}

func TestFlannelIsThePrimary(t *testing.T) {
	env := filepath.Join(folder(t, map[string]string{"other.env": "FLANNEL_SUBNET=10.244.5.1/24\n"}), "other.env")
	dir := folder(t, map[string]string{"10-pods.conflist": list("pods", `{"type": "flannel", "subnetFile": "`+env+`", "delegate": {"isDefaultGateway": true}}`, ours)})
	c, err := Load("", dir)
	if err != nil {
		t.Fatal(err)
	}
	checkPrefixes(t, []string{"10.244.5.0/24"}, c.PodCIDRs)
}

// Every example is one that wgcnid takes as it is.
func TestExamples(t *testing.T) {
	examples, err := filepath.Glob("../../conflist/*.conflist")
	if err != nil || len(examples) < 3 {
		t.Fatalf("%d examples, %v", len(examples), err)
	}
	for _, path := range examples {
		if c, err := Load(path, t.TempDir()); err != nil || len(c.PodCIDRs) != 2 {
			t.Errorf("%s: %v, %v", path, c.PodCIDRs, err)
		}
	}
}
