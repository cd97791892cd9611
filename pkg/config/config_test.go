package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/wgcni/wgcni/pkg/mesh"
)

var compareAddrs = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

const (
	minimal  = `"clusterCIDRs": ["10.244.0.0/16"], "registry": {"type": "file", "path": "/srv/mesh.json"}`
	registry = `"registry": {"type": "file", "path": "/srv/mesh.json"}`
	cidrs    = `"clusterCIDRs": ["10.244.0.0/16"]`
)

// object puts keys before those that are required.
func object(keys string) string { return `{"nodeName": "node-a", ` + keys + `, ` + minimal + `}` }

// etcd is a stanza with these keys in a registry of type etcd.
func etcd(keys string) string {
	return `{"nodeName": "node-a", ` + cidrs + `, "registry": {"type": "etcd", ` + keys + `}}`
}

// endpoints are an etcd's with more keys behind them.
func endpoints(keys string) string { return etcd(`"endpoints": ["192.0.2.1:2379"], ` + keys) }

// A wrong stanza, the key that the error must name, and what else it must say.
type wrong struct{ stanza, key, says string }

// wrongs has every key of ours wrong in type and wrong in value.
var wrongs = []wrong{
	{`{` + registry + `}`, "clusterCIDRs", "missing"},
	{`{"clusterCIDRs": [], ` + registry + `}`, "clusterCIDRs", "missing"},
	{`{"clusterCIDRs": null, ` + registry + `}`, "clusterCIDRs", "missing"},
	{`{"clusterCIDRs": "10.244.0.0/16", ` + registry + `}`, "clusterCIDRs", "list"},
	{`{"clusterCIDRs": [1], ` + registry + `}`, "clusterCIDRs", "string"},
	{`{"clusterCIDRs": ["10.244.0.0"], ` + registry + `}`, "clusterCIDRs", "10.244.0.0"},
	{`{"clusterCIDRs": ["10.244.0.0/16", "pods"], ` + registry + `}`, "clusterCIDRs", "pods"},
	{`{"clusterCIDRs": ["10.244.1.0/16"], ` + registry + `}`, "clusterCIDRs", "write 10.244.0.0/16"},
	{`{"clusterCIDRs": ["0.0.0.0/0"], ` + registry + `}`, "clusterCIDRs", "every address"},
	{`{"clusterCIDRs": ["::/0"], ` + registry + `}`, "clusterCIDRs", "every address"},
	{`{"clusterCIDRs": ["::ffff:10.244.0.0/112"], ` + registry + `}`, "clusterCIDRs", "IPv4"},
	{object(`"podCIDRs": "10.244.1.0/24"`), "podCIDRs", "list"},
	{object(`"podCIDRs": ["10.244.1.5/24"]`), "podCIDRs", "10.244.1.0/24"},
	{object(`"podCIDRs": ["10.245.1.0/24"]`), "podCIDRs", "not inside clusterCIDRs"},
	{object(`"podCIDRs": ["10.0.0.0/8"]`), "podCIDRs", "not inside clusterCIDRs"},
	{object(`"podCIDRs": ["172.17.0.0/16"], "externalCIDRs": ["172.17.0.0/24"]`), "podCIDRs", "or externalCIDRs"},
	{object(`"externalCIDRs": "192.0.2.0/24"`), "externalCIDRs", "list"},
	{object(`"externalCIDRs": [4]`), "externalCIDRs", "string"},
	{object(`"externalCIDRs": ["192.0.2.200"]`), "externalCIDRs", "is not a prefix"},
	{object(`"externalCIDRs": ["192.0.2.200/24"]`), "externalCIDRs", "write 192.0.2.0/24"},
	{object(`"externalCIDRs": ["0.0.0.0/0"]`), "externalCIDRs", "every address"},
	{object(`"externalCIDRs": ["192.0.2.0/24", "::/0"], "peerCIDRs": ["0.0.0.0/0"]`), "externalCIDRs", "::/0 is every address"},
	{object(`"externalCIDRs": ["192.0.2.0/24", "10.244.7.0/24"]`), "externalCIDRs", "10.244.7.0/24 overlaps 10.244.0.0/16 of clusterCIDRs"},
	{object(`"externalCIDRs": ["10.0.0.0/8"]`), "externalCIDRs", "10.0.0.0/8 overlaps 10.244.0.0/16 of clusterCIDRs"},
	{object(`"peerCIDRs": {"a": "10.9.0.0/24"}`), "peerCIDRs", "list"},
	{object(`"peerCIDRs": ["laptops"]`), "peerCIDRs", "laptops"},
	{object(`"peerCIDRs": ["0.0.0.0/0"]`), "peerCIDRs", "every address"},
	{object(`"peerCIDRs": ["10.244.7.0/24"]`), "peerCIDRs", "10.244.7.0/24 overlaps 10.244.0.0/16 of clusterCIDRs"},
	{object(`"peerCIDRs": ["10.9.0.0/24"], "externalCIDRs": ["10.9.0.128/25"]`), "peerCIDRs", "10.9.0.0/24 overlaps 10.9.0.128/25 of externalCIDRs"},
	{object(`"subnets": "172.17.0.0/16"`), "subnets", "list"},
	{object(`"subnets": ["172.17.0.1/16"]`), "subnets", "write 172.17.0.0/16"},
	{object(`"subnets": ["172.17.0.0/16"]`), "subnets", "172.17.0.0/16 is not inside"},
	{object(`"subnets": ["172.17.0.0/16"], "externalCIDRs": ["172.17.0.0/17"]`), "subnets", "172.17.0.0/16 is not inside"},
	{object(`"subnets": ["10.9.0.0/24"], "peerCIDRs": ["10.9.0.0/24"]`), "subnets", "10.9.0.0/24 is not inside"},
	{object(`"location": 1`), "location", "string"},
	{object(`"location": "Zürich"`), "location", "lower case"},
	{object(`"location": "-a"`), "location", `"-a" is no name`},
	{object(`"location": "` + strings.Repeat("a", 64) + `"`), "location", "63"},
	{object(`"role": ["gateway"]`), "role", "string"},
	{object(`"role": "router"`), "role", `"router" is no role`},
	{object(`"segments": "prod"`), "segments", "list"},
	{object(`"segments": [1]`), "segments", "string"},
	{object(`"segments": ["prod", ""]`), "segments", `"" is no name`},
	{object(`"segments": ["a.b"]`), "segments", `"a.b" is no name`},
	{object(`"encryption": true`), "encryption", "string"},
	{object(`"encryption": "maybe"`), "encryption", `"required"`},
	{object(`"encryptNodes": "yes"`), "encryptNodes", "true or false"},
	{object(`"encryptNodes": true, "directPorts": 22`), "directPorts", "list"},
	{object(`"encryptNodes": true, "directPorts": ["22"]`), "directPorts", "whole number"},
	{object(`"encryptNodes": true, "directPorts": [0]`), "directPorts", "1 to 65535"},
	{object(`"encryptNodes": true, "directPorts": [22, 65536]`), "directPorts", "65536"},
	{object(`"directPorts": [22]`), "directPorts", "without encryptNodes"},
	{object(`"externalCIDRs": ["192.0.2.0/24"], "directPorts": [0]`), "directPorts", "1 to 65535"},
	{`{"nodeName": 5, ` + minimal + `}`, "nodeName", "string"},
	{`{"nodeName": "Node_A", ` + minimal + `}`, "nodeName", "Node_A"},
	{`{"nodeName": "-a", ` + minimal + `}`, "nodeName", "DNS"},
	{`{"nodeName": "` + strings.Repeat("a", 254) + `", ` + minimal + `}`, "nodeName", "DNS"},
	{object(`"endpoint": 51820`), "endpoint", "string"},
	{object(`"endpoint": "192.0.2.1"`), "endpoint", "host:port"},
	{object(`"endpoint": "location"`), "endpoint", `set "location" too`},
	{object(`"endpoint": ":51820"`), "endpoint", "host:port"},
	{object(`"endpoint": "2001:db8::1:51820"`), "endpoint", "host:port"},
	{object(`"endpoint": "192.0.2.1:0"`), "endpoint", "1 to 65535"},
	{object(`"endpoint": "192.0.2.1:65536"`), "endpoint", "1 to 65535"},
	{object(`"endpoint": "192.0.2.1:http"`), "endpoint", "1 to 65535"},
	{object(`"endpoint": "0.0.0.0:51820"`), "endpoint", "0.0.0.0"},
	{object(`"endpoint": "[::1]:51820"`), "endpoint", "::1"},
	{object(`"endpoint": "224.0.0.1:51820"`), "endpoint", "224.0.0.1"},
	{object(`"interface": 0`), "interface", "string"},
	{object(`"interface": "a-name-of-16-char"`), "interface", "15"},
	{object(`"interface": "a/b"`), "interface", "a/b"},
	{object(`"interface": ".."`), "interface", ".."},
	{object(`"interface": "wg 0"`), "interface", "wg 0"},
	{object(`"listenPort": "51820"`), "listenPort", "whole number"},
	{object(`"listenPort": 51820.5`), "listenPort", "whole number"},
	{object(`"listenPort": 0`), "listenPort", "1 to 65535"},
	{object(`"listenPort": 65536`), "listenPort", "1 to 65535"},
	{object(`"interface": "a-name-of-15chx"`), "interface", "its second interface"},
	{object(`"rotationPort": "51821"`), "rotationPort", "whole number"},
	{object(`"rotationPort": 0`), "rotationPort", "1 to 65535"},
	{object(`"rotationPort": 65536`), "rotationPort", "1 to 65535"},
	{object(`"rotationPort": 51820`), "rotationPort", "51820 is listenPort as well"},
	{object(`"listenPort": 7000, "rotationPort": 7000`), "rotationPort", "7000 is listenPort as well"},
	{object(`"keyRotation": 720`), "keyRotation", "string"},
	{object(`"keyRotation": ""`), "keyRotation", `"" is no time`},
	{object(`"keyRotation": "30d"`), "keyRotation", `"720h" for 30 days`},
	{object(`"keyRotation": "59m"`), "keyRotation", "59m0s is too short"},
	{object(`"keyRotation": "-2h"`), "keyRotation", "too short"},
	{object(`"mtu": "1420"`), "mtu", "whole number"},
	{object(`"mtu": 0`), "mtu", "576"},
	{object(`"mtu": 575`), "mtu", "576"},
	{`{"mtu": 1279, "clusterCIDRs": ["10.244.0.0/16", "fd00:244::/32"], ` + registry + `}`, "mtu", "1280"},
	{object(`"mtu": 65536`), "mtu", "65535"},
	{object(`"keepalive": "25s"`), "keepalive", "whole number"},
	{object(`"keepalive": -1`), "keepalive", "0 to 65535"},
	{object(`"keepalive": 65536`), "keepalive", "0 to 65535"},
	{object(`"fwmark": []`), "fwmark", "0x4"},
	{object(`"fwmark": true`), "fwmark", "0x4"},
	{object(`"fwmark": "four"`), "fwmark", "four"},
	{object(`"fwmark": -4`), "fwmark", "-4"},
	{object(`"fwmark": 4294967296`), "fwmark", "32 bit"},
	{object(`"fwmark": 0`), "fwmark", "0 bits"},
	{object(`"fwmark": "0x6"`), "fwmark", "2 bits"},
	{object(`"table": "main"`), "table", "whole number"},
	{object(`"table": 0`), "table", "out of range"},
	{object(`"table": 2147483648`), "table", "out of range"},
	{object(`"table": 253`), "table", "the kernel's own"},
	{object(`"table": 254`), "table", "the kernel's own"},
	{object(`"table": 255`), "table", "the kernel's own"},
	{object(`"rulePriority": "high"`), "rulePriority", "whole number"},
	{object(`"rulePriority": 0`), "rulePriority", "out of range"},
	{object(`"rulePriority": 32766`), "rulePriority", "32765"},
	{`{` + cidrs + `}`, "registry", "missing"},
	{`{` + cidrs + `, "registry": null}`, "registry", "missing"},
	{`{` + cidrs + `, "registry": "/srv/mesh.json"}`, "registry", "object"},
	{`{` + cidrs + `, "registry": []}`, "registry", "object"},
	{`{` + cidrs + `, "registry": {"path": "/srv/mesh.json"}}`, "registry.type", "missing"},
	{`{` + cidrs + `, "registry": {"type": "consul", "path": "/srv/mesh.json"}}`, "registry.type", "consul"},
	{`{` + cidrs + `, "registry": {"type": 1}}`, "registry.type", "string"},
	{`{` + cidrs + `, "registry": {"type": "file"}}`, "registry.path", "missing"},
	{`{` + cidrs + `, "registry": {"type": "file", "path": "mesh.json"}}`, "registry.path", "relative"},
	{`{` + cidrs + `, "registry": {"type": "file", "path": 1}}`, "registry.path", "string"},
	{`{` + cidrs + `, "registry": {"type": "file", "paht": "/srv"}}`, "registry.paht", `"registry.path"`},
	{etcd(`"endpoints": null`), "registry.endpoints", "missing"},
	{etcd(`"endpoints": []`), "registry.endpoints", "missing"},
	{etcd(`"endpoints": "192.0.2.1:2379"`), "registry.endpoints", "list"},
	{etcd(`"endpoints": [2379]`), "registry.endpoints", "string"},
	{etcd(`"endpoints": [""]`), "registry.endpoints", "host:port"},
	{etcd(`"endpoints": ["192.0.2.1:2379", ":2379"]`), "registry.endpoints", `":2379" has no address`},
	{etcd(`"endpoints": ["192.0.2.1"]`), "registry.endpoints", "port"},
	{etcd(`"endpoints": ["https://etcd.example.org"]`), "registry.endpoints", "port"},
	{etcd(`"endpoints": ["192.0.2.1:0"]`), "registry.endpoints", "1 to 65535"},
	{etcd(`"endpoints": ["192.0.2.1:65536"]`), "registry.endpoints", "1 to 65535"},
	{etcd(`"endpoints": ["192.0.2.1:etcd"]`), "registry.endpoints", "host:port"},
	{etcd(`"endpoints": ["2001:db8::1:2379"]`), "registry.endpoints", "[2001:db8::1]:2379"},
	{etcd(`"endpoints": ["etcd-1,etcd-2:2379"]`), "registry.endpoints", "DNS name"},
	{etcd(`"endpoints": ["http://192.0.2.1:2379,http://192.0.2.2:2379"]`), "registry.endpoints", "host:port"},
	{etcd(`"endpoints": ["http://192.0.2.1:2379/v3"]`), "registry.endpoints", "URL"},
	{etcd(`"endpoints": ["http://192.0.2.1:2379?x"]`), "registry.endpoints", "URL"},
	{etcd(`"endpoints": ["unix:///run/etcd.sock"]`), "registry.endpoints", "URL"},
	{etcd(`"endpoints": ["ftp://192.0.2.1:2379"]`), "registry.endpoints", "neither http nor https"},
	{etcd(`"endpoints": ["https://192.0.2.1:2379", "http://192.0.2.2:2379"]`), "registry.endpoints", `"http://192.0.2.2:2379"`},
	{etcd(`"endpoints": ["http://192.0.2.1:2379"], "caFile": "/ca"`), "registry.endpoints", "in the clear"},
	{etcd(`"endpoints": ["http://192.0.2.1:2379"], "certFile": "/c", "keyFile": "/k"`), "registry.endpoints", "in the clear"},
	{endpoints(`"prefix": 5`), "registry.prefix", "string"},
	{endpoints(`"prefix": "wgcni"`), "registry.prefix", "/wgcni/"},
	{endpoints(`"prefix": "/"`), "registry.prefix", "folder"},
	{endpoints(`"prefix": "//"`), "registry.prefix", "empty"},
	{endpoints(`"prefix": "/a//b"`), "registry.prefix", "empty"},
	{endpoints(`"prefix": "/a//"`), "registry.prefix", "empty"},
	{endpoints(`"prefix": "/a/../b"`), "registry.prefix", ".."},
	{endpoints(`"prefix": "/a/.."`), "registry.prefix", ".."},
	{endpoints(`"prefix": "/./a"`), "registry.prefix", "/./a"},
	{endpoints(`"prefix": "/a /"`), "registry.prefix", "white space"},
	{endpoints(`"prefix": "/a\u0000"`), "registry.prefix", "white space"},
	{endpoints(`"caFile": true`), "registry.caFile", "string"},
	{endpoints(`"caFile": "ca.pem"`), "registry.caFile", "relative"},
	{endpoints(`"certFile": 1, "keyFile": "/k"`), "registry.certFile", "string"},
	{endpoints(`"certFile": "cert.pem", "keyFile": "/k"`), "registry.certFile", "relative"},
	{endpoints(`"keyFile": "/k"`), "registry.certFile", "missing"},
	{endpoints(`"certFile": "/c", "keyFile": 1`), "registry.keyFile", "string"},
	{endpoints(`"certFile": "/c", "keyFile": "./k"`), "registry.keyFile", "path from /"},
	{endpoints(`"certFile": "/c"`), "registry.keyFile", "missing"},
	{endpoints(`"username": 1`), "registry.username", "string"},
	{endpoints(`"passwordFile": "/p"`), "registry.username", "missing"},
	{endpoints(`"passwordFile": ["/p"]`), "registry.passwordFile", "string"},
	{endpoints(`"username": "node", "passwordFile": "p"`), "registry.passwordFile", "path from /"},
	{endpoints(`"username": "node"`), "registry.passwordFile", "missing"},
	{endpoints(`"path": "/srv/mesh.json"`), "registry.path", "belongs to type file"},
	{`{` + cidrs + `, "registry": {"type": "file", "path": "/srv/mesh.json", "endpoints": ["192.0.2.1:2379"]}}`, "registry.endpoints", "belongs to type etcd"},
	{`{` + cidrs + `, "registry": {"type": "file", "prefix": "/wgcni/"}}`, "registry.prefix", "belongs to type etcd"},
	{`{` + cidrs + `, "registry": {"type": "file", "caFile": "/f"}}`, "registry.caFile", "belongs to type etcd"},
	{`{` + cidrs + `, "registry": {"type": "file", "certFile": "/f"}}`, "registry.certFile", "belongs to type etcd"},
	{`{` + cidrs + `, "registry": {"type": "file", "keyFile": "/f"}}`, "registry.keyFile", "belongs to type etcd"},
	{`{` + cidrs + `, "registry": {"type": "file", "username": "node"}}`, "registry.username", "belongs to type etcd"},
	{`{` + cidrs + `, "registry": {"type": "file", "passwordFile": "/f"}}`, "registry.passwordFile", "belongs to type etcd"},
	{object(`"clusterSecretFile": 5`), "clusterSecretFile", "string"},
	{object(`"clusterSecretFile": "secret"`), "clusterSecretFile", "path from /"},
	{object(`"clusterSecretFile": "/etc/secret", "seal": true`), "seal", "string"},
	{object(`"clusterSecretFile": "/etc/secret", "seal": "off"`), "seal", `neither "required" nor "preferred"`},
	{object(`"seal": "required"`), "seal", "clusterSecretFile"},
	{object(`"seal": "preferred"`), "seal", "clusterSecretFile"},
	{object(`"runDir": 5`), "runDir", "string"},
	{object(`"runDir": "run"`), "runDir", "relative"},
	{object(`"runDir": "/var/lib/wgcni/"`), "runDir", "stateDir"},
	{object(`"stateDir": ["/x"]`), "stateDir", "string"},
	{object(`"stateDir": "./x"`), "stateDir", "relative"},
}

