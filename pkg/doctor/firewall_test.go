package doctor

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestJudgeNftables(t *testing.T) {
	alone(t)
	none := uint32(0)
	wg := Packet{
		Proto: unix.IPPROTO_UDP, DstPort: 51820, In: "eth0", State: stateNew, Mark: &none,
		Src: netip.MustParseAddr("192.0.2.7"), Dst: netip.MustParseAddr("192.0.2.1"),
	}
	wg6 := wg
	wg6.IPv6, wg6.Src, wg6.Dst = true, netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("2001:db8::1")
	unknown := Packet{Proto: unix.IPPROTO_UDP, DstPort: 51820}
	const base = "chain in { type filter hook input priority 0; "
	for _, tt := range []struct {
		name   string
		table  string
		packet Packet
		want   Tri
		by     string // the rule, where it is dropped
	}{
		{"empty", base + "}", wg, No, ""},
		{"policy", base + "policy drop; }", wg, Yes, "chain in: policy drop"},
		{"accepted before the policy", base + "policy drop; udp dport 51820 accept; }", wg, No, ""},
		{"another port", base + "policy drop; udp dport 51821 accept; }", wg, Yes, "policy drop"},
		{"another protocol", base + "policy drop; tcp dport 51820 accept; }", wg, Yes, "policy drop"},
		{"drop by port", base + "udp dport 51820 drop; }", wg, Yes, "udp dport 51820 drop"},
		{"reject", base + "udp dport 51820 reject; }", wg, Yes, "udp dport 51820 reject"},
		{"range", base + "udp dport 50000-52000 drop; }", wg, Yes, "udp dport 50000-52000 drop"},
		{"outside of the range", base + "udp dport 50000-51819 drop; }", wg, No, ""},
		{"at least", base + "udp dport >= 51820 drop; }", wg, Yes, ""},
		{"below", base + "udp dport < 51820 drop; }", wg, No, ""},
		{"anonymous set", base + "udp dport { 53, 51820 } drop; }", wg, Yes, "udp dport @__set"},
		{"not in a set", base + "udp dport != { 53, 67 } drop; }", wg, Yes, "udp dport != @__set"},
		{"named set of ranges", "set ports { type inet_service; flags interval; elements = { 50000-52000 }; }\n" + base + "policy drop; udp dport @ports accept; }", wg, No, ""},
		{"set of addresses", "set peers { type ipv4_addr; elements = { 192.0.2.7 }; }\n" + base + "policy drop; ip saddr @peers accept; }", wg, No, ""},
		{"set of prefixes", "set peers { type ipv4_addr; flags interval; elements = { 192.0.2.0/28 }; }\n" + base + "policy drop; ip saddr @peers accept; }", wg, No, ""},
		{"not in the prefixes", "set peers { type ipv4_addr; flags interval; elements = { 192.0.2.0/30 }; }\n" + base + "policy drop; ip saddr @peers accept; }", wg, Yes, ""},
		{"source not known", "set peers { type ipv4_addr; elements = { 192.0.2.7 }; }\n" + base + "policy drop; ip saddr @peers accept; }", unknown, Maybe, ""},
		{"prefix", base + "ip saddr 192.0.2.0/29 drop; }", wg, Yes, "ip saddr 192.0.2.0/29 drop"},
		{"other prefix", base + "ip saddr 192.0.2.8/29 drop; }", wg, No, ""},
		{"interface", base + `iifname "eth0" drop; }`, wg, Yes, `iifname "eth0" drop`},
		{"other interface", base + `iifname != "eth1" drop; }`, wg, Yes, `iifname != "eth1" drop`},
		{"wildcard", base + `iifname "eth*" drop; }`, wg, Yes, `iifname "eth*" drop`},
		{"interface not known", base + `iifname "eth0" drop; }`, unknown, Maybe, ""},
		{"new", base + "ct state new drop; }", wg, Yes, "ct state new drop"},
		{"established only", base + "policy drop; ct state established,related accept; }", wg, Yes, "policy drop"},
		{"state map", base + "policy drop; ct state vmap { established : accept, new : jump more }; } \nchain more { udp dport 51820 accept; }", wg, No, ""},
		{"state map without it", base + "policy drop; ct state vmap { established : accept }; }", wg, Yes, ""},
		{"mark", base + "meta mark 0x0 drop; }", wg, Yes, "mark 0x0 drop"},
		{"masked mark", base + "meta mark and 0x4 == 0x4 drop; }", wg, No, ""},
		{"jump and return", base + "jump more; drop; } \nchain more { udp dport 51820 return; accept; }", wg, Yes, ""},
		{"jump and accept", base + "jump more; drop; } \nchain more { udp dport 51820 accept; }", wg, No, ""},
		{"goto does not come back", base + "goto more; drop; } \nchain more { udp dport 53 drop; }", wg, No, ""},
		{"rate limit", base + "udp dport 51820 limit rate over 10/second drop; }", wg, Maybe, ""},
		{"what is not known may match", base + "policy drop; meta skuid 0 accept; }", wg, Maybe, ""},
		{"first certain drop counts", base + "meta skuid 0 drop; udp dport 51820 drop; }", wg, Yes, "udp dport 51820 drop"},
		{"other family's rule", base + "ip6 saddr ::/0 drop; }", wg, No, ""},
		{"IPv6", base + "ip6 saddr 2001:db8::/32 drop; }", wg6, Yes, "ip6 saddr 2001:db8::/32 drop"},
		{"comment", base + `udp dport 51820 counter drop comment "no tunnels"; }`, wg, Yes, `comment "no tunnels"`},
		{"several chains", base + "}\nchain later { type filter hook input priority 10; udp dport 51820 drop; }", wg, Yes, "chain later"},
		{"accept ends its chain only", base + "accept; }\nchain later { type filter hook input priority 10; policy drop; }", wg, Yes, "chain later: policy drop"},
	} {
		sh(t, "flush ruleset\ntable inet t {\n"+tt.table+"\n}\n", "nft", "-f", "-")
		rules, err := readNftables()
		if err != nil || rules.Unread != "" {
			t.Fatal(err, rules.Unread)
		}
		fate := rules.Judge(tt.packet, HookInput)
		if fate.Dropped != tt.want || !strings.Contains(fate.String(), tt.by) {
			t.Errorf("%s: dropped %v by %s; want %v by %q", tt.name, fate.Dropped, fate, tt.want, tt.by)
		}
	}
}

