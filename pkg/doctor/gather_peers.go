package doctor

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/probe"
	"github.com/wgcni/wgcni/pkg/registry"
)

// How long answers may take. A handshake whose first message is lost is tried
// again after 5 s and a bit (REKEY_TIMEOUT in section 6.1 of the WireGuard paper),
// so that those that stay silent are given the time for a second one.
const (
	echoPatience   = 2 * time.Second
	secondPatience = 6 * time.Second
	echoEvery      = 400 * time.Millisecond
	// keepaliveAfter is when a peer that hears us, and does not answer, must have sent
	// something all the same (KEEPALIVE_TIMEOUT, of 10 s, in the same section).
	keepaliveAfter = 11500 * time.Millisecond
)

// atOnce bounds how many peers are looked at closely at the same time.
const atOnce = 64

func gatherPeers(ctx context.Context, s Sources, f Facts) []Peer {
	peers := planned(s, f)
	for i := range peers {
		peers[i].Route, peers[i].RouteErr = routeTo(peers[i].Address)
	}
	if !s.Quick && f.Plan.Observed.Link.Up {
		begin := time.Now()
		ping(ctx, peers, s.Config.FwMark, f.Plan.Observed.Link.MTU)
		awaitKeepalive(ctx, s.Kernel, peers, begin, f.Now)
	}
	after := map[wgtypes.Key]mesh.Peer{}
	if now, err := s.Kernel.Observe(); err == nil {
		for _, p := range mesh.BothPlanes(f.Plan.State, now) {
			after[p.PublicKey] = p
		}
	}
	for i, p := range peers {
		peers[i].Have = p.Before
		if now, ok := after[p.Key]; ok {
			peers[i].Have = now
		}
	}
	return peers
}

// awaitKeepalive waits for those that had a session when we began, and did not
// answer: whether the way is broken, or just nobody there answers pings.
func awaitKeepalive(ctx context.Context, k *kernel.Kernel, peers []Peer, begin, now time.Time) {
	for time.Since(begin) < keepaliveAfter && ctx.Err() == nil {
		heard, err := k.Handshakes()
		if err != nil {
			return
		}
		waiting := slices.ContainsFunc(peers, func(p Peer) bool {
			fresh := !p.Before.LastHandshake.IsZero() && now.Sub(p.Before.LastHandshake) < mesh.HandshakeFresh
			return fresh && p.Address.IsValid() && !p.Echo.Answered && !errors.Is(p.Echo.Err, probe.ErrNoSocket) && heard[p.Key].Received <= p.Before.ReceiveBytes
		})
		if !waiting {
			return
		}
		time.Sleep(settlePause)
	}
}

// planned are the peers that there should be, by name.
func planned(s Sources, f Facts) (out []Peer) {
	have := map[wgtypes.Key]mesh.Peer{}
	for _, p := range mesh.BothPlanes(f.Plan.State, f.Plan.Observed) {
		have[p.PublicKey] = p
	}
	for _, want := range f.Plan.State.Peers {
		if len(s.Peers) > 0 && !slices.Contains(s.Peers, want.Name) {
			continue
		}
		record, _ := f.Mesh.Known.Records.Record(want.Name)
		p := Peer{Name: want.Name, Key: want.PublicKey, Wanted: want, Record: record}
		p.Before, p.Present = have[want.PublicKey]
		p.Address = TunnelAddress(p.Record, want, f.Plan.State.Routes)
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Peer) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// TunnelAddress is one that the peer itself has, and that these routes lead to by
// the tunnel; invalid if there is none.
func TunnelAddress(r registry.Record, p mesh.Peer, routes []mesh.Route) netip.Addr {
	candidates := mesh.Node{Prefixes: r.Prefixes}.TunnelAddresses()
	for _, h := range r.Hosts {
		candidates = append(candidates, h.Prefix.Addr())
	}
	for _, a := range candidates {
		if slices.ContainsFunc(p.AllowedIPs, func(p netip.Prefix) bool { return p.Contains(a) }) && viaLink(routes, a) {
			return a
		}
	}
	return netip.Addr{}
}

// viaLink reports whether the longest prefix leads into the tunnel.
func viaLink(routes []mesh.Route, a netip.Addr) bool {
	best, via := -1, false
	for _, r := range routes {
		if r.Prefix.Contains(a) && r.Prefix.Bits() > best && r.Metric == 0 {
			best, via = r.Prefix.Bits(), r.Type == mesh.ViaLink
		}
	}
	return via
}

// routeTo is the interface by which the kernel would send to an address.
func routeTo(a netip.Addr) (string, error) {
	if !a.IsValid() {
		return "", nil
	}
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return "", err
	}
	l, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", err
	}
	return l.Attrs().Name, nil
}

