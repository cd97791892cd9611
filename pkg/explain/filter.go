package explain

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// A passage is a packet as the filter sees it, at the hooks that it meets.
type passage struct {
	in, out  string // "" at a hook where there is none
	src, dst netip.Addr
	next     netip.Addr // the router; invalid where dst is on the link
	marked   bool
}

// A finding is the rule that decided, and what it did.
type finding struct {
	chain string
	rule  string
	drop  bool
}

func (f finding) String() string {
	if f.drop {
		return fmt.Sprintf("chain %s: %s: dropped", f.chain, f.rule)
	}
	return fmt.Sprintf("chain %s: %s: passes", f.chain, f.rule)
}

const tableName = "inet " + kernel.TableName

// filter evaluates the table's chains over the sets that were observed, in the
// order of pkg/kernel/filter_rules.go and filter_nodes.go.
type filter struct{ mesh.Filter }

// tunnel reports whether an interface is one of the two that encrypt.
func (f filter) tunnel(link string) bool { return isTunnel(f.Interface, link) }

func isTunnel(primary, link string) bool {
	return link == primary || link == mesh.SpareInterface(primary)
}

func (f filter) family(p passage) string {
	if p.dst.Is6() {
		return "6"
	}
	return "4"
}

// forward is what the forward hook says of a packet that passes through.
func (f filter) forward(p passage) finding {
	link, v := f.Interface, f.family(p)
	at := finding{chain: "forward"}
	if f.tunnel(p.out) {
		at.rule = fmt.Sprintf("oifname %q", p.out)
		return at
	}
	if f.tunnel(p.in) && inSet(f.Local, p.hop()).IsValid() {
		at.rule = fmt.Sprintf("iifname %q nexthop @local%s return", p.in, v)
		return at
	}
	if f.tunnel(p.in) && inSet(f.Behind, p.dst).IsValid() {
		at.rule = fmt.Sprintf("iifname %q daddr @behind%s return", p.in, v)
		return at
	}
	if inSet(f.Cluster, p.src).IsValid() && inSet(f.Guarded, p.dst).IsValid() {
		if f.plainOut(p) {
			return finding{"forward, plain-out", fmt.Sprintf("oifname != %q saddr @cluster%s daddr @guarded%s, counter dropped-out", link, v, v), true}
		}
	}
	if !f.tunnel(p.in) && inSet(f.Guarded, p.src).IsValid() && inSet(f.Cluster, p.dst).IsValid() {
		if f.plainIn(p.src, p.dst) {
			return finding{"forward, plain-in", fmt.Sprintf("iifname != %q saddr @guarded%s daddr @cluster%s, counter dropped-in", link, v, v), true}
		}
	}
	switch n := f.Nodes; {
	case n.Mark == 0:
	case inSet(f.Cluster, p.src).IsValid() && slices.Contains(n.Held, p.dst) && !p.marked:
		return finding{"forward, node-out", fmt.Sprintf("oifname != %q saddr @cluster%s daddr @held%s, counter dropped-out", link, v, v), true}
	case !f.tunnel(p.in) && slices.Contains(n.Held, p.src) && inSet(f.Cluster, p.dst).IsValid():
		return finding{"forward", fmt.Sprintf("iifname != %q saddr @held%s daddr @cluster%s, counter dropped-in", link, v, v), true}
	}
	at.rule = "no rule holds it"
	return at
}

// output is what the postrouting hook says, of what is made here and of what passes through.
func (f filter) output(p passage) finding {
	v := f.family(p)
	at := finding{chain: "output"}
	switch {
	case f.tunnel(p.out):
		at.rule = fmt.Sprintf("leaves by %s", p.out)
		return at
	case inSet(f.Withheld, p.dst).IsValid() && f.plainOut(p):
		return finding{"output, plain-out", fmt.Sprintf("oifname != %q daddr @withheld%s, counter dropped-out", f.Interface, v), true}
	case f.Nodes.Mark != 0 && slices.Contains(f.Nodes.Held, p.dst) && !p.marked && p.out != "lo":
		return finding{"output, node-out", fmt.Sprintf("oifname != %q daddr @held%s, counter dropped-out", f.Interface, v), true}
	}
	at.rule = "no rule holds it"
	return at
}

// input is what the input hook says of a packet for this machine itself.
func (f filter) input(p passage) finding {
	v := f.family(p)
	at := finding{chain: "input"}
	switch {
	case f.tunnel(p.in):
		at.rule = fmt.Sprintf("came by %s", p.in)
		return at
	case inSet(f.Withheld, p.src).IsValid() && inSet(f.Cluster, p.dst).IsValid() && f.plainIn(p.src, p.dst):
		return finding{"input, plain-in", fmt.Sprintf("iifname != %q saddr @withheld%s daddr @cluster%s, counter dropped-in", f.Interface, v, v), true}
	}
	at.rule = "no rule holds it"
	return at
}

// hop is where the packet's route leads.
func (p passage) hop() netip.Addr {
	if p.next.IsValid() {
		return p.next
	}
	return p.dst
}

// plainOut reports whether chain plain-out drops: unless the far end is here.
func (f filter) plainOut(p passage) bool {
	return !f.here(p.hop()) && !inSet(f.Behind, p.dst).IsValid() && !slices.Contains(f.Exempt, p.dst)
}

func (f filter) plainIn(src, dst netip.Addr) bool {
	return !f.here(src) && !slices.Contains(f.Exempt, src) && !slices.Contains(f.Exempt, dst)
}

func (f filter) here(a netip.Addr) bool {
	return inSet(f.Local, a).IsValid() || slices.Contains(f.Pods, a)
}

// source is what becomes of the address of a packet that goes into the tunnel;
// kept is false if it is replaced.
func (f filter) source(a netip.Addr) (rule string, kept bool) {
	v := "4"
	if a.Is6() {
		v = "6"
	}
	switch {
	case inSet(f.Local, a).IsValid():
		return "chain kept: saddr @local" + v + " snat to ip saddr", true
	case slices.Contains(f.Pods, a):
		return "chain kept: saddr @pods" + v + " snat to ip saddr", true
	case slices.Contains(f.Nodes.Own, a):
		return "chain kept: saddr @own" + v + " snat to ip saddr", true
	case !inSet(f.Cluster, a).IsValid():
		return "chain replaced: saddr != @cluster" + v + " masquerade", false
	case slices.Contains(f.Exempt, a):
		return "chain replaced: saddr @exempt" + v + " masquerade", false
	case inSet(f.Masqueraded, a).IsValid():
		return "chain replaced: saddr @masqueraded" + v + " masquerade", false
	}
	return "no rule of ours changes it", true
}