func TestJudgeIptablesNft(t *testing.T) {
	alone(t)
	none := uint32(0)
	wg := Packet{Proto: unix.IPPROTO_UDP, DstPort: 51820, In: "eth0", State: stateNew, Mark: &none}
	for _, tt := range []struct {
		rule string
		want Tri
	}{
		{"-p udp --dport 51820 -j DROP", Yes},
		{"-p udp -m multiport --dports 53,51820 -j DROP", Yes},
		{"-p udp -m multiport --dports 50000:52000 -j DROP", Yes},
		{"-p udp -m multiport --dports 53,67 -j DROP", No},
		{"-p udp -m multiport ! --dports 53,67 -j DROP", Yes},
		{"-p tcp --dport 51820 -j DROP", No},
		{"-m conntrack --ctstate NEW -j DROP", Yes},
		{"-m conntrack --ctstate ESTABLISHED,RELATED -j DROP", No},
		{"-m mark --mark 0x4/0x4 -j DROP", No},
		{"-m comment --comment why -p udp -j REJECT", Yes},
		{"! -i eth0 -j DROP", No},
		{"-p udp -m limit --limit 5/min -j DROP", Maybe},
		{"-p udp -m string --string x --algo bm -j DROP", Maybe},
	} {
		sh(t, "", "iptables", "-F", "INPUT")
		sh(t, "", append([]string{"iptables", "-A", "INPUT"}, strings.Fields(tt.rule)...)...)
		rules, err := readNftables()
		if err != nil {
			t.Fatal(err)
		}
		if fate := rules.Judge(wg, HookInput); fate.Dropped != tt.want {
			t.Errorf("%s: dropped %v by %s, want %v", tt.rule, fate.Dropped, fate, tt.want)
		}
	}
	sh(t, "", "iptables", "-t", "mangle", "-A", "PREROUTING", "-j", "MARK", "--set-xmark", "0x6/0xff")
	rules, err := readNftables()
	if err != nil {
		t.Fatal(err)
	}
	if got := rules.SettersOf(4); len(got) != 1 || !strings.Contains(got[0].In.String(), "table ip mangle, chain PREROUTING") {
		t.Errorf("who sets bit 4: %v", got)
	}
	if got := rules.SettersOf(8); len(got) != 0 {
		t.Errorf("who sets bit 8: %v", got)
	}
}

