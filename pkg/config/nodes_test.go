package config

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDirectPorts(t *testing.T) {
	etcdAt := func(endpoints, keys string) string {
		return `{"clusterCIDRs": ["10.244.0.0/16"], "registry": {"type": "etcd", "endpoints": [` + endpoints + `]}, "encryptNodes": true` + keys + `}`
	}
	for _, tt := range []struct {
		name, stanza string
		want         []uint16
	}{
		{"off", object(`"encryptNodes": false`), nil},
		{"ssh by default", object(`"encryptNodes": true`), []uint16{22}},
		{"ssh with external machines", object(`"externalCIDRs": ["192.0.2.0/24"]`), []uint16{22}},
		{"chosen with external machines", object(`"externalCIDRs": ["192.0.2.0/24"], "directPorts": [2222]`), []uint16{2222}},
		{"none", object(`"encryptNodes": true, "directPorts": []`), nil},
		{"sorted, each once", object(`"encryptNodes": true, "directPorts": [6443, 22, 22]`), []uint16{22, 6443}},
		{"the registry's too", etcdAt(`"http://192.0.2.1:2379", "http://[2001:db8::1]:12379", "http://etcd.example.org:2379"`, ""), []uint16{22, 2379, 12379}},
		{"the registry's in any case", etcdAt(`"192.0.2.1:2379"`, `, "directPorts": []`), []uint16{2379}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Parse([]byte(tt.stanza))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, c.DirectPorts); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
