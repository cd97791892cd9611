package doctor

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// machine runs the expressions of a rule, as nft_do_chain does in
// net/netfilter/nf_tables_core.c, but for a packet of which only some bytes are
// known. An expression that the library does not know leaves its register unknown.
type machine struct {
	packet Packet
	sets   map[string]*nftSet
	data   [96]byte // the registers: four of 16 bytes, which are also sixteen of 4
	known  [96]bool
	// order says which registers have a number in this machine's byte order: where nft
	// compares such ones by size it turns them around first, which the library does
	// not show.
	order map[int]bool
}

// at is where a register begins (nft_parse_register in nf_tables_api.c).
func at(register uint32) int {
	if register >= unix.NFT_REG32_00 {
		return int(register-unix.NFT_REG32_00) * 4
	}
	return int(max(register, 1)-1) * 16
}

func (m *machine) store(register uint32, value []byte) {
	i := at(register)
	m.forget(register)
	for j, b := range value {
		if i+j < len(m.data) {
			m.data[i+j], m.known[i+j] = b, true
		}
	}
}

func (m *machine) forget(register uint32) {
	i := at(register)
	delete(m.order, i)
	for j := i; j < min(i+16, len(m.known)); j++ {
		m.known[j] = false
	}
}

// load returns what a register holds, and whether all of it is known.
func (m *machine) load(register uint32, n int) ([]byte, bool) {
	i := at(register)
	if i+n > len(m.data) {
		return nil, false
	}
	for j := i; j < i+n; j++ {
		if !m.known[j] {
			return nil, false
		}
	}
	return m.data[i : i+n], true
}

// run returns whether the rule matches, and its verdict.
func (m *machine) run(exprs []expr.Any) (Tri, Verdict) {
	m.order = map[int]bool{}
	matches := Yes
	for _, e := range exprs {
		var t Tri
		var v Verdict
		switch e := e.(type) {
		case *expr.Verdict:
			return matches, nftVerdict(e)
		case *expr.Reject:
			return matches, Verdict{Kind: Drop}
		case *expr.Target:
			switch e.Name {
			case "REJECT", "DROP":
				return matches, Verdict{Kind: Drop}
			}
			continue
		case *expr.Queue:
			return min(matches, Maybe), Verdict{Kind: Drop}
		case *expr.Lookup:
			if t, v = m.lookup(e); v.Kind != Continue {
				return min(matches, t), v
			}
		default:
			t = m.step(e)
		}
		if matches = min(matches, t); matches == No {
			return No, Verdict{}
		}
	}
	return matches, Verdict{}
}

func nftVerdict(v *expr.Verdict) Verdict {
	switch v.Kind {
	case expr.VerdictAccept:
		return Verdict{Kind: Accept}
	case expr.VerdictDrop:
		return Verdict{Kind: Drop}
	case expr.VerdictJump:
		return Verdict{Kind: Jump, Target: v.Chain}
	case expr.VerdictGoto:
		return Verdict{Kind: Goto, Target: v.Chain}
	case expr.VerdictReturn:
		return Verdict{Kind: Return}
	}
	return Verdict{}
}

