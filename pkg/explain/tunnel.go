package explain

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// arrive is how the packet of another machine comes here.
func (w *walker) arrive() {
	src := w.Source.Address
	peer, ok := w.taker(src)
	switch {
	case ok && !w.tunnelled():
		w.step(Cryptokey, w.Settings.Interface, "not asked: %s sends it past the tunnel, since this address is not reached by that", w.nameOf(peer))
	case ok:
		w.step(Cryptokey, w.Settings.Interface, "taken from %s only, whose allowed IPs have %s", w.nameOf(peer), inSet(peer.AllowedIPs, src))
		w.describe(peer, src)
	case w.State.Link.Name == "":
		w.step(Cryptokey, w.Settings.Interface, "the interface is missing: nothing comes by the tunnel")
	default:
		w.step(Cryptokey, w.Settings.Interface, "refused from every peer: none has it among its allowed IPs; it could come in the clear, by %s", cmp.Or(w.Way.In, "no interface"))
	}
	if !w.Destination.Kind.Here() {
		w.step(Delivery, "", "neither end is on this machine: this is what would become of such a packet here")
	}
	if c := w.Clear; c != nil {
		w.step(InClear, c.In, "%s", w.clearText(*c))
	}
}

// clearText says whether the packet would be taken without the tunnel.
func (w *walker) clearText(c Way) string {
	p := passage{in: c.In, out: c.Route.Interface, src: w.Source.Address, dst: w.Destination.Address, next: c.Route.Gateway, marked: c.Mark != 0}
	switch {
	case c.Route.Refused != "":
		return fmt.Sprintf("the same packet by %s would not be taken: %s", c.In, c.Route.Refused)
	case !w.filterThere():
		return fmt.Sprintf("the same packet by %s would be taken: the filter is missing", c.In)
	}
	held := w.filter.forward(p)
	if forThisMachine(c.Route) {
		held = w.filter.input(p)
	}
	if held.drop {
		return fmt.Sprintf("the same packet by %s would be dropped (%s)", c.In, held)
	}
	return fmt.Sprintf("the same packet by %s would be taken (%s)", c.In, held)
}

// encrypt takes the packet through WireGuard.
func (w *walker) encrypt() {
	src := w.Source.Address
	if w.filterThere() {
		rule, kept := w.filter.source(src)
		if kept {
			w.step(Source, tableName, "stays %s (%s)", src, rule)
		} else {
			w.step(Source, tableName, "is replaced by this machine's address in the tunnel (%s)", rule)
		}
	}
	peer, ok := w.takerBy(w.Way.Route.Interface, w.Destination.Address)
	if !ok {
		w.step(Peer, w.Way.Route.Interface, "none has it among its allowed IPs")
		w.decide(Dropped, "it goes into the tunnel, where no peer takes it")
		w.fault(mendHelper)
		return
	}
	name := w.nameOf(peer)
	w.describe(peer, w.Destination.Address)
	if !peer.Endpoint.IsValid() {
		w.decide(Dropped, "%s has no endpoint: it has to call first, and has not yet", name)
		w.fault("see that wgcnid runs on " + name + ", and that its UDP gets here")
		return
	}
	w.step(Endpoint, peer.Endpoint.String(), "where %s is called", name)
	if o := w.Outer; o != nil {
		switch {
		case o.Refused != "":
			w.step(Outer, "", "the kernel has no route there: %s", o.Refused)
			w.decide(Dropped, "the endpoint of %s, %s, cannot be reached: %s", name, peer.Endpoint, o.Refused)
			w.fault("mend this machine's route to " + peer.Endpoint.Addr().String())
			return
		case isTunnel(w.Settings.Interface, o.Interface):
			w.step(Outer, o.Interface, "into the tunnel itself")
			w.decide(Dropped, "the endpoint of %s is routed into the tunnel itself", name)
			w.fault("a route or rule sends " + peer.Endpoint.Addr().String() + " to " + o.Interface + ": remove it")
			return
		}
		w.step(Outer, o.Interface, "%s", w.routeText(*o, true))
	}
	w.decide(Encrypted, "it leaves through the tunnel to %s, by %s", name, peer.Endpoint)
	if peer.LastHandshake.IsZero() {
		w.out.Why += "; there has been no handshake yet, and it waits for one"
		w.out.Mend = "if there is none within seconds, see `wgcnid doctor " + name + "`"
	}
}

// describe is the step about a peer, which has that address among its allowed IPs.
func (w *walker) describe(p mesh.Peer, a netip.Addr) {
	psk := "no preshared key"
	if p.PresharedKey != (mesh.Fingerprint{}) {
		psk = "with a preshared key"
	}
	handshake := "no handshake yet"
	if !p.LastHandshake.IsZero() {
		handshake = "last handshake " + max(w.Now.Sub(p.LastHandshake), 0).Truncate(1e9).String() + " ago"
	}
	w.step(Peer, p.PublicKey.String(), "%s, key %s, allowed IPs %s; %s; %s", w.nameOf(p), p.PublicKey, inSet(p.AllowedIPs, a), psk, handshake)
}

// routeText is a route as ip-route(8) writes it.
func (w *walker) routeText(r kernel.RouteAnswer, made bool) string {
	text := r.Prefix.String()
	if !r.Prefix.IsValid() || r.Prefix == netip.PrefixFrom(r.Prefix.Addr(), 0) {
		text = "default"
	}
	if r.Kind != kernel.RouteUnicast {
		text = r.Kind + " " + text
	}
	if r.Gateway.IsValid() {
		text += " via " + r.Gateway.String()
	}
	if r.Interface != "" {
		text += " dev " + r.Interface
	}
	if made && r.Source.IsValid() {
		text += " src " + r.Source.String()
	}
	return text + " table " + w.tableName(r.Table)
}

func (w *walker) tableName(table int) string {
	switch table {
	case 254:
		return "main"
	case 255:
		return "local"
	case 253:
		return "default"
	}
	return fmt.Sprint(table)
}
