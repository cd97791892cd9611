package kernel

import (
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// The table, as `nft list table inet wgcni` shows it (here for IPv4 and wgcni0).
// What is there for wgcni0 is there for wgcni0x as well, and what is not for wgcni0
// is for neither of the two: they carry the same while keys are rotated. So the
// table is the same whether there is a second interface or not.
//
//	chain forward {                              # what passes through this node
//	  type filter hook forward priority filter - 10
//	  oifname "wgcni0" goto into-tunnel          # encrypted: the most frequent comes first
//	  iifname "wgcni0" rt ip nexthop @local4 return # decrypted, for a pod here
//	  oifname != "wgcni0" ip saddr @cluster4 ip daddr @guarded4 jump plain-out
//	  iifname != "wgcni0" ip saddr @guarded4 ip daddr @cluster4 jump plain-in
//	}
//	chain output {                               # what this node itself sends, by its last route:
//	  type filter hook postrouting priority filter - 10 # the output hooks see the one before a dnat (kube-proxy's)
//	  oifname != "wgcni0" ip daddr @withheld4 jump plain-out
//	}
//	chain input {                                # what reaches this node itself
//	  type filter hook input priority filter - 10
//	  iifname != "wgcni0" ip saddr @withheld4 ip daddr @cluster4 jump plain-in
//	}
//	chain plain-out {                            # unless the far end is here
//	  rt ip nexthop @local4 return; rt ip nexthop @pods4 return; ip daddr @exempt4 return; ip daddr @behind4 return
//	  counter name "dropped-out" drop
//	}
//	chain plain-in { goto from-here for a local saddr and one of pods, return for an exempt saddr and daddr, then drop }
//	chain keep-source {
//	  type nat hook postrouting priority srcnat - 10
//	  oifname "wgcni0" jump kept
//	}
//	chain kept {
//	  ip saddr @local4 snat ip to ip saddr
//	  ip saddr @pods4 snat ip to ip saddr
//	}
//	chain own-source {                           # of what no peer would take as it is (antrea#2697)
//	  type nat hook postrouting priority srcnat + 10
//	  oifname "wgcni0" jump replaced
//	}
//	chain replaced {
//	  ip saddr != @cluster4 masquerade
//	  ip saddr @exempt4 masquerade
//	  ip saddr @masqueraded4 masquerade
//	}
//
// The rules name clusters, not pods, as sources: the last packets of a pod
// that is being deleted are held too.
//
// A packet is for a pod of this node if the route leads there: the next hop is the
// destination itself where it is on the link (net/ipv4/route.c, rt_nexthop). When a
// pod is gone, so is the route to it, and others would lead what was meant for it,
// decrypted by now, to a router. What is behind a machine that is no node may well be
// behind a router of its own.

const (
	counterOut = "dropped-out"
	counterIn  = "dropped-in"
)

var counterNames = []string{counterOut, counterIn}

func counter(name string) *nftables.NamedObj {
	return &nftables.NamedObj{Table: table(), Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}}
}

type chainSpec struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook // nil: a chain that others jump to
	priority nftables.ChainPriority
	rules    []chainRule
}

type chainRule struct {
	text  string // the rule's comment in the kernel, and its identity
	exprs []expr.Any
}

func (s chainSpec) chain() *nftables.Chain {
	c := &nftables.Chain{Table: table(), Name: s.name}
	if s.hook != nil {
		accept := nftables.ChainPolicyAccept
		c.Type, c.Hooknum, c.Priority, c.Policy = s.kind, s.hook, &s.priority, &accept
	}
	return c
}

func (s chainSpec) sameHook(c *nftables.Chain) bool {
	if s.hook == nil {
		return c.Hooknum == nil
	}
	return c.Type == s.kind && c.Hooknum != nil && *c.Hooknum == *s.hook && c.Priority != nil && *c.Priority == s.priority
}

const (
	chainPlainOut = "plain-out"
	chainPlainIn  = "plain-in"

	filterPriority = nftables.ChainPriority(-10) // ahead of priority filter
	natPriority    = nftables.ChainPriority(90)  // ahead of every masquerade, at srcnat (100)
	masqPriority   = nftables.ChainPriority(110) // behind all of them
)