func TestJudgeSave(t *testing.T) {
	const save = `# Generated by iptables-save
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:ours - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p udp -m comment --comment "let \"them\" in" -m multiport --dports 53,51000:51999 -j ours
-A ours -s 192.0.2.0/24 -j ACCEPT
-A ours -m set --match-set friends src -j ACCEPT
COMMIT
`
	rules := Ruleset{Chains: parseSave("ip", save)}
	if len(rules.Chains) != 4 || len(rules.Chains[0].Rules) != 3 {
		t.Fatalf("%+v", rules)
	}
	p := Packet{Proto: unix.IPPROTO_UDP, DstPort: 51820, In: "eth0", State: stateNew, Src: netip.MustParseAddr("192.0.2.7")}
	for _, tt := range []struct {
		name   string
		change func(*Packet)
		want   Tri
	}{
		{"accepted", func(*Packet) {}, No},
		{"by a set that is not known", func(p *Packet) { p.Src = netip.MustParseAddr("198.51.100.1") }, Maybe},
		{"source not known", func(p *Packet) { p.Src = netip.Addr{} }, Maybe},
		{"another port", func(p *Packet) { p.DstPort = 52000 }, Yes},
		{"an answer", func(p *Packet) { p.DstPort, p.State = 52000, stateEstablished }, No},
		{"loopback", func(p *Packet) { p.DstPort, p.In = 52000, "lo" }, No},
		{"IPv6 does not come here", func(p *Packet) { p.IPv6, p.Src = true, netip.Addr{} }, No},
	} {
		q := p
		tt.change(&q)
		if fate := rules.Judge(q, HookInput); fate.Dropped != tt.want {
			t.Errorf("%s: dropped %v by %s, want %v", tt.name, fate.Dropped, fate, tt.want)
		}
	}
	q := p
	q.DstPort = 52000
	if got, want := rules.Judge(q, HookInput).letIn(51820), "`iptables-legacy -t filter -I INPUT -p udp --dport 51820 -j ACCEPT`"; !strings.HasPrefix(got, want) {
		t.Errorf("mend: %s, want %s", got, want)
	}
}

// Random rules, and what the kernel really does with a packet. An answer that is
// certain must be right.
func TestJudgeAgainstTheKernel(t *testing.T) {
	alone(t)
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	server, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	port := server.LocalAddr().(*net.UDPAddr).Port
	none := uint32(0)
	loopback := netip.MustParseAddr("127.0.0.1")
	certain := 0
	const rounds = 60
	for range rounds {
		text := randomTable(r, port)
		sh(t, text, "nft", "-f", "-")
		rules, err := readNftables()
		if err != nil {
			t.Fatal(err)
		}
		client, err := net.DialUDP("udp4", nil, server.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Fatal(err)
		}
		from := client.LocalAddr().(*net.UDPAddr).Port
		fate := rules.Judge(Packet{
			Proto: unix.IPPROTO_UDP, SrcPort: uint16(from), DstPort: uint16(port), Src: loopback, Dst: loopback, In: "lo", Mark: &none, State: stateNew,
		}, HookPrerouting, HookInput)
		arrived := arrives(t, client, server)
		_ = client.Close()
		if fate.Dropped == Maybe {
			continue
		}
		certain++
		if arrived == (fate.Dropped == Yes) {
			t.Fatalf("seed %d: the packet arrives: %v, but it is dropped: %v by %s; rules:\n%s", seed, arrived, fate.Dropped, fate, text)
		}
	}
	if certain < rounds/2 {
		t.Errorf("seed %d: %d certain answers of %d only", seed, certain, rounds)
	}
}

