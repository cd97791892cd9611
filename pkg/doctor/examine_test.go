package doctor

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/containerd"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/install"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/probe"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

var (
	now   = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	keyA  = wgtypes.Key{1}
	keyB  = wgtypes.Key{2}
	hostA = netip.MustParseAddr("192.0.2.10")
	atB   = netip.MustParseAddrPort("192.0.2.11:51820")
	podsB = netip.MustParsePrefix("10.244.2.0/24")
)

// wellFacts are those of a node at which nothing is wrong.
func wellFacts() Facts {
	settings := mesh.Settings{
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, Interface: "wgcni0", ListenPort: 51820, SparePort: 51821,
		FwMark: 4, Table: 30567, RulePriority: 110,
	}
	revision := uint64(now.Add(-time.Hour).UnixMilli())
	a := registry.Record{Name: "a", PublicKey: keyA, Endpoints: []string{"192.0.2.10:51820"}, Revision: revision}
	b := registry.Record{Name: "b", PublicKey: keyB, Endpoints: []string{atB.String()}, Revision: revision, Prefixes: []mesh.Claim{{Prefix: podsB}}}
	have := mesh.Peer{Name: "b", PublicKey: keyB, Endpoint: atB, AllowedIPs: []netip.Prefix{podsB}, LastHandshake: now.Add(-time.Minute), ReceiveBytes: 1000, TransmitBytes: 1000}
	link := mesh.Link{Name: "wgcni0", MTU: 1440, Up: true, PublicKey: keyA, ListenPort: 51820, FwMark: 4}
	state := mesh.State{Link: link, Peers: []mesh.Peer{have}, Filter: mesh.Filter{Interface: "wgcni0"}}
	return Facts{
		Now: now, Version: "v1", Config: config.Config{NodeName: "a", Settings: settings, RunDir: "/run/wgcni", StateDir: "/var/lib/wgcni", SecretFile: "/etc/wgcni/secret"},
		Chain: Chains{
			Dir: "/etc/cni/net.d", BinDir: "/opt/cni/bin", PluginVersion: "v1", Containerd: containerd.Config{MaxConfNum: -1},
			Files: []ChainFile{{Name: "10-pods.conflist", Network: "pods", Plugins: []string{"bridge", "wgcni", "portmap"}}},
		},
		Helper: Helper{Running: true, Report: &reconcile.Report{At: now}},
		Files: Files{
			KeyPath: "/var/lib/wgcni/private.key", KeyMode: 0o600, StateMode: 0o700, SecretPath: "/etc/wgcni/secret", SecretIDs: 1,
			NextPath: "/var/lib/wgcni/next.key", NextMode: 0o600, Keys: identity.Keys{Current: keyA, Next: wgtypes.Key{9}, Since: now.Add(-time.Hour)},
		},
		Tunnel: Tunnel{KernelHasIt: true, Kind: "wireguard"},
		Plan:   Plan{Observed: state, State: state, Pods: []store.Attachment{{ContainerID: "x", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.2")}}}},
		Mesh: Mesh{
			Key: keyA, Store: "file:/srv/mesh.json", Fresh: registry.NewSnapshot(a, b),
			Known: store.Known{Self: a, Records: registry.NewSnapshot(a, b)},
		},
		Network: Network{
			Uplinks: []string{"eth0"}, Addresses: []netip.Addr{hostA}, UnderlayMTU: 1500, ForwardsV4: true, ForwardsV6: true, LinkForwards: true,
			ReversePath: map[string]int{"all": 0, "eth0": 1, "wgcni0": 0},
		},
		Peers: []Peer{{
			Name: "b", Key: keyB, Record: b, Wanted: have, Present: true, Have: have, Before: have, Address: podsB.Addr(), Route: "wgcni0",
			Echo: probe.Answer{Answered: true, RTT: time.Millisecond}, Full: probe.Answer{Answered: true}, Machine: probe.Answer{Answered: true},
			Whole: probe.Answer{Answered: true}, WholeSize: 1500,
		}},
	}
}

// rotating has the key of node a be replaced for so long, and wait for these.
func rotating(f *Facts, since time.Duration, waits ...string) {
	b, laptop := registry.Record{Name: "b", Rotation: registry.Rotation{SparePort: 7001}}, registry.Record{Name: "laptop", Place: registry.Place{Via: []string{"a"}}}
	f.Mesh.Known.Records = registry.NewSnapshot(registry.Record{Name: "a"}, b, laptop)
	r := reconcile.RotationReport{Stage: mesh.Out, Since: f.Now.Add(-since), Pairs: 5, Moved: 3}
	for _, name := range waits {
		r.Waiting = append(r.Waiting, reconcile.RotationWait{Node: name, Why: "no handshake"})
	}
	f.Files.Keys.Stage, f.Helper.Report.Rotation = mesh.Out, &r
}

func TestExamineWell(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range Examine(wellFacts()) {
		if c.Level != OK || c.Mend != "" {
			t.Errorf("%+v", c)
		}
		if seen[c.ID] || c.Title == "" || c.Looked == "" || c.Found == "" {
			t.Errorf("%+v: says too little, or is there twice", c)
		}
		seen[c.ID] = true
	}
}

// Each row breaks one thing; the check that is named must say so, and how to mend it.
func TestExamine(t *testing.T) {
	silent := func(f *Facts) *Peer {
		p := &f.Peers[0]
		p.Echo, p.Full, p.Whole = probe.Answer{}, probe.Answer{}, probe.Answer{}
		return p
	}
	never := func(f *Facts) *Peer {
		p := silent(f)
		p.Have.LastHandshake, p.Before.LastHandshake = time.Time{}, time.Time{}
		p.Have.ReceiveBytes, p.Before.ReceiveBytes = 0, 0
		return p
	}
	for _, tt := range []struct {
		name  string
		spoil func(*Facts)
		id    string
		level Level
		found string
		mend  string
	}{
		{"no CNI", func(f *Facts) { f.Config.Bare = true; f.Chain.Files = nil }, "conflist", OK, "no CNI", ""},
		{"wgcni first", func(f *Facts) { f.Chain.Files[0].Plugins = []string{"wgcni", "bridge"} }, "chain", Fail, "comes first", "behind"},
		{"macvlan", func(f *Facts) { f.Chain.Files[0].Plugins[0] = "macvlan" }, "chain", Fail, "bypass", "bridge"},
		{"twice", func(f *Facts) { f.Chain.Files[0].Plugins[2] = "wgcni" }, "chain", Warn, "twice", "one"},
		{"stranger behind", func(f *Facts) { f.Chain.Files[0].Plugins[2] = "nat64" }, "chain", Note, "nat64 runs after wgcni", "behind it"},
		{"plugin of another version", func(f *Facts) { f.Chain.PluginVersion = "v0" }, "version", Warn, "v0", "wgcnid install"},
		{"plugin that is none", func(f *Facts) { f.Chain.PluginError = errors.New("it is another program") }, "version", Fail, "another program", "wgcnid install"},
		{"several networks", func(f *Facts) {
			f.Chain.Containerd = containerd.Config{File: "/etc/containerd/config.toml", MaxConfNum: 0}
			f.Chain.Install = &install.Record{Stage: "installed", Mode: "copy", Source: "10-x.conflist", Target: "10-pods.conflist"}
		}, "conflist", Fail, "max_conf_num = 0", "--in-place"},
		{"another folder", func(f *Facts) { f.Chain.Containerd.ConfDir = "/etc/other" }, "conflist", Warn, "/etc/other", "--cni-dir /etc/other"},
		{"copy gone", func(f *Facts) {
			f.Chain.Install = &install.Record{Stage: "installed", Mode: "copy", Source: "10-pods.conflist", Target: "00-wgcni.conflist"}
		}, "install", Fail, "gone", "wgcnid install"},
		{"copy stale", func(f *Facts) {
			f.Chain.Files = []ChainFile{
				{Name: "00-wgcni.conflist", Plugins: []string{"bridge", "wgcni"}, raw: []string{`{"type":"bridge"}`, `{"type":"wgcni"}`}},
				{Name: "10-pods.conflist", Plugins: []string{"bridge"}, raw: []string{`{"type":"bridge","mtu":1400}`}},
			}
			f.Chain.Install = &install.Record{Stage: "installed", Mode: "copy", Source: "10-pods.conflist", Target: "00-wgcni.conflist"}
		}, "install", Fail, "has changed since", "wgcnid"},
		{"copy current", func(f *Facts) {
			f.Chain.Files = []ChainFile{
				{Name: "00-wgcni.conflist", Plugins: []string{"bridge", "wgcni"}, raw: []string{`{"type":"bridge"}`, `{"type":"wgcni"}`}},
				{Name: "10-pods.conflist", Plugins: []string{"bridge"}, raw: []string{`{"type":"bridge"}`}},
			}
			f.Chain.Install = &install.Record{Stage: "installed", Mode: "copy", Source: "10-pods.conflist", Target: "00-wgcni.conflist"}
		}, "install", OK, "10-pods.conflist", ""},
		{"stopped half way", func(f *Facts) { f.Chain.Install = &install.Record{Stage: "removing", Target: "10-pods.conflist"} }, "install", Warn, "half way", "again"},
		{"pass failed", func(f *Facts) { f.Helper.Report.Error = "no such table" }, "helper", Fail, "no such table", "mend"},
		{"next key for all to read", func(f *Facts) { f.Files.NextMode = 0o644 }, "key", Fail, "next.key, the key that it is replaced by (mode 0644)", "rm /var/lib/wgcni/next.key"},
		{"keys damaged", func(f *Facts) { f.Files.KeysError = errors.New("rotation.json is damaged: delete it") }, "rotation", Fail, "rotation.json is damaged", "do what it says"},
		{"no key at all", func(f *Facts) { f.Files.KeysError, f.Files.KeyError = identity.ErrNoKey, identity.ErrNoKey }, "rotation", OK, "Private key", ""},
		{"no next key", func(f *Facts) { f.Files.Keys.Next = wgtypes.Key{} }, "rotation", Warn, "no next key (/var/lib/wgcni/next.key)", "restart wgcnid"},
		{"spare port taken", func(f *Facts) { f.Tunnel.SpareHolders = []Holder{{12, "dnsd"}} }, "rotation", Warn, "UDP port 51821 is taken by process 12 (dnsd)", "rotationPort"},
		{"spare port taken when it counts", func(f *Facts) {
			f.Tunnel.SpareHolders, f.Files.Keys.Stage = []Holder{{}}, mesh.Out
		}, "rotation", Fail, "cannot be seen", "ss -ulpn sport = :51821"},
		{"rotating without helper", func(f *Facts) { f.Files.Keys.Stage, f.Helper.Running = mesh.Back, false }, "rotation", Warn, "wgcnid does not run", "start wgcnid"},
		{"ordered without helper", func(f *Facts) { f.Files.Ordered, f.Helper.Running = true, false }, "rotation", Warn, "wgcnid does not run", "start wgcnid"},
		{"rotating", func(f *Facts) { rotating(f, time.Second) }, "rotation", OK, "3 of 5 pairs have moved", ""},
		{"rotation waits", func(f *Facts) { rotating(f, time.Minute, "b") }, "rotation", Note, "waits for b (no handshake)", ""},
		{"rotation waits for long", func(f *Facts) { rotating(f, time.Hour, "b") }, "rotation", Warn, "waits for b (no handshake)", "b: see that wgcnid runs there, and let UDP port 7001 in there and 51821 in here; or cut them off"},
		{"rotation waits for an older version", func(f *Facts) { rotating(f, time.Hour, "a") }, "rotation", Warn, "waits for a", "a: update wgcni there"},
		{"rotation waits for a plain machine", func(f *Facts) { rotating(f, time.Hour, "laptop") }, "rotation", Warn, "waits for laptop", "wgcnid peer config"},
		{"rotation waits for many", func(f *Facts) { rotating(f, time.Hour, "b", "b", "b", "b", "b") }, "rotation", Warn, "2 more, which `wgcnid key show` lists", "--force"},
		{"report of a rotation that is over", func(f *Facts) {
			rotating(f, time.Hour, "b")
			f.Files.Keys.Stage = mesh.Resting
		}, "rotation", OK, "none is going on", ""},
		{"rival", func(f *Facts) { f.Helper.Report.Rival = true }, "helper", Fail, "another node", "nodeName"},
		{"first pass", func(f *Facts) { f.Helper.Report = nil }, "helper", Note, "first pass", "wait"},
		{"state folder open", func(f *Facts) { f.Files.StateMode = 0o777 }, "key", Warn, "0777", "chmod 700 /var/lib/wgcni"},
		{"no secret", func(f *Facts) { f.Files.SecretPath = "" }, "secret", Note, "whoever", "wgcnid secret"},
		{"secret unreadable", func(f *Facts) { f.Files.SecretError = errors.New("no such file") }, "secret", Fail, "no such file", "another node"},
		{"link down", func(f *Facts) { f.Plan.Observed.Link.Up = false }, "wireguard", Fail, "is down", "ip link set wgcni0 up"},
		{"another key", func(f *Facts) { f.Plan.Observed.Link.PublicKey = keyB }, "wireguard", Fail, "another key", "restart"},
		{"forgotten", func(f *Facts) { f.Mesh.Forgotten = true; f.Plan.Observed.Link = mesh.Link{} }, "wireguard", Fail, "forgotten", "leave --purge"},
		{"userspace needlessly", func(f *Facts) { f.Tunnel.Kind = "tuntap" }, "wireguard", Warn, "though this kernel has WireGuard", "ip link delete wgcni0"},
		{"filter altered", func(f *Facts) { f.Plan.Observed.Filter.Broken = true }, "nftables", Fail, "changed", "nft monitor"},
		{"sources not verified", func(f *Facts) { f.Plan.Unverified, f.Network.ReversePath["eth0"] = true, 0 }, "nftables", Note, "next to this node", "5.18"},
		{"nor loosely", func(f *Facts) { f.Plan.Unverified, f.Network.ReversePath["all"] = true, 2 }, "nftables", Note, "next to this node", "5.18"},
		{"but strictly", func(f *Facts) { f.Plan.Unverified = true }, "nftables", OK, "", ""},
		{"no nftables", func(f *Facts) { f.Plan.Tables = errors.New("protocol not supported") }, "nftables", Fail, "not supported", "CONFIG_NF_TABLES"},
		{"not as planned", func(f *Facts) {
			f.Plan.Pending = []mesh.Op{mesh.AddLink{Name: "wgcni0"}, mesh.RemoveFilter{}, mesh.RemoveFilter{}, mesh.RemoveFilter{}}
		}, "plan", Fail, "ip link add wgcni0 mtu 0 type wireguard; nft delete table; nft delete table; and 1 more", "wgcnid sync"},
		{"registry read-only", func(f *Facts) { f.Mesh.WriteError = errors.New("read-only file system") }, "registry", Fail, "read-only", "mount it rw"},
		{"registry refuses us", func(f *Facts) { f.Helper.Report.PublishError = "permission denied" }, "registry", Fail, "refuses this node's record", "mend"},
		{"no record", func(f *Facts) { f.Mesh.Fresh = registry.NewSnapshot() }, "record", Fail, "there is none", "log"},
		{"record refused", func(f *Facts) { f.Mesh.Fresh = registry.Snapshot{Invalid: map[string]error{"a": identity.ErrUnsealed}} }, "record", Fail, "refused", "secret"},
		{"record of another", func(f *Facts) {
			f.Mesh.Fresh = registry.NewSnapshot(registry.Record{Name: "a", PublicKey: keyB, Revision: 1})
		}, "record", Fail, "another key", "nodeName"},
		{"rolled back", func(f *Facts) { f.Mesh.Stale = []registry.Stale{{Name: "a", Known: 2, Offered: 1}} }, "record", Fail, "earlier state", "publishes it again"},
		{"endpoint moved", func(f *Facts) { f.Network.Addresses = []netip.Addr{netip.MustParseAddr("192.0.2.77")} }, "record", Fail, "no address of this machine any more", "publishes the new one"},
		{"endpoint behind NAT", func(f *Facts) {
			f.Network.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.1")}
			f.Config.Endpoint = "192.0.2.10:51820"
		}, "record", Note, "as configured", "forwarded"},
		{"forged record", func(f *Facts) {
			f.Mesh.Fresh.Invalid = map[string]error{"c": fmt.Errorf("record c: %w", identity.ErrForged)}
		}, "conflicts", Warn, "record c", "wgcnid nodes"},
		{"claims collide", func(f *Facts) {
			f.Mesh.Conflicts = []mesh.Conflict{{Node: "c", What: "10.244.2.0/24", Reason: "b has it"}}
		}, "conflicts", Warn, "c: 10.244.2.0/24 refused: b has it", "forget"},
		{"others are ahead", func(f *Facts) {
			r := f.Mesh.Known.Records.Nodes["b"]
			r.Revision = uint64(now.Add(time.Minute).UnixMilli())
			f.Mesh.Known.Records.Nodes["b"] = r
		}, "clock", Warn, "up to 1m0s behind the others' (b)", "chronyc makestep"},
		{"set back", func(f *Facts) { f.Helper.Report.At = now.Add(time.Hour) }, "clock", Warn, "1h0m0s behind what it was", "NTP"},
		{"a little ahead", func(f *Facts) {
			r := f.Mesh.Known.Records.Nodes["b"]
			r.Revision = uint64(now.Add(2 * time.Second).UnixMilli())
			f.Mesh.Known.Records.Nodes["b"] = r
		}, "clock", OK, "", ""},
		{"fragments", func(f *Facts) { f.Network.Fragments = "packets leave in fragments: set \"mtu\"" }, "underlay", Warn, "packets leave in fragments", "set \"mtu\""},
		{"no default route", func(f *Facts) { f.Network.Addresses = nil }, "underlay", Warn, "no default route", "endpoint"},
		{"filters unreadable", func(f *Facts) { f.RulesError = errors.New("operation not permitted") }, "firewall", Note, "not permitted", ""},
		{"old iptables, unread", func(f *Facts) { f.Rules.Unread = "no iptables-legacy-save" }, "firewall", Note, "no iptables-legacy-save", ""},
		{"old iptables", func(f *Facts) {
			f.Rules.Chains = parseSave("ip", "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp -m udp --dport 51820 -j DROP\n")
		}, "firewall", Fail, "iptables-legacy table filter, chain INPUT: -A INPUT -p udp", "`iptables-legacy -t filter -I INPUT -p udp --dport 51820 -j ACCEPT`"},
		{"answers only", func(f *Facts) {
			f.Rules.Chains = parseSave("ip", "*filter\n:INPUT DROP [0:0]\n-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n")
		}, "firewall", Fail, "answers get in, and a peer that calls first is dropped by iptables-legacy table filter, chain INPUT: policy drop", "-I INPUT -p udp --dport 51820 -j ACCEPT"},
		{"answers only, and a keepalive", func(f *Facts) {
			f.Config.Keepalive = 25 * time.Second
			f.Rules.Chains = parseSave("ip", "*filter\n:INPUT DROP [0:0]\n-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n")
		}, "firewall", Warn, "the keepalive of 25s", "--dport 51820"},
		{"what is sent", func(f *Facts) {
			f.Rules.Chains = parseSave("ip", "*filter\n:OUTPUT DROP [0:0]\n-A OUTPUT -p tcp -j ACCEPT\n")
		}, "firewall", Fail, "what WireGuard sends", "--sport 51820"},
		{"the spare is not let through", func(f *Facts) {
			f.Rules.Chains = parseSave("ip", "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -o wgcni0 -j ACCEPT\n")
		}, "forward", Note, "by wgcni0x, as it does while keys are rotated", "-o wgcni0x -j ACCEPT"},
		{"the spare is there and not let through", func(f *Facts) {
			f.Plan.Observed.Spare.Link.Name = "wgcni0x"
			f.Rules.Chains = parseSave("ip", "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -o wgcni0 -j ACCEPT\n")
		}, "forward", Fail, "is dropped by", "-o wgcni0x -j ACCEPT"},
		{"both are let through", func(f *Facts) {
			f.Rules.Chains = parseSave("ip", "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -o wgcni0+ -j ACCEPT\n")
		}, "forward", OK, "", ""},
		{"wgcni0 does not forward", func(f *Facts) { f.Network.LinkForwards = false }, "forwarding", Fail, "wgcni0 does not forward", "net.ipv4.conf.wgcni0.forwarding=1"},
		{"gateway", func(f *Facts) { f.Network.Forwarding = "packets are lost: run `sysctl`" }, "forwarding", Fail, "packets are lost", "run `sysctl`"},
		{"our table", func(f *Facts) {
			f.Network.Rules = []PolicyRule{{Text: "50: from all lookup 30567", Family: "ipv4", Priority: 50, Table: 30567}}
		}, "rules", Warn, "uses our table", "ip -4 rule del priority 50"},
		{"our mark", func(f *Facts) {
			f.Network.Rules = []PolicyRule{{Text: "50: fwmark 0x4", Family: "ipv6", Priority: 50, Mark: 4, Mask: 4, Table: 9}}
		}, "rules", Warn, "goes by our mark", "ip -6 rule del priority 50"},
		{"another's mark", func(f *Facts) { f.Network.Rules = []PolicyRule{{Mark: 0x4000, Mask: 0x4000, Table: 9}} }, "rules", OK, "", ""},
		{"route elsewhere", func(f *Facts) { f.Peers[0].Route = "eth0" }, "routes", Fail, "10.244.2.0 (b) by eth0", "ip route get 10.244.2.0"},
		{"route by the spare", func(f *Facts) { f.Peers[0].Route = "wgcni0x" }, "routes", OK, "", ""},
		{"no route", func(f *Facts) { f.Peers[0].Route, f.Peers[0].RouteErr = "", unix.ENETUNREACH }, "routes", Fail, "unreachable", "wgcnid"},
		{"NetworkManager", func(f *Facts) { f.Network.Managers = []string{"NetworkManager"} }, "managers", Note, "wgcni0", "unmanaged-devices=interface-name:wgcni0"},
		{"networkd", func(f *Facts) { f.Network.Managers = []string{"systemd-networkd"} }, "managers", Note, "restarts", "ManageForeignRoutingPolicyRules=no"},
		{"peer missing", func(f *Facts) { f.Peers[0].Present = false }, "peer/b", Fail, "not in the kernel", "planned"},
		{"ICMP dropped there", func(f *Facts) { silent(f).Have.ReceiveBytes++ }, "peer/b", Warn, "no answer", "on b"},
		{"way broken since", func(f *Facts) { silent(f) }, "peer/b", Fail, "its machine answers a plain ping", "UDP to port 51820"},
		{"nobody listens", func(f *Facts) { never(f).Refused = true }, "peer/b", Fail, "nobody listens", "start wgcnid"},
		{"keys differ", func(f *Facts) { never(f).Have.ReceiveBytes = 148 }, "peer/b", Fail, "do not agree on a key", "Cluster secret"},
		{"no route, as its peer has it", func(f *Facts) { silent(f).Route, f.Peers[0].RouteErr = "", unix.EHOSTUNREACH }, "peer/b", Fail, "does not enter the tunnel", "Routes"},
		{"another route, as its peer has it", func(f *Facts) { silent(f).Route = "eth0" }, "peer/b", Fail, "does not enter the tunnel", "Routes"},
		{"machine gone", func(f *Facts) { never(f).Machine = probe.Answer{} }, "peer/b", Fail, "does not answer a plain ping either", "is up"},
		{"no way there", func(f *Facts) { never(f).Machine = probe.Answer{Err: unix.ENETUNREACH} }, "peer/b", Fail, "cannot be reached from here", "ip route get 192.0.2.11"},
		{"behind NAT", func(f *Facts) {
			p := never(f)
			p.Have.Endpoint, p.Before.Endpoint, p.Record.Endpoints = netip.AddrPort{}, netip.AddrPort{}, nil
		}, "peer/b", Warn, "behind NAT", "wgcnid runs"},
		{"name unknown", func(f *Facts) {
			p := never(f)
			p.Have.Endpoint, p.Before.Endpoint, p.Record.Endpoints = netip.AddrPort{}, netip.AddrPort{}, []string{"b.example.org:51820"}
		}, "peer/b", Fail, "b.example.org:51820 has no address", "name server"},
		{"plain machine asleep", func(f *Facts) { never(f).Record.Via = []string{"a"} }, "peer/b", Note, "nothing but WireGuard", "calls"},
		{"quick, idle", func(f *Facts) { f.Quick = true; never(f).Have.TransmitBytes = 0 }, "peer/b", OK, "the next packet starts one", ""},
		{"quick, silent", func(f *Facts) { f.Quick = true; never(f) }, "peer/b", Warn, "nothing came back", "wgcnid doctor b"},
		{"narrow", func(f *Facts) { f.Peers[0].Full = probe.Answer{}; f.Peers[0].Fits = 1340 }, "mtu/b", Fail, "1340 bytes", `"mtu": 1340`},
		{"nothing large", func(f *Facts) { f.Peers[0].Full = probe.Answer{} }, "mtu/b", Fail, "none of 500", "on the way"},
		{"in fragments", func(f *Facts) { f.Peers[0].Whole = probe.Answer{} }, "mtu/b", Note, "in fragments", "MTU"},
		{"nobody yet", func(f *Facts) { f.Peers = nil }, "peers", OK, "none yet", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := wellFacts()
			tt.spoil(&f)
			checks := Examine(f)
			i := slices.IndexFunc(checks, func(c Check) bool { return c.ID == tt.id })
			if i < 0 {
				t.Fatalf("no check %s", tt.id)
			}
			if c := checks[i]; c.Level != tt.level || !strings.Contains(c.Found, tt.found) || !strings.Contains(c.Mend, tt.mend) || tt.level == Fail && c.Mend == "" {
				t.Errorf("%s: %s; mend: %s; want %s with %q and %q", c.Level, c.Found, c.Mend, tt.level, tt.found, tt.mend)
			}
		})
	}
}

// Of a large mesh, those that are well have one line in all.
func TestExamineManyPeers(t *testing.T) {
	f := wellFacts()
	for i := range 5000 {
		p := f.Peers[0]
		p.Name = fmt.Sprintf("n%d", i)
		f.Peers = append(f.Peers, p)
	}
	f.Peers[77].Present = false
	var named []string
	for _, c := range Examine(f) {
		if strings.HasPrefix(c.ID, "peer") || strings.HasPrefix(c.ID, "mtu") {
			named = append(named, c.ID)
		}
	}
	if want := []string{"peer/n76", "peers"}; !slices.Equal(named, want) {
		t.Errorf("lines %v, want %v", named, want)
	}
}

func TestGatherChains(t *testing.T) {
	dir, bin, state := t.TempDir(), t.TempDir(), t.TempDir()
	write := func(path, text string, perm os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), perm); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(dir, "20-b.conf"), `{"name":"b","type":"ptp"}`, 0o644)
	write(filepath.Join(dir, "10-a.conflist"), `{"name":"a","plugins":[{"type":"bridge"},{"type":"wgcni"}]}`, 0o644)
	write(filepath.Join(dir, "30-c.json"), `{"name":`, 0o644)
	write(filepath.Join(dir, "05-d.conflist.bak"), `{}`, 0o644)
	write(filepath.Join(bin, "bridge"), "", 0o644)
	write(filepath.Join(bin, "wgcni"), "#!/bin/sh\necho 'CNI plugin wgcni v7: x'\n", 0o755)
	write(filepath.Join(state, "install.json"), `{"stage":"installed","mode":"copy","source":"s","target":"t","cniDir":"`+dir+`","entry":"{}","plugin":{"path":"`+filepath.Join(bin, "wgcni")+`"}}`, 0o600)
	file := filepath.Join(state, "config.toml")
	write(file, "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.cni]\n  bin_dir = \"/opt/x\"\n  conf_dir = '/etc/x'\n  # max_conf_num = 9\n  max_conf_num = 3\n", 0o644)
	before := containerdFile
	containerdFile = file
	t.Cleanup(func() { containerdFile = before })

	c := GatherChains(t.Context(), dir, "", config.Config{StateDir: state})
	var names []string
	for _, f := range c.Files {
		names = append(names, fmt.Sprintf("%s %v %v", f.Name, f.Plugins, f.Error != nil))
	}
	if want := []string{"10-a.conflist [bridge wgcni] false", "20-b.conf [ptp] false", "30-c.json [] true"}; !slices.Equal(names, want) {
		t.Errorf("files %q, want %q", names, want)
	}
	if want := []string{"bridge"}; !slices.Equal(c.Missing, want) || c.PluginVersion != "v7" || c.PluginError != nil || c.BinDir != bin {
		t.Errorf("missing %v, plugin %q %v, folder %s", c.Missing, c.PluginVersion, c.PluginError, c.BinDir)
	}
	if want := (containerd.Config{File: file, MaxConfNum: 3, ConfDir: "/etc/x", BinDir: "/opt/x"}); c.Containerd != want {
		t.Errorf("containerd %+v, want %+v", c.Containerd, want)
	}
	if c.Install == nil || c.Install.Mode != "copy" {
		t.Errorf("installed %+v", c.Install)
	}
}

// Whatever lies in the CNI folder, it is read.
func FuzzChainFile(f *testing.F) {
	f.Add(`{"name":"a","plugins":[{"type":"wgcni"},7,null]}`)
	f.Add(`{"plugins":{}}`)
	f.Add(`[]`)
	f.Fuzz(func(t *testing.T, text string) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "10.conflist"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		ExamineChains(GatherChains(t.Context(), dir, dir, config.Config{StateDir: dir}), nil)
	})
}
