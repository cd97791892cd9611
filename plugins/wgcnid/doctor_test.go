package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/doctor"
	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/pkg/verify"
)

func TestPrintChecks(t *testing.T) {
	checks := []doctor.Check{
		{ID: "helper", Title: "Helper", Level: doctor.OK, Looked: "its lock", Found: "wgcnid runs"},
		{ID: "secret", Title: "Secret", Level: doctor.Note, Looked: "the configuration", Found: "none", Mend: "see `wgcnid secret --help`"},
		{ID: "firewall", Title: "Firewall", Level: doctor.Fail, Looked: "UDP port 51820", Found: "dropped by\x1b[2J table x", Mend: "let it in"},
		{ID: "rules", Title: "Rules", Level: doctor.Warn, Looked: "`ip rule`", Found: "one is odd"},
	}
	var b strings.Builder
	if err := printChecks(&b, "a", checks, false); err != nil {
		t.Fatal(err)
	}
	want := `1 fault, 1 warning, 1 note on a; 1 of 4 checks are ok.
FAIL  Firewall
      looked at: UDP port 51820
      found:     dropped by\u001b[2J table x
      mend:      let it in
warn  Rules
      looked at: ` + "`ip rule`" + `
      found:     one is odd
note  Secret
      looked at: the configuration
      found:     none
      mend:      see ` + "`wgcnid secret --help`" + `
ok    Helper: wgcnid runs (looked at its lock)
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	b.Reset()
	if err := printChecks(&b, "a", checks[:1], false); err != nil || !strings.HasPrefix(b.String(), "Nothing is wrong on a; 1 of 1 checks are ok.\n") {
		t.Errorf("%v: %s", err, b.String())
	}
	b.Reset()
	if err := printChecks(&b, "a", checks, true); err != nil || !strings.Contains(b.String(), `"ok": false`) || !strings.Contains(b.String(), `"id": "firewall"`) {
		t.Errorf("%v: %s", err, b.String())
	}
}

func TestPrintVerification(t *testing.T) {
	address := netip.MustParseAddr("10.244.2.0")
	good := verify.Result{Peer: "b", Address: address, Sent: 5, Answered: 5, InTunnel: 10, WireGuardOut: 5, WireGuardIn: 5, Verdict: verify.Encrypted}
	dark := verify.Result{Peer: "c", Address: address, Sent: 5, Verdict: verify.NotShown, Reason: "it was dropped"}
	clear := verify.Result{Peer: "d", Address: address, Sent: 5, InClear: 5, Verdict: verify.Plaintext, Reason: "on eth0"}
	for _, tt := range []struct {
		peers []verify.Result
		first string
		last  string
	}{
		{[]verify.Result{good}, "Encrypted: traffic to 1 peer, and their answers; nothing was seen in the clear.", "b     10.244.2.0  5     5        10             0             5              5   encrypted"},
		{[]verify.Result{good, dark}, "Not shown for 1 of 2 peers; nothing was seen in the clear.", "c: it was dropped"},
		{[]verify.Result{good, dark, clear}, "NOT encrypted: traffic to 1 of 3 peers was seen in the clear.", "d: on eth0"},
	} {
		var b strings.Builder
		if err := printVerification(&b, Verification{Node: "a", From: "node a", Watched: []string{"eth0"}, Peers: tt.peers}, false); err != nil {
			t.Fatal(err)
		}
		if out := b.String(); !strings.HasPrefix(out, tt.first+"\nsent from  node a\nwatched    eth0\n") || !strings.HasSuffix(out, tt.last+"\n") {
			t.Errorf("want %q first and %q last:\n%s", tt.first, tt.last, out)
		}
	}
}

func TestChoosePod(t *testing.T) {
	targets := []verify.Target{{Address: netip.MustParseAddr("10.244.2.0")}}
	pods := []store.Attachment{
		{ContainerID: "aaa", Pod: "default/web", Addresses: []netip.Addr{netip.MustParseAddr("fd00::2")}},
		{ContainerID: "bbb", Pod: "default/db", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.2")}},
	}
	for wish, want := range map[string]string{"": "bbb", "default/web": "aaa", "aa": "aaa"} {
		if got, err := choosePod(pods, wish, targets); err != nil || got == nil || got.ContainerID != want {
			t.Errorf("%q: %+v, %v", wish, got, err)
		}
	}
	if got, err := choosePod(pods, "default/none", targets); err == nil {
		t.Errorf("%+v for a pod that is not there", got)
	}
	if got, err := choosePod(pods[:1], "", targets); err != nil || got != nil {
		t.Errorf("%+v, %v: it cannot reach the target", got, err)
	}
}
