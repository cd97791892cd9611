package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// What the table has besides for the nodes' own traffic, where some of it is encrypted
// (here for IPv4, wgcni0 and the mark 0x4):
//
//	chain node-arrive {                          # after every dnat
//	  type filter hook prerouting priority dstnat + 10
//	  iifname "wgcni0" ip saddr @nodes4 ct direction original ct mark set ct mark and not 0x4
//	  iifname != "wgcni0" ip saddr @nodes4 jump node-plain
//	  ip daddr @nodes4 ct direction reply ct mark and 0x4 meta mark set meta mark or 0x4
//	}
//	chain node-plain {                           # what another machine sends in the clear
//	  ct state new tcp ct mark set ct mark or 0x4    # it is answered in the clear
//	  ... and so for udp dport < 32768, icmp, icmpv6
//	  ip daddr @own4 ... @exempt4 ... @local4 ... @pods4 meta mark set meta mark or 0x4 return
//	  ip daddr @cluster4 return; ip daddr @nodes4 return
//	  meta mark set meta mark or 0x4             # or a strict rp_filter would drop it
//	}
//	chain node-send {
//	  type route hook output priority dstnat + 10
//	  ip daddr @nodes4 ct direction reply tcp flags & (fin|syn|rst|ack) == syn ct mark set ct mark and not 0x4
//	  ip daddr @nodes4 ct direction reply ct mark and 0x4 meta mark set meta mark or 0x4
//	  ip daddr @nodes4 tcp dport @direct meta mark set meta mark or 0x4
//	  ip daddr @nodes4 tcp sport @direct meta mark set meta mark or 0x4
//	}
//	chain forward { ...
//	  oifname != "wgcni0" ip saddr @cluster4 ip daddr @held4 meta mark and 0x4 == 0 jump node-out
//	  iifname != "wgcni0" ip saddr @held4 ip daddr @cluster4 counter name "dropped-in" drop
//	}
//	chain output { ...
//	  oifname != "wgcni0" ip daddr @held4 meta mark and 0x4 == 0 jump node-out
//	}
//	chain node-out {                             # but for loopback and neighbour discovery
//	  oifname "lo" return; icmpv6 type 133-137 return
//	  counter name "dropped-out" drop
//	}
//	chain kept { ...
//	  ip saddr @own4 snat ip to ip saddr
//	}
//	chain own-source { ...                       # direct, with the source of the route by the tunnel
//	  oifname != "wgcni0" ip saddr @local4 ip daddr @nodes4 meta mark and 0x4 != 0 masquerade
//	}
//
// A packet in the clear never changes how a connection that began by the tunnel
// is answered: whoever can forge one could have the answers in the clear. Nor can
// it make what this node is about to send look like an answer: a SYN is none, and
// UDP from the ports that clients get (ip_local_port_range) is not taken for one.

const (
	setNodes  = "nodes"
	setHeld   = "held"
	setOwn    = "own"
	setDirect = "direct"

	chainNodePlain = "node-plain"
	chainNodeOut   = "node-out"

	arrivePriority = nftables.ChainPriority(-90) // behind every dnat, at dstnat (-100)
)

var nodeSets = []string{setNodes, setHeld, setOwn}

// nodeSetOf returns the field that a set of machines' addresses holds.
func nodeSetOf(n *mesh.NodeFilter, name string) *[]netip.Addr {
	switch name {
	case setNodes:
		return &n.Peers
	case setHeld:
		return &n.Held
	}
	return &n.Own
}

// A nodeGate keeps a pass that fails half-way from locking a machine out. One
// that the filter does not know is not routed into the tunnel: it could not be
// answered in the clear any more. One that is not routed is not held.
type nodeGate struct {
	machines []netip.Addr
	closed   bool // the filter is not as it should be
	unrouted bool
}

func newNodeGate(ops []mesh.Op) *nodeGate {
	g := &nodeGate{}
	for _, op := range ops {
		switch o := op.(type) {
		case mesh.ReplaceFilter:
			g.machines = o.Filter.Nodes.Peers
		case mesh.SetFilterNodes:
			g.machines = o.Nodes.Peers
		}
	}
	return g
}

// shuts reports whether an op is to be left out.
func (g *nodeGate) shuts(op mesh.Op) bool {
	switch o := op.(type) {
	case mesh.SetFilterNodes:
		return g.unrouted
	case mesh.SetRoute:
		g.unrouted = g.unrouted || g.closed && g.leads(o)
		return g.closed && g.leads(o)
	}
	return false
}

// fail takes in that an op has failed, or was left out.
func (g *nodeGate) fail(op mesh.Op) {
	switch o := op.(type) {
	case mesh.ReplaceFilter, mesh.SetFilterNodes, mesh.SetSrcValidMark:
		g.closed = true
	case mesh.SetRoute:
		g.unrouted = g.unrouted || g.leads(o)
	}
}

