package kernel

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// The table, as `nft list table inet wgcni` shows it (here for IPv4 and wgcni0):
//
//	chain forward {                              # what passes through this node
//	  type filter hook forward priority filter - 10
//	  oifname "wgcni0" return                    # encrypted: the most frequent comes first
//	  iifname "wgcni0" ip daddr @local4 return   # decrypted, for a pod here
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
//	  ip daddr @local4 return; ip daddr @pods4 return; ip daddr @exempt4 return
//	  counter name "dropped-out" drop
//	}
//	chain plain-in { the same for saddr, and for an exempt daddr }
//	chain keep-source {
//	  type nat hook postrouting priority srcnat - 10
//	  oifname "wgcni0" ip saddr @local4 snat ip to ip saddr
//	  oifname "wgcni0" ip saddr @pods4 snat ip to ip saddr
//	}
//	chain own-source {                           # of what no peer would take as it is (antrea#2697)
//	  type nat hook postrouting priority srcnat + 10
//	  oifname "wgcni0" ip saddr != @cluster4 masquerade
//	  oifname "wgcni0" ip saddr @exempt4 masquerade
//	  oifname "wgcni0" ip saddr @masqueraded4 masquerade
//	}
//
// The rules name clusters, not pods, as sources: the last packets of a pod
// that is being deleted are held too.

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

// chains are those of the table; the nodes' own are among them where mark is not 0.
func chains(link string, mark uint32) []chainSpec {
	filter := func(name string, hook *nftables.ChainHook) chainSpec {
		return chainSpec{name: name, kind: nftables.ChainTypeFilter, hook: hook, priority: filterPriority}
	}
	plainOut, plainIn := chainSpec{name: chainPlainOut}, chainSpec{name: chainPlainIn}
	forward := filter("forward", nftables.ChainHookForward)
	output := filter("output", nftables.ChainHookPostrouting)
	input := filter("input", nftables.ChainHookInput)
	keepSource := chainSpec{name: "keep-source", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: natPriority}
	ownSource := chainSpec{name: "own-source", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: masqPriority}
	for _, f := range families {
		forward.add(f.via(expr.MetaKeyOIFNAME, "oifname", link), verdict("return", expr.VerdictReturn))
		forward.add(f.via(expr.MetaKeyIIFNAME, "iifname", link), f.to(setLocal), verdict("return", expr.VerdictReturn))
		notOut, notIn := f.notVia(expr.MetaKeyOIFNAME, "oifname", link), f.notVia(expr.MetaKeyIIFNAME, "iifname", link)
		forward.add(notOut, f.from(setCluster), f.to(setGuarded), jump(chainPlainOut))
		forward.add(notIn, f.from(setGuarded), f.to(setCluster), jump(chainPlainIn))
		output.add(notOut, f.to(setWithheld), jump(chainPlainOut))
		input.add(notIn, f.from(setWithheld), f.to(setCluster), jump(chainPlainIn))
		for _, set := range []string{setLocal, setPods, setExempt} {
			plainOut.add(f.proto(), f.to(set), verdict("return", expr.VerdictReturn))
			plainIn.add(f.proto(), f.from(set), verdict("return", expr.VerdictReturn))
		}
		plainIn.add(f.proto(), f.to(setExempt), verdict("return", expr.VerdictReturn))
		for _, set := range []string{setLocal, setPods} {
			keepSource.add(f.via(expr.MetaKeyOIFNAME, "oifname", link), f.from(set), f.keepSource())
		}
		outLink := f.via(expr.MetaKeyOIFNAME, "oifname", link)
		ownSource.add(outLink, f.fromOutside(setCluster), masquerade())
		for _, set := range []string{setExempt, setMasq} {
			ownSource.add(outLink, f.from(set), masquerade())
		}
	}
	plainOut.add(count(counterOut), verdict("drop", expr.VerdictDrop))
	plainIn.add(count(counterIn), verdict("drop", expr.VerdictDrop))
	var more []chainSpec
	if mark != 0 {
		more = addNodeRules(link, mark, &forward, &output, &keepSource, &ownSource)
	}
	return append([]chainSpec{plainOut, plainIn}, append(more, forward, output, input, keepSource, ownSource)...)
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

func (f family) interfaceIs(op expr.CmpOp, key expr.MetaKey, text, link string) part {
	name := make([]byte, unix.IFNAMSIZ) // compared with its padding
	copy(name, link)
	p := f.proto()
	return part{p.text + " " + text + " " + link, append(p.exprs,
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: name})}
}

func (f family) via(key expr.MetaKey, text, link string) part {
	return f.interfaceIs(expr.CmpOpEq, key, text, link)
}

func (f family) notVia(key expr.MetaKey, text, link string) part {
	return f.interfaceIs(expr.CmpOpNeq, key, text+" !=", link)
}

func (f family) from(set string) part { return f.inSet("saddr", f.saddr, set) }
func (f family) to(set string) part   { return f.inSet("daddr", f.daddr, set) }

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
