package kernel

import (
	"encoding/binary"
	"errors"

	rtnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// routeBatch is how many routes share one sendmsg(2). Were all of them refused, the
// kernel's answers, of up to a kilobyte each, would still fit into the least buffer
// that a socket has by default (net.core.rmem_default).
const routeBatch = 64

// leadingRoutes counts the ops at the head of ops that may share one message: routes
// of one interface, or of none, that the gate lets through.
func leadingRoutes(ops []mesh.Op, gate *nodeGate) int {
	n := 0
	for ; n < min(len(ops), routeBatch); n++ {
		if _, ok := ops[n].(mesh.SetRoute); !ok || linkOf(ops[n]) != linkOf(ops[0]) || gate.shuts(ops[n]) {
			break
		}
	}
	return n
}

// setRoutes carries out ops that may share one message, and returns what each met with.
// The kernel goes on behind one that it refuses, and tells of that unasked
// (netlink_rcv_skb in net/netlink/af_netlink.c): only the last has to be confirmed.
func (k *Kernel) setRoutes(ops []mesh.Op) []error {
	errs := make([]error, len(ops))
	routes := make([]*netlink.Route, len(ops))
	var messages []rtnetlink.Message
	var of []int // the op of each message
	for i, op := range ops {
		if routes[i], errs[i] = k.route(op.(mesh.SetRoute)); errs[i] == nil {
			messages, of = append(messages, routeMessage(routes[i])), append(of, i)
		}
	}
	if len(messages) == 0 {
		return errs
	}
	messages[len(messages)-1].Header.Flags |= rtnetlink.Acknowledge
	sent, err := k.batch.SendMessages(messages)
	for last := false; err == nil && !last; {
		var answers []rtnetlink.Message
		answers, err = k.batch.Receive()
		for _, a := range answers {
			last = last || a.Header.Sequence == sent[len(sent)-1].Header.Sequence
		}
		var refused *rtnetlink.OpError
		if !errors.As(err, &refused) || refused.Sequence == 0 {
			continue
		}
		err = nil
		for j, m := range sent {
			if m.Header.Sequence == refused.Sequence {
				errs[of[j]], last = refused.Err, j == len(sent)-1
			}
		}
	}
	if err != nil { // an answer was lost: setting a route twice does no harm
		for _, i := range of {
			errs[i] = k.rt.RouteReplace(routes[i])
		}
	}
	return errs
}

// routeMessage is what netlink.RouteReplace sends.
func routeMessage(r *netlink.Route) rtnetlink.Message {
	ones, _ := r.Dst.Mask.Size()
	// struct rtmsg in <linux/rtnetlink.h>; the table is the attribute's.
	data := []byte{byte(r.Family), byte(ones), 0, 0, unix.RT_TABLE_UNSPEC, byte(r.Protocol), byte(r.Scope), byte(r.Type), 0, 0, 0, 0}
	dst, src := r.Dst.IP.To4(), r.Src.To4()
	if r.Family == netlink.FAMILY_V6 {
		dst, src = r.Dst.IP.To16(), r.Src.To16()
	}
	data = appendAttribute(data, unix.RTA_DST, dst)
	data = appendAttribute(data, unix.RTA_TABLE, binary.NativeEndian.AppendUint32(nil, uint32(r.Table)))
	if r.LinkIndex != 0 {
		data = appendAttribute(data, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(r.LinkIndex)))
	}
	if r.Priority != 0 {
		data = appendAttribute(data, unix.RTA_PRIORITY, binary.NativeEndian.AppendUint32(nil, uint32(r.Priority)))
	}
	if src != nil {
		data = appendAttribute(data, unix.RTA_PREFSRC, src)
	}
	return rtnetlink.Message{
		Header: rtnetlink.Header{Type: unix.RTM_NEWROUTE, Flags: rtnetlink.Request | rtnetlink.Create | rtnetlink.Replace},
		Data:   data,
	}
}

// appendAttribute appends a struct rtattr whose value is of a length that needs no padding.
func appendAttribute(b []byte, kind uint16, value []byte) []byte {
	const header = 4
	b = binary.NativeEndian.AppendUint16(b, uint16(header+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	return append(b, value...)
}