func TestParseRefuses(t *testing.T) {
	for _, w := range wrongs {
		c, err := Parse([]byte(w.stanza))
		var invalid *Error
		if !errors.As(err, &invalid) {
			t.Errorf("%s: %v, %v", w.stanza, c, err)
			continue
		}
		if invalid.Key != w.key || !strings.HasPrefix(err.Error(), w.key+": ") || !strings.Contains(err.Error(), w.says) {
			t.Errorf("%s: %q, want one about %s that says %q", w.stanza, err, w.key, w.says)
		}
		if !reflect.DeepEqual(c, Config{}) {
			t.Errorf("%s: half a configuration beside the error", w.stanza)
		}
	}
}

// cniKeys are those that libcni and the specification put into a stanza.
var cniKeys = []string{
	"cniVersion", "cniVersions", "name", "type", "prevResult", "runtimeConfig", "capabilities", "args", "ipam", "dns",
	"disableCheck", "disableGC", "cni.dev/valid-attachments", "cni.dev/attachments",
}

// ourKeys are all others, those of objects as "registry.path".
func ourKeys(path string, t reflect.Type) (out []string) {
	for i := range t.NumField() {
		key, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		if slices.Contains(cniKeys, key) {
			continue
		}
		out = append(out, path+key)
		if f := t.Field(i).Type; f.Kind() == reflect.Pointer && f.Elem().Kind() == reflect.Struct {
			out = append(out, ourKeys(path+key+".", f.Elem())...)
		}
	}
	return out
}