// ping provokes handshakes, and looks closer where something does not come back.
func ping(ctx context.Context, peers []Peer, mark uint32, mtu int) {
	echoAll(ctx, echoPatience, probe.Options{Every: echoEvery}, peers, func(p *Peer) (probe.Request, *probe.Answer, bool) {
		return probe.Sized(p.Address, 92), &p.Echo, p.Address.IsValid()
	})
	echoAll(ctx, secondPatience, probe.Options{Every: echoEvery}, peers, func(p *Peer) (probe.Request, *probe.Answer, bool) {
		return probe.Sized(p.Address, 92), &p.Echo, p.Address.IsValid() && !p.Echo.Answered && p.Before.Endpoint.IsValid()
	})
	echoAll(ctx, echoPatience, probe.Options{Every: echoEvery, Whole: true}, peers, func(p *Peer) (probe.Request, *probe.Answer, bool) {
		return probe.Sized(p.Address, mtu), &p.Full, p.Echo.Answered
	})
	outside := probe.Options{Every: echoEvery, Mark: mark}
	echoAll(ctx, time.Second, outside, peers, func(p *Peer) (probe.Request, *probe.Answer, bool) {
		e := p.Before.Endpoint.Addr()
		return probe.Sized(e, 92), &p.Machine, e.IsValid()
	})
	outside.Whole = true
	echoAll(ctx, time.Second, outside, peers, func(p *Peer) (probe.Request, *probe.Answer, bool) {
		e := p.Before.Endpoint.Addr()
		p.WholeSize = mtu + 60
		if e.Is6() {
			p.WholeSize = mtu + 80
		}
		return probe.Sized(e, p.WholeSize), &p.Whole, e.IsValid() && p.Machine.Answered
	})
	closer(ctx, peers, mark, mtu)
}

// echoAll asks those of the peers that which wants asked.
func echoAll(ctx context.Context, patience time.Duration, o probe.Options, peers []Peer, which func(*Peer) (probe.Request, *probe.Answer, bool)) {
	var requests []probe.Request
	var into []*probe.Answer
	for i := range peers {
		if r, answer, wanted := which(&peers[i]); wanted {
			requests, into = append(requests, r), append(into, answer)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	answers, err := probe.Echo(ctx, o, requests)
	for i := range into {
		if err != nil {
			*into[i] = probe.Answer{Err: err}
			continue
		}
		*into[i] = answers[i]
	}
}

// closer looks at the peers of which something was not answered.
func closer(ctx context.Context, peers []Peer, mark uint32, mtu int) {
	slots := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for i := range peers {
		p := &peers[i]
		silent, narrow := p.Address.IsValid() && !p.Echo.Answered, p.Echo.Answered && !p.Full.Answered
		if !silent && !narrow {
			continue
		}
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			if narrow {
				p.Fits = largest(ctx, p.Address, mtu)
			} else if p.Before.Endpoint.IsValid() {
				p.Refused = probe.Refused(ctx, p.Before.Endpoint, mark, time.Second)
			}
		})
	}
	all.Wait()
}

// largest is the largest packet of some that comes back whole, in bytes; 0 if none does.
func largest(ctx context.Context, to netip.Addr, mtu int) int {
	var sizes []int
	for size := mtu - 4; size >= 500; size -= 4 {
		sizes = append(sizes, size)
	}
	for len(sizes) > 0 { // a search by halves, eight at a time, so that no queue overflows
		var asked []int
		step := max(len(sizes)/8, 1)
		for i := 0; i < len(sizes); i += step {
			asked = append(asked, i)
		}
		var requests []probe.Request
		for _, i := range asked {
			requests = append(requests, probe.Sized(to, sizes[i]))
		}
		round, cancel := context.WithTimeout(ctx, time.Second)
		answers, err := probe.Echo(round, probe.Options{Every: echoEvery, Whole: true}, requests)
		cancel()
		if err != nil {
			return 0
		}
		first := slices.IndexFunc(answers, func(a probe.Answer) bool { return a.Answered })
		switch {
		case first < 0 && step == 1:
			return 0
		case first < 0:
			sizes = sizes[asked[len(asked)-1]+1:]
		case step == 1 || first == 0:
			return sizes[asked[first]]
		default:
			sizes = sizes[asked[first-1]+1 : asked[first]+1]
		}
	}
	return 0
}
