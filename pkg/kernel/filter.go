package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// elementsPerMessage keeps a message well below 64 KiB, netlink's limit for an attribute.
const elementsPerMessage = 500

// bufferSize is in bytes, of a socket that sends a transaction in one piece.
const bufferSize = 4 << 20

func (k *Kernel) nftConn() (*nftables.Conn, error) {
	if k.nft == nil {
		// The kernel acknowledges each of the hundreds of messages of a transaction
		// before the first answer is read: what is usual has room for some 270.
		c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(s *netlink.Conn) error {
			return errors.Join(s.SetReadBuffer(bufferSize), s.SetWriteBuffer(bufferSize))
		}))
		if err != nil {
			return nil, fmt.Errorf("open a netfilter socket: %w", err)
		}
		k.nft = c
	}
	return k.nft, nil
}

func table() *nftables.Table {
	return &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}
}

// A family is what differs between IPv4 and IPv6 in sets and rules.
type family struct {
	name             string
	v6               bool
	setType          nftables.SetDatatype
	nfproto          byte
	saddr, daddr, ln uint32 // offsets of the addresses in the header, and their length
}

var families = []family{
	{name: "4", setType: nftables.TypeIPAddr, nfproto: unix.NFPROTO_IPV4, saddr: 12, daddr: 16, ln: 4},
	{name: "6", v6: true, setType: nftables.TypeIP6Addr, nfproto: unix.NFPROTO_IPV6, saddr: 8, daddr: 24, ln: 16},
}

// The sets of the table; each exists once a family, as local4 and local6.
const (
	setCluster  = "cluster"
	setGuarded  = "guarded"
	setWithheld = "withheld"
	setLocal    = "local"
	setExempt   = "exempt"
	setPods     = "pods"
	setMasq     = "masqueraded"
	setBehind   = "behind"
)

var prefixSets = []string{setCluster, setGuarded, setWithheld, setLocal, setMasq, setBehind}

func (f family) set(name string) *nftables.Set {
	return &nftables.Set{
		Table: table(), Name: name + f.name, KeyType: f.setType,
		Interval: slices.Contains(prefixSets, name),
	}
}

// prefixesOf returns the field of the filter that a set of prefixes holds.
func prefixesOf(f *mesh.Filter, name string) *[]netip.Prefix {
	switch name {
	case setCluster:
		return &f.Cluster
	case setGuarded:
		return &f.Guarded
	case setWithheld:
		return &f.Withheld
	case setMasq:
		return &f.Masqueraded
	case setBehind:
		return &f.Behind
	}
	return &f.Local
}

// replaceFilter makes the table anew. It is one transaction: there is no moment
// without a guard. A kernel that cannot verify sources gets a table that does not.
func (k *Kernel) replaceFilter(f mesh.Filter) error {
	c, err := k.nftConn()
	if err != nil {
		return err
	}
	err = writeTable(c, f, true)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		err = writeTable(c, f, false)
	}
	if f.Nodes.Mark != 0 && errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("this kernel has not all that encryptNodes and externalCIDRs need (nftables with masquerade, CONFIG_NF_CONNTRACK_MARK): %w", err)
	}
	if err != nil {
		return err
	}
	return replaceARP(c, f.Nodes.Mark)
}

func writeTable(c *nftables.Conn, f mesh.Filter, verify bool) error {
	t := table()
	was := rememberedSrcValidMark(c)
	c.AddTable(t) // so that the deletion cannot fail
	c.DelTable(t)
	c.AddTable(t)
	for _, fam := range families {
		for _, name := range append(slices.Clone(prefixSets), setExempt, setPods) {
			if err := c.AddSet(fam.set(name), nil); err != nil {
				return err
			}
		}
		if verify {
			if err := addVerifiedSet(c, fam); err != nil {
				return err
			}
		}
	}
	if f.Nodes.Mark != 0 {
		if err := addNodeSets(c); err != nil {
			return err
		}
	}
	for _, name := range counterNames {
		c.AddObj(counter(name))
	}
	if was != "" {
		c.AddObj(counter(srcValidMarkWas + was))
	}
	for _, ch := range chains(f.Interface, f.FwMark, f.Nodes.Mark, verify) {
		nc := c.AddChain(ch.chain())
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: nc, Exprs: r.exprs, UserData: comment(r.text)})
		}
	}
	if err := fillSets(c, f); err != nil {
		return err
	}
	if err := addPods(c, f.Pods); err != nil {
		return err
	}
	if f.Nodes.Mark != 0 {
		if err := fillNodeSets(c, f.Nodes); err != nil {
			return err
		}
	}
	return c.Flush()
}