// TestEveryKeyHasItsCases keeps the tables here as long as the stanza: each key
// is wrong once in type and once in value, and misspelt once.
func TestEveryKeyHasItsCases(t *testing.T) {
	keys := ourKeys("", reflect.TypeFor[rawStanza]())
	for _, key := range keys {
		var ofType, ofValue int
		for _, w := range wrongs {
			if w.key != key {
				continue
			}
			var typed *json.UnmarshalTypeError
			var raw rawStanza
			if err := json.Unmarshal([]byte(w.stanza), &raw); errors.As(err, &typed) || strings.Contains(w.stanza, `"fwmark": [`) {
				ofType++
			} else {
				ofValue++
			}
		}
		if key == "encryptNodes" {
			ofValue++ // both truth values are right
		}
		if ofType == 0 || ofValue == 0 {
			t.Errorf("%s: %d cases of a wrong type, %d of a wrong value", key, ofType, ofValue)
		}
	}
	for key := range maps.Keys(values) {
		if !slices.Contains(keys, key) {
			t.Errorf("the stanza has no key %s", key)
		}
	}
	for _, key := range keys {
		if _, ok := values[key]; !ok && !strings.Contains(key, ".") {
			t.Errorf("%s has no case of a good value", key)
		}
	}
}

// TestUnknownKeys: each key misspelt is refused, and the right one is named.
func TestUnknownKeys(t *testing.T) {
	for _, key := range ourKeys("", reflect.TypeFor[rawStanza]()) {
		object, name, nested := strings.Cut(key, ".")
		if !nested {
			object, name = "", key
		}
		for _, misspelt := range []string{name + "x", name[:len(name)-1], strings.ToUpper(name), name[:1] + "_" + name[1:]} {
			stanza := fmt.Sprintf(`{%q: 1, %s}`, misspelt, minimal)
			path := ""
			if nested {
				stanza, path = fmt.Sprintf(`{%s, %q: {%q: 1}}`, cidrs, object, misspelt), object+"."
			}
			_, err := Parse([]byte(stanza))
			var invalid *Error
			if !errors.As(err, &invalid) || invalid.Key != path+misspelt || !strings.Contains(err.Error(), fmt.Sprintf("%q", key)) {
				t.Errorf("%s: %v, want one that names %q and %q", stanza, err, path+misspelt, key)
			}
		}
	}
	if _, err := Parse([]byte(`{"": 1, ` + minimal + `}`)); err == nil {
		t.Error("a key without a name is accepted")
	}
}

