package explain

import (
	"fmt"
	"strings"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// rules says by which rules of the routing policy the kernel came to its answer:
// those that apply, up to the one that leads to the table of the route. Tables
// that have no route for the packet, as the local one mostly has, are left out,
// but for ours.
func (w *walker) rules() {
	r := w.Way.Route
	own, guarded := w.ownRoute()
	for _, rule := range w.Rules {
		matches := w.matches(rule)
		ours := rule.Table == w.Settings.Table && rule.RoutingProtocol == kernel.RouteProtocol
		switch {
		case ours && !matches:
			w.step(Rule, fmt.Sprint(rule.Priority), "%s: passed over, the packet has the mark", w.ruleText(rule))
		case !matches:
		case rule.Table == r.Table && r.Refused == "":
			w.step(Rule, fmt.Sprint(rule.Priority), "%s", w.ruleText(rule))
			return
		case ours && guarded && own.Type == mesh.Unreachable && r.Refused != "":
			w.step(Rule, fmt.Sprint(rule.Priority), "%s", w.ruleText(rule))
			return
		case ours && guarded && own.Type == mesh.Throw:
			w.step(Rule, fmt.Sprint(rule.Priority), "%s: %s, so the next rule is asked", w.ruleText(rule), own)
		case ours && !guarded:
			w.step(Rule, fmt.Sprint(rule.Priority), "%s: no route for it there, so the next rule is asked", w.ruleText(rule))
		}
	}
}

// matches evaluates the selectors that are known. A rule with others is taken to
// match: the table of the route decides then.
func (w *walker) matches(r kernel.PolicyRule) bool {
	src, dst := w.Source.Address, w.Destination.Address
	ok := !r.Source.IsValid() || r.Source.Bits() == 0 || src.IsValid() && r.Source.Contains(src)
	ok = ok && (!r.Destination.IsValid() || r.Destination.Contains(dst))
	in := w.Way.In
	if in == "" {
		in = "lo" // as rules have it for what is made here (ip-rule(8))
	}
	ok = ok && (r.From == "" || r.From == in) && r.To == ""
	ok = ok && (!r.Marked || w.Way.Mark&r.Mask == r.Mark)
	return ok != r.Invert
}

// ruleText is a rule as ip-rule(8) writes it.
func (w *walker) ruleText(r kernel.PolicyRule) string {
	var words []string
	if r.Invert {
		words = append(words, "not")
	}
	words = append(words, "from")
	if r.Source.IsValid() {
		words = append(words, r.Source.String())
	} else {
		words = append(words, "all")
	}
	if r.Destination.IsValid() {
		words = append(words, "to", r.Destination.String())
	}
	if r.Marked {
		mark := fmt.Sprintf("%#x", r.Mark)
		if r.Mask != ^uint32(0) {
			mark += fmt.Sprintf("/%#x", r.Mask)
		}
		words = append(words, "fwmark", mark)
	}
	if r.From != "" {
		words = append(words, "iif", r.From)
	}
	if r.To != "" {
		words = append(words, "oif", r.To)
	}
	if r.OtherSelectors {
		words = append(words, "(and more)")
	}
	if r.Table != 0 {
		words = append(words, "lookup", w.tableName(r.Table))
	}
	if r.SuppressedLength >= 0 {
		words = append(words, "suppress_prefixlength", fmt.Sprint(r.SuppressedLength))
	}
	return fmt.Sprintf("%d: %s", r.Priority, strings.Join(words, " "))
}