// setFilter refills the sets in one transaction, so that no packet sees them empty.
func (k *Kernel) setFilter(f mesh.Filter) error {
	c, err := k.nftConn()
	if err != nil {
		return err
	}
	for _, fam := range families {
		for _, name := range append(slices.Clone(prefixSets), setExempt) {
			c.FlushSet(fam.set(name))
		}
	}
	if err := fillSets(c, f); err != nil {
		return err
	}
	return c.Flush()
}

func fillSets(c *nftables.Conn, f mesh.Filter) error {
	for _, fam := range families {
		for _, name := range prefixSets {
			var elements []nftables.SetElement
			for _, p := range *prefixesOf(&f, name) {
				if p.Addr().Is6() == fam.v6 {
					elements = append(elements, interval(p)...)
				}
			}
			if err := addElements(c, fam.set(name), elements); err != nil {
				return err
			}
		}
		if err := addElements(c, fam.set(setExempt), hosts(fam, f.Exempt)); err != nil {
			return err
		}
	}
	return nil
}

func addPods(c *nftables.Conn, pods []netip.Addr) error {
	for _, fam := range families {
		if err := addElements(c, fam.set(setPods), hosts(fam, pods)); err != nil {
			return err
		}
	}
	return nil
}

func addElements(c *nftables.Conn, s *nftables.Set, elements []nftables.SetElement) error {
	for chunk := range slices.Chunk(elements, elementsPerMessage) {
		if err := c.SetAddElements(s, chunk); err != nil {
			return err
		}
	}
	return nil
}

func (k *Kernel) setFilterPods(add, remove []netip.Addr) error {
	c, err := k.nftConn()
	if err != nil {
		return err
	}
	if err := addPods(c, add); err != nil {
		return err
	}
	if len(add) > 0 {
		if err := c.Flush(); err != nil {
			return err
		}
	}
	// One by one: an element that is gone already would undo the whole batch.
	for _, a := range remove {
		for _, fam := range families {
			if h := hosts(fam, []netip.Addr{a}); len(h) > 0 {
				if err := c.SetDeleteElements(fam.set(setPods), h); err != nil {
					return err
				}
			}
		}
		if err := ignoring(c.Flush(), unix.ENOENT); err != nil {
			return err
		}
	}
	return nil
}

func (k *Kernel) removeFilter() error {
	c, err := k.nftConn()
	if err != nil {
		return err
	}
	c.DelTable(table())
	if err := ignoring(c.Flush(), unix.ENOENT); err != nil {
		return err
	}
	return replaceARP(c, 0)
}

func hosts(fam family, addrs []netip.Addr) []nftables.SetElement {
	var out []nftables.SetElement
	for _, a := range addrs {
		if a.Is6() == fam.v6 {
			out = append(out, nftables.SetElement{Key: a.AsSlice()})
		}
	}
	return out
}

// interval is a prefix as the kernel wants it: its first address, and the first
// address behind it. A prefix that reaches to the end of all addresses has no end.
func interval(p netip.Prefix) []nftables.SetElement {
	out := []nftables.SetElement{{Key: p.Addr().AsSlice()}}
	if end := netipx.PrefixLastIP(p).Next(); end.IsValid() {
		out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
	}
	return out
}

