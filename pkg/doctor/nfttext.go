package doctor

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// nftText prints a rule nearly as nft does; what it has no words for is "…".
func nftText(exprs []expr.Any) string {
	t := texter{in: map[int]string{}}
	for _, e := range exprs {
		t.add(e)
	}
	out := strings.Join(t.words, " ")
	for _, proto := range []string{"udp", "tcp"} { // nft leaves it out, too
		out = strings.ReplaceAll(out, "meta l4proto "+proto+" "+proto+" ", proto+" ")
	}
	return out
}

// texter remembers what the registers hold.
type texter struct {
	words []string
	in    map[int]string
	proto string
}

func (t *texter) word(format string, args ...any) {
	t.words = append(t.words, fmt.Sprintf(format, args...))
}

func (t *texter) add(e expr.Any) {
	switch e := e.(type) {
	case *expr.Meta:
		if e.SourceRegister {
			t.word("meta %s set %s", metaName(e.Key), t.what(e.Register))
			return
		}
		t.in[at(e.Register)] = metaName(e.Key)
	case *expr.Payload:
		t.in[at(e.DestRegister)] = t.payload(e)
	case *expr.Ct:
		t.in[at(e.Register)] = map[bool]string{true: "ct state", false: "ct …"}[e.Key == expr.CtKeySTATE]
	case *expr.Immediate:
		t.in[at(e.Register)] = fmt.Sprintf("%#x", number(e.Data))
	case *expr.Bitwise:
		t.bitwise(e)
	case *expr.Cmp:
		t.compare(e)
	case *expr.Range:
		t.word("%s %s%s-%s", t.what(e.Register), map[bool]string{true: "!= "}[e.Op == expr.CmpOpNeq], t.value(e.Register, e.FromData), t.value(e.Register, e.ToData))
	case *expr.Lookup:
		t.word("%s %s@%s", t.what(e.SourceRegister), map[bool]string{true: "!= "}[e.Invert], e.SetName)
		if e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
			t.words[len(t.words)-1] = strings.Replace(t.words[len(t.words)-1], " @", " vmap @", 1)
		}
	case *expr.Verdict:
		t.word("%s", verdictText(e))
	case *expr.Reject:
		t.word("reject")
	case *expr.Target:
		t.word("%s", e.Name)
	case *expr.Match:
		t.match(e)
	case *expr.Limit:
		t.word("limit …")
	case *expr.Fib:
		t.in[at(e.Register)] = "fib …"
	case *expr.Masq:
		t.word("masquerade")
	case *expr.NAT:
		t.word("nat")
	case *expr.Queue:
		t.word("queue")
	}
}

func metaName(k expr.MetaKey) string {
	switch k {
	case expr.MetaKeyL4PROTO:
		return "meta l4proto"
	case expr.MetaKeyNFPROTO:
		return "meta nfproto"
	case expr.MetaKeyIIFNAME:
		return "iifname"
	case expr.MetaKeyOIFNAME:
		return "oifname"
	case expr.MetaKeyMARK:
		return "mark"
	case expr.MetaKeySKUID:
		return "meta skuid"
	}
	return "meta …"
}

func (t *texter) what(register uint32) string {
	if s, ok := t.in[at(register)]; ok {
		return s
	}
	return "…"
}

func (t *texter) payload(e *expr.Payload) string {
	switch {
	case e.Base == expr.PayloadBaseTransportHeader && e.Len == 2 && e.Offset <= 2:
		proto := t.proto
		if proto == "" {
			proto = "th"
		}
		return proto + map[uint32]string{0: " sport", 2: " dport"}[e.Offset]
	case e.Base == expr.PayloadBaseNetworkHeader && (e.Offset == 12 || e.Offset == 16) && e.Len <= 4:
		return map[uint32]string{12: "ip saddr", 16: "ip daddr"}[e.Offset] + shortened(e.Len, 4)
	case e.Base == expr.PayloadBaseNetworkHeader && (e.Offset == 8 || e.Offset == 24) && e.Len <= 16:
		return map[uint32]string{8: "ip6 saddr", 24: "ip6 daddr"}[e.Offset] + shortened(e.Len, 16)
	case e.Base == expr.PayloadBaseNetworkHeader && e.Len == 1 && (e.Offset == 9 || e.Offset == 6):
		return "meta l4proto"
	}
	return "…"
}

// shortened is the prefix length, where only the first bytes of an address are looked at.
func shortened(have, whole uint32) string {
	if have == whole {
		return ""
	}
	return fmt.Sprintf("/%d", have*8)
}

func (t *texter) bitwise(e *expr.Bitwise) {
	what := t.what(e.SourceRegister)
	switch {
	case strings.HasPrefix(what, "ip"):
		ones := 0
		for _, b := range e.Mask {
			for ; b != 0; b <<= 1 {
				ones++
			}
		}
		what += fmt.Sprintf("/%d", ones)
	case what == "mark" && len(e.Mask) == 4 && number(e.Xor) != 0:
		what = fmt.Sprintf("mark and %#x xor %#x", number(e.Mask), number(e.Xor))
	case what == "mark" && len(e.Mask) == 4:
		what = fmt.Sprintf("mark and %#x", number(e.Mask))
	case what == "ct state" && len(e.Mask) == 4:
		what = "ct state " + stateNames(number(e.Mask))
	}
	t.in[at(e.DestRegister)] = what
}

