// Package verify shows by packets whether a node's traffic is encrypted.
//
// It sends ICMP echo requests that carry a random marker, and looks at every
// interface for it:
//
//	pod --> wgcni0: the marker must be there, else nothing is shown
//	          |
//	          v
//	        eth0:   WireGuard's packets must be there, and the marker must not
package verify

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"math/big"
	"net/netip"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/wgcni/wgcni/pkg/probe"
)

// Target is a peer that is sent to.
type Target struct {
	Name     string
	Address  netip.Addr     // in the tunnel
	Endpoint netip.AddrPort // of its WireGuard
}

// Options say what is sent and where it is looked for.
type Options struct {
	Targets   []Target
	Count     int    // packets to each target; required
	Namespace string // optional: path of the pod's network namespace to send from
	// Tunnels are the WireGuard interfaces; there are two while keys are replaced.
	Tunnels []string
	// Watched are the interfaces where nothing may be in the clear: all but those that
	// lead to pods of this node. Required.
	Watched []string
}

// The verdicts.
const (
	Encrypted = "encrypted"
	Plaintext = "PLAINTEXT" // the marker was seen outside of the tunnel
	NotShown  = "not shown" // neither could be
)

// Result is what was seen of the packets to one peer.
type Result struct {
	Peer     string         `json:"peer"`
	Address  netip.Addr     `json:"address"`
	Endpoint netip.AddrPort `json:"endpoint"`
	Sent     int            `json:"sent"`     // different ones; some may have been sent again
	Answered int            `json:"answered"` // of them
	// InTunnel are the packets with the marker on the WireGuard interfaces, requests and
	// answers; InClear those on the other interfaces that were watched.
	InTunnel int            `json:"inTunnel"`
	InClear  int            `json:"inClear"`
	ClearOn  map[string]int `json:"clearOn,omitempty"` // InClear by interface
	// WireGuardOut and WireGuardIn are WireGuard's own packets of that size to and from
	// the endpoint.
	WireGuardOut int    `json:"wireGuardOut"`
	WireGuardIn  int    `json:"wireGuardIn"`
	Verdict      string `json:"verdict"`
	Reason       string `json:"reason,omitempty"` // why it is not Encrypted
}

// How long answers may take: the first time, and where there was none, so that a
// handshake can be tried again (after 5 s, REKEY_TIMEOUT).
const (
	patience       = 2 * time.Second
	secondPatience = 6 * time.Second
	every          = 400 * time.Millisecond
)

// smallest and its range are the sizes of the packets, in bytes, IP header included.
// They fit into every link. The exact size is drawn by lot: it tells the packets from
// most others before they are looked at.
const (
	smallest  = 300
	sizeRange = 200
)

// Run sends and watches. The results are in the order of the targets; missed is how
// many packets could not be looked at, since this machine was too busy.
func Run(ctx context.Context, o Options) (results []Result, missed int, err error) {
	n, err := rand.Int(rand.Reader, big.NewInt(sizeRange))
	if err != nil {
		return nil, 0, err
	}
	size := smallest + int(n.Int64())
	w, err := watch(o, size)
	if err != nil {
		return nil, 0, err
	}
	var requests []probe.Request
	for i, t := range o.Targets {
		marker := make([]byte, markerLen)
		_, _ = rand.Read(marker) // never fails
		w.add(i, marker, t)
		room := size - ipv4.HeaderLen - 8
		if t.Address.Is6() {
			room = size - ipv6.HeaderLen - 8
		}
		payload := bytes.Repeat(marker, room/markerLen+1)[:room]
		for range o.Count {
			requests = append(requests, probe.Request{To: t.Address, Payload: payload})
		}
	}
	answers, err := exchange(ctx, o.Namespace, requests)
	missed, werr := w.stop()
	if err == nil {
		err = werr
	}
	if err != nil {
		return nil, missed, err
	}
	results = w.results
	for i := range results {
		r := &results[i]
		r.Sent = o.Count
		for _, a := range answers[i*o.Count : (i+1)*o.Count] {
			if a.Answered {
				r.Answered++
			}
			if a.Err != nil {
				r.Reason = a.Err.Error()
			}
		}
		r.Verdict, r.Reason = Judge(*r, missed)
	}
	return results, missed, nil
}

// exchange sends all, and those without an answer once more for longer.
func exchange(ctx context.Context, namespace string, requests []probe.Request) ([]probe.Answer, error) {
	answers := make([]probe.Answer, len(requests))
	for _, wait := range []time.Duration{patience, secondPatience} {
		var left []probe.Request
		var at []int
		for i, a := range answers {
			if !a.Answered {
				left, at = append(left, requests[i]), append(at, i)
			}
		}
		if len(left) == 0 {
			break
		}
		bounded, cancel := context.WithTimeout(ctx, wait)
		got, err := probe.Echo(bounded, probe.Options{Namespace: namespace, Every: every}, left)
		cancel()
		if err != nil {
			return nil, err
		}
		for j, i := range at {
			answers[i] = got[j]
		}
	}
	return answers, nil
}

// Judge says what the counts of a Result show, and why not more. A Reason that is
// set is why sending failed.
func Judge(r Result, missed int) (verdict, reason string) {
	switch {
	case r.InClear > 0:
		return Plaintext, fmt.Sprintf("%d packets with the marker were seen outside of the tunnel, on %s: `wgcnid doctor %s` and `wgcnid explain` say by which way", r.InClear, names(r.ClearOn), r.Peer)
	case missed > 0:
		return NotShown, fmt.Sprintf("%d packets passed by without being looked at, since this machine is too busy: try again", missed)
	case r.InTunnel == 0 && r.Reason != "":
		return NotShown, "nothing could be sent: " + r.Reason
	case r.InTunnel == 0:
		return NotShown, fmt.Sprintf("nothing of what was sent came by the tunnel, nor by any interface that was watched: it was dropped; run `wgcnid doctor %s`", r.Peer)
	case r.WireGuardOut == 0:
		return NotShown, fmt.Sprintf("the packets entered the tunnel, and no WireGuard packets left for it: there is no handshake; run `wgcnid doctor %s`", r.Peer)
	case r.Answered == 0:
		return NotShown, fmt.Sprintf("WireGuard packets left for it, and no answer came: run `wgcnid doctor %s`", r.Peer)
	}
	return Encrypted, ""
}
