package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
)

func checkRegistry(f Facts) Check {
	t := topic{"registry", "Registry", f.Mesh.Store}
	known := fmt.Sprintf("this node goes on with the %d machines that it knows", len(f.Mesh.Known.Records.Nodes))
	r := f.Helper.Report
	switch {
	case f.Mesh.RegistryError != nil:
		if r != nil && f.Helper.Running && !r.RegistrySince.IsZero() {
			known += ", as of " + r.RegistrySince.Local().Format(time.DateTime)
		}
		return t.fail(fmt.Sprintf("cannot be read: %v; %s", f.Mesh.RegistryError, known), "mend what it names; nothing is lost meanwhile, but new nodes are not learnt")
	case f.Mesh.WriteError != nil:
		return t.fail("can be read, and not written to: "+f.Mesh.WriteError.Error(), "give root of this machine the right to write there (mount it rw, and without root_squash on NFS)")
	case f.Helper.Running && r != nil && r.PublishError != "":
		return t.fail("can be read, and refuses this node's record: "+r.PublishError, "mend what it names; wgcnid tries again by itself")
	case f.Helper.Running && r != nil && r.RegistryError != "":
		return t.warn("can be read from here, but not by wgcnid: "+r.RegistryError, "wait a few seconds; if it stays, restart wgcnid")
	}
	return t.ok(fmt.Sprintf("read in %s, %d records", f.Mesh.Took.Round(100*time.Microsecond), len(f.Mesh.Fresh.Nodes)))
}

// checkRecord looks whether the others learn of this node what is so.
func checkRecord(f Facts) Check {
	name := f.Config.NodeName
	t := topic{"record", "Own record", fmt.Sprintf("what the registry has of this node, %s", name)}
	const restart = "restart wgcnid, and see its log"
	published, there := f.Mesh.Fresh.Record(name)
	switch invalid := f.Mesh.Fresh.Invalid[name]; {
	case f.Mesh.RegistryError != nil:
		return t.ok("not known while the registry cannot be read")
	case f.Mesh.Forgotten:
		return t.fail("the mesh has forgotten this node and revoked its key", "to join again: stop wgcnid, run `wgcnid leave --purge`, start it")
	case invalid != nil:
		return t.fail("it is refused: "+invalid.Error(), "give this node the same cluster secret as the others have (`wgcnid secret --help`); wgcnid then publishes it again")
	case !there && f.Helper.Running:
		return t.fail("there is none", "wgcnid publishes it within seconds; if it stays, its log says why")
	case !there:
		return t.fail("there is none: no other node knows this one", "start wgcnid")
	case published.Left:
		return t.fail("it says that this node has left the mesh", "start wgcnid, which joins again")
	case f.Mesh.Key != (wgtypes.Key{}) && published.PublicKey != f.Mesh.Key:
		return t.fail(fmt.Sprintf("it has another key (%s) than this node: the others encrypt for that one. Another node may have the same name", published.PublicKey), `set "nodeName" so that each node has its own; else `+restart)
	case slices.ContainsFunc(f.Mesh.Stale, func(s registry.Stale) bool { return s.Name == name }):
		return t.fail("it is older than what this node has published: the registry was put back to an earlier state", "wgcnid publishes it again within seconds; if it stays, "+restart)
	}
	return f.checkEndpoint(t, published)
}

func (f Facts) checkEndpoint(t topic, r registry.Record) Check {
	for _, e := range r.Endpoints {
		a, err := netip.ParseAddrPort(e)
		if err != nil || slices.Contains(f.Network.Addresses, a.Addr()) || len(f.Network.Addresses) == 0 {
			continue
		}
		if f.Config.Endpoint == "" {
			return t.fail(fmt.Sprintf("its endpoint %s is no address of this machine any more (it has %s)", e, texts(f.Network.Addresses)), "wgcnid publishes the new one within seconds; if it stays, restart it")
		}
		return t.note(fmt.Sprintf("its endpoint %s, as configured, is no address of this machine", e), fmt.Sprintf("right behind NAT, if UDP port %d is forwarded to here", a.Port()))
	}
	if len(r.Endpoints) == 0 {
		return t.ok("current; without an endpoint, so that this node calls the others")
	}
	return t.ok(fmt.Sprintf("current; endpoint %s", strings.Join(r.Endpoints, ", ")))
}

