package kernel

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// The table of family arp, with a strict rp_filter: a request for this node's
// address, from a machine that is routed into the tunnel, would not be answered
// (arp_process asks ip_route_input for the way back; no chain of family inet sees it).
//
//	chain input {
//	  type filter hook input priority filter
//	  meta mark set meta mark or 0x4
//	}
func arpTable() *nftables.Table {
	return &nftables.Table{Name: TableName, Family: nftables.TableFamilyARP}
}

const arpChain = "input"

func arpPresent(c *nftables.Conn) (bool, error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyARP)
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName }), err
}

// arpHolds reports whether the arp table is as a mark needs it.
func arpHolds(c *nftables.Conn, mark uint32) (bool, error) {
	present, err := arpPresent(c)
	if err != nil || mark == 0 || !present {
		return err == nil && !present && (mark == 0 || !strictReversePath()), err
	}
	rules, err := c.GetRules(arpTable(), &nftables.Chain{Table: arpTable(), Name: arpChain})
	if err != nil {
		return false, ignoring(err, unix.ENOENT)
	}
	return len(rules) == 1 && commentOf(rules[0].UserData) == setMark(mark).text, nil
}

// replaceARP makes the arp table anew, or removes it where there is no use for it.
func replaceARP(c *nftables.Conn, mark uint32) error {
	present, err := arpPresent(c)
	if err != nil {
		return err
	}
	wanted := mark != 0 && strictReversePath()
	if present {
		c.DelTable(arpTable())
	}
	if wanted {
		t, accept := arpTable(), nftables.ChainPolicyAccept
		c.AddTable(t)
		ch := c.AddChain(&nftables.Chain{
			Table: t, Name: arpChain, Type: nftables.ChainTypeFilter, Policy: &accept,
			Hooknum:  nftables.ChainHookRef(unix.NF_INET_PRE_ROUTING), // NF_ARP_IN has the same number
			Priority: nftables.ChainPriorityFilter,
		})
		p := setMark(mark)
		c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: p.exprs, UserData: comment(p.text)})
	}
	if !present && !wanted {
		return nil
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables table arp %s, which a strict rp_filter needs (net.ipv4.conf.*.rp_filter=2 does not): %w", TableName, err)
	}
	return nil
}