// step runs an expression that has no verdict, and says whether the rule goes on.
func (m *machine) step(e expr.Any) Tri {
	switch e := e.(type) {
	case *expr.Meta:
		if !e.SourceRegister {
			m.meta(e)
		}
	case *expr.Payload:
		if e.OperationType == expr.PayloadLoad {
			m.payload(e)
		}
	case *expr.Ct:
		m.forget(e.Register)
		if !e.SourceRegister && e.Key == expr.CtKeySTATE && m.packet.State != 0 {
			m.store(e.Register, native32(m.packet.State))
			m.order[at(e.Register)] = true
		}
	case *expr.Immediate:
		m.store(e.Register, e.Data)
	case *expr.Bitwise:
		m.bitwise(e)
	case *expr.Cmp:
		return m.compare(e)
	case *expr.Range:
		return m.within(e)
	case *expr.Match:
		return m.match(e)
	case *expr.Limit, *expr.Quota, *expr.Connlimit, *expr.Dynset:
		return Maybe
	case *expr.Exthdr:
		m.forget(e.DestRegister)
	case *expr.Fib:
		m.forget(e.Register)
	case *expr.Hash:
		m.forget(e.DestRegister)
	case *expr.Numgen:
		m.forget(e.Register)
	}
	return Yes
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func (m *machine) meta(e *expr.Meta) {
	m.forget(e.Register)
	p := m.packet
	name := func(s string) {
		if s != "" {
			m.store(e.Register, append([]byte(s), make([]byte, 16-min(len(s), 16))...)[:16])
		}
	}
	switch e.Key {
	case expr.MetaKeyNFPROTO:
		m.store(e.Register, []byte{map[bool]byte{false: unix.NFPROTO_IPV4, true: unix.NFPROTO_IPV6}[p.IPv6]})
	case expr.MetaKeyPROTOCOL:
		m.store(e.Register, map[bool][]byte{false: {0x08, 0x00}, true: {0x86, 0xdd}}[p.IPv6])
	case expr.MetaKeyL4PROTO:
		if p.Proto != 0 {
			m.store(e.Register, []byte{p.Proto})
		}
	case expr.MetaKeyIIFNAME:
		name(p.In)
	case expr.MetaKeyOIFNAME:
		name(p.Out)
	case expr.MetaKeyMARK:
		if p.Mark != nil {
			m.store(e.Register, native32(*p.Mark))
			m.order[at(e.Register)] = true
		}
	}
}

// payload copies what is known of the packet's headers.
func (m *machine) payload(e *expr.Payload) {
	m.forget(e.DestRegister)
	var header [44]byte
	var known [44]bool
	put := func(i int, value []byte) {
		for j, b := range value {
			header[i+j], known[i+j] = b, true
		}
	}
	p := m.packet
	switch e.Base {
	case expr.PayloadBaseNetworkHeader:
		proto, src, dst := 9, 12, 16
		if p.IPv6 {
			proto, src, dst = 6, 8, 24
		}
		if p.Proto != 0 {
			put(proto, []byte{p.Proto})
		}
		if p.Src.IsValid() {
			put(src, p.Src.AsSlice())
		}
		if p.Dst.IsValid() {
			put(dst, p.Dst.AsSlice())
		}
	case expr.PayloadBaseTransportHeader:
		if p.SrcPort != 0 {
			put(0, binary.BigEndian.AppendUint16(nil, p.SrcPort))
		}
		if p.DstPort != 0 {
			put(2, binary.BigEndian.AppendUint16(nil, p.DstPort))
		}
	}
	to := at(e.DestRegister)
	for j := range int(e.Len) {
		if from := int(e.Offset) + j; from < len(header) && to+j < len(m.data) && known[from] {
			m.data[to+j], m.known[to+j] = header[from], true
		}
	}
}

func (m *machine) bitwise(e *expr.Bitwise) {
	from, to := at(e.SourceRegister), at(e.DestRegister)
	if len(e.Mask) != int(e.Len) || len(e.Xor) != int(e.Len) || max(from, to)+int(e.Len) > len(m.data) { // a shift
		m.forget(e.DestRegister)
		return
	}
	order := m.order[from]
	var data [64]byte
	var known [64]bool
	for j := range min(int(e.Len), len(data)) {
		data[j] = m.data[from+j]&e.Mask[j] ^ e.Xor[j]
		known[j] = m.known[from+j] || e.Mask[j] == 0
	}
	m.forget(e.DestRegister)
	copy(m.data[to:], data[:e.Len])
	copy(m.known[to:], known[:e.Len])
	if order {
		m.order[to] = true
	}
}

func (m *machine) compare(e *expr.Cmp) Tri {
	have, ok := m.load(e.Register, len(e.Data))
	if !ok {
		return Maybe
	}
	c := bytes.Compare(have, e.Data)
	switch e.Op {
	case expr.CmpOpEq:
		return tri(c == 0)
	case expr.CmpOpNeq:
		return tri(c != 0)
	}
	if m.order[at(e.Register)] {
		return Maybe
	}
	switch e.Op {
	case expr.CmpOpLt:
		return tri(c < 0)
	case expr.CmpOpLte:
		return tri(c <= 0)
	case expr.CmpOpGt:
		return tri(c > 0)
	case expr.CmpOpGte:
		return tri(c >= 0)
	}
	return Maybe
}

func (m *machine) within(e *expr.Range) Tri {
	have, ok := m.load(e.Register, len(e.FromData))
	if !ok || m.order[at(e.Register)] {
		return Maybe
	}
	in := tri(bytes.Compare(have, e.FromData) >= 0 && bytes.Compare(have, e.ToData) <= 0)
	if e.Op == expr.CmpOpNeq {
		return in.Not()
	}
	return in
}

// newNftSet takes the keys' length from the elements: of a map of verdicts the library
// tells another one.
func newNftSet(interval bool, elements []nftables.SetElement) *nftSet {
	s := &nftSet{interval: interval, elements: slices.Clone(elements)}
	if len(elements) > 0 {
		s.keyLen = len(elements[0].Key)
	}
	slices.SortStableFunc(s.elements, func(a, b nftables.SetElement) int {
		if c := bytes.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		// An interval that ends where the next begins: the beginning counts.
		order := map[bool]int{true: 0, false: 1}
		return order[a.IntervalEnd] - order[b.IntervalEnd]
	})
	return s
}

// find returns the element that a key is in.
func (s *nftSet) find(key []byte) (nftables.SetElement, bool) {
	for i := len(s.elements) - 1; i >= 0; i-- {
		e := s.elements[i]
		switch c := bytes.Compare(e.Key, key); {
		case !s.interval && c == 0:
			return e, true
		case s.interval && c <= 0:
			return e, !e.IntervalEnd
		}
	}
	return nftables.SetElement{}, false
}

// lookup looks a register up in a set, or in a map of verdicts.
func (m *machine) lookup(e *expr.Lookup) (Tri, Verdict) {
	set := m.sets[e.SetName]
	isVerdict := e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT
	if e.IsDestRegSet && !isVerdict {
		m.forget(e.DestRegister)
	}
	if set == nil {
		return unknownLookup(isVerdict)
	}
	key, ok := m.load(e.SourceRegister, set.keyLen)
	if !ok {
		if len(set.elements) == 0 {
			return tri(e.Invert), Verdict{}
		}
		return unknownLookup(isVerdict)
	}
	element, found := set.find(key)
	switch {
	case isVerdict && found:
		return Yes, mapVerdict(element.Val)
	case e.Invert:
		return tri(!found), Verdict{}
	}
	return tri(found), Verdict{}
}

// mapVerdict reads a verdict as the library hands it on, which is as the kernel has
// it: NFTA_VERDICT_CODE and NFTA_VERDICT_CHAIN of linux/netfilter/nf_tables.h.
func mapVerdict(b []byte) Verdict {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return Verdict{}
	}
	var v expr.Verdict
	for _, a := range attrs {
		switch {
		case a.Attr.Type == unix.NFTA_VERDICT_CODE && len(a.Value) == 4:
			v.Kind = expr.VerdictKind(int32(binary.BigEndian.Uint32(a.Value)))
		case a.Attr.Type == unix.NFTA_VERDICT_CHAIN:
			v.Chain = strings.TrimRight(string(a.Value), "\x00")
		}
	}
	return nftVerdict(&v)
}

// unknownLookup may be a drop where the map has verdicts.
func unknownLookup(isVerdict bool) (Tri, Verdict) {
	if isVerdict {
		return Maybe, Verdict{Kind: Drop}
	}
	return Maybe, Verdict{}
}
