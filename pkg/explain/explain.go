package explain

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// A Verdict is what becomes of the packet.
type Verdict string

// The verdicts.
const (
	Encrypted Verdict = "encrypted" // it passes between machines through the tunnel
	Plaintext Verdict = "plaintext" // it passes between machines as it is
	Dropped   Verdict = "dropped"
	Local     Verdict = "local" // it does not leave this machine
)

// A Stage is a part of the packet's way.
type Stage string

// The stages, in the order of the way.
const (
	From      Stage = "from"
	To        Stage = "to"
	Cryptokey Stage = "cryptokey" // WireGuard's check of what a peer sends
	Rule      Stage = "rule"
	Route     Stage = "route"
	Filter    Stage = "filter"
	Source    Stage = "source"
	Peer      Stage = "peer"
	Endpoint  Stage = "endpoint"
	Outer     Stage = "outer"
	InClear   Stage = "in the clear" // what would become of the same packet without the tunnel
	Delivery  Stage = "delivery"
)

// A Step is one thing that the packet meets.
type Step struct {
	Stage  Stage  `json:"stage"`
	Object string `json:"object,omitempty"` // its name in the kernel
	Text   string `json:"text"`
}

// An Explanation is the verdict, and how it came to be.
type Explanation struct {
	Source      Party   `json:"source"`
	Destination Party   `json:"destination"`
	Flow        Flow    `json:"flow,omitzero"`
	Verdict     Verdict `json:"verdict"`
	Why         string  `json:"why"`
	// Fault says that it should be otherwise, Mend how to bring that about.
	Fault bool   `json:"fault"`
	Mend  string `json:"mend,omitempty"`
	Steps []Step `json:"steps"`
}

// walker takes the packet along its way.
type walker struct {
	Facts
	out    Explanation
	filter filter
}

// Explain says what becomes of the packet.
func Explain(f Facts) Explanation {
	w := walker{Facts: f, filter: filter{f.State.Filter}}
	w.out = Explanation{Source: f.Source, Destination: f.Destination, Flow: f.Flow}
	who, source := f.Source.String(), f.Source.Address
	if !source.IsValid() { // where there is no route there is none: no set has the zero address
		who += ", with the address that the route gives"
		source = f.Way.Route.Source
		w.Source.Address, w.out.Source.Address = source, source
	}
	object := ""
	if source.IsValid() {
		object = source.String()
	}
	w.step(From, object, "%s", who)
	w.step(To, f.Destination.Address.String(), "%s", f.Destination)
	if !f.Source.Kind.Here() {
		w.arrive()
	}
	w.walk()
	return w.out
}

func (w *walker) step(stage Stage, object, format string, args ...any) {
	w.out.Steps = append(w.out.Steps, Step{Stage: stage, Object: object, Text: fmt.Sprintf(format, args...)})
}

// decide ends the way.
func (w *walker) decide(v Verdict, format string, args ...any) {
	w.out.Verdict, w.out.Why = v, fmt.Sprintf(format, args...)
}

func (w *walker) fault(mend string) { w.out.Fault, w.out.Mend = true, mend }

const (
	mendHelper   = "see that wgcnid runs on this machine (`wgcnid status`); it makes again what is missing within seconds"
	mendAnnounce = "`wgcnid nodes` lists what each machine has announced: see that wgcnid runs on the one that has the address, and that its registry is the same"
)

// walk goes on where the packet is on this machine.
func (w *walker) walk() {
	r := w.Way.Route
	w.rules()
	if r.Refused != "" {
		w.refused()
		return
	}
	w.step(Route, r.Interface, "%s", w.routeText(r, w.Way.In == ""))
	switch {
	case forThisMachine(r):
		w.deliver()
		return
	case r.Kind != kernel.RouteUnicast:
		w.decide(Dropped, "the route is of the kind %s", r.Kind)
		w.fault("`ip route get` shows it; it is none of wgcni's")
		return
	}
	if !w.passes() {
		return
	}
	switch {
	case isTunnel(w.Settings.Interface, r.Interface):
		w.encrypt()
	case w.stays():
		w.arrived(w.Destination.Interface)
	default:
		w.leave()
	}
}

// forThisMachine reports whether a packet is not sent on. Anycast is IPv6's, of the
// first address of each of a router's networks (RFC 4291, section 2.6.1).
func forThisMachine(r kernel.RouteAnswer) bool {
	return r.Kind == kernel.RouteLocal || r.Kind == kernel.RouteAnycast
}