// values has a good value for every key, and what becomes of it.
var values = map[string]struct {
	value string
	want  func(*Config)
}{
	"clusterCIDRs": {`["10.244.0.0/16", "fd00:244::/32"]`, func(c *Config) {
		c.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}
	}},
	"podCIDRs": {`["10.244.1.0/24"]`, func(c *Config) { c.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")} }},
	"externalCIDRs": {`["192.0.2.0/24", "2001:db8::/64"]`, func(c *Config) {
		c.ExternalCIDRs, c.DirectPorts = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/64")}, []uint16{22}
	}},
	"peerCIDRs":         {`["10.9.0.0/24"]`, func(c *Config) { c.PeerCIDRs = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")} }},
	"subnets":           {`["10.244.8.0/24"]`, func(c *Config) { c.Subnets = []netip.Prefix{netip.MustParsePrefix("10.244.8.0/24")} }}, // for more see TestSubnets
	"location":          {`"dc-1"`, func(c *Config) { c.Location = "dc-1" }},
	"role":              {`"gateway"`, func(c *Config) { c.Role = mesh.RoleGateway }},
	"segments":          {`["web", "db", "web"]`, func(c *Config) { c.Segments = []string{"db", "web"} }},
	"encryption":        {`"preferred"`, func(c *Config) { c.Encryption = mesh.Preferred }},
	"encryptNodes":      {`true`, func(c *Config) { c.EncryptNodes, c.DirectPorts = true, []uint16{22} }},
	"directPorts":       {`null`, func(*Config) {}}, // for more see TestDirectPorts
	"nodeName":          {`"node-b.example.org"`, func(c *Config) { c.NodeName = "node-b.example.org" }},
	"endpoint":          {`"[2001:db8::1]:51821"`, func(c *Config) { c.Endpoint = "[2001:db8::1]:51821" }},
	"interface":         {`"wg.pods_1-a"`, func(c *Config) { c.Interface = "wg.pods_1-a" }},
	"listenPort":        {`1`, func(c *Config) { c.ListenPort, c.SparePort = 1, 2 }},
	"rotationPort":      {`51819`, func(c *Config) { c.SparePort = 51819 }},
	"keyRotation":       {`"720h"`, func(c *Config) { c.KeyRotation = 30 * 24 * time.Hour }},
	"mtu":               {`576`, func(c *Config) { c.MTU = 576 }},
	"keepalive":         {`25`, func(c *Config) { c.Keepalive = 25 * time.Second }},
	"fwmark":            {`"0x10"`, func(c *Config) { c.FwMark = 0x10 }},
	"table":             {`256`, func(c *Config) { c.Table = 256 }},
	"rulePriority":      {`32765`, func(c *Config) { c.RulePriority = 32765 }},
	"registry":          {`{"type": "file", "path": "/mnt//shared/mesh.json"}`, func(c *Config) { c.Registry.Path = "/mnt/shared/mesh.json" }},
	"clusterSecretFile": {`"/etc/wgcni//secret"`, func(c *Config) { c.SecretFile, c.AcceptUnsealed = "/etc/wgcni/secret", false }},
	"seal":              {`""`, func(*Config) {}}, // for more see TestSeal
	"runDir":            {`"/run/other/"`, func(c *Config) { c.RunDir = "/run/other" }},
	"stateDir":          {`"/srv/state"`, func(c *Config) { c.StateDir = "/srv/state" }},
}

func defaults() Config {
	return Config{
		NodeName: "node-a",
		Settings: mesh.Settings{
			ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, Encryption: mesh.Required,
			Interface: "wgcni0", ListenPort: 51820, SparePort: 51821, FwMark: 0x4, Table: 0x7767, RulePriority: 110,
		},
		Registry: Registry{Type: "file", Path: "/srv/mesh.json"},
		RunDir:   "/run/wgcni", StateDir: "/var/lib/wgcni",
		AcceptUnsealed: true,
	}
}

func TestParse(t *testing.T) {
	t.Setenv("NODE_NAME", "node-a")
	check := func(stanza string, want Config) {
		t.Helper()
		got, err := Parse([]byte(stanza))
		if err != nil {
			t.Errorf("%s: %v", stanza, err)
			return
		}
		if diff := cmp.Diff(want, got, compareAddrs); diff != "" {
			t.Errorf("%s (-want +got):\n%s", stanza, diff)
		}
	}
	check(`{`+minimal+`}`, defaults())
	for key, v := range values {
		want := defaults()
		v.want(&want)
		stanza := map[string]json.RawMessage{}
		if err := json.Unmarshal([]byte(`{`+minimal+`}`), &stanza); err != nil {
			t.Fatal(err)
		}
		stanza[key] = json.RawMessage(v.value)
		text, err := json.Marshal(stanza)
		if err != nil {
			t.Fatal(err)
		}
		check(string(text), want)
		if key != "clusterCIDRs" && key != "registry" { // null is as good as absent
			stanza[key] = json.RawMessage("null")
			text, _ = json.Marshal(stanza)
			check(string(text), defaults())
		}
	}
	for _, mark := range []string{`16`, `"16"`, `"0x10"`, `"0b10000"`} {
		want := defaults()
		want.FwMark = 0x10
		check(object(`"fwmark": `+mark), want)
	}
	// What libcni and runtimes add to every stanza is none of our business.
	for _, key := range cniKeys {
		switch key {
		case "cniVersion", "name", "type":
			continue
		}
		for _, value := range []string{`{}`, `[]`, `"x"`, `null`, `true`} {
			check(object(fmt.Sprintf("%q: %s", key, value)), defaults())
		}
	}
	last := defaults()
	last.ListenPort, last.SparePort = 65535, 65534
	check(object(`"listenPort": 65535`), last)
	check(object(`"keyRotation": "0"`), defaults())
	check(object(`"interface": "a-name-of-14-x"`), func() Config { c := defaults(); c.Interface = "a-name-of-14-x"; return c }())
	want := defaults()
	want.Name, want.CNIVersion = "pods", "1.1.0"
	check(object(`"type": "wgcni", "name": "pods", "cniVersion": "1.1.0"`), want)
}

func TestSubnets(t *testing.T) {
	c, err := Parse([]byte(object(`"externalCIDRs": ["172.16.0.0/12"], "subnets": ["172.17.0.0/16", "10.244.8.0/24"], "podCIDRs": ["172.18.1.0/24"]`)))
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16"), netip.MustParsePrefix("10.244.8.0/24")}
	if diff := cmp.Diff(want, c.Subnets, compareAddrs); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRoles(t *testing.T) {
	for word, want := range map[string]mesh.Role{"": mesh.RoleNode, "node": mesh.RoleNode, "gateway": mesh.RoleGateway, "spoke": mesh.RoleSpoke} {
		if c, err := Parse([]byte(object(fmt.Sprintf(`"role": %q`, word)))); err != nil || c.Role != want {
			t.Errorf("%q: %q, %v", word, c.Role, err)
		}
	}
}

// TestNoEndpoint: a machine behind NAT publishes none, not even the one that is found.
func TestNoEndpoint(t *testing.T) {
	c, err := Parse([]byte(object(`"endpoint": "none"`)))
	if err != nil || c.Endpoint != "" || !c.CallsOnly {
		t.Errorf("%q, calls only: %v, %v", c.Endpoint, c.CallsOnly, err)
	}
	c, err = Parse([]byte(object(`"endpoint": "location", "location": "a"`)))
	if err != nil || c.Endpoint != "" || c.CallsOnly || !c.CalledInside {
		t.Errorf("%q, calls only: %v, called inside: %v, %v", c.Endpoint, c.CallsOnly, c.CalledInside, err)
	}
	if _, err := Parse([]byte(object(`"endpoint": "None"`))); err == nil {
		t.Error("None is taken for none")
	}
}

func TestSeal(t *testing.T) {
	for _, tt := range []struct {
		keys string
		want bool // AcceptUnsealed
	}{
		{`"clusterSecretFile": "", "seal": ""`, true},
		{`"clusterSecretFile": "/etc/secret"`, false},
		{`"clusterSecretFile": "/etc/secret", "seal": null`, false},
		{`"clusterSecretFile": "/etc/secret", "seal": "required"`, false},
		{`"clusterSecretFile": "/etc/secret", "seal": "preferred"`, true},
	} {
		c, err := Parse([]byte(object(tt.keys)))
		if err != nil || c.AcceptUnsealed != tt.want || (c.SecretFile != "") != strings.Contains(tt.keys, "/etc/secret") {
			t.Errorf("%s: %q, accepts unsealed: %v, %v", tt.keys, c.SecretFile, c.AcceptUnsealed, err)
		}
	}
}

func TestEtcd(t *testing.T) {
	for _, tt := range []struct {
		keys string
		want Etcd
	}{
		{`"endpoints": ["192.0.2.1:2379"]`, Etcd{Endpoints: []string{"http://192.0.2.1:2379"}, Prefix: "/wgcni/"}},
		{
			`"endpoints": ["http://a.example.org:2379/", "[2001:db8::1]:2379", "etcd_1:1"], "prefix": "/a/b.c"`,
			Etcd{Endpoints: []string{"http://a.example.org:2379", "http://[2001:db8::1]:2379", "http://etcd_1:1"}, Prefix: "/a/b.c/"},
		},
		{ // https of one is https of all that do not say otherwise
			`"endpoints": ["b:2379", "HTTPS://a:65535"], "prefix": "/clusters/ü/"`,
			Etcd{Endpoints: []string{"https://b:2379", "https://a:65535"}, Prefix: "/clusters/ü/"},
		},
		{`"endpoints": ["a:2379"], "caFile": "/etc//ca.pem"`, Etcd{Endpoints: []string{"https://a:2379"}, Prefix: "/wgcni/", CAFile: "/etc/ca.pem"}},
		{
			`"endpoints": ["a:2379"], "certFile": "/etc/cert.pem", "keyFile": "/etc/x/../key.pem"`,
			Etcd{Endpoints: []string{"https://a:2379"}, Prefix: "/wgcni/", CertFile: "/etc/cert.pem", KeyFile: "/etc/key.pem"},
		},
		{
			`"endpoints": ["http://a:2379"], "username": "node", "passwordFile": "/etc/password", "path": "", "prefix": null`,
			Etcd{Endpoints: []string{"http://a:2379"}, Prefix: "/wgcni/", Username: "node", PasswordFile: "/etc/password"},
		},
	} {
		c, err := Parse([]byte(etcd(tt.keys)))
		if err != nil {
			t.Errorf("%s: %v", tt.keys, err)
			continue
		}
		if diff := cmp.Diff(Registry{Type: "etcd", Etcd: tt.want}, c.Registry); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.keys, diff)
		}
	}
}

// TestNoSecretInside: a secret in the stanza is refused, with what to do instead,
// and is not repeated.
func TestNoSecretInside(t *testing.T) {
	for _, tt := range []struct{ stanza, key, says string }{
		{endpoints(`"username": "node", "password": "hunter2"`), "registry.password", "registry.passwordFile"},
		{endpoints(`"username": "node", "password": ["hunter2"], "passwordFile": "/p"`), "registry.password", "registry.passwordFile"},
		{endpoints(`"Password": "hunter2"`), "registry.Password", "no such key"},
		{etcd(`"endpoints": ["http://node:hunter2@192.0.2.1:2379"]`), "registry.endpoints", "passwordFile"},
		{etcd(`"endpoints": ["node:hunter2@192.0.2.1:2379"]`), "registry.endpoints", "passwordFile"},
		{etcd(`"endpoints": ["http://node:hunter2%@[192.0.2.1"]`), "registry.endpoints", "passwordFile"},
		{endpoints(`"username": "node", "passwordFile": "hunter2"`), "registry.passwordFile", "path from /"},
		{endpoints(`"certFile": "/c", "keyFile": "-----BEGIN hunter2"`), "registry.keyFile", "path from /"},
		{object(`"clusterSecret": "hunter2"`), "clusterSecret", "clusterSecretFile"},
		{object(`"clusterSecretFile": "wgcni1_hunter2"`), "clusterSecretFile", "path from /"},
	} {
		c, err := Parse([]byte(tt.stanza))
		var invalid *Error
		if !errors.As(err, &invalid) || invalid.Key != tt.key || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, %v, want one about %s that says %s", tt.stanza, c, err, tt.key, tt.says)
			continue
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error repeats the secret: %v", tt.stanza, err)
		}
	}
}

// TestMarkOwners: a full-width mark broke Calico and Cilium (talos#4836).
func TestMarkOwners(t *testing.T) {
	for owner, bits := range map[string][]uint32{
		"kube-proxy": {0x4000, 0x8000}, "portmap": {0x2000}, "Calico": {0x10000, 0x80000, 0x80000000},
		"Cilium": {0x100, 0x200, 0x400, 0x800, 0x1000}, "KubeSpan": {0x20, 0x40}, "AWS": {0x80},
	} {
		for _, bit := range bits {
			_, err := Parse([]byte(object(fmt.Sprintf(`"fwmark": "%#x"`, bit))))
			if err == nil || !strings.Contains(err.Error(), owner) {
				t.Errorf("%#x: %v, want one that names %s", bit, err, owner)
			}
		}
	}
	for _, bit := range []uint32{0x1, 0x2, 0x4, 0x8, 0x10} {
		if _, err := Parse([]byte(object(fmt.Sprintf(`"fwmark": %d`, bit)))); err != nil {
			t.Errorf("%#x: %v", bit, err)
		}
	}
}

func TestNodeName(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ stanza, env, want string }{
		{`"nodeName": "configured", `, "from-env", "configured"},
		{``, "from-env", "from-env"},
		{``, "", strings.ToLower(host)},
	} {
		t.Setenv("NODE_NAME", tt.env)
		c, err := Parse([]byte(`{` + tt.stanza + minimal + `}`))
		if err != nil || c.NodeName != tt.want {
			t.Errorf("%+v: %q, %v", tt, c.NodeName, err)
		}
	}
	t.Setenv("NODE_NAME", "Not A Name")
	if _, err := Parse([]byte(`{` + minimal + `}`)); err == nil || !strings.Contains(err.Error(), "nodeName") {
		t.Errorf("a bad NODE_NAME: %v", err)
	}
}

