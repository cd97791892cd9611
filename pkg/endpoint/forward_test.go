package endpoint

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var prefixes = cmpopts.EquateComparable(netip.Prefix{})

func TestParseForward(t *testing.T) {
	for text, want := range map[string]Forward{
		"tcp/5432=db.prod.svc.cluster.local:5432": {Protocol: TCP, Port: 5432, Target: "db.prod.svc.cluster.local:5432"},
		"udp/53=10.96.0.10:53":                    {Protocol: UDP, Port: 53, Target: "10.96.0.10:53"},
		"tcp/80=[fd00::1]:8080,allow=laptop,allow=10.251.0.0/24,allow=10.9.9.9,max=7,proxy-protocol": {
			Protocol: TCP, Port: 80, Target: "[fd00::1]:8080", MaxConnections: 7, ProxyProtocol: true,
			Allow: Allow{Names: []string{"laptop"}, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.251.0.0/24"), netip.MustParsePrefix("10.9.9.9/32")}},
		},
	} {
		got, err := ParseForward(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if d := cmp.Diff(want, got, prefixes); d != "" {
			t.Errorf("%s: %s", text, d)
		}
	}
	for text, want := range map[string]string{
		"tcp/5432":                            "names no target",
		"sctp/5432=db:1":                      `"sctp" is neither tcp nor udp`,
		"tcp/0=db:1":                          `port "0" is out of range`,
		"tcp/70000=db:1":                      "out of range",
		"tcp=db:1":                            "out of range",
		"tcp/1=db":                            "not host:port",
		"tcp/1=:5":                            "not host:port",
		"tcp/1=db:0":                          "not host:port",
		"tcp/1=d b:5":                         "not host:port",
		"tcp/1=db:5,alow=x":                   `"alow=x" is none of`,
		"tcp/1=db:5,max=0":                    "no number of connections",
		"udp/1=db:5,max=4":                    "for tcp only",
		"udp/1=db:5,proxy-protocol":           "for tcp only",
		"tcp/1=db:5,allow=":                   "neither the name of a machine",
		"tcp/1=db:5,allow=Laptop":             "neither the name of a machine",
		"tcp/1=db:5,allow=10.0.0.1/8":         "not a prefix",
		"tcp/1=db:5,proxy-protocol=v1":        "takes no value",
		"tcp/1=db:5,max=99999999999999999999": "no number",
	} {
		if _, err := ParseForward(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q in it", text, err, want)
		}
	}
}

func TestParseForwards(t *testing.T) {
	got, err := ParseForwards([]byte(`{"forwards": [
	  {"listen": "tcp/5432", "target": "db:5432", "allow": ["laptop"], "maxConnections": 3, "proxyProtocol": true},
	  {"listen": "udp/53", "target": "10.96.0.10:53"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []Forward{
		{Protocol: TCP, Port: 5432, Target: "db:5432", Allow: Allow{Names: []string{"laptop"}}, MaxConnections: 3, ProxyProtocol: true},
		{Protocol: UDP, Port: 53, Target: "10.96.0.10:53"},
	}
	if d := cmp.Diff(want, got, prefixes); d != "" {
		t.Error(d)
	}
	for _, text := range []string{"", "{", "[]", `{"forward": []}`, `{"forwards": [{"listen": "tcp/1", "targets": "db:1"}]}`, `{} {}`, `{"forwards": [{"listen": "tcp/1", "target": "db:1", "maxConnections": -1}]}`} {
		if got, err := ParseForwards([]byte(text)); err == nil {
			t.Errorf("%s: %v", text, got)
		}
	}
}

func FuzzParseForward(f *testing.F) {
	f.Add("tcp/5432=db.prod.svc.cluster.local:5432,allow=laptop,max=1,proxy-protocol")
	f.Add("udp/53=[::1]:53")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseForward(text)
		if err != nil {
			return
		}
		if _, _, err := splitTarget(got.Target); err != nil || got.Port == 0 {
			t.Errorf("%q: %+v", text, got)
		}
	})
}

func FuzzParseForwards(f *testing.F) {
	f.Add([]byte(`{"forwards": [{"listen": "tcp/5432", "target": "db:5432", "allow": ["laptop"]}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := ParseForwards(text)
		for _, f := range got {
			if _, _, terr := splitTarget(f.Target); terr != nil || err != nil {
				t.Errorf("%q: %+v, %v", text, f, err)
			}
		}
	})
}

func TestCheckForwards(t *testing.T) {
	if err := CheckForwards(nil); err == nil {
		t.Error("nothing to forward is fine")
	}
	tcp, udp := Forward{Protocol: TCP, Port: 53}, Forward{Protocol: UDP, Port: 53}
	if err := CheckForwards([]Forward{tcp, udp}); err != nil {
		t.Error(err)
	}
	if err := CheckForwards([]Forward{tcp, udp, tcp}); err == nil || !strings.Contains(err.Error(), "tcp/53 is named twice") {
		t.Errorf("got %v", err)
	}
}

func TestSources(t *testing.T) {
	p := func(texts ...string) (out []netip.Prefix) {
		for _, s := range texts {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	s := NewSources(p("10.244.0.0/16", "10.251.0.0/24"), map[string][]netip.Prefix{
		"node-a": p("10.244.1.0/24", "10.251.0.9/32"), "vm": p("10.244.1.7/32", "fd00::/64"), "laptop": p("10.251.0.2/32"),
		"one": p("10.251.0.3/32"), "two": p("10.251.0.3/32"),
	})
	for addr, want := range map[string]string{
		"10.244.1.5": "node-a", "10.244.1.7": "vm", "fd00::5": "vm", "10.251.0.2": "laptop", "10.251.0.3": "", "10.9.9.9": "", "10.251.0.9": "node-a",
	} {
		if got := s.Owner(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s belongs to %q, want %q", addr, got, want)
		}
	}
	for _, tt := range []struct {
		allow Allow
		addr  string
		want  bool
	}{
		{Allow{}, "10.244.9.9", true},
		{Allow{}, "10.9.9.9", false},
		{Allow{Names: []string{"laptop"}}, "10.251.0.2", true},
		{Allow{Names: []string{"laptop"}}, "10.251.0.3", false},
		{Allow{Names: []string{"one"}}, "10.251.0.3", false}, // two claim it
		{Allow{Names: []string{"node-a"}}, "10.244.1.7", false},
		{Allow{Prefixes: p("10.9.0.0/16")}, "10.9.9.9", true},
		{Allow{Prefixes: p("10.9.0.0/16")}, "10.244.1.1", false},
	} {
		if got := s.allows(tt.allow, netip.MustParseAddr(tt.addr)); got != tt.want {
			t.Errorf("%+v of %s: %v", tt.allow, tt.addr, got)
		}
	}
	var none *Sources
	if none.allows(Allow{}, loopback4) || none.allows(Allow{Names: []string{"x"}}, loopback4) || !none.allows(Allow{Prefixes: p("127.0.0.1/32")}, loopback4) {
		t.Error("while nobody is known, only listed addresses are allowed")
	}
}
