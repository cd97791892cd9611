package operate

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/doctor"
	"github.com/wgcni/wgcni/test/cluster"
)

// diagnose runs the doctor on a node, and checks that its exit status says the same.
func diagnose(t *testing.T, c *cluster.Cluster, n *cluster.Node, args ...string) []doctor.Check {
	t.Helper()
	flags := []string{"doctor", "--json", "--bin-dir", c.BinDir}
	if slices.Contains(c.Machines, n) {
		flags = append(flags, "--config", cluster.StanzaFile)
	}
	cmd := n.Command(t.Context(), filepath.Join(c.BinDir, "wgcnid"), append(flags, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var d struct {
		OK     bool           `json:"ok"`
		Checks []doctor.Check `json:"checks"`
	}
	if jerr := json.Unmarshal(out, &d); jerr != nil {
		t.Fatalf("wgcnid doctor: %v: %s\n%s", err, stderr.String(), out)
	}
	if failed := doctor.Count(d.Checks, doctor.Fail) > 0; failed != (err != nil) || failed == d.OK {
		t.Errorf("the exit status is %v, ok is %v; %s", err, d.OK, describe(d.Checks))
	}
	return d.Checks
}

func describe(checks []doctor.Check) string {
	var b strings.Builder
	for _, c := range checks {
		if c.Level != doctor.OK {
			fmt.Fprintf(&b, "\n%s %s: %s\n  mend: %s", c.Level, c.ID, c.Found, c.Mend)
		}
	}
	return b.String()
}

// healthy fails the test for every alarm.
func healthy(t *testing.T, checks []doctor.Check) {
	t.Helper()
	if len(checks) < 20 {
		t.Errorf("%d checks only", len(checks))
	}
	if doctor.Count(checks, doctor.Fail)+doctor.Count(checks, doctor.Warn) > 0 {
		t.Errorf("false alarms on a healthy node:%s", describe(checks))
	}
	for _, c := range checks {
		if c.ID == "" || c.Title == "" || c.Looked == "" || c.Found == "" {
			t.Errorf("%+v says too little", c)
		}
	}
}

func TestDoctorHealthy(t *testing.T) {
	c, _, _ := cluster.NewMeshT(t, 3, 1, cluster.NetworkOptions{})
	for _, n := range c.Nodes {
		healthy(t, diagnose(t, c, n))
	}
	out, err := c.Nodes[0].Wgcnid(t.Context(), "doctor", "--bin-dir", c.BinDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(out)
}

// firewalld is how a distribution's firewall looks that lets WireGuard in: zones,
// sets, a reverse path filter, and a policy that is a last rule.
const firewalld = `table inet firewalld {
  chain mangle_PREROUTING { type filter hook prerouting priority -140; policy accept; jump zones_pre; }
  chain zones_pre { iifname "eth0" goto pre_public; goto pre_public; }
  chain pre_public { return; }
  chain rpfilter { type filter hook prerouting priority -290; policy accept;
    meta nfproto ipv6 icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
    meta nfproto ipv6 fib saddr . mark . iif oif missing drop
  }
  chain filter_INPUT { type filter hook input priority 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    jump zones_in
    ct state { invalid } drop
    reject with icmpx type admin-prohibited
  }
  chain zones_in { iifname { "cni0", "wgcni0" } accept; iifname "eth0" goto in_public; goto in_public; }
  chain in_public { jump in_public_allow; meta l4proto { icmp, ipv6-icmp } accept; }
  chain in_public_allow { tcp dport 22 ct state { new, untracked } accept; udp dport { 53, 51820 } ct state { new, untracked } accept; }
  chain filter_FORWARD { type filter hook forward priority 10; policy accept;
    ct state { established, related } accept
    iifname { "cni0", "wgcni0" } accept
    ct state { invalid } drop
    reject with icmpx type admin-prohibited
  }
}
`

// docker is what it does to the filters of a node, and kube-proxy beside it.
var docker = []string{
	"iptables -P FORWARD DROP", "iptables -N DOCKER-USER", "iptables -A DOCKER-USER -j RETURN", "iptables -N KUBE-FORWARD",
	"iptables -A FORWARD -j DOCKER-USER", "iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
	"iptables -A FORWARD -j KUBE-FORWARD", "iptables -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
	"iptables -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT", "iptables -A FORWARD -s 10.244.0.0/16 -j ACCEPT", "iptables -A FORWARD -d 10.244.0.0/16 -j ACCEPT",
	"iptables -t nat -N KUBE-MARK-MASQ", "iptables -t nat -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
}

// Whatever a mesh is like, and whatever else is on its nodes: what works is not
// called broken.
func TestDoctorRaisesNoFalseAlarm(t *testing.T) {
	for _, tt := range []struct {
		name    string
		network cluster.NetworkOptions
		before  func(*testing.T, *bed) // what is there before any helper
		after   func(*testing.T, *bed)
	}{
		{name: "ptp, preferred, and a secret", network: cluster.NetworkOptions{Example: "ptp.conflist", Stanza: map[string]any{"encryption": "preferred"}, Secrets: []string{freshSecret(t)}}},
		{
			name: "node traffic, behind strict filters", network: cluster.NetworkOptions{Stanza: map[string]any{"encryptNodes": true}},
			before: func(t *testing.T, b *bed) {
				const strict = "for f in all default eth0; do echo 1 >/proc/sys/net/ipv4/conf/$f/rp_filter; done"
				onA(strict)(t, b)
				onB(strict)(t, b)
			},
		},
		{
			name: "firewalld", after: func(t *testing.T, b *bed) {
				if _, err := b.a.Batch(t.Context(), firewalld, "nft", "-f", "-"); err != nil {
					t.Fatal(err)
				}
			},
		},
		{name: "docker and kube-proxy", after: onA(docker...)},
		{
			name: "behind NAT", network: cluster.NetworkOptions{Stanza: map[string]any{"endpoint": "none"}},
			before: func(t *testing.T, b *bed) {
				onA(`nft 'add table ip fw; add chain ip fw in { type filter hook input priority 0; }; add rule ip fw in ct state established,related accept; add rule ip fw in udp dport 51820 drop'`)(t, b)
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := cluster.NewT(t, 2)
			b := &bed{c: c, a: c.Nodes[0], b: c.Nodes[1]}
			if tt.before != nil {
				tt.before(t, b)
			}
			if tt.network.Stanza["endpoint"] != nil { // of two that nobody can call none could reach the other
				joinOneByOne(t, b, tt.network)
			} else if _, err := c.JoinAll(t.Context(), tt.network); err != nil {
				t.Fatal(err)
			}
			for _, n := range c.Nodes {
				if _, err := n.AddPod(t.Context(), cluster.NetworkName, n.Name+"-pod", cluster.PodOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			if tt.after != nil {
				tt.after(t, b)
			}
			before := dropped(t, c)
			for _, n := range c.Nodes {
				healthy(t, diagnose(t, c, n))
			}
			if after := dropped(t, c); after != before {
				t.Errorf("the doctor's own packets are counted as plaintext that was dropped: %v, %v before", after, before)
			}
		})
	}
}

// dropped is what both nodes have dropped since it would have been in the clear.
func dropped(t *testing.T, c *cluster.Cluster) (n uint64) {
	t.Helper()
	for _, node := range c.Nodes {
		s, err := node.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n += s.Dropped.Out.Packets + s.Dropped.In.Packets
	}
	return n
}

// joinOneByOne gives the options to the first node only.
func joinOneByOne(t *testing.T, b *bed, o cluster.NetworkOptions) {
	t.Helper()
	for i, n := range b.c.Nodes {
		if i > 0 {
			o.Stanza = nil
		}
		if err := n.Configure(o); err != nil {
			t.Fatal(err)
		}
		if _, err := n.StartHelper(); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A machine beside the cluster has no conflist, no plugin and no pods.
func TestDoctorOfAMachine(t *testing.T) {
	c := cluster.NewT(t, 1)
	stanza := map[string]any{"externalCIDRs": []string{"192.0.2.192/26", "2001:db8:1::200/120"}}
	if _, err := c.JoinAll(t.Context(), cluster.NetworkOptions{Stanza: stanza}); err != nil {
		t.Fatal(err)
	}
	m, err := c.AddMachine(t.Context(), "database")
	if err != nil {
		t.Fatal(err)
	}
	stanza["encryptNodes"] = true
	if err := m.Configure(cluster.NetworkOptions{Stanza: stanza}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.StartHelper(); err != nil {
		t.Fatal(err)
	}
	err = cluster.Poll(t.Context(), "each to have the other", func() error {
		for _, n := range []*cluster.Node{c.Nodes[0], m} {
			if s, err := n.Status(t.Context()); err != nil || !s.OK || len(s.Peers) != 1 {
				return fmt.Errorf("%s: %s %w", n.Name, s.Verdict, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	healthy(t, diagnose(t, c, c.Nodes[0]))
	healthy(t, diagnose(t, c, m))
}

// Where the configuration is broken the doctor says so, and looks at what it can.
func TestDoctorWithoutConfiguration(t *testing.T) {
	c := cluster.NewT(t, 1)
	n := c.Nodes[0]
	checks := diagnose(t, c, n)
	f := fault{id: "config", level: doctor.Fail, found: "no network configuration chains wgcni", do: "mend what it names"}
	f.among(t, checks)
	f = fault{id: "conflist", level: doctor.Fail, found: "no such file", do: "--cni-dir"}
	f.among(t, checks)
	if err := n.Configure(cluster.NetworkOptions{Stanza: map[string]any{"encyption": "required"}}); err != nil {
		t.Fatal(err)
	}
	f = fault{id: "config", level: doctor.Fail, found: `encryption`, do: "mend what it names"}
	f.among(t, diagnose(t, c, n))
	if err := n.Configure(cluster.NetworkOptions{}); err != nil {
		t.Fatal(err)
	}
	checks = diagnose(t, c, n)
	for _, f := range []fault{
		{id: "helper", level: doctor.Fail, found: "wgcnid does not run", do: "systemctl start wgcnid"},
		{id: "key", level: doctor.Fail, found: "this node has no key yet", do: "start wgcnid"},
		{id: "wireguard", level: doctor.Fail, found: "has not joined yet", do: "start wgcnid"},
	} {
		f.among(t, checks)
	}
	if out, err := n.Wgcnid(t.Context(), "doctor", "nobody"); err == nil || !strings.Contains(err.Error(), `knows no machine "nobody"`) {
		t.Errorf("%v: %s", err, out)
	}
}

// A container that may not open raw sockets, or root without that right, is told so;
// the peers are not called broken for it.
func TestDoctorWithoutRawSockets(t *testing.T) {
	b := newBed(t, cluster.NetworkOptions{})
	b.well(t) // with a handshake
	out, err := b.a.Run(t.Context(), "setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw",
		filepath.Join(b.c.BinDir, "wgcnid"), "doctor", "--bin-dir", b.c.BinDir)
	if err != nil || !strings.Contains(out, "no ping was sent: cannot open an ICMP socket; without CAP_NET_RAW nobody can") || strings.Contains(out, "FAIL") {
		t.Errorf("%v: %s", err, out)
	}
}

// What the doctor says may be sent to anybody.
func TestDoctorTellsNoSecret(t *testing.T) {
	secret := freshSecret(t)
	b := newBed(t, cluster.NetworkOptions{Secrets: []string{secret}})
	key, err := b.a.ReadFile("/var/lib/wgcni/private.key")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"doctor"}, {"doctor", "--json"}, {"verify"}, {"verify", "--json"}} {
		out, _ := b.a.Wgcnid(t.Context(), args...)
		for _, hidden := range []string{strings.TrimSpace(key), secret, secret[len(secret)-20:]} {
			if len(out) < 100 || strings.Contains(out, hidden) {
				t.Errorf("wgcnid %v tells a secret, or nothing:\n%s", args, out)
			}
		}
	}
}
