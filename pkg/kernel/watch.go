package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Event says what may have changed.
type Event struct {
	// Ours: something that we made. The kernel should be observed again.
	Ours bool
	// Underlay: addresses, links or default routes of the machine.
	Underlay bool
}

// Watch tells of changes until ctx ends, and then closes the channel. Changes
// that have not been received yet are joined into one Event. What WireGuard does
// itself (peers, keys) the kernel tells no one: that takes a look now and then.
func (k *Kernel) Watch(ctx context.Context) (<-chan Event, error) {
	route, err := subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
	if err != nil {
		return nil, fmt.Errorf("subscribe to routes and links: %w", err)
	}
	filter, err := subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		route.Close() //nolint:errcheck // on the way out
		return nil, fmt.Errorf("subscribe to nftables: %w", err)
	}
	events := make(chan Event, 1)
	w := &watcher{events: events}
	for _, name := range []string{k.Interface, k.spare()} {
		w.links = append(w.links, append([]byte(name), 0))
	}
	var readers sync.WaitGroup
	readers.Go(func() { w.read(route, w.routeEvent) })
	readers.Go(func() { w.read(filter, filterEvent) })
	go func() {
		<-ctx.Done()
		route.Close()  //nolint:errcheck // ends its reader
		filter.Close() //nolint:errcheck // ends its reader
		readers.Wait()
		close(events)
	}()
	return events, nil
}

func subscribe(protocol int, groups ...uint32) (*netlink.Conn, error) {
	c, err := netlink.Dial(protocol, nil)
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		if err := c.JoinGroup(g); err != nil {
			c.Close() //nolint:errcheck // on the way out
			return nil, err
		}
	}
	return c, nil
}

type watcher struct {
	mu     sync.Mutex
	events chan Event
	links  [][]byte // names with their NUL
}

func (w *watcher) read(c *netlink.Conn, classify func(netlink.Message) Event) {
	for {
		messages, err := c.Receive()
		var e Event
		switch {
		case errors.Is(err, unix.ENOBUFS):
			e = Event{Ours: true, Underlay: true} // some were lost: it may have been anything
		case err != nil:
			return // closed
		}
		for _, m := range messages {
			one := classify(m)
			e.Ours, e.Underlay = e.Ours || one.Ours, e.Underlay || one.Underlay
		}
		if e != (Event{}) {
			w.send(e)
		}
	}
}

// send joins the event to one that has not been received yet.
func (w *watcher) send(e Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case before := <-w.events:
		e.Ours, e.Underlay = e.Ours || before.Ours, e.Underlay || before.Underlay
	default:
	}
	w.events <- e // never blocks: it has room for one, and only we send
}

// Sizes and offsets of the headers in <linux/rtnetlink.h>, <linux/if_addr.h> and <linux/fib_rules.h>.
const (
	rtmsgLen      = 12 // struct rtmsg; struct fib_rule_hdr is as long
	rtmsgDstLen   = 1
	rtmsgTable    = 4
	rtmsgProtocol = 5
	rtmsgType     = 7
	ifinfomsgLen  = 16
	nfgenmsgLen   = 4
)

func (w *watcher) routeEvent(m netlink.Message) Event {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		// A device that goes down takes its routes along without a word.
		if len(m.Data) < ifinfomsgLen {
			return Event{Underlay: true}
		}
		name := attribute(m.Data[ifinfomsgLen:], unix.IFLA_IFNAME)
		ours := slices.ContainsFunc(w.links, func(l []byte) bool { return bytes.Equal(l, name) })
		return Event{Ours: ours, Underlay: !ours}
	case unix.RTM_NEWADDR:
		return Event{Underlay: true}
	case unix.RTM_DELADDR:
		return Event{Ours: true, Underlay: true}
	case unix.RTM_DELROUTE, unix.RTM_NEWROUTE:
		if len(m.Data) < rtmsgLen {
			return Event{}
		}
		// The throw routes of single pods go with every DEL, as the sets' elements do.
		ofAPod := m.Data[rtmsgType] == unix.RTN_THROW && m.Data[rtmsgDstLen] >= 32
		ours := m.Data[rtmsgProtocol] == RouteProtocol
		if m.Header.Type == unix.RTM_NEWROUTE {
			// One that takes the place of another: nothing tells that the other has
			// gone (fib_table_insert in net/ipv4/fib_trie.c). In the main table, where
			// many do that, there is nothing of ours.
			ours = !ours && m.Header.Flags&netlink.Replace != 0 && m.Data[rtmsgTable] != unix.RT_TABLE_MAIN
		}
		return Event{Ours: ours && !ofAPod, Underlay: m.Data[rtmsgDstLen] == 0}
	case unix.RTM_DELRULE, unix.RTM_NEWRULE:
		if len(m.Data) < rtmsgLen {
			return Event{}
		}
		protocol := attribute(m.Data[rtmsgLen:], unix.FRA_PROTOCOL)
		return Event{Ours: len(protocol) == 1 && protocol[0] == RouteProtocol}
	}
	return Event{}
}

// filterEvent looks for changes of our table, which are rare. Elements of sets are
// left out: every ADD and DEL of a pod has some.
func filterEvent(m netlink.Message) Event {
	switch int(m.Header.Type) & 0xff {
	case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET,
		unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_NEWRULE:
		if len(m.Data) < nfgenmsgLen {
			return Event{}
		}
		// The table's name is attribute 1 of all of them (NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, …).
		name := attribute(m.Data[nfgenmsgLen:], unix.NFTA_TABLE_NAME)
		return Event{Ours: string(bytes.TrimRight(name, "\x00")) == TableName}
	}
	return Event{}
}

// attribute finds the first attribute of a type in a row of them, or nil.
func attribute(b []byte, kind uint16) []byte {
	const header = 4
	for len(b) >= header {
		length := int(binary.NativeEndian.Uint16(b))
		if length < header || length > len(b) {
			return nil
		}
		if binary.NativeEndian.Uint16(b[2:])&^unix.NLA_F_NESTED == kind {
			return b[header:length]
		}
		b = b[min((length+3)&^3, len(b)):]
	}
	return nil
}
