package doctor

import (
	"errors"
	"fmt"
	"time"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/probe"
)

// manyPeers is how many peers that are well have a line each.
const manyPeers = 10

func checkPeers(f Facts) []Check {
	if len(f.Peers) == 0 {
		t := topic{"peers", "Peers", "the other machines of the mesh"}
		return []Check{t.ok("there are none yet")}
	}
	var out, well []Check
	for _, p := range f.Peers {
		for _, c := range []Check{checkPeer(f, p), checkMTU(f, p)} {
			switch c.Level {
			case "": // nothing to say
			case OK:
				well = append(well, c)
			default:
				out = append(out, c)
			}
		}
	}
	if len(well) > 2*manyPeers {
		t := topic{"peers", "Peers", "the other machines of the mesh"}
		return append(out, t.ok(fmt.Sprintf("of %d, all but those named are well", len(f.Peers))))
	}
	return append(out, well...)
}

// handshakeText says how old the last handshake is.
func handshakeText(p mesh.Peer, now time.Time) string {
	if p.LastHandshake.IsZero() {
		return "no handshake so far"
	}
	return fmt.Sprintf("handshake %s ago", max(now.Sub(p.LastHandshake), 0).Round(time.Second))
}

func checkPeer(f Facts, p Peer) Check {
	t := topic{"peer/" + p.Name, "Peer " + p.Name, fmt.Sprintf("its handshake, and its answer to a ping of %s through the tunnel", p.Address)}
	if f.Quick || !p.Address.IsValid() {
		t.looked = "its handshake"
	}
	fresh := !p.Have.LastHandshake.IsZero() && f.Now.Sub(p.Have.LastHandshake) < mesh.HandshakeFresh
	switch {
	case !p.Present:
		return t.fail("it is not in the kernel", "see \"Kernel as planned\"")
	case p.Echo.Answered:
		return t.ok(fmt.Sprintf("answers in %s from %s; %s", p.Echo.RTT.Round(10*time.Microsecond), p.Have.Endpoint, handshakeText(p.Have, f.Now)))
	case errors.Is(p.Echo.Err, probe.ErrNoSocket):
		c := checkHandshake(f, t, p, fresh)
		c.Found += " (no ping was sent: " + p.Echo.Err.Error() + ")"
		return c
	case f.Quick, !p.Address.IsValid():
		return checkHandshake(f, t, p, fresh)
	case p.RouteErr != nil, p.Route != "" && !f.tunnel(p.Route):
		return t.fail(handshakeText(p.Have, f.Now)+", but what this machine sends it does not enter the tunnel", "see \"Routes\"")
	case fresh && p.Have.ReceiveBytes > p.Before.ReceiveBytes:
		return t.warn(fmt.Sprintf("%s, but no answer from %s to a ping", handshakeText(p.Have, f.Now), p.Address),
			fmt.Sprintf("on %s: run `wgcnid doctor %s`; a firewall there may drop ICMP from %s, which hurts nobody else", p.Name, f.Config.NodeName, f.Config.Interface))
	case len(p.Record.Via) > 0:
		return t.note("runs nothing but WireGuard, and is not connected; "+handshakeText(p.Have, f.Now), "it calls when it has something to send")
	case p.Echo.Err != nil && !p.Have.Endpoint.IsValid():
		return checkHandshake(f, t, p, fresh)
	}
	return f.silent(t, p)
}

// checkHandshake is all there is where nothing was sent.
func checkHandshake(f Facts, t topic, p Peer, fresh bool) Check {
	switch {
	case fresh:
		return t.ok(handshakeText(p.Have, f.Now))
	case len(p.Record.Via) > 0:
		return t.note("runs nothing but WireGuard, and is not connected; "+handshakeText(p.Have, f.Now), "it calls when it has something to send")
	case !p.Have.Endpoint.IsValid() && len(p.Record.Endpoints) > 0:
		return t.fail(fmt.Sprintf("its endpoint %s has no address", p.Record.Endpoints[0]), "see that this machine's name server knows the name")
	case !p.Have.Endpoint.IsValid():
		return t.warn("it is behind NAT, publishes no endpoint, and has not called yet", fmt.Sprintf("on %s: see that wgcnid runs, and that it reaches this node's UDP port %d", p.Name, f.Config.ListenPort))
	case p.Have.LastHandshake.IsZero() && p.Have.TransmitBytes > 0 && p.Have.ReceiveBytes == 0:
		return t.warn(fmt.Sprintf("%d bytes were sent to %s, and nothing came back", p.Have.TransmitBytes, p.Have.Endpoint), fmt.Sprintf("run `wgcnid doctor %s`, which looks why", p.Name))
	}
	return t.ok(handshakeText(p.Have, f.Now) + "; the next packet starts one")
}