// leads reports whether a route leads one of the machines into the tunnel.
func (g *nodeGate) leads(o mesh.SetRoute) bool {
	return o.Route.Type == mesh.ViaLink && o.Route.Prefix.IsSingleIP() && slices.Contains(g.machines, o.Route.Prefix.Addr())
}

func directSet() *nftables.Set {
	return &nftables.Set{Table: table(), Name: setDirect, KeyType: nftables.TypeInetService}
}

// addNodeRules adds what the plain chains get with a mark, and returns the chains
// that there are besides.
func addNodeRules(links []string, mark uint32, forward, output, kept, ownSource *chainSpec) []chainSpec {
	arrive := chainSpec{name: "node-arrive", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: arrivePriority}
	send := chainSpec{name: "node-send", kind: nftables.ChainTypeRoute, hook: nftables.ChainHookOutput, priority: arrivePriority}
	plain, out := chainSpec{name: chainNodePlain}, chainSpec{name: chainNodeOut}
	back := verdict("return", expr.VerdictReturn)

	for _, asks := range []part{{"tcp", layer4(unix.IPPROTO_TCP)}, udpService(), {"icmp", layer4(unix.IPPROTO_ICMP)}, {"icmpv6", layer4(unix.IPPROTO_ICMPV6)}} {
		plain.add(ctNew(), asks, setCtMark(mark, true))
	}
	out.add(loopback("oifname", expr.MetaKeyOIFNAME), back)
	out.add(neighbourDiscovery(), back)
	for _, f := range families {
		notIn, notOut := f.notVia(expr.MetaKeyIIFNAME, "iifname", links), f.notVia(expr.MetaKeyOIFNAME, "oifname", links)
		asked := []part{f.proto(), f.to(setNodes), ctDirection("reply", 1), ctMarked(mark), setMark(mark)}
		for _, l := range links {
			arrive.add(f.via(expr.MetaKeyIIFNAME, "iifname", l), f.from(setNodes), ctDirection("original", 0), setCtMark(mark, false))
		}
		kept.add(f.proto(), f.from(setOwn), f.keepSource())
		arrive.add(notIn, f.from(setNodes), jump(chainNodePlain))
		arrive.add(asked...)
		for _, set := range []string{setOwn, setExempt, setLocal, setPods} {
			plain.add(f.proto(), f.to(set), setMark(mark), back)
		}
		for _, set := range []string{setCluster, setNodes} {
			plain.add(f.proto(), f.to(set), back)
		}
		send.add(f.proto(), f.to(setNodes), ctDirection("reply", 1), tcpSYN(), setCtMark(mark, false))
		send.add(asked...)
		for _, end := range []part{tcpPort("dport", 2), tcpPort("sport", 0)} {
			send.add(f.proto(), f.to(setNodes), end, setMark(mark))
		}
		forward.add(notOut, f.from(setCluster), f.to(setHeld), unmarked(mark), jump(chainNodeOut))
		forward.add(notIn, f.from(setHeld), f.to(setCluster), count(counterIn), verdict("drop", expr.VerdictDrop))
		output.add(notOut, f.to(setHeld), unmarked(mark), jump(chainNodeOut))
		ownSource.add(notOut, f.from(setLocal), f.to(setNodes), hasMark(mark), masquerade())
	}
	plain.add(setMark(mark))
	out.add(count(counterOut), verdict("drop", expr.VerdictDrop))
	return []chainSpec{plain, out, arrive, send}
}

// native is a mark as registers hold it.
func native(n uint32) []byte { return binaryutil.NativeEndian.PutUint32(n) }

// changeBit sets or clears the mark's bit in register 1.
func changeBit(mark uint32, on bool) *expr.Bitwise {
	b := &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(^mark), Xor: native(0)}
	if on {
		b.Xor = native(mark)
	}
	return b
}

func testBit(mark uint32, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(mark), Xor: native(0)},
		&expr.Cmp{Op: op, Register: 1, Data: native(0)},
	}
}

const setMarkText = "meta mark set "

func setMark(mark uint32) part {
	return part{fmt.Sprintf("%s%#x", setMarkText, mark), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, changeBit(mark, true),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}}
}

// markOf is the inverse of setMark, for the last rule of node-plain; 0 if it is none.
func markOf(text string) (mark uint32) {
	hex, ok := strings.CutPrefix(text, setMarkText)
	if n, err := fmt.Sscanf(hex, "0x%x", &mark); !ok || err != nil || n != 1 {
		return 0
	}
	return mark
}

func hasMark(mark uint32) part  { return metaMark("meta mark %#x", mark, expr.CmpOpNeq) }
func unmarked(mark uint32) part { return metaMark("meta mark not %#x", mark, expr.CmpOpEq) }