func TestBrokenJSON(t *testing.T) {
	for _, text := range []string{``, `{`, `[]`, `"x"`, `5`, `{"clusterCIDRs": ["10.244.0.0/16"],}`, `{"a": 1} {"b": 2}`, "\x00", `{"name": "\ud800`} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), "not valid JSON") {
			t.Errorf("%q: %v", text, err)
		}
		if got := RunDirOf([]byte(text)); got != DefaultRunDir {
			t.Errorf("%q: the run folder is %s", text, got)
		}
	}
}

// TestRunDirOf: DEL finds the store whatever else the stanza says.
func TestRunDirOf(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{`{"runDir": "/run/other/"}`, "/run/other"},
		{`{"runDir": "/run/other", "no-such": 1}`, "/run/other"},
		{`{"runDir": "/run/other", "clusterCIDRs": "x"}`, "/run/other"},
		{`{"runDir": "/run/other", "registry": {"x": []}}`, "/run/other"},
		{`{"runDir": "run"}`, DefaultRunDir},
		{`{"runDir": 5}`, DefaultRunDir},
		{`{"runDir": null}`, DefaultRunDir},
		{`{}`, DefaultRunDir},
	} {
		if got := RunDirOf([]byte(tt.text)); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.text, got, tt.want)
		}
	}
}

