package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/page"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

func TestParseListen(t *testing.T) {
	for text, want := range map[string]string{
		"off": "", "127.0.0.1:51822": "127.0.0.1:51822", ":80": ":80", "[::1]:80": "[::1]:80", "node-a:80": "node-a:80",
	} {
		if got, err := parseListen(text); err != nil || got != want {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "on", "51822", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "::1:80", "127.0.0.1:-1"} {
		if got, err := parseListen(text); err == nil || !strings.Contains(err.Error(), "--http") {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
}

// DNS rebinding: a name that somebody else gave to this machine's address is refused.
func TestAddressed(t *testing.T) {
	for host, want := range map[string]bool{
		"127.0.0.1": true, "127.0.0.1:51822": true, "[::1]": true, "[::1]:80": true, "::1": true, "192.0.2.1:80": true,
		"localhost": true, "LocalHost:51822": true, "node-a:51822": true, "": true,
		"evil.example": false, "127.0.0.1.evil.example": false, "localhost.": false, "node-b:51822": false, "localhost@evil.example": false,
		"[::1": true, "]": false, ":": false, ":80": false,
	} {
		if got := (&web{listen: "node-a:51822"}).addressed(host); got != want {
			t.Errorf("%q: %v, want %v", host, got, want)
		}
	}
	if (&web{listen: ":51822"}).addressed(":51822") {
		t.Error("a host without a name is let in")
	}
}

func TestPagePeers(t *testing.T) {
	s := connected()
	if got, note := pagePeers(s); note != "" || len(got) != 1 || got[0].State != stateConnected || got[0].Level != page.OK || got[0].Received != "1.00 MiB" {
		t.Errorf("%+v, %q", got, note)
	}
	peer := s.Peers[0]
	s.Peers = nil
	for i := range manyListed + 50 {
		peer.Name, peer.State = fmt.Sprintf("node-%03d", i), stateConnected
		switch i {
		case 249:
			peer.State = stateMissing
		case 248, 3:
			peer.State = stateWaiting
		}
		s.Peers = append(s.Peers, peer)
	}
	got, note := pagePeers(s)
	var names []string
	for _, p := range got[:4] {
		names = append(names, p.Name)
	}
	if want := []string{"node-249", "node-003", "node-248", "node-000"}; len(got) != manyListed || !slices.Equal(names, want) || note != "50 peers more; `wgcnid status` lists all." {
		t.Errorf("%d peers, the first %v; %q", len(got), names, note)
	}
	if s.Peers[0].Name != "node-000" {
		t.Error("the status itself is sorted anew")
	}
}

func TestDescribe(t *testing.T) {
	w := &web{}
	for name, tt := range map[string]struct {
		change func(*Status)
		want   string
	}{
		"well":          {func(s *Status) { s.OK = true }, page.OK},
		"in the clear":  {func(s *Status) { s.OK, s.Encryption = true, mesh.Preferred }, page.Note},
		"not as wanted": {func(*Status) {}, page.Fault},
	} {
		s := connected()
		tt.change(&s)
		var p page.Page
		w.describe(&p, s)
		if p.Level != tt.want || len(p.Tiles) < 4 || len(p.Facts) < 5 {
			t.Errorf("%s: level %s, tiles %v, facts %v", name, p.Level, p.Tiles, p.Facts)
		}
	}
	s := connected()
	s.Pending = []string{"ip link set wgcni0 up\x1b[2J"}
	s.Report = &reconcile.Report{Error: "it broke"}
	if got := pageFaults(s); !slices.Contains(got, `the last pass failed: it broke`) || !slices.Contains(got, `pending: ip link set wgcni0 up\u001b[2J`) {
		t.Errorf("%q", got)
	}
	for i := range 30 {
		s.Pending = append(s.Pending, fmt.Sprint("op ", i))
	}
	if got := pageFaults(s); len(got) != 21 || got[20] != "and 12 more; `wgcnid status` lists all" {
		t.Errorf("%d lines, the last %q", len(got), got[len(got)-1])
	}
}