// chains are those of the table; the nodes' own are among them where mark is not 0,
// and those that verify sources where the kernel can.
func chains(link string, fwMark, mark uint32, verify bool) []chainSpec {
	filter := func(name string, hook *nftables.ChainHook) chainSpec {
		return chainSpec{name: name, kind: nftables.ChainTypeFilter, hook: hook, priority: filterPriority}
	}
	plainOut, plainIn := chainSpec{name: chainPlainOut}, chainSpec{name: chainPlainIn}
	kept, replaced := chainSpec{name: "kept"}, chainSpec{name: "replaced"}
	forward := filter("forward", nftables.ChainHookForward)
	output := filter("output", nftables.ChainHookPostrouting)
	input := filter("input", nftables.ChainHookInput)
	keepSource := chainSpec{name: "keep-source", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: natPriority}
	ownSource := chainSpec{name: "own-source", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: masqPriority}
	back, drop := verdict("return", expr.VerdictReturn), verdict("drop", expr.VerdictDrop)
	intoTunnel, ownSources := back, back
	var first, more []chainSpec // what is jumped to has to be there
	if verify {
		into, here := verifyingChains(fwMark)
		intoTunnel, ownSources = jumpOff(into.name), jumpOff(here.name)
		first = []chainSpec{here, into}
	}
	links := []string{link, mesh.SpareInterface(link)}
	for _, l := range links {
		into := via(expr.MetaKeyOIFNAME, "oifname", l)
		forward.add(into, intoTunnel)
		for _, f := range families {
			forward.add(f.via(expr.MetaKeyIIFNAME, "iifname", l), f.nextHop(setLocal), back)
			forward.add(f.via(expr.MetaKeyIIFNAME, "iifname", l), f.to(setBehind), back)
		}
		keepSource.add(into, jump(kept.name))
		ownSource.add(into, jump(replaced.name))
	}
	for _, f := range families {
		notOut, notIn := f.notVia(expr.MetaKeyOIFNAME, "oifname", links), f.notVia(expr.MetaKeyIIFNAME, "iifname", links)
		forward.add(notOut, f.from(setCluster), f.to(setGuarded), jump(chainPlainOut))
		forward.add(notIn, f.from(setGuarded), f.to(setCluster), jump(chainPlainIn))
		output.add(notOut, f.to(setWithheld), jump(chainPlainOut))
		input.add(notIn, f.from(setWithheld), f.to(setCluster), jump(chainPlainIn))
		for _, set := range []string{setLocal, setPods, setExempt} {
			here := f.nextHop(set)
			if set == setExempt {
				here = f.to(set)
			}
			plainOut.add(f.proto(), here, back)
		}
		plainOut.add(f.proto(), f.to(setBehind), back)
		for _, set := range []string{setLocal, setPods} {
			plainIn.add(f.proto(), f.from(set), ownSources)
		}
		plainIn.add(f.proto(), f.from(setExempt), back)
		plainIn.add(f.proto(), f.to(setExempt), back)
		for _, set := range []string{setLocal, setPods} {
			kept.add(f.proto(), f.from(set), f.keepSource())
		}
		replaced.add(f.proto(), f.fromOutside(setCluster), masquerade())
		for _, set := range []string{setExempt, setMasq} {
			replaced.add(f.proto(), f.from(set), masquerade())
		}
	}
	plainOut.add(count(counterOut), drop)
	plainIn.add(count(counterIn), drop, madeFor(fwMark))
	if mark != 0 {
		more = addNodeRules(links, mark, &forward, &output, &kept, &ownSource)
	}
	return slices.Concat(first, []chainSpec{plainOut, plainIn, kept, replaced}, more, []chainSpec{forward, output, input, keepSource, ownSource})
}

// A part is a piece of a rule: its text, and what the kernel takes.
type part struct {
	text  string
	exprs []expr.Any
}

func (s *chainSpec) add(parts ...part) {
	var r chainRule
	for _, p := range parts {
		if r.text != "" {
			r.text += " "
		}
		r.text += p.text
		r.exprs = append(r.exprs, p.exprs...)
	}
	s.rules = append(s.rules, r)
}