// FuzzStanza: no text makes Parse panic; what it accepts is within bounds, and
// an error names a key, or says that this is no JSON.
func FuzzStanza(f *testing.F) {
	for _, w := range wrongs {
		f.Add([]byte(w.stanza))
	}
	for key, v := range values {
		f.Add([]byte(object(fmt.Sprintf("%q: %s", key, v.value))))
	}
	f.Add([]byte(endpoints(`"prefix": "/a/b", "caFile": "/ca", "certFile": "/c", "keyFile": "/k", "username": "node", "passwordFile": "/p"`)))
	f.Add([]byte(etcd(`"endpoints": ["http://[fe80::1%25eth0]:2379/"]`)))
	f.Fuzz(func(t *testing.T, text []byte) {
		if dir := RunDirOf(text); !strings.HasPrefix(dir, "/") {
			t.Errorf("run folder %q", dir)
		}
		c, err := Parse(text)
		var invalid *Error
		switch {
		case errors.As(err, &invalid):
			if invalid.Key == "" && !strings.Contains(string(text), `""`) {
				t.Errorf("no key in %q", err)
			}
		case err != nil:
			if !strings.HasPrefix(err.Error(), "not valid JSON: ") {
				t.Errorf("%v", err)
			}
		default:
			if len(c.ClusterCIDRs) == 0 || c.ListenPort < 1 || c.ListenPort > 65535 || c.SparePort < 1 || c.SparePort > 65535 || c.SparePort == c.ListenPort || c.FwMark&(c.FwMark-1) != 0 || c.FwMark == 0 ||
				c.RunDir == c.StateDir || c.NodeName == "" || c.MTU != 0 && c.MTU < mesh.LeastMTU(c.ClusterCIDRs) ||
				c.SecretFile == "" && !c.AcceptUnsealed || c.SecretFile != "" && !filepath.IsAbs(c.SecretFile) || !soundRegistry(c.Registry) {
				t.Errorf("accepted: %+v", c)
			}
			for _, p := range slices.Concat(c.ClusterCIDRs, c.PodCIDRs, c.ExternalCIDRs, c.PeerCIDRs, c.Subnets) {
				if p != p.Masked() || p.Bits() == 0 {
					t.Errorf("accepted: %s", p)
				}
			}
		}
	})
}

func soundRegistry(r Registry) bool {
	e := r.Etcd
	if r.Type == RegistryFile {
		return filepath.IsAbs(r.Path) && reflect.DeepEqual(e, Etcd{})
	}
	for _, s := range e.Endpoints {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != strings.SplitN(e.Endpoints[0], ":", 2)[0] || s != u.Scheme+"://"+strings.Replace(u.Host, "%", "%25", 1) ||
			!validPort(u.Port()) || u.Scheme == "http" && e.CAFile+e.CertFile != "" {
			return false
		}
	}
	return r.Type == RegistryEtcd && r.Path == "" && len(e.Endpoints) > 0 &&
		path.Clean(e.Prefix)+"/" == e.Prefix && strings.HasPrefix(e.Prefix, "/") &&
		(e.CertFile == "") == (e.KeyFile == "") && (e.Username == "") == (e.PasswordFile == "")
}