// observeFilter reads the table. Chains and rules are compared with what we
// would make by their comments: a rule cannot be changed in place without
// losing them. Whatever differs makes the filter Broken.
func (k *Kernel) observeFilter(s *mesh.State) error {
	c, err := k.nftConn()
	if err != nil {
		return err
	}
	present, whole, err := k.observeChains(c, &s.Filter)
	if err != nil {
		return fmt.Errorf("read nftables table %s: %w", TableName, err)
	}
	if !present {
		return nil
	}
	if !whole {
		s.Filter = mesh.Filter{Broken: true}
		return nil
	}
	s.Filter.Interface = k.Interface
	for _, fam := range families {
		if err := readSets(c, fam, &s.Filter); errors.Is(err, unix.ENOENT) {
			s.Filter = mesh.Filter{Broken: true}
			return nil
		} else if err != nil {
			return fmt.Errorf("read the sets of nftables table %s: %w", TableName, err)
		}
	}
	if s.Filter.Nodes.Mark == 0 {
		return nil
	}
	if err := readNodeSets(c, &s.Filter.Nodes); errors.Is(err, unix.ENOENT) {
		s.Filter = mesh.Filter{Broken: true}
	} else if err != nil {
		return fmt.Errorf("read the sets of nftables table %s: %w", TableName, err)
	}
	return nil
}

func (k *Kernel) observeChains(c *nftables.Conn, f *mesh.Filter) (present, whole bool, err error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, false, err
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName })
	if i < 0 {
		return false, false, nil
	}
	if tables[i].Flags != 0 { // dormant: its chains are not hooked
		return true, false, nil
	}
	all, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return true, false, err
	}
	have := map[string]*nftables.Chain{}
	for _, ch := range all {
		if ch.Table.Name == TableName {
			have[ch.Name] = ch
		}
	}
	if f.Nodes.Mark, err = observeMark(c, have[chainNodePlain]); err != nil {
		return true, false, err
	}
	if f.FwMark, err = observeFwMark(c, have[chainPlainIn]); err != nil {
		return true, false, err
	}
	want := chains(k.Interface, f.FwMark, f.Nodes.Mark, have[chainFromHere] != nil)
	if len(have) != len(want) {
		return true, false, nil
	}
	for _, w := range want {
		h, ok := have[w.name]
		if !ok || !w.sameHook(h) {
			return true, false, nil
		}
		rules, err := c.GetRules(table(), h)
		if err != nil {
			return true, false, err
		}
		if !slices.EqualFunc(rules, w.rules, func(r *nftables.Rule, q chainRule) bool { return commentOf(r.UserData) == q.text }) {
			return true, false, nil
		}
	}
	if f.Nodes.Mark != 0 {
		whole, err = arpHolds(c, f.Nodes.Mark)
		return true, whole, err
	}
	return true, true, nil
}

func readSets(c *nftables.Conn, fam family, f *mesh.Filter) error {
	for _, name := range prefixSets {
		elements, err := c.GetSetElements(fam.set(name))
		if err != nil {
			return err
		}
		into := prefixesOf(f, name)
		*into = append(*into, decodeIntervals(elements)...)
	}
	for name, into := range map[string]*[]netip.Addr{setExempt: &f.Exempt, setPods: &f.Pods} {
		elements, err := c.GetSetElements(fam.set(name))
		if err != nil {
			return err
		}
		for _, e := range elements {
			if a, ok := netip.AddrFromSlice(e.Key); ok {
				*into = append(*into, a)
			}
		}
	}
	return nil
}

// decodeIntervals is the inverse of interval, for the elements in any order.
func decodeIntervals(elements []nftables.SetElement) []netip.Prefix {
	type bound struct {
		at  netip.Addr
		end bool
	}
	var bounds []bound
	for _, e := range elements {
		if a, ok := netip.AddrFromSlice(e.Key); ok {
			bounds = append(bounds, bound{a, e.IntervalEnd})
		}
	}
	slices.SortFunc(bounds, func(a, b bound) int {
		ends := func(x bound) int {
			if x.end {
				return 0 // where one ends and the next begins, the end comes first
			}
			return 1
		}
		return cmp.Or(a.at.Compare(b.at), cmp.Compare(ends(a), ends(b)))
	})
	var out []netip.Prefix
	var start netip.Addr
	for _, b := range bounds {
		switch {
		case !b.end:
			start = b.at
		case start.IsValid():
			out = append(out, netipx.IPRangeFrom(start, b.at.Prev()).Prefixes()...)
			start = netip.Addr{}
		}
	}
	if start.IsValid() {
		last := netipx.PrefixLastIP(netip.PrefixFrom(start, 0).Masked())
		out = append(out, netipx.IPRangeFrom(start, last).Prefixes()...)
	}
	return out
}