func metaMark(text string, mark uint32, op expr.CmpOp) part {
	return part{fmt.Sprintf(text, mark), append([]expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}}, testBit(mark, op)...)}
}

func ctMarked(mark uint32) part {
	return part{
		fmt.Sprintf("ct mark %#x", mark),
		append([]expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}}, testBit(mark, expr.CmpOpNeq)...),
	}
}

func setCtMark(mark uint32, on bool) part {
	text := map[bool]string{true: "set", false: "clear"}[on]
	return part{fmt.Sprintf("ct mark %s %#x", text, mark), []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, changeBit(mark, on),
		&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1},
	}}
}

func ctDirection(text string, direction byte) part {
	return part{"ct " + text, []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{direction}},
	}}
}

func ctNew() part {
	return part{"ct state new", append([]expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}}, testBit(expr.CtStateBitNEW, expr.CmpOpNeq)...)}
}

func loopback(text string, key expr.MetaKey) part {
	return part{text + " lo", []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: linkName("lo")},
	}}
}

func layer4(protocol byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocol}},
	}
}

// neighbourDiscovery are ICMPv6's types 133 to 137 (RFC 4861): what asks whether
// a neighbour is still there is sent to its own address.
func neighbourDiscovery() part {
	return part{"icmpv6 type 133-137", append(layer4(unix.IPPROTO_ICMPV6),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{133}, ToData: []byte{137}})}
}

func tcpPort(field string, offset uint32) part {
	return part{"tcp " + field + " @" + setDirect, append(layer4(unix.IPPROTO_TCP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		&expr.Lookup{SourceRegister: 1, SetName: setDirect})}
}

// udpService is UDP to a port below those that Linux gives to clients.
func udpService() part {
	return part{"udp dport < 32768", append(layer4(unix.IPPROTO_UDP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpLt, Register: 1, Data: binary.BigEndian.AppendUint16(nil, 32768)})}
}

// tcpSYN is the first packet of a connection.
func tcpSYN() part {
	const syn, flags = 0x02, 0x17 // FIN, SYN, RST and ACK (RFC 9293, section 3.1)
	return part{"tcp flags syn", append(layer4(unix.IPPROTO_TCP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{flags}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{syn}})}
}

// addNodeSets makes the sets of a table that has the nodes' chains.
func addNodeSets(c *nftables.Conn) error {
	for _, fam := range families {
		for _, name := range nodeSets {
			if err := c.AddSet(fam.set(name), nil); err != nil {
				return err
			}
		}
	}
	return c.AddSet(directSet(), nil)
}

func fillNodeSets(c *nftables.Conn, n mesh.NodeFilter) error {
	for _, fam := range families {
		for _, name := range nodeSets {
			if err := addElements(c, fam.set(name), hosts(fam, *nodeSetOf(&n, name))); err != nil {
				return err
			}
		}
	}
	var ports []nftables.SetElement
	for _, p := range n.DirectPorts {
		ports = append(ports, nftables.SetElement{Key: binary.BigEndian.AppendUint16(nil, p)})
	}
	return addElements(c, directSet(), ports)
}

// setFilterNodes refills the sets in one transaction, so that no packet sees them empty.
func (k *Kernel) setFilterNodes(n mesh.NodeFilter) error {
	c, err := k.nftConn()
	if err != nil {
		return err
	}
	if err := k.forgetRoutes6(); err != nil { // before their packets are held
		return err
	}
	for _, fam := range families {
		for _, name := range nodeSets {
			c.FlushSet(fam.set(name))
		}
	}
	c.FlushSet(directSet())
	if err := fillNodeSets(c, n); err != nil {
		return err
	}
	return c.Flush()
}

func readNodeSets(c *nftables.Conn, n *mesh.NodeFilter) error {
	for _, fam := range families {
		for _, name := range nodeSets {
			elements, err := c.GetSetElements(fam.set(name))
			if err != nil {
				return err
			}
			into := nodeSetOf(n, name)
			for _, e := range elements {
				if a, ok := netip.AddrFromSlice(e.Key); ok {
					*into = append(*into, a)
				}
			}
		}
	}
	elements, err := c.GetSetElements(directSet())
	for _, e := range elements {
		if len(e.Key) == 2 {
			n.DirectPorts = append(n.DirectPorts, binary.BigEndian.Uint16(e.Key))
		}
	}
	return err
}

// observeMark finds out which mark the table's chains were made for.
func observeMark(c *nftables.Conn, plain *nftables.Chain) (uint32, error) {
	if plain == nil {
		return 0, nil
	}
	rules, err := c.GetRules(table(), plain)
	if err != nil || len(rules) == 0 {
		return 0, err
	}
	return markOf(commentOf(rules[len(rules)-1].UserData)), nil
}