// arrives sends one datagram. On loopback it is there when the call returns, if it
// is not dropped.
func arrives(t *testing.T, client, server *net.UDPConn) bool {
	t.Helper()
	if _, err := client.Write([]byte("x")); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatal(err)
	}
	_ = server.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	_, _, err := server.ReadFrom(make([]byte, 10))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return err == nil
}

// randomTable has two base chains, and chains that they jump to.
func randomTable(r *rand.Rand, port int) string {
	pick := func(words ...string) string { return words[r.IntN(len(words))] }
	match := func() string {
		return pick("", "udp dport "+fmt.Sprint(port), fmt.Sprintf("udp dport %d-%d", port-r.IntN(3), port+r.IntN(3)), "udp dport != 53",
			fmt.Sprintf("udp dport { 53, %d }", port+r.IntN(2)), "tcp dport 1-60000", `iifname "lo"`, `iifname "l*"`, `iifname "eth0"`,
			"ip saddr 127.0.0.0/8", "ip saddr 127.0.0.0/30", "ip daddr 10.0.0.0/8", "ip saddr @peers", "ip saddr != @peers",
			"ct state new", "ct state established", "ct state != new", "meta mark 0", "meta mark and 0x4 == 0x4", "meta l4proto udp", "meta nfproto ipv4",
			"ip protocol udp", fmt.Sprintf("udp dport vmap { 53 : drop, %d : %s }", port, pick("drop", "accept", "jump a")), "limit rate 1000/second", "counter")
	}
	chain := func(targets ...string) string {
		var b strings.Builder
		for range r.IntN(5) {
			verdicts := append([]string{"accept", "drop", "return", "counter", "reject"}, targets...)
			m := match()
			if strings.Contains(m, "vmap") && !strings.Contains(m, "jump") {
				fmt.Fprintf(&b, "    %s\n", m)
			} else if !strings.Contains(m, "vmap") {
				fmt.Fprintf(&b, "    %s %s\n", m, pick(verdicts...))
			}
		}
		return b.String()
	}
	policy := func() string { return pick("accept", "accept", "drop") }
	return "flush ruleset\ntable inet t {\n  set peers { type ipv4_addr; flags interval; elements = { 127.0.0.0/" + fmt.Sprint(8+r.IntN(25)) + " }; }\n" +
		"  chain b {\n" + chain() + "  }\n  chain a {\n" + chain("jump b", "goto b") + "  }\n" +
		"  chain in { type filter hook input priority 0; policy " + policy() + ";\n" + chain("jump a", "goto a", "jump b") + "  }\n" +
		"  chain pre { type filter hook " + pick("prerouting", "input") + " priority -5; policy " + policy() + ";\n" + strings.ReplaceAll(chain("jump a", "goto b"), "reject", "drop") + "  }\n}\n"
}

// Whatever iptables-save prints, it is read.
func FuzzParseSave(f *testing.F) {
	f.Add("*filter\n:INPUT DROP [0:0]\n-A INPUT -p udp -m udp --dport 1:2 ! -s 192.0.2.0/24 -m comment --comment \"a b\" -j X\nCOMMIT\n")
	f.Add("*filter\n:-A\n-A \n")
	f.Add("*filter\n:A\n-A A !\n-A A -j\n-A\n-A A --dports ,:,9")
	f.Fuzz(func(_ *testing.T, text string) {
		rules := Ruleset{Chains: parseSave("ip", text)}
		rules.Judge(Packet{Proto: 17, DstPort: 51820, In: "eth0", State: stateNew}, HookPrerouting, HookInput, HookForward)
		rules.SettersOf(4)
	})
}
