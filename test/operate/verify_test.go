package operate

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/verify"
	"github.com/wgcni/wgcni/test/cluster"
)

// verification is what `wgcnid verify --json` says.
type verification struct {
	Encrypted bool
	From      string
	Watched   []string
	Peers     []verify.Result
}

func runVerify(t *testing.T, c *cluster.Cluster, n *cluster.Node, args ...string) (v verification) {
	t.Helper()
	cmd := n.Command(t.Context(), filepath.Join(c.BinDir, "wgcnid"), append([]string{"verify", "--json"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if jerr := json.Unmarshal(out, &v); jerr != nil {
		t.Fatalf("wgcnid verify: %v: %s", err, stderr.String())
	}
	if v.Encrypted != (err == nil) {
		t.Errorf("the exit status is %v, encrypted is %v", err, v.Encrypted)
	}
	return v
}

func TestVerifyEncrypted(t *testing.T) {
	c, _, pods := cluster.NewMeshT(t, 3, 1, cluster.NetworkOptions{})
	for _, pod := range pods {
		cluster.ServeT(t, pod)
	}
	stream, err := cluster.StartStream(pods[0], netip.AddrPortFrom(pods[1].IPv4(), cluster.EchoPort), cluster.StreamOptions{Rate: 1000, Size: 400})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Stop() // it is only there to be in the way
	for _, n := range c.Nodes {
		v := runVerify(t, c, n, "--count", "7")
		if !v.Encrypted || len(v.Peers) != 2 || !strings.HasPrefix(v.From, "pod ") {
			t.Errorf("%s: %+v", n.Name, v)
		}
		for _, r := range v.Peers {
			if r.Verdict != verify.Encrypted || r.Sent != 7 || r.Answered != 7 || r.InTunnel < 14 || r.InClear != 0 || r.WireGuardOut < 7 || r.WireGuardIn < 7 {
				t.Errorf("%s: %+v", n.Name, r)
			}
		}
	}
	// Without pods it is the node itself that sends.
	if err := pods[0].Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if v := runVerify(t, c, c.Nodes[0], "node-b"); !v.Encrypted || len(v.Peers) != 1 || v.From != "node node-a" {
		t.Errorf("%+v", v)
	}
	out, err := c.Nodes[1].Wgcnid(t.Context(), "verify")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(out)
}

// A node whose guard and rule somebody has removed, and which routes pods by the
// underlay: the pings leave in the clear, and that is seen.
func TestVerifySeesPlaintext(t *testing.T) {
	b := newBed(t, cluster.NetworkOptions{})
	b.stopHelper(t, 0, false)
	onA(`nft delete table inet wgcni`, `ip rule del priority 110`, `ip route add 10.244.2.0/24 via `+b.b.IPv4.String())(t, b)
	v := runVerify(t, b.c, b.a)
	if v.Encrypted || len(v.Peers) != 1 {
		t.Fatalf("%+v", v)
	}
	if r := v.Peers[0]; r.Verdict != verify.Plaintext || r.InClear == 0 || r.ClearOn[cluster.Uplink] != r.InClear || !strings.Contains(r.Reason, cluster.Uplink) {
		t.Errorf("%+v", r)
	}
}

// Nothing that was not seen is called encrypted.
func TestVerifyShowsNothingWithoutAnAnswer(t *testing.T) {
	b := newBed(t, cluster.NetworkOptions{})
	if err := b.b.SetLoss(t.Context(), 1000); err != nil {
		t.Fatal(err)
	}
	if v := runVerify(t, b.c, b.a); v.Encrypted || v.Peers[0].Verdict != verify.NotShown || !strings.Contains(v.Peers[0].Reason, "wgcnid doctor node-b") {
		t.Errorf("%+v", v)
	}
	b.stopHelper(t, 0, true)
	if out, err := b.a.Wgcnid(t.Context(), "verify"); err == nil || !strings.Contains(err.Error(), "wgcni0 is missing") {
		t.Errorf("%v: %s", err, out)
	}
}
