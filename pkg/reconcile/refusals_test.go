package reconcile_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

// Entries that call themselves alike are refused one by one, and a flood of them
// does not fill the log.
func TestFloodOfRefusals(t *testing.T) {
	n := newNode(t, record("b"))
	n.registry.raw = map[string]string{}
	const many = 500
	for i := range many {
		n.registry.raw[fmt.Sprintf("x%d", i)] = `{"name": "b"}`
	}
	n.joins()
	n.holds(peerB)
	eventually(t, "the flood to be counted", func() bool {
		r := n.report()
		return len(r.Refused) == many && r.RefusedTotal[reconcile.KindMalformed] == many
	})
	if said := n.log.count("record refused"); said > 50 || !strings.Contains(n.log.String(), "more records refused") {
		t.Errorf("said %d times; log:\n%s", said, n.log)
	}
}

// A claim that covers this node's endpoint is settled here as everywhere else.
func TestFactsHaveOurEndpoint(t *testing.T) {
	known := store.Known{Self: record("a")}
	known.Self.Endpoints = []string{"a.example.org:51820", "192.0.2.1:51820", "[2001:db8::1]:51820"}
	if got, want := reconcile.Facts(config.Config{NodeName: "a"}, keyA, nil, known, nil).Self.Endpoint, netip.MustParseAddrPort("192.0.2.1:51820"); got != want {
		t.Errorf("endpoint %s, want %s", got, want)
	}
}
