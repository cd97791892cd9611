package operate

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/doctor"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/test/cluster"
)

// fault is something that is broken on purpose, and what the doctor has to say.
type fault struct {
	name  string
	args  []string // of the doctor
	spoil func(t *testing.T, b *bed)
	mend  func(t *testing.T, b *bed)
	id    string // of the check that names it
	level doctor.Level
	found string // in what it found
	do    string // in how to mend it
}

// bed is a mesh of two nodes.
type bed struct {
	c       *cluster.Cluster
	a, b    *cluster.Node
	helpers []*cluster.Process
}

func newBed(t *testing.T, o cluster.NetworkOptions) *bed {
	c, helpers, _ := cluster.NewMeshT(t, 2, 1, o)
	return &bed{c: c, a: c.Nodes[0], b: c.Nodes[1], helpers: helpers}
}

// on runs commands on a node; each is a line of the shell.
func on(n func(*bed) *cluster.Node, lines ...string) func(*testing.T, *bed) {
	return func(t *testing.T, b *bed) {
		t.Helper()
		for _, l := range lines {
			if _, err := n(b).Run(t.Context(), "sh", "-ec", l); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func onA(lines ...string) func(*testing.T, *bed) {
	return on(func(b *bed) *cluster.Node { return b.a }, lines...)
}

func onB(lines ...string) func(*testing.T, *bed) {
	return on(func(b *bed) *cluster.Node { return b.b }, lines...)
}

// stopHelper stops the helper of one node, and loses its tunnel where that is wanted.
func (b *bed) stopHelper(t *testing.T, i int, tunnelToo bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Patience(10*time.Second))
	defer cancel()
	if err := b.helpers[i].Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if tunnelToo {
		if _, err := b.c.Nodes[i].LoseTunnel(ctx); err != nil {
			t.Fatal(err)
		}
		b.awaitLink(t, i, false)
	}
}

func (b *bed) awaitLink(t *testing.T, i int, want bool) {
	t.Helper()
	n := b.c.Nodes[i]
	err := cluster.Poll(t.Context(), "the tunnel's interface to come or go", func() error {
		return n.Do(func() error {
			if _, err := net.InterfaceByName(cluster.Interface); (err == nil) != want {
				return fmt.Errorf("it is there: %v", err == nil)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (b *bed) startHelper(t *testing.T, i int) {
	t.Helper()
	h, err := b.c.Nodes[i].StartHelper()
	if err != nil {
		t.Fatal(err)
	}
	b.helpers[i] = h
}

// well waits until a node is healthy again.
func (b *bed) well(t *testing.T) {
	t.Helper()
	for _, n := range b.c.Nodes {
		var checks []doctor.Check
		err := cluster.Poll(t.Context(), n.Name+" to be well again", func() error {
			checks = diagnose(t, b.c, n)
			if doctor.Count(checks, doctor.Fail)+doctor.Count(checks, doctor.Warn) > 0 {
				return fmt.Errorf("%s", describe(checks))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// named checks that the doctor names the fault, and says how to mend it.
func (f fault) named(t *testing.T, b *bed) {
	t.Helper()
	args := f.args
	if !strings.HasPrefix(f.id, "peer/") && !strings.HasPrefix(f.id, "mtu/") {
		args = append([]string{"--quick"}, args...)
	}
	f.among(t, diagnose(t, b.c, b.a, args...))
}

func (f fault) among(t *testing.T, checks []doctor.Check) {
	t.Helper()
	i := slices.IndexFunc(checks, func(c doctor.Check) bool { return c.ID == f.id })
	if i < 0 {
		t.Fatalf("no check %s:%s", f.id, describe(checks))
	}
	if c := checks[i]; c.Level != f.level || !strings.Contains(c.Found, f.found) || !strings.Contains(c.Mend, f.do) || f.do == "" {
		t.Errorf("%s is %s: %s\n  mend: %s\nwant %s with %q and %q; all:%s", f.id, c.Level, c.Found, c.Mend, f.level, f.found, f.do, describe(checks))
	}
}

func (b *bed) run(t *testing.T, faults []fault) {
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			f.spoil(t, b)
			f.named(t, b)
			if f.mend != nil {
				f.mend(t, b)
			}
		})
		if t.Failed() {
			return // the next one would start from a broken bed
		}
	}
	b.well(t)
}

// What the machine's administrator, or another program, has done to the network.
func TestDoctorNamesNetworkFaults(t *testing.T) {
	b := newBed(t, cluster.NetworkOptions{})
	b.run(t, []fault{
		{
			name:  "firewall that lets only SSH in",
			spoil: onA(`nft add table inet fw`, `nft 'add chain inet fw in { type filter hook input priority 0; policy drop; }'`, `nft add rule inet fw in ct state established accept`, `nft add rule inet fw in tcp dport { 22, 443 } accept`),
			mend:  onA(`nft delete table inet fw`),
			id:    "firewall", level: doctor.Fail, found: "nftables table inet fw, chain in: policy drop", do: "`nft insert rule inet fw in udp dport 51820 accept`",
		},
		{
			name:  "rule of iptables, two chains deep",
			spoil: onA(`iptables -N BLOCK`, `iptables -A BLOCK -p udp -m udp --dport 51820 -j DROP`, `iptables -A INPUT -i eth0 -j BLOCK`),
			mend:  onA(`iptables -F INPUT`, `iptables -F BLOCK`, `iptables -X BLOCK`),
			id:    "firewall", level: doctor.Fail, found: "table ip filter, chain BLOCK: udp dport 51820", do: "`iptables -t filter -I BLOCK -p udp --dport 51820 -j ACCEPT`",
		},
		{
			name:  "forwarding dropped by policy",
			spoil: onA(`iptables -P FORWARD DROP`),
			mend:  onA(`iptables -P FORWARD ACCEPT`),
			id:    "forward", level: doctor.Fail, found: "table ip filter, chain FORWARD: policy drop", do: "`iptables -t filter -I FORWARD -o wgcni0 -j ACCEPT`",
		},
		{
			name:  "forwarding switched off",
			spoil: onA(`sysctl -qw net.ipv4.ip_forward=0`),
			mend:  onA(`sysctl -qw net.ipv4.ip_forward=1`),
			id:    "forwarding", level: doctor.Fail, found: "does not forward", do: "sysctl -w net.ipv4.ip_forward=1",
		},
		{
			name:  "policy rule of another program",
			spoil: onA(`ip route add 10.244.0.0/16 via 192.0.2.1 table 500`, `ip rule add to 10.244.0.0/16 lookup 500 priority 50`),
			mend:  onA(`ip rule del priority 50`, `ip route flush table 500`),
			id:    "rules", level: doctor.Fail, found: "takes traffic to 10.244.0.0/16", do: "`ip -4 rule del priority 50`",
		},
		{
			name:  "route of another program in our table",
			spoil: onA(`ip route add 10.244.2.0/25 via 192.0.2.1 table 30567`),
			mend:  onA(`ip route del 10.244.2.0/25 table 30567`),
			id:    "routes", level: doctor.Fail, found: "10.244.2.0/25 dev eth0", do: "ip route del",
		},
		{
			name:  "our mark is somebody else's, too",
			spoil: onA(`nft add table inet marker`, `nft 'add chain inet marker pre { type filter hook prerouting priority -150; }'`, `nft add rule inet marker pre ip saddr 203.0.113.0/24 meta mark set meta mark or 0x4`),
			mend:  onA(`nft delete table inet marker`),
			id:    "mark", level: doctor.Warn, found: "table inet marker, chain pre", do: `"fwmark"`,
		},
		{
			name:  "a narrow link on the way",
			spoil: func(t *testing.T, b *bed) { underlayMTU(t, b, 1400) },
			mend:  func(t *testing.T, b *bed) { underlayMTU(t, b, 1500) },
			id:    "mtu/node-b", level: doctor.Fail, found: "packets of 13", do: `"mtu": 13`,
		},
	})
}

// underlayMTU sets that of the wire to node-b, which drops what does not fit and
// tells nobody, as a switch does.
func underlayMTU(t *testing.T, b *bed, mtu int) {
	t.Helper()
	if _, err := b.c.Underlay.Run(t.Context(), "ip", "link", "set", "node-b", "mtu", fmt.Sprint(mtu)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.c.Underlay.Run(t.Context(), "ip", "link", "set", cluster.Bridge, "mtu", "1500"); err != nil {
		t.Fatal(err)
	}
}

// What has become of the node's own parts.
func TestDoctorNamesNodeFaults(t *testing.T) {
	b := newBed(t, cluster.NetworkOptions{})
	empty := t.TempDir()
	old := t.TempDir()
	for _, plugin := range []string{"bridge", "wgcni"} {
		script := "#!/bin/sh\necho 'CNI plugin wgcni v0.0.1: encrypts pod traffic' >&2\n"
		if err := os.WriteFile(filepath.Join(old, plugin), []byte(script), 0o755); err != nil { //nolint:gosec // it is to be run
			t.Fatal(err)
		}
	}
	var port *net.UDPConn
	b.run(t, []fault{
		{
			name:  "a configuration that comes first",
			spoil: onA(`echo '{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"ptp"}]}' > /etc/cni/net.d/05-other.conflist`),
			mend:  onA(`rm /etc/cni/net.d/05-other.conflist`),
			id:    "conflist", level: doctor.Fail, found: "05-other.conflist, which does not chain wgcni", do: "wgcnid install",
		},
		{
			name:  "a configuration that is half written",
			spoil: onA(`printf '{"cniVersion":"1.0.0"' > /etc/cni/net.d/05-other.conflist`),
			mend:  onA(`rm /etc/cni/net.d/05-other.conflist`),
			id:    "conflist", level: doctor.Fail, found: "unexpected end of JSON", do: "remove it",
		},
		{
			name: "plugin missing", args: []string{"--bin-dir", empty}, spoil: onA(),
			id: "plugins", level: doctor.Fail, found: "bridge, wgcni is missing", do: "wgcnid install",
		},
		{
			name: "plugin of another version", args: []string{"--bin-dir", old}, spoil: onA(),
			id: "version", level: doctor.Warn, found: "the plugin is v0.0.1", do: "wgcnid install",
		},
		{
			name:  "key that others may read",
			spoil: onA(`chmod 644 /var/lib/wgcni/private.key`),
			mend:  onA(`chmod 600 /var/lib/wgcni/private.key`),
			id:    "key", level: doctor.Fail, found: "0644", do: "chmod 600 /var/lib/wgcni/private.key",
		},
		{
			name:  "registry away",
			spoil: func(t *testing.T, b *bed) { rename(t, b.c.Shared, b.c.Shared+".away") },
			mend:  func(t *testing.T, b *bed) { rename(t, b.c.Shared+".away", b.c.Shared) },
			id:    "registry", level: doctor.Fail, found: "cannot be read", do: "mend what it names",
		},
		{
			name:  "helper not running",
			spoil: func(t *testing.T, b *bed) { b.stopHelper(t, 0, false) },
			id:    "helper", level: doctor.Fail, found: "wgcnid does not run", do: "systemctl start wgcnid",
		},
		{
			name:  "filter removed while no helper is there",
			spoil: onA(`nft delete table inet wgcni`),
			id:    "nftables", level: doctor.Fail, found: "it is missing", do: "wgcnid puts it back",
		},
		{
			name: "tunnel gone while no helper is there",
			spoil: func(t *testing.T, b *bed) {
				if _, err := b.a.LoseTunnel(t.Context()); err != nil {
					t.Fatal(err)
				}
				b.awaitLink(t, 0, false)
			},
			id: "wireguard", level: doctor.Fail, found: "wgcni0 is missing, and wgcnid does not run", do: "start wgcnid",
		},
		{
			name:  "interface name taken",
			spoil: onA(`ip link add wgcni0 type bridge`),
			mend:  onA(`ip link del wgcni0`),
			id:    "wireguard", level: doctor.Fail, found: "is a bridge interface of somebody else", do: "`ip link delete wgcni0`",
		},
		{
			name: "UDP port taken",
			spoil: func(t *testing.T, b *bed) {
				err := b.a.Do(func() (err error) {
					port, err = net.ListenUDP("udp", &net.UDPAddr{Port: 51820})
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
				b.startHelper(t, 0)
				b.awaitLink(t, 0, true)
			},
			mend: func(t *testing.T, _ *bed) {
				if err := port.Close(); err != nil {
					t.Fatal(err)
				}
			},
			id: "port", level: doctor.Fail, found: "WireGuard cannot have it", do: "ss -ulpn",
		},
	})
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// What is wrong at the other end, as far as that can be told from this one: all at
// once, since the doctor gives each the time to answer.
func TestDoctorNamesPeerFaults(t *testing.T) {
	c, helpers, _ := cluster.NewMeshT(t, 4, 1, cluster.NetworkOptions{})
	b := &bed{c: c, a: c.Nodes[0], b: c.Nodes[2], helpers: helpers}
	b.stopHelper(t, 1, true)
	onB(`nft add table inet fw`, `nft 'add chain inet fw in { type filter hook input priority 0; }'`, `nft add rule inet fw in udp dport 51820 drop`)(t, b)
	if err := c.Nodes[3].SetLoss(t.Context(), 1000); err != nil {
		t.Fatal(err)
	}
	checks := diagnose(t, c, b.a)
	for _, f := range []fault{
		{name: "no helper and no tunnel there", id: "peer/node-b", level: doctor.Fail, found: "nobody listens on UDP port 51820", do: "on node-b: start wgcnid"},
		{name: "firewall there", id: "peer/node-c", level: doctor.Fail, found: "its machine answers a plain ping", do: "on node-c: `wgcnid doctor node-a`"},
		{name: "cable cut", id: "peer/node-d", level: doctor.Fail, found: "does not answer a plain ping either", do: "node-d is up"},
	} {
		t.Run(f.name, func(t *testing.T) { f.among(t, checks) })
	}
}

// Another secret at one node: each says what the other would have to be believed.
func TestDoctorNamesTrustFaults(t *testing.T) {
	secrets := []string{freshSecret(t), freshSecret(t)}
	b := newBed(t, cluster.NetworkOptions{Secrets: secrets[:1]})
	b.well(t)
	o := cluster.NetworkOptions{Secrets: secrets[1:]}
	if err := b.a.Configure(o); err != nil {
		t.Fatal(err)
	}
	b.run(t, []fault{
		{
			name: "another secret", spoil: onA(),
			id: "conflicts", level: doctor.Fail, found: "it is this one that has the wrong secret", do: "copy /etc/wgcni/secret from another node",
		},
		{
			name: "secret that others may read", spoil: onA(`chmod 644 /etc/wgcni/secret`),
			mend: func(t *testing.T, b *bed) {
				if err := b.a.Configure(cluster.NetworkOptions{Secrets: secrets[:1]}); err != nil {
					t.Fatal(err)
				}
			},
			id: "secret", level: doctor.Fail, found: "open to others", do: "mend that",
		},
	})
}

func freshSecret(t *testing.T) string {
	t.Helper()
	s, err := identity.NewSecret(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return s.Reveal()
}
