package doctor

import (
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"

	"github.com/wgcni/wgcni/pkg/kernel"
)

// manyElements is how many elements of a set are read; whether something is in a
// larger one is not known.
const manyElements = 20000

// readNftables reads all filters of nftables, and with them those that iptables-nft
// has written, without our own.
func readNftables() (Ruleset, error) {
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return Ruleset{}, fmt.Errorf("open a netfilter socket: %w", err)
	}
	defer c.CloseLasting() //nolint:errcheck // nothing was written
	chains, err := c.ListChains()
	if err != nil {
		return Ruleset{}, fmt.Errorf("list the chains of nftables: %w", err)
	}
	var out Ruleset
	sets := map[*nftables.Table]nftSets{}
	tables := map[string]*nftables.Table{} // one value a table, whatever each chain has
	for _, nc := range chains {
		family, ok := nftFamilies[nc.Table.Family]
		if !ok || nc.Table.Name == kernel.TableName && nc.Table.Family == nftables.TableFamilyINet {
			continue
		}
		key := family + " " + nc.Table.Name
		if tables[key] == nil {
			tables[key] = nc.Table
			sets[nc.Table] = nftSets{conn: c, table: nc.Table, known: map[string]*nftSet{}}
		}
		t := tables[key]
		rules, err := c.GetRules(t, nc)
		if err != nil { // gone since
			out.Unread = fmt.Sprintf("table %s, chain %s: %v", key, nc.Name, err)
			continue
		}
		out.Chains = append(out.Chains, decodeChain(nc, family, rules, sets[t]))
	}
	return out, nil
}

var nftFamilies = map[nftables.TableFamily]string{
	nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
}

var nftHooks = map[nftables.ChainHook]string{
	*nftables.ChainHookPrerouting: HookPrerouting, *nftables.ChainHookInput: HookInput, *nftables.ChainHookForward: HookForward,
	*nftables.ChainHookOutput: HookOutput, *nftables.ChainHookPostrouting: HookPostrouting,
}

func decodeChain(nc *nftables.Chain, family string, rules []*nftables.Rule, sets nftSets) Chain {
	c := Chain{Backend: backendNft, Family: family, Table: nc.Table.Name, Name: nc.Name}
	if nc.Hooknum != nil {
		c.Hook = nftHooks[*nc.Hooknum]
		if nc.Priority != nil {
			c.Priority = int(*nc.Priority)
		}
		c.Drops = nc.Policy != nil && *nc.Policy == nftables.ChainPolicyDrop
	}
	for _, r := range rules {
		c.Rules = append(c.Rules, decodeRule(r, sets))
	}
	return c
}

func decodeRule(r *nftables.Rule, sets nftSets) Rule {
	for _, e := range r.Exprs { // read now: Decide asks nobody
		if l, ok := e.(*expr.Lookup); ok {
			sets.read(l.SetName)
		}
	}
	out := Rule{Text: nftText(r.Exprs), SetsMark: marksSet(r.Exprs)}
	if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok {
		out.Text += fmt.Sprintf(" comment %q", comment)
	}
	out.Text = strings.TrimSpace(fmt.Sprintf("%s (handle %d)", out.Text, r.Handle))
	out.Decide = func(p Packet) (Tri, Verdict) {
		m := machine{packet: p, sets: sets.known}
		return m.run(r.Exprs)
	}
	return out
}

// nftSets reads sets when a rule first names them.
type nftSets struct {
	conn  *nftables.Conn
	table *nftables.Table
	known map[string]*nftSet
}

// nftSet is a set or a map; nil where it is not known what is in it.
type nftSet struct {
	interval bool
	keyLen   int
	elements []nftables.SetElement // of an interval set: sorted by key
}

func (s nftSets) read(name string) {
	if _, done := s.known[name]; done || s.conn == nil {
		return
	}
	s.known[name] = nil
	set, err := s.conn.GetSetByName(s.table, name)
	if err != nil || set.Concatenation && set.Interval {
		return
	}
	set.Table = s.table
	elements, err := s.conn.GetSetElements(set)
	if err != nil || len(elements) > manyElements {
		return
	}
	s.known[name] = newNftSet(set.Interval, elements)
}