// number is one in this machine's byte order, 0 for other sizes than an int's.
func number(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

func stateNames(bits uint32) string {
	var out []string
	for _, s := range []struct {
		bit  uint32
		name string
	}{{stateInvalid, "invalid"}, {stateEstablished, "established"}, {stateRelated, "related"}, {stateNew, "new"}} {
		if bits&s.bit != 0 {
			out = append(out, s.name)
		}
	}
	return strings.Join(out, ",")
}

func (t *texter) compare(e *expr.Cmp) {
	what := t.what(e.Register)
	if what == "meta nfproto" { // nft leaves it to the table's family
		return
	}
	if strings.HasPrefix(what, "ct state ") && !slices.ContainsFunc(e.Data, func(b byte) bool { return b != 0 }) {
		if e.Op == expr.CmpOpEq {
			what = strings.Replace(what, "state ", "state != ", 1)
		}
		t.word("%s", what)
		return
	}
	value := t.value(e.Register, e.Data)
	if what == "meta l4proto" {
		t.proto = value
	}
	addr, bits, isPrefix := strings.Cut(what, "/")
	if isPrefix {
		what, value = addr, value+"/"+bits
	}
	if e.Op == expr.CmpOpLte && len(t.words) > 0 { // a range, which nft writes so where it is alone
		if from, ok := strings.CutPrefix(t.words[len(t.words)-1], what+" >= "); ok {
			t.words[len(t.words)-1] = fmt.Sprintf("%s %s-%s", what, from, value)
			return
		}
	}
	op := map[expr.CmpOp]string{expr.CmpOpNeq: "!= ", expr.CmpOpLt: "< ", expr.CmpOpLte: "<= ", expr.CmpOpGt: "> ", expr.CmpOpGte: ">= "}[e.Op]
	t.word("%s %s%s", what, op, value)
}

func (t *texter) value(register uint32, data []byte) string {
	what := t.what(register)
	switch {
	case what == "meta l4proto" && len(data) == 1:
		if name, ok := protocols[data[0]]; ok {
			return name
		}
		return fmt.Sprint(data[0])
	case strings.HasSuffix(what, "ifname"):
		name, _, whole := bytes.Cut(data, []byte{0})
		if !whole && len(data) < 16 {
			return fmt.Sprintf("%q", string(name)+"*")
		}
		return fmt.Sprintf("%q", name)
	case strings.HasSuffix(what, "port") && len(data) == 2:
		return fmt.Sprint(binary.BigEndian.Uint16(data))
	case strings.HasPrefix(what, "ip"):
		whole := make([]byte, map[bool]int{true: 16, false: 4}[strings.HasPrefix(what, "ip6")])
		copy(whole, data)
		if a, ok := netip.AddrFromSlice(whole); ok {
			return a.String()
		}
	case strings.HasPrefix(what, "mark") && len(data) == 4:
		return fmt.Sprintf("%#x", number(data))
	}
	return fmt.Sprintf("%#x", data)
}

var protocols = map[uint8]string{unix.IPPROTO_UDP: "udp", unix.IPPROTO_TCP: "tcp", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "ipv6-icmp"}

func verdictText(v *expr.Verdict) string {
	switch v.Kind {
	case expr.VerdictAccept:
		return "accept"
	case expr.VerdictDrop:
		return "drop"
	case expr.VerdictReturn:
		return "return"
	case expr.VerdictJump:
		return "jump " + v.Chain
	case expr.VerdictGoto:
		return "goto " + v.Chain
	}
	return "continue"
}

func (t *texter) match(e *expr.Match) {
	switch info := e.Info.(type) {
	case *xt.Udp:
		t.ports("udp", info.SrcPorts, info.DstPorts)
	case *xt.Tcp:
		t.ports("tcp", info.SrcPorts, info.DstPorts)
	case *xt.Comment:
		t.word("comment %q", strings.TrimRight(string(*info), "\x00"))
	default:
		t.word("%s …", e.Name)
	}
}

func (t *texter) ports(proto string, src, dst [2]uint16) {
	for _, p := range []struct {
		name string
		r    [2]uint16
	}{{"sport", src}, {"dport", dst}} {
		switch {
		case p.r == [2]uint16{0, 0xffff}:
		case p.r[0] == p.r[1]:
			t.word("%s %s %d", proto, p.name, p.r[0])
		default:
			t.word("%s %s %d-%d", proto, p.name, p.r[0], p.r[1])
		}
	}
}

// marksSet are the bits of the packet's mark that a rule sets, whatever they were.
func marksSet(exprs []expr.Any) (bits uint32) {
	values := map[int]uint32{} // what registers surely have set
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Immediate:
			values[at(e.Register)] = number(e.Data)
		case *expr.Bitwise:
			values[at(e.DestRegister)] = values[at(e.SourceRegister)]&number(e.Mask) ^ number(e.Xor)
		case *expr.Meta:
			if e.SourceRegister && e.Key == expr.MetaKeyMARK {
				bits |= values[at(e.Register)]
			} else if !e.SourceRegister {
				delete(values, at(e.Register))
			}
		case *expr.Target: // struct xt_mark_tginfo2 of linux/netfilter/xt_mark.h
			if info, ok := e.Info.(*xt.Unknown); ok && e.Name == "MARK" && len(*info) >= 8 {
				bits |= binary.NativeEndian.Uint32(*info)
			}
		}
	}
	return bits
}