// silent says as much as can be told of why nothing comes back.
func (f Facts) silent(t topic, p Peer) Check {
	port := p.Have.Endpoint.Port()
	there := fmt.Sprintf("on %s: `wgcnid doctor %s`", p.Name, f.Config.NodeName)
	nothing := fmt.Sprintf("%s, and no answer through the tunnel", handshakeText(p.Have, f.Now))
	came := p.Have.ReceiveBytes > p.Before.ReceiveBytes && p.Before.LastHandshake.IsZero()
	switch {
	case !p.Have.Endpoint.IsValid():
		return checkHandshake(f, t, p, false)
	case p.Refused:
		return t.fail(fmt.Sprintf("%s: %s says that nobody listens on UDP port %d", nothing, p.Have.Endpoint.Addr(), port),
			fmt.Sprintf("on %s: start wgcnid, or see why %s is down (`wgcnid doctor`)", p.Name, f.Config.Interface))
	case came:
		return t.fail(nothing+": its WireGuard sends, but the two do not agree on a key",
			fmt.Sprintf("%s, and see \"Own record\" and \"Cluster secret\" on both", there))
	case p.Machine.Answered:
		return t.fail(fmt.Sprintf("%s: its machine answers a plain ping of %s, its WireGuard does not", nothing, p.Have.Endpoint.Addr()),
			fmt.Sprintf("a firewall there or on the way drops UDP to port %d, or it does not know this node: %s", port, there))
	case p.Machine.Err != nil:
		return t.fail(fmt.Sprintf("%s: %s cannot be reached from here: %v", nothing, p.Have.Endpoint.Addr(), p.Machine.Err),
			fmt.Sprintf("see `ip route get %s`; the address comes from its record, and may be out of date", p.Have.Endpoint.Addr()))
	}
	return t.fail(fmt.Sprintf("%s: its machine %s does not answer a plain ping either", nothing, p.Have.Endpoint.Addr()),
		fmt.Sprintf("see that %s is up, that its network reaches this one, and that UDP port %d is open on the way", p.Name, port))
}

// checkMTU has no level where nothing was measured.
func checkMTU(f Facts, p Peer) Check {
	mtu := f.Plan.Observed.Link.MTU
	t := topic{"mtu/" + p.Name, "MTU to " + p.Name, fmt.Sprintf("packets of %d bytes through the tunnel, and of %d bytes below it, that may not be fragmented", mtu, p.WholeSize)}
	switch {
	case !p.Echo.Answered:
		return Check{}
	case !p.Full.Answered && p.Fits == 0:
		return t.fail("small packets come back, none of 500 bytes and more does", "find out what on the way drops them")
	case !p.Full.Answered:
		return t.fail(fmt.Sprintf("packets of %d bytes come back at most: larger ones are lost on the way, and connections hang", p.Fits),
			fmt.Sprintf("set \"mtu\": %d on both nodes, or raise the MTU on the way to %d", p.Fits, p.WholeSize))
	case p.Machine.Answered && !p.Whole.Answered && p.Whole.Err == nil:
		return t.note(fmt.Sprintf("%d bytes get through, but in fragments: a packet of %d bytes below the tunnel does not come back whole", mtu, p.WholeSize),
			"harmless but slow, and some networks drop fragments: raise the MTU on the way, or set \"mtu\" lower")
	}
	return t.ok(fmt.Sprintf("%d bytes come back", mtu))
}
