package main

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/explain"
)

func TestExplainFlags(t *testing.T) {
	m := newMesh(t, 0)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"10.244.1.5"}, "accepts 2 arg(s), received 1"},
		{[]string{"10.244.1.5", "b", "--proto", "sctp"}, `--proto "sctp": want tcp, udp or icmp`},
		{[]string{"10.244.1.5", "b", "--dport", "22"}, "--dport: give --proto tcp or --proto udp with it"},
		{[]string{"10.244.1.5", "b", "--proto", "tcp", "--dport", "70000"}, `invalid argument "70000" for "--dport" flag: strconv.ParseUint: parsing "70000": value out of range`},
	} {
		out, _, err := m.run(append([]string{"explain"}, tt.args...)...)
		if err == nil || err.Error() != tt.want || out != "" {
			t.Errorf("%q: %q, %v; want %s", tt.args, out, err, tt.want)
		}
	}
}

func TestPrintExplanation(t *testing.T) {
	e := explain.Explanation{
		Source:      explain.Party{Name: "default/web-0", Address: netip.MustParseAddr("10.244.1.2"), Kind: explain.Pod},
		Destination: explain.Party{Name: "10.244.2.7", Address: netip.MustParseAddr("10.244.2.7"), Kind: explain.Remote},
		Verdict:     explain.Dropped, Why: "interface wgcni0 is missing", Fault: true, Mend: "start wgcnid",
		Steps: []explain.Step{
			{Stage: explain.From, Object: "10.244.1.2", Text: "pod default/web-0"},
			{Stage: explain.Rule, Object: "110", Text: "110: lookup 30567"},
			{Stage: explain.Delivery, Text: "a name with \x1b[2J in it"},
		},
	}
	const want = `Dropped: interface wgcni0 is missing.
Mend: start wgcnid.

from      10.244.1.2: pod default/web-0
rule      110: lookup 30567
delivery  a name with \u001b[2J in it
`
	var b bytes.Buffer
	err := printExplanation(&b, e)
	if diff := cmp.Diff(want, b.String()); diff != "" || err != nil {
		t.Error(err, diff)
	}
}
