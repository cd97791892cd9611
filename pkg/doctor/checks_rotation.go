package doctor

import (
	"fmt"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
)

// slowRotation is after how long a rotation that waits is worth a warning: far
// more than a node takes that is started anew.
const slowRotation = 10 * time.Minute

// checkRotation looks at how this node's key is replaced.
func checkRotation(f Facts) Check {
	t := topic{"rotation", "Key rotation", fmt.Sprintf("how old the key is, whether its rotation waits, and who listens on UDP port %d", f.Config.SparePort)}
	k := f.Files.Keys
	var r reconcile.RotationReport
	if f.Helper.Report != nil && f.Helper.Report.Rotation != nil {
		r = *f.Helper.Report.Rotation
	}
	waits := len(r.Waiting) > 0 && k.Stage != mesh.Resting
	slow := waits && f.Now.Sub(r.Since) > slowRotation
	switch {
	case f.Files.KeyError != nil:
		return t.ok("see \"Private key\"")
	case f.Files.KeysError != nil:
		return t.fail(f.Files.KeysError.Error(), "do what it says, and restart wgcnid")
	case len(f.Tunnel.SpareHolders) > 0:
		level := Warn
		if k.Stage != mesh.Resting {
			level = Fail
		}
		return t.at(level, fmt.Sprintf("UDP port %d is %s: while keys are replaced, this node or another would wait for it", f.Config.SparePort, holdersText(f.Tunnel.SpareHolders)),
			fmt.Sprintf("end that program (`ss -ulpn sport = :%d` shows it), or set \"rotationPort\" to another port", f.Config.SparePort))
	case (k.Stage != mesh.Resting || f.Files.Ordered) && !f.Helper.Running:
		return t.warn("it is to be replaced, and wgcnid does not run", "start wgcnid, which goes on with it")
	case slow:
		return t.warn(fmt.Sprintf("it began at %s and waits for %s", r.Since.Local().Format(time.DateTime), waitsFor(r)), strings.Join(f.rotationMends(r), "; "))
	case waits:
		return t.note("it is going on, and waits for "+waitsFor(r), "")
	case k.Stage != mesh.Resting:
		return t.ok(fmt.Sprintf("one is going on: %d of %d pairs have moved", r.Moved, r.Pairs))
	case k.Next == (wgtypes.Key{}) && f.Helper.Running:
		return t.warn(fmt.Sprintf("there is no next key (%s), and no rotation without", f.Files.NextPath), "restart wgcnid, which makes one")
	}
	return t.ok(fmt.Sprintf("none is going on; the key is in use since %s", k.Since.Local().Format(time.DateTime)))
}

func waitsFor(r reconcile.RotationReport) string {
	const most = 3
	var out []string
	for i, w := range r.Waiting {
		if i == most {
			out = append(out, fmt.Sprintf("%d more, which `wgcnid key show` lists", len(r.Waiting)-most))
			break
		}
		out = append(out, fmt.Sprintf("%s (%s)", w.Node, w.Why))
	}
	return strings.Join(out, ", ")
}

// rotationMends are what to do about those that a rotation waits for.
func (f Facts) rotationMends(r reconcile.RotationReport) (out []string) {
	var plain, old, silent []string
	port := f.Config.SparePort
	for _, w := range r.Waiting {
		record, _ := f.Mesh.Known.Records.Record(w.Node)
		switch {
		case len(record.Via) > 0:
			plain = append(plain, w.Node)
		case record.SparePort == 0:
			old = append(old, w.Node)
		default:
			silent, port = append(silent, w.Node), int(record.SparePort)
		}
	}
	add := func(nodes []string, format string, args ...any) {
		if len(nodes) > 0 {
			out = append(out, fmt.Sprintf("%s: ", strings.Join(nodes, ", "))+fmt.Sprintf(format, args...))
		}
	}
	add(silent, "see that wgcnid runs there, and let UDP port %d in there and %d in here", port, f.Config.SparePort)
	add(old, "update wgcni there")
	add(plain, "after the next step each needs a new file (`wgcnid peer config NAME`)")
	return append(out, "or cut them off until they know the new key: `wgcnid key rotate --force`")
}