// stays reports whether the packet goes to one of this machine's pods. With a
// gateway on the way it leaves, as it does from a machine whose bridge is not made yet.
func (w *walker) stays() bool {
	return (w.Destination.Kind == Pod || w.Destination.Kind == Free) && !w.Way.Route.Gateway.IsValid()
}

// refused has the kernel without a route: the guard's, or none at all.
func (w *walker) refused() {
	r, ok := w.ownRoute()
	why := w.Way.Route.Refused
	if !ok || r.Type != mesh.Unreachable || w.Way.Mark&w.Settings.FwMark != 0 {
		w.step(Route, "", "the kernel has none: %s", why)
		w.decide(Dropped, "this machine's routes do not take it: %s", why)
		switch {
		case w.Way.In != "" && w.Source.Kind != Pod:
			w.out.Mend = "the reverse path filter refuses a source that comes by another interface than its route's (rp_filter)"
		default:
			w.fault("compare `ip route get` and `ip rule`: none of wgcni's routes has it")
		}
		return
	}
	w.step(Route, "", "%s: the kernel says %s", r, why)
	w.unreachable()
}

// unreachable says why the guard's route is all that there is.
func (w *walker) unreachable() {
	d := w.Destination
	switch {
	case d.Kind != Remote && d.Kind != Machine:
		w.decide(Dropped, "nobody has announced %s, and encryption is required", d.Address)
		w.out.Mend = mendAnnounce
	case w.Why[d.Node] != "":
		w.decide(Dropped, "%s has announced it, and cannot be reached from here: %s", d.Node, w.Why[d.Node])
		w.fault("`wgcnid graph` draws who can talk to whom")
	case w.State.Link.Name == "":
		w.decide(Dropped, "interface %s is missing; encryption is required", w.Settings.Interface)
		w.fault(mendHelper)
	case w.apart(d.Node):
		w.decide(Dropped, "%s has announced it, and shares no segment with this machine", d.Node)
		w.out.Mend = "if they are to talk, give both a segment in common (\"segments\")"
	default:
		w.decide(Dropped, "%s has announced it, and no route leads there", d.Node)
		w.fault(mendHelper)
	}
}

// apart reports whether the other machine shares no segment with this one. Those
// that name none are in one, see mesh.Topology.
func (w *walker) apart(node string) bool {
	own, known := w.Segments[w.Node]
	other, there := w.Segments[node]
	if !known || !there {
		return false
	}
	if len(own) == 0 || len(other) == 0 {
		return len(own) != len(other)
	}
	return !slices.ContainsFunc(own, func(s string) bool { return slices.Contains(other, s) })
}

// ownRoute is the best of our own routes for the destination.
func (w *walker) ownRoute() (best mesh.Route, ok bool) {
	for _, r := range w.State.Routes {
		if r.Table != w.Settings.Table || !r.Prefix.Contains(w.Destination.Address) {
			continue
		}
		if c := cmp.Compare(best.Prefix.Bits(), r.Prefix.Bits()); !ok || c < 0 || c == 0 && r.Metric < best.Metric {
			best, ok = r, true
		}
	}
	return best, ok
}

// filterThere reports whether the filter is as wgcni makes it.
func (w *walker) filterThere() bool { return w.State.Filter.Interface != "" && !w.State.Filter.Broken }

// passes takes the packet past the filter, if it lets it.
func (w *walker) passes() bool {
	if !w.filterThere() {
		w.step(Filter, tableName, "missing, or not as wgcni makes it: it holds nothing")
		return true
	}
	p := passage{in: w.Way.In, out: w.Way.Route.Interface, src: w.Source.Address, dst: w.Destination.Address, next: w.Way.Route.Gateway, marked: w.Way.Mark&w.Settings.FwMark != 0}
	found := w.filter.output(p)
	if w.Way.In != "" {
		if forwarded := w.filter.forward(p); forwarded.drop || !found.drop {
			found = forwarded
		}
	}
	w.step(Filter, tableName, "%s", found)
	if !found.drop {
		return true
	}
	w.held(p)
	return false
}

