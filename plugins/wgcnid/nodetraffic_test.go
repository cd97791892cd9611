package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

func TestNodeTraffic(t *testing.T) {
	on := config.Config{Settings: mesh.Settings{EncryptNodes: true, DirectPorts: []uint16{22, 2379}}}
	host := netip.MustParsePrefix("192.0.2.2/32")
	for _, tt := range []struct {
		name      string
		config    config.Config
		routed    bool
		handshake time.Time
		peer      string   // what its line says
		says      []string // parts of the text
	}{
		{"off", config.Config{}, true, now, "", nil},
		{"encrypted", on, true, now.Add(-time.Minute), "encrypted", []string{
			"nodes      traffic with 1 of 1 machines is encrypted; TCP ports outside of the tunnel: 22 2379\n",
		}},
		{"not of the other", on, false, now.Add(-time.Minute), "clear", []string{
			"nodes      traffic with 0 of 1 machines is encrypted; in the clear with b, which have no encryptNodes; TCP ports outside of the tunnel: 22 2379\n",
		}},
		{"never", on, true, time.Time{}, "no handshake", []string{
			"nodes      traffic with 0 of 1 machines",
			"node traffic to b cannot be delivered: there has been no handshake yet; see that UDP reaches its WireGuard, and that wgcnid runs there\n",
		}},
		{"not any more", on, true, now.Add(-time.Hour), "no handshake", []string{"node traffic to b cannot be delivered: the last handshake was 1h0m0s ago;"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := observedPeer(func(p *mesh.Peer) {
				p.LastHandshake, p.AllowedIPs = tt.handshake, slices.Concat(podsB, []netip.Prefix{host})
			})
			s := newStatus(p)
			o := reconcile.Outcome{Observed: mesh.State{Peers: []mesh.Peer{p}}}
			p.Name = "b"
			o.Plan.Peers = []mesh.Peer{p}
			if tt.routed {
				o.Plan.Filter.Nodes.Peers = []netip.Addr{host.Addr()}
			}
			s.Nodes = nodeTraffic(tt.config, o, s.Peers, now)
			if diff := cmp.Diff(tt.peer, s.Peers[0].NodeTraffic); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			var text, asJSON bytes.Buffer
			if err := printStatus(&text, s, false); err != nil {
				t.Fatal(err)
			}
			for _, want := range tt.says {
				if !strings.Contains(text.String(), want) {
					t.Errorf("want %q in\n%s", want, &text)
				}
			}
			if tt.says == nil && (s.Nodes != nil || strings.Contains(text.String(), "nodes ")) {
				t.Errorf("without encryptNodes:\n%s", &text)
			}
			if err := printStatus(&asJSON, s, true); err != nil {
				t.Fatal(err)
			}
			var back struct {
				Peers []struct{ NodeTraffic string }
			}
			if err := json.Unmarshal(asJSON.Bytes(), &back); err != nil || back.Peers[0].NodeTraffic != tt.peer {
				t.Errorf("%v in JSON:\n%s", err, &asJSON)
			}
		})
	}
}