func texts[T fmt.Stringer](values []T) string {
	var out []string
	for _, v := range values {
		out = append(out, v.String())
	}
	return strings.Join(out, " ")
}

func checkConflicts(f Facts) Check {
	t := topic{"conflicts", "Records of others", "the records that are refused, and the claims that contradict each other"}
	var found []string
	for name, err := range f.Mesh.Fresh.Invalid {
		if name != f.Config.NodeName {
			found = append(found, err.Error())
		}
	}
	for _, s := range f.Mesh.Stale {
		if s.Name != f.Config.NodeName {
			found = append(found, s.Error())
		}
	}
	for _, c := range f.Mesh.Conflicts {
		found = append(found, c.String())
	}
	if len(found) == 0 {
		return t.ok("none")
	}
	if f.alone() {
		return t.fail("no record of another node is sealed with a secret that this node has: it is this one that has the wrong secret, or an old one",
			fmt.Sprintf("copy %s from another node, see `wgcnid secret --help`; wgcnid takes it up within seconds", cmp.Or(f.Files.SecretPath, "the cluster secret")))
	}
	slices.Sort(found)
	const most = 5
	text := strings.Join(found[:min(len(found), most)], "; ")
	if more := len(found) - most; more > 0 {
		text += fmt.Sprintf("; and %d more", more)
	}
	return t.warn(text, "`wgcnid nodes` lists them; a machine that is gone for good: `wgcnid forget NAME`; without the right secret: `wgcnid secret --help`")
}

// alone reports whether this node has another secret than all others.
func (f Facts) alone() bool {
	strangers := 0
	for name, err := range f.Mesh.Fresh.Invalid {
		if name != f.Config.NodeName && errors.Is(err, identity.ErrUnknownSecret) {
			strangers++
		}
	}
	for name, r := range f.Mesh.Fresh.Nodes {
		if name != f.Config.NodeName && !r.Left {
			return false
		}
	}
	return strangers > 0
}

// manyAhead is how far clocks may differ: NTP keeps them within far less.
const manyAhead = 10 * time.Second

// checkClock goes by the records' revisions, which are made from their nodes' clocks
// in milliseconds. It looks at a record only where its revision may be a time.
func checkClock(f Facts) Check {
	t := topic{"clock", "Clock", "this machine's clock against the records of the others, and against its own past"}
	ahead := func(revision uint64) time.Duration { return time.UnixMilli(int64(revision)).Sub(f.Now) }
	var names []string
	var worst time.Duration
	others := 0
	for _, r := range f.Mesh.Known.Records.Records() {
		if r.Left {
			continue
		}
		d := ahead(r.Revision)
		if r.Name == f.Config.NodeName && d > manyAhead {
			return t.warn(fmt.Sprintf("it is %s behind what it was when this node last published", d.Round(time.Second)), "let NTP set it: `chronyc makestep`, or `timedatectl set-ntp true`")
		}
		if r.Name == f.Config.NodeName {
			continue
		}
		others++
		if d > manyAhead {
			names, worst = append(names, r.Name), max(worst, d)
		}
	}
	if r := f.Helper.Report; r != nil && r.At.Sub(f.Now) > manyAhead {
		return t.warn(fmt.Sprintf("it is %s behind what it was at wgcnid's last pass", r.At.Sub(f.Now).Round(time.Second)), "let NTP set it: `chronyc makestep`, or `timedatectl set-ntp true`")
	}
	switch {
	case len(names) == 0:
		return t.ok("no record is from the future")
	case len(names)*2 > others:
		return t.warn(fmt.Sprintf("it is up to %s behind the others' (%s)", worst.Round(time.Second), some(names)), "let NTP set this machine's clock: `chronyc makestep`, or `timedatectl set-ntp true`")
	}
	return t.warn(fmt.Sprintf("that of %s is up to %s ahead of this one", some(names), worst.Round(time.Second)), "let NTP set the clocks there")
}

// some names a few.
func some(names []string) string {
	const most = 4
	text := strings.Join(names[:min(len(names), most)], ", ")
	if more := len(names) - most; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}
