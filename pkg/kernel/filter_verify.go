package kernel

import (
	"fmt"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Whoever is next to this node could give a packet the address of one of its pods
// as source, and reach the others, here and through the tunnel: rp_filter would see
// it for IPv4 alone, and only where it is strict. So the table asks what has such a
// source whether it comes by the interface that leads there (here for IPv4):
//
//	chain into-tunnel {
//	  ip saddr . iif @verified4 return
//	  ip saddr @local4 goto from-here; ip saddr @pods4 goto from-here
//	}
//	chain from-here {                            # does it come from where it would be answered?
//	  iifname "lo" return                        # this node to itself
//	  ip saddr . iif @verified4 return
//	  meta nfproto ipv4 fib saddr . mark . iif oif exists add @verified4 { ip saddr . iif timeout 10s }
//	  fib saddr . mark . iif oif exists return
//	  counter name "dropped-in" drop
//	}
//
// The question is asked with our mark on the packet, for that moment: past our own
// table, whose throw routes are answers to it on Linux 7 and later for IPv6.
//
// From these hooks kernels before 5.18 cannot ask (be8be04e5ddb, "nft_fib: reverse
// path filter for policy-based routing on iif"): their table has a return in the
// place of each goto, and FilterVerifiesSources says so.

const (
	chainIntoTunnel = "into-tunnel"
	chainFromHere   = "from-here"
	setVerified     = "verified"

	verifiedFor  = 10 * time.Second
	mostVerified = 16384
)

// verifyingChains stop what has a source of this node's own, but does not come by
// the interface that leads there.
func verifyingChains(fwMark uint32) (into, here chainSpec) {
	into, here = chainSpec{name: chainIntoTunnel}, chainSpec{name: chainFromHere}
	back := verdict("return", expr.VerdictReturn)
	here.add(loopback("iifname", expr.MetaKeyIIFNAME), back) // an address of this node's own has no way back
	for _, f := range families {
		into.add(f.proto(), f.verified(), back)
		here.add(f.proto(), f.verified(), back)
	}
	for _, f := range families {
		for _, set := range []string{setLocal, setPods} {
			into.add(f.proto(), f.from(set), jumpOff(chainFromHere))
		}
		here.add(f.proto(), reversePath(fwMark), f.remember())
	}
	here.add(reversePath(fwMark), back) // nothing is remembered where the set is full
	here.add(count(counterIn), verdict("drop", expr.VerdictDrop))
	return into, here
}

// addVerifiedSet makes the set of sources, with their interfaces, that have passed
// lately: to find them takes a fraction of what IPv6's lookup of a route takes.
func addVerifiedSet(c *nftables.Conn, f family) error {
	key, err := nftables.ConcatSetType(f.setType, nftables.TypeIFIndex)
	if err != nil {
		return err
	}
	return c.AddSet(&nftables.Set{
		Table: table(), Name: setVerified + f.name, KeyType: key, Concatenation: true,
		Dynamic: true, HasTimeout: true, Timeout: verifiedFor, Size: mostVerified,
	}, nil)
}

// FilterVerifiesSources reports whether the table stops packets with a source of
// this node's own that come from elsewhere. It fails where there is no table.
func (k *Kernel) FilterVerifiesSources() (bool, error) {
	c, err := k.nftConn()
	if err != nil {
		return false, err
	}
	all, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list the chains of nftables table %s: %w", TableName, err)
	}
	there, verifies := false, false
	for _, ch := range all {
		there = there || ch.Table.Name == TableName
		verifies = verifies || ch.Table.Name == TableName && ch.Name == chainFromHere
	}
	if !there {
		return false, fmt.Errorf("there is no nftables table inet %s", TableName)
	}
	return verifies, nil
}

// sourceAndLink loads the key of that set.
func (f family) sourceAndLink() []expr.Any {
	next := uint32(unix.NFT_REG32_00) + f.ln/4
	load := f.load(f.saddr)
	load.DestRegister = unix.NFT_REG32_00
	return []expr.Any{load, &expr.Meta{Key: expr.MetaKeyIIF, Register: next}}
}

func (f family) verified() part {
	set := setVerified + f.name
	return part{"saddr . iif @" + set, append(f.sourceAndLink(), &expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: set})}
}

func (f family) remember() part {
	set := setVerified + f.name
	return part{"add @" + set, append(f.sourceAndLink(),
		&expr.Dynset{SrcRegKey: unix.NFT_REG32_00, SetName: set, Operation: uint32(unix.NFT_DYNSET_OP_ADD), Timeout: verifiedFor})}
}

// reversePath is a source that is answered by the interface by which it comes. The
// packet's own mark is kept beside, and put back.
func reversePath(fwMark uint32) part {
	const kept, with = unix.NFT_REG32_08, unix.NFT_REG32_09
	return part{fmt.Sprintf("fib saddr mark %#x iif exists", fwMark), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: kept},
		&expr.Bitwise{SourceRegister: kept, DestRegister: with, Len: 4, Mask: native(^fwMark), Xor: native(fwMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: with},
		&expr.Fib{Register: 1, FlagSADDR: true, FlagMARK: true, FlagIIF: true, FlagPRESENT: true, ResultOIF: true},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: kept},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
	}}
}

const madeForText = "# fwmark "

// madeFor stands in the last rule of plain-in, so that the mark can be observed.
func madeFor(fwMark uint32) part { return part{text: fmt.Sprintf("%s%#x", madeForText, fwMark)} }

func observeFwMark(c *nftables.Conn, plainIn *nftables.Chain) (mark uint32, err error) {
	if plainIn == nil {
		return 0, nil
	}
	rules, err := c.GetRules(table(), plainIn)
	if err != nil || len(rules) == 0 {
		return 0, err
	}
	if _, hex, ok := strings.Cut(commentOf(rules[len(rules)-1].UserData), madeForText); ok {
		_, _ = fmt.Sscanf(hex, "0x%x", &mark) // else the rule is not ours
	}
	return mark, nil
}
