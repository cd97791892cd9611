package matrix

import (
	"fmt"
	"slices"
	"strings"
)

// Begin and End enclose, in README, what [Section] prints.
const (
	Begin = "<!-- made by `make matrix` from test/e2e/testdata/matrix; do not edit -->"
	End   = "<!-- end of the matrix -->"
)

// untested are primaries that no test of ours runs, and what is known of them without.
var untested = [][2]string{
	{"Calico (iptables or nftables data path)", "not tested. Its pods have veths and /32 routes like those of the AWS VPC CNI. Its own WireGuard must be off"},
	{"Calico's eBPF data path, Cilium", "not tested, and not expected to work: their programs on the pods' veths send packets on by themselves, past the node's routing and netfilter, where wgcni is. Use the encryption that they bring"},
	{"SR-IOV, DPDK (vhost-user)", "not tested. As with macvlan, packets do not come through the node's routing"},
}

// Section prints the tables of both kinds' results.
func Section(userspace, kernel []Cell) string {
	var b strings.Builder
	b.WriteString(`Each mark was put here by a test on two nodes: TCP, UDP and ICMP between pods of both and on one of them, the source address intact, no
plaintext on the wire, ADD, CHECK and DEL, and nothing left behind. ✓ works, ⊘ is refused at ADD with an error that says why, ✗ fails,
– could not be run. Where a mark has ᵘ or ᵏ it is of userspace WireGuard or the kernel's alone; empty: no test.

`)
	table(&b, Primaries, "primary plugin", "IPAM", userspace, kernel)
	b.WriteString(`
- Refused are primaries whose pods' packets never come through the node's routing, where wgcni encrypts.
- flannel is the real flanneld on etcd, with flannel's plugin. Its etcd mode cannot do IPv6 alone: it gives all nodes the same range.
- Where pods have addresses of the nodes' network, each is announced by itself, and nodes reach each other in the clear as before. A node then
  reaches its own pods, and another node's with ` + "`encryptNodes`" + ` alone. What lies in ` + "`clusterCIDRs`" + ` and is neither a node nor a pod is not reached (unless ` + "`encryption`" + `
  is ` + "`preferred`" + `): give the pods' subnets, not the whole VPC.

Of these there is no test:

`)
	b.WriteString("| plugin | what can be said without |\n|---|---|\n")
	for _, u := range untested {
		fmt.Fprintf(&b, "| %s | %s |\n", u[0], u[1])
	}
	b.WriteString("\nOther chained plugins, between the primary and wgcni or behind wgcni:\n\n")
	table(&b, Chained, "plugin", "what is looked at", userspace, kernel)
	b.WriteString(`
- Whoever lets ` + "`FORWARD`" + ` drop must accept what comes in by the tunnel; the firewall plugin has the chain ` + "`CNI-ADMIN`" + ` for that
  (` + "`iptables -A CNI-ADMIN -i wgcni0+ -j ACCEPT`" + `).
`)
	return b.String()
}

func table(b *strings.Builder, name, rowHead, detailHead string, userspace, kernel []Cell) {
	var rows [][2]string
	var columns []string
	for _, c := range slices.Concat(userspace, kernel) {
		if c.Table != name {
			continue
		}
		if r := [2]string{c.Row, c.Detail}; !slices.Contains(rows, r) {
			rows = append(rows, r)
		}
		if !slices.Contains(columns, c.Column) {
			columns = append(columns, c.Column)
		}
	}
	fmt.Fprintf(b, "| %s | %s | %s |\n|---|---|%s\n", rowHead, detailHead, strings.Join(columns, " | "), strings.Repeat(":-:|", len(columns)))
	for _, r := range rows {
		fmt.Fprintf(b, "| %s | %s |", r[0], r[1])
		for _, column := range columns {
			cell := Cell{Table: name, Row: r[0], Detail: r[1], Column: column}.Name()
			fmt.Fprintf(b, " %s |", mark(Find(userspace, cell), Find(kernel, cell)))
		}
		b.WriteByte('\n')
	}
}

// mark joins what was seen with the two kinds. A failure of either is shown.
func mark(userspace, kernel Outcome) string {
	symbols := map[Outcome]string{Works: "✓", Refused: "⊘", Fails: "✗", Impossible: "–"}
	seen := func(o Outcome) bool { return o != "" && o != Impossible }
	switch {
	case userspace == kernel && userspace != "":
		return symbols[userspace]
	case seen(userspace) && seen(kernel):
		return symbols[userspace] + "ᵘ " + symbols[kernel] + "ᵏ"
	case seen(userspace):
		return symbols[userspace] + "ᵘ"
	case seen(kernel):
		return symbols[kernel] + "ᵏ"
	case userspace != "" || kernel != "":
		return symbols[Impossible]
	}
	return ""
}

// Replace returns README with a new section between its marks.
func Replace(readme, section string) (string, error) {
	before, rest, ok := strings.Cut(readme, Begin+"\n")
	_, after, ok2 := strings.Cut(rest, End)
	if !ok || !ok2 {
		return "", fmt.Errorf("README has not the lines %q and %q", Begin, End)
	}
	return before + Begin + "\n" + section + End + after, nil
}
