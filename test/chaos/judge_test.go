package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/test/cluster"
)

const (
	table     = 30567 // the default of a stanza's "table"
	etcdNodes = "/wgcni/nodes/"
	// lookPatience is for one judgement, in which everything answers at once.
	lookPatience = 20 * time.Second
)

// record is as much of a node's record as a judgement needs, read without the
// code that is judged.
type record struct {
	Name      string   `json:"name"`
	PublicKey string   `json:"publicKey"`
	Endpoints []string `json:"endpoints"`
	Prefixes  []claim  `json:"prefixes"`
	Pods      []claim  `json:"pods"`
	Left      bool     `json:"left"`
}

type claim struct {
	Prefix string `json:"prefix"`
}

func (r record) prefixes() (out []string) {
	for _, c := range slices.Concat(r.Prefixes, r.Pods) {
		out = append(out, c.Prefix)
	}
	slices.Sort(out)
	return out
}

// records are those that the registry holds of nodes that have not left.
func (b *bed) records(ctx context.Context) (map[string]record, error) {
	raw := map[string]json.RawMessage{}
	if b.etcd == nil {
		text, err := os.ReadFile(b.RegistryFile())
		if err != nil {
			return nil, err
		}
		var document struct{ Nodes map[string]json.RawMessage }
		if err := json.Unmarshal(text, &document); err != nil {
			return nil, fmt.Errorf("the registry's file: %w", err)
		}
		raw = document.Nodes
	} else {
		text, err := b.etcd.Ctl(ctx, "get", etcdNodes, "--prefix", "--write-out", "json")
		if err != nil {
			return nil, err
		}
		var answer struct{ KVs []struct{ Key, Value []byte } }
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			return nil, fmt.Errorf("etcdctl printed %s: %w", text, err)
		}
		for _, kv := range answer.KVs {
			raw[strings.TrimPrefix(string(kv.Key), etcdNodes)] = kv.Value
		}
	}
	out := map[string]record{}
	for name, text := range raw {
		var r record
		if err := json.Unmarshal(text, &r); err != nil {
			return nil, fmt.Errorf("record of %s: %w", name, err)
		}
		if !r.Left {
			out[name] = r
		}
	}
	return out, nil
}

