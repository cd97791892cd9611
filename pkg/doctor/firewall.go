package doctor

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// Tri is an answer that may not be known: most of a packet is decided while it is
// under way.
type Tri int8

// The answers, in this order.
const (
	No Tri = iota
	Maybe
	Yes
)

// Not is the opposite; what is not known stays so.
func (t Tri) Not() Tri { return Yes - t }

func tri(b bool) Tri {
	if b {
		return Yes
	}
	return No
}

// Packet is as much of a packet as rules can be asked about without sending it. A
// zero field is one that is not known.
type Packet struct {
	IPv6             bool
	Proto            uint8 // of IP
	SrcPort, DstPort uint16
	Src, Dst         netip.Addr
	In, Out          string  // interfaces
	Mark             *uint32 // nil: not known
	State            uint32  // of connection tracking, as a bit of nft's "ct state"
}

// The bits of "ct state", which are iptables' too (NF_CT_STATE_BIT in
// include/uapi/linux/netfilter/nf_conntrack_common.h).
const (
	stateInvalid     = 1
	stateEstablished = 2
	stateRelated     = 4
	stateNew         = 8
)

// The hooks that matter.
const (
	HookPrerouting  = "prerouting"
	HookInput       = "input"
	HookForward     = "forward"
	HookOutput      = "output"
	HookPostrouting = "postrouting"
)

// The programs that a rule can be changed with.
const (
	backendNft    = "nft"
	backendLegacy = "iptables-legacy"
)

// Ruleset is all filters of a machine but our own.
type Ruleset struct {
	Chains []Chain
	// Unread says which could not be read, and why; "" if all were.
	Unread string
}

// Chain is one chain, of nftables or of iptables.
type Chain struct {
	Backend     string // nft or iptables-legacy
	Family      string // inet, ip or ip6
	Table, Name string
	Hook        string // "": others jump to it
	Priority    int
	Drops       bool // by its policy
	Rules       []Rule
}

// Rule is one rule.
type Rule struct {
	Text string // as nft or iptables would write it
	// Decide says whether the rule matches, and what then becomes of the packet.
	Decide func(Packet) (Tri, Verdict)
	// SetsMark are the bits of the packet's mark that the rule sets.
	SetsMark uint32
}

// Verdict is what a rule that matches does. The zero value goes on with the next.
type Verdict struct {
	Kind   VerdictKind
	Target string // of Jump and Goto
}

// VerdictKind is what becomes of a packet.
type VerdictKind int8

// The verdicts.
const (
	Continue VerdictKind = iota
	Accept
	Drop
	Jump
	Goto
	Return
)

// String names the chain as nft would.
func (c Chain) String() string {
	if c.Backend == backendLegacy {
		return fmt.Sprintf("iptables-legacy table %s, chain %s", c.Table, c.Name)
	}
	return fmt.Sprintf("nftables table %s %s, chain %s", c.Family, c.Table, c.Name)
}

// handles reports whether packets of a family come to the chain.
func (c Chain) handles(ipv6 bool) bool {
	return c.Family == "inet" || c.Family == map[bool]string{true: "ip6", false: "ip"}[ipv6]
}

// Fate is what becomes of a packet at the hooks that it passes.
type Fate struct {
	Dropped Tri
	By      Chain
	Rule    string // "": by the chain's policy
}

// String says who drops it.
func (f Fate) String() string {
	if f.Rule == "" {
		return fmt.Sprintf("%s: policy drop", f.By)
	}
	return fmt.Sprintf("%s: %s", f.By, f.Rule)
}

// Judge sends a packet through the hooks, in this order, and returns the first
// certain drop, else the first possible one.
func (r Ruleset) Judge(p Packet, hooks ...string) Fate {
	w := walk{rules: r, packet: p}
	for _, hook := range hooks {
		var base []Chain
		for _, c := range r.Chains {
			if c.Hook == hook && c.handles(p.IPv6) {
				base = append(base, c)
			}
		}
		slices.SortStableFunc(base, func(a, b Chain) int { return cmp.Compare(a.Priority, b.Priority) })
		for _, c := range base {
			w.base = c
			if left := w.chain(c, Yes, 0); left != No && c.Drops {
				w.drop(left, c, "")
			}
			if w.fate.Dropped == Yes {
				return w.fate
			}
		}
	}
	return w.fate
}

// walk is a packet's way through the chains of a hook.
type walk struct {
	rules  Ruleset
	packet Packet
	base   Chain
	fate   Fate
}

// deepest is more than nftables allows to jump (NFT_JUMP_STACK_SIZE).
const deepest = 32

func (w *walk) drop(certain Tri, by Chain, rule string) {
	if certain > w.fate.Dropped {
		w.fate = Fate{Dropped: certain, By: by, Rule: rule}
	}
}

// chain walks through a chain that the packet comes to as surely as reach says,
// and returns whether it comes back from there.
func (w *walk) chain(c Chain, reach Tri, depth int) Tri {
	if depth > deepest {
		return Maybe
	}
	back := reach // as far as no accept and no drop has come between
	for _, r := range c.Rules {
		matches, v := r.Decide(w.packet)
		sure := min(reach, matches)
		if sure == No || v.Kind == Continue {
			continue
		}
		switch v.Kind {
		case Drop:
			// Whatever is dropped here for certain is so too if an earlier rule may have
			// done it already: that one takes nothing from what is reached for sure.
			w.drop(sure, c, r.Text)
			if matches == Yes {
				return No
			}
		case Accept:
			if matches == Yes {
				return No
			}
			reach, back = Maybe, Maybe
		case Return:
			if matches == Yes {
				return back
			}
			reach = Maybe
		case Jump, Goto:
			returns := w.target(v.Target, c, sure, depth)
			switch {
			case matches == Yes && v.Kind == Goto:
				return min(back, returns)
			case matches == Yes && returns == No:
				return No
			case returns < sure:
				reach, back = Maybe, Maybe
			case v.Kind == Goto:
				reach = Maybe
			}
		}
	}
	return back
}

func (w *walk) target(name string, from Chain, reach Tri, depth int) Tri {
	for _, c := range w.rules.Chains {
		if c.Name == name && c.Table == from.Table && c.Family == from.Family && c.Backend == from.Backend {
			return w.chain(c, reach, depth+1)
		}
	}
	return Maybe
}

// MarkSetter is a rule of somebody else that sets bits of the packet's mark.
type MarkSetter struct {
	In   Chain
	Rule string
}

// SettersOf are the rules that set a bit.
func (r Ruleset) SettersOf(bit uint32) (out []MarkSetter) {
	for _, c := range r.Chains {
		for _, rule := range c.Rules {
			if rule.SetsMark&bit != 0 {
				out = append(out, MarkSetter{c, rule.Text})
			}
		}
	}
	return out
}