// held says why the filter holds the packet.
func (w *walker) held(p passage) {
	d := w.Destination
	if w.Source.Kind.Here() || isTunnel(w.Settings.Interface, p.in) {
		w.decide(Dropped, "it would leave by %s in the clear; it may only go through the tunnel", p.out)
		switch {
		case w.State.Link.Name == "":
			w.out.Why = fmt.Sprintf("interface %s is missing, and it would leave by %s in the clear", w.Settings.Interface, p.out)
			w.fault(mendHelper)
		case d.Kind == Free:
			w.out.Why = fmt.Sprintf("no pod of this machine has it, and its route leads to a router, by %s in the clear", p.out)
			w.out.Mend = "if it is behind that router, announce the router's address too (\"subnets\")"
		case d.Kind == Pod:
			w.out.Why = fmt.Sprintf("the route to the pod is gone, and another leads by %s in the clear", p.out)
			w.fault("its link is gone, or the primary plugin's route to it: the runtime should have deleted it")
		case d.Kind == Unannounced || d.Kind == Outside:
			w.out.Mend = mendAnnounce
		case w.Why[d.Node] != "":
			w.out.Why += ": " + w.Why[d.Node]
			w.fault("`wgcnid graph` draws who can talk to whom")
		case w.apart(d.Node):
			w.out.Why += fmt.Sprintf(", and %s shares no segment with this machine", d.Node)
			w.out.Mend = "if they are to talk, give both a segment in common (\"segments\")"
		default:
			w.fault("a route takes it past the tunnel: compare `ip route get` and `ip rule` with `wgcnid status`")
		}
		return
	}
	w.decide(Dropped, "it comes by %s in the clear; from %s it is taken through the tunnel only", p.in, w.Source.Address)
	w.out.Mend = mendAnnounce
	if w.State.Link.Name == "" {
		w.fault(mendHelper)
	}
}

// deliver is for this machine itself.
func (w *walker) deliver() {
	if !w.filterThere() {
		w.step(Filter, tableName, "missing, or not as wgcni makes it: it holds nothing")
	} else if w.Way.In != "" {
		p := passage{in: w.Way.In, src: w.Source.Address, dst: w.Destination.Address}
		found := w.filter.input(p)
		w.step(Filter, tableName, "%s", found)
		if found.drop {
			w.held(p)
			return
		}
	}
	w.arrived(w.Destination.Interface)
}

// arrived is the end of the way on this machine.
func (w *walker) arrived(link string) {
	to := "to this machine"
	switch kind := w.Destination.Kind; {
	case forThisMachine(w.Way.Route):
	case kind == Pod:
		to = "to the pod, by " + cmp.Or(link, w.Way.Route.Interface)
	case kind == Free:
		to = fmt.Sprintf("by %s, where nobody answers", w.Way.Route.Interface)
	}
	w.step(Delivery, w.Way.Route.Interface, "%s", to)
	switch {
	case w.Source.Kind.Here():
		w.decide(Local, "both ends are on this machine")
	case isTunnel(w.Settings.Interface, w.Way.In):
		w.decide(Encrypted, "it comes through the tunnel")
	default:
		w.inTheClear(fmt.Sprintf("it comes by %s as it is", w.Way.In), w.Source)
	}
}

// leave is a packet that passes by the underlay, or to wherever else this machine leads.
func (w *walker) leave() {
	r := w.Way.Route
	by := r.Interface
	if r.Gateway.IsValid() {
		by += ", by the gateway " + r.Gateway.String()
	}
	w.step(Delivery, r.Interface, "leaves by %s; what other programs do to it is not looked at", by)
	far := w.Destination
	if !w.Source.Kind.Here() && far.Kind == Outside {
		far = w.Source
	}
	w.inTheClear(fmt.Sprintf("it leaves by %s as it is", r.Interface), far)
}

// inTheClear decides for plaintext, and says whether it is meant to be.
func (w *walker) inTheClear(how string, far Party) {
	switch {
	case far.Kind == Outside:
		w.decide(Plaintext, "%s: %s is not in the ranges that the mesh is for", how, far.Address)
	case far.Kind == Machine && w.Way.Mark&w.Settings.FwMark != 0:
		w.decide(Plaintext, "%s: TCP port %d of machines is direct (\"directPorts\")", how, w.Flow.Port)
	case far.Kind == Machine && !w.Settings.EncryptNodes:
		w.decide(Plaintext, "%s: the machines' own traffic is not encrypted here (\"encryptNodes\")", how)
	case far.Kind == Machine:
		w.decide(Plaintext, "%s: %s does not encrypt its own traffic, or has only just said so", how, far.Node)
	case !w.filterThere():
		w.decide(Plaintext, "%s: the filter is missing, and nothing holds it back", how)
		w.fault(mendHelper)
	case far.Kind == Free:
		w.decide(Plaintext, "%s: it is in this node's own range, and no interface here leads there", how)
	case w.Settings.Encryption == mesh.Preferred && far.Kind == Unannounced:
		w.decide(Plaintext, "%s: whoever has %s has not joined, and encryption is only preferred", how, far.Address)
		w.fault(mendAnnounce + "; with \"encryption\": \"required\" it would be dropped")
	default:
		w.decide(Plaintext, "%s", how)
		w.fault("`wgcnid status` shows what this machine's kernel lacks")
	}
}