// judge says what is not as it should be: by what the nodes say themselves, and by
// what ip, wg and nft show against what the registry has.
func (b *bed) judge(ctx context.Context) error {
	records, err := b.records(ctx)
	if err != nil {
		return err
	}
	if len(records) != len(b.members) {
		return fmt.Errorf("the registry has %d nodes of %d", len(records), len(b.members))
	}
	ctx, cancel := context.WithTimeout(ctx, cluster.Patience(lookPatience))
	defer cancel()
	errs := make([]error, len(b.members))
	var all sync.WaitGroup
	for i, m := range b.members {
		all.Go(func() {
			if err := errors.Join(m.judgeStatus(ctx, len(b.members)), m.judgeKernel(ctx, records), m.judgeKnown(ctx, records)); err != nil {
				errs[i] = fmt.Errorf("%s: %w", m.Name, err)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// judgeStatus asks the node itself, by the one diff that CHECK and the helper go by.
func (m *member) judgeStatus(ctx context.Context, nodes int) error {
	s, err := m.Status(ctx)
	switch {
	case err != nil:
		return err
	case !s.OK:
		return fmt.Errorf("%s %v", s.Verdict, s.Pending)
	case !s.Helper:
		return errors.New("no helper runs")
	case len(s.Peers) != nodes-1:
		return fmt.Errorf("%d peers of %d", len(s.Peers), nodes-1)
	case s.Pods != len(m.pods):
		return fmt.Errorf("the store has %d pods of %d", s.Pods, len(m.pods))
	}
	return nil
}

// look prints all that is to be judged, and no key but public ones.
const look = `set -e
wg show wgcni0 dump | sed '1s/^[^\t]*\t//; 2,$s/^\([^\t]*\)\t[^(\t][^\t]*/\1\tset/'
wg pubkey </var/lib/wgcni/private.key
echo ==; ip -4 rule; ip -6 rule
echo ==; ip -4 route show table all proto 119; ip -6 route show table all proto 119
echo ==; ip -o address show dev wgcni0 scope global; ip -o link show dev wgcni0
echo ==; nft list table inet wgcni`

// tunnel is what wg shows, in words.
type tunnel struct {
	PublicKey string
	KeyOnDisk string
	Port      string
	Mark      string
	Peers     []string // key, whether there is a preshared key, keepalive, allowed IPs
	Rules     []string
	Routes    []string
	Addresses []string
	Link      string
	Filter    string
	Pods      []string // elements of the sets pods4 and pods6
}

func (m *member) judgeKernel(ctx context.Context, records map[string]record) error {
	out, err := m.Run(ctx, "sh", "-c", look)
	if err != nil {
		return fmt.Errorf("look at the kernel: %w: %s", err, strings.TrimSpace(out))
	}
	have, err := parseLook(out)
	if err != nil {
		return err
	}
	want := m.want(records)
	if m.filter == "" { // the first judgement, of a mesh that nothing has happened to
		m.filter = have.Filter
	}
	want.Filter = m.filter
	if d := cmp.Diff(want, have); d != "" {
		return fmt.Errorf("the kernel is not as the registry has it (-want +have):\n%s", d)
	}
	return nil
}

// want is what there should be by the registry's records.
func (m *member) want(records map[string]record) tunnel {
	own := records[m.Name]
	w := tunnel{PublicKey: own.PublicKey, KeyOnDisk: own.PublicKey, Port: "51820", Mark: "0x4"}
	const rule = "110: not from all fwmark 0x4/0x4 lookup 30567 proto 119"
	w.Rules = []string{rule, rule}
	w.Routes = []string{"unreachable 10.244.0.0/16 metric 1048576", "unreachable fd00:244::/32 metric 1048576"}
	source := map[bool]string{}
	for _, c := range own.Prefixes {
		p := netip.MustParsePrefix(c.Prefix)
		source[p.Addr().Is6()] = p.Addr().String()
		w.Routes = append(w.Routes, "throw "+c.Prefix)
		w.Addresses = append(w.Addresses, netip.PrefixFrom(p.Addr(), p.Addr().BitLen()).String())
	}
	for _, p := range m.pods {
		for _, ip := range p.Result.IPs {
			if a := ip.Address.Addr(); !slices.ContainsFunc(own.Prefixes, func(c claim) bool { return netip.MustParsePrefix(c.Prefix).Contains(a) }) {
				w.Routes = append(w.Routes, "throw "+a.String())
				w.Pods = append(w.Pods, a.String())
			}
		}
	}
	psk := "(none)"
	if m.sealed {
		psk = "set"
	}
	for name, r := range records {
		if name == m.Name {
			continue
		}
		w.Peers = append(w.Peers, strings.Join(append([]string{r.PublicKey, psk, "off"}, r.prefixes()...), " "))
		for _, text := range r.prefixes() {
			p := netip.MustParsePrefix(text)
			if p.IsSingleIP() {
				text = p.Addr().String() // as ip prints it
			}
			w.Routes = append(w.Routes, text+" dev wgcni0 src "+source[p.Addr().Is6()])
		}
	}
	w.Link = "up 1420"
	w.sort()
	return w
}

func (t *tunnel) sort() {
	for _, list := range [][]string{t.Peers, t.Rules, t.Routes, t.Addresses, t.Pods} {
		slices.Sort(list)
	}
}

var (
	counts   = regexp.MustCompile(`packets \d+ bytes \d+`)
	podSet   = regexp.MustCompile(`(?s)(set pods[46] \{[^}]*?)\s*elements = \{([^}]*)\}`)
	verified = regexp.MustCompile(`(?s)(set verified[46] \{[^}]*?)\s*elements = \{([^}]*)\}`) // what has passed lately
	linkMTU  = regexp.MustCompile(`<([A-Z_,]*)> mtu (\d+)`)
	sections = 5
)

// parseLook reads what look prints.
func parseLook(text string) (t tunnel, err error) {
	parts := strings.Split(text, "==\n")
	if len(parts) != sections {
		return t, fmt.Errorf("%d parts instead of %d: %s", len(parts), sections, text)
	}
	lines := strings.Split(strings.TrimSpace(parts[0]), "\n")
	for i, line := range lines {
		words := strings.Fields(line)
		switch {
		case i == 0 && len(words) == 3:
			t.PublicKey, t.Port, t.Mark = words[0], words[1], words[2]
		case i == len(lines)-1 && len(words) == 1:
			t.KeyOnDisk = words[0]
		case len(words) == 8:
			allowed := strings.Split(words[3], ",")
			slices.Sort(allowed)
			t.Peers = append(t.Peers, strings.Join(append([]string{words[0], words[1], words[7]}, allowed...), " "))
		default:
			return t, fmt.Errorf("wg shows a line of %d words", len(words))
		}
	}
	for line := range strings.Lines(parts[1]) {
		if strings.Contains(line, "lookup 30567") || strings.Contains(line, "proto 119") {
			t.Rules = append(t.Rules, strings.Join(strings.Fields(line), " "))
		}
	}
	for line := range strings.Lines(parts[2]) {
		line = strings.NewReplacer("table 30567", "", "proto 119", "", "dev lo", "", "scope link", "", "pref medium", "", "metric 1024 ", "").Replace(line)
		t.Routes = append(t.Routes, strings.Join(strings.Fields(line), " "))
	}
	for line := range strings.Lines(parts[3]) {
		words := strings.Fields(line)
		if len(words) > 3 && strings.HasPrefix(words[2], "inet") {
			p, err := netip.ParseAddr(strings.Split(words[3], "/")[0])
			if err != nil {
				return t, err
			}
			t.Addresses = append(t.Addresses, netip.PrefixFrom(p, p.BitLen()).String())
		} else if found := linkMTU.FindStringSubmatch(line); found != nil {
			t.Link = map[bool]string{true: "up ", false: "down "}[slices.Contains(strings.Split(found[1], ","), "UP")] + found[2]
		}
	}
	t.Filter = verified.ReplaceAllString(counts.ReplaceAllString(parts[4], ""), "$1")
	for _, set := range podSet.FindAllStringSubmatch(t.Filter, -1) {
		for _, a := range strings.Split(set[2], ",") {
			t.Pods = append(t.Pods, strings.TrimSpace(a))
		}
	}
	t.Filter = podSet.ReplaceAllString(t.Filter, "$1")
	t.sort()
	return t, nil
}

// judgeKnown compares what is on the node's disk, by which it boots while the
// registry is away, with what the registry has.
func (m *member) judgeKnown(ctx context.Context, records map[string]record) error {
	known, damaged, err := store.LoadKnown(ctx, m.Path("/var/lib/wgcni"))
	if err = errors.Join(err); err != nil {
		return err
	}
	if damaged != nil {
		return damaged
	}
	have := map[string]string{}
	for name, r := range known.Records.Nodes {
		if !r.Left {
			var prefixes []string
			for _, c := range slices.Concat(r.Prefixes, r.Pods) {
				prefixes = append(prefixes, c.Prefix.String())
			}
			slices.Sort(prefixes)
			have[name] = fmt.Sprintf("%s %s %s", r.PublicKey, r.Endpoints, prefixes)
		}
	}
	want := map[string]string{}
	for name, r := range records {
		want[name] = fmt.Sprintf("%s %s %s", r.PublicKey, r.Endpoints, r.prefixes())
	}
	if d := cmp.Diff(want, have); d != "" {
		return fmt.Errorf("peers.db is not as the registry has it (-want +have):\n%s", d)
	}
	return nil
}

// talk has each pod reach one of every other node, in both families.
func (b *bed) talk(ctx context.Context) error {
	var all sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for _, from := range b.members {
		for _, to := range b.members {
			if from == to || len(to.pods) == 0 {
				continue
			}
			for i, p := range from.pods {
				there := to.pods[i%len(to.pods)]
				for _, a := range []netip.Addr{there.IPv4(), there.IPv6()} {
					all.Go(func() {
						err := cluster.Poll(ctx, fmt.Sprintf("%s to reach %s at %s", p, there, a), func() error {
							once, cancel := context.WithTimeout(ctx, cluster.Patience(pingPatience))
							defer cancel()
							_, err := cluster.Ping(once, p, a, nil)
							return err
						})
						if err != nil {
							mu.Lock()
							errs = append(errs, err)
							mu.Unlock()
						}
					})
				}
			}
		}
	}
	all.Wait()
	return errors.Join(errs...)
}