func (f family) proto() part {
	return part{"ipv" + f.name, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{f.nfproto}},
	}}
}

func via(key expr.MetaKey, text, link string) part {
	return part{text + " " + link, []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: linkName(link)},
	}}
}

func (f family) via(key expr.MetaKey, text, link string) part {
	p, by := f.proto(), via(key, text, link)
	return part{p.text + " " + by.text, append(p.exprs, by.exprs...)}
}

// notVia is by none of the links. A set of them would be looked up for longer than
// two names are compared.
func (f family) notVia(key expr.MetaKey, text string, links []string) part {
	p := f.proto()
	p.exprs = append(p.exprs, &expr.Meta{Key: key, Register: 1})
	for _, l := range links {
		p.text += " " + text + " != " + l
		p.exprs = append(p.exprs, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: linkName(l)})
	}
	return p
}

// linkName is an interface's as registers hold it, with its padding.
func linkName(link string) []byte {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, link)
	return name
}

func (f family) from(set string) part { return f.inSet("saddr", f.saddr, set) }
func (f family) to(set string) part   { return f.inSet("daddr", f.daddr, set) }

// nextHop is where the packet's route leads: the router, or else its destination.
func (f family) nextHop(set string) part {
	key := expr.RtNexthop4
	if f.v6 {
		key = expr.RtNexthop6
	}
	return part{"nexthop @" + set + f.name, []expr.Any{
		&expr.Rt{Register: 1, Key: key},
		&expr.Lookup{SourceRegister: 1, SetName: set + f.name},
	}}
}

func (f family) fromOutside(set string) part {
	return part{"saddr != @" + set + f.name, []expr.Any{
		f.load(f.saddr),
		&expr.Lookup{SourceRegister: 1, SetName: set + f.name, Invert: true},
	}}
}

func (f family) inSet(field string, offset uint32, set string) part {
	return part{field + " @" + set + f.name, []expr.Any{
		f.load(offset),
		&expr.Lookup{SourceRegister: 1, SetName: set + f.name},
	}}
}

func (f family) load(offset uint32) *expr.Payload {
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.ln}
}

// keepSource maps the source to itself: the first chain to set a mapping wins,
// and a later masquerade leaves the packet alone.
func (f family) keepSource() part {
	return part{"snat to saddr", []expr.Any{
		f.load(f.saddr),
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto), RegAddrMin: 1},
	}}
}

func masquerade() part { return part{"masquerade", []expr.Any{&expr.Masq{}}} }

func jump(chain string) part {
	return part{"jump " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}}
}

// jumpOff is a jump that does not come back here: a return is one of this chain.
func jumpOff(chain string) part {
	return part{"goto " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}}
}

func verdict(text string, kind expr.VerdictKind) part {
	return part{text, []expr.Any{&expr.Verdict{Kind: kind}}}
}

func count(name string) part {
	return part{"counter " + name, []expr.Any{&expr.Objref{Type: int(nftables.ObjTypeCounter), Name: name}}}
}

func comment(text string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, text)
}

func commentOf(data []byte) string {
	text, _ := userdata.GetString(data, userdata.TypeComment)
	return text
}

// A DropCount is how many packets and bytes the filter has stopped since it was made.
type DropCount struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Drops are the plaintext packets that were kept from leaving and from coming in.
type Drops struct {
	Out DropCount `json:"out"`
	In  DropCount `json:"in"`
}

// Drops reads the table's counters; zero where there is no table.
func (k *Kernel) Drops() (Drops, error) {
	c, err := k.nftConn()
	if err != nil {
		return Drops{}, err
	}
	read := func(name string) DropCount {
		obj, err := c.GetObject(counter(name))
		if err != nil {
			return DropCount{}
		}
		if named, ok := obj.(*nftables.NamedObj); ok {
			if n, ok := named.Obj.(*expr.Counter); ok {
				return DropCount{n.Packets, n.Bytes}
			}
		}
		return DropCount{}
	}
	return Drops{Out: read(counterOut), In: read(counterIn)}, nil
}
