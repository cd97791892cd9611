package doctor

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

func checkHelper(f Facts) Check {
	t := topic{"helper", "Helper", "the lock in " + f.Config.RunDir + ", and what `wgcnid run` has left there"}
	const start = "start it: `systemctl start wgcnid`, or see why its pod does not run; its log says what is wrong"
	r := f.Helper.Report
	switch {
	case !f.Helper.Running:
		return t.fail("wgcnid does not run: traffic flows as it did, and new nodes, keys and pods outside of this node's range are not followed", start)
	case r == nil:
		return t.note("wgcnid runs, and has not finished its first pass", "wait a few seconds, then look again")
	case r.Error != "":
		return t.fail("the last pass failed: "+r.Error, "mend what it names; wgcnid tries again by itself")
	case r.Rival:
		return t.fail("another node publishes under this node's name, "+f.Config.NodeName, `set "nodeName" so that each node has its own`)
	}
	return t.ok(fmt.Sprintf("wgcnid runs; its last pass was at %s, without errors", r.At.Local().Format("15:04:05")))
}

func checkKey(f Facts) Check {
	t := topic{"key", "Private key", f.Files.KeyPath}
	switch {
	case f.Files.KeyMode&0o077 != 0:
		return t.fail(fmt.Sprintf("others may read it (mode %04o)", f.Files.KeyMode), "chmod 600 "+f.Files.KeyPath)
	case f.Files.KeyError != nil && f.Mesh.Known.Self.PublicKey == (wgtypes.Key{}):
		return t.fail("this node has no key yet: "+f.Files.KeyError.Error(), "start wgcnid, which makes one")
	case f.Files.KeyError != nil:
		return t.fail(f.Files.KeyError.Error(), "mend what it says; a key that is lost for good is made anew by wgcnid: restart it, and the other nodes learn the new one")
	case f.Files.NextMode&0o077 != 0:
		return t.fail(fmt.Sprintf("others may read %s, the key that it is replaced by (mode %04o)", f.Files.NextPath, f.Files.NextMode),
			fmt.Sprintf("`rm %s` and restart wgcnid, which makes another; while a rotation is going on: `chmod 600 %s`, and rotate once more", f.Files.NextPath, f.Files.NextPath))
	case f.Files.StateMode&0o022 != 0:
		return t.warn(fmt.Sprintf("others may put another in its place (mode %04o of %s)", f.Files.StateMode, filepath.Dir(f.Files.KeyPath)), "chmod 700 "+filepath.Dir(f.Files.KeyPath))
	}
	return t.ok(fmt.Sprintf("mode %04o, public key %s", f.Files.KeyMode, f.Mesh.Key))
}

func checkSecret(f Facts) Check {
	t := topic{"secret", "Cluster secret", cmp.Or(f.Files.SecretPath, `"clusterSecretFile" in the configuration`)}
	r := f.Helper.Report
	switch {
	case f.Files.SecretPath == "":
		return t.note("there is none: whoever can write to the registry is trusted", "see `wgcnid secret --help`")
	case f.Files.SecretError != nil:
		return t.fail(f.Files.SecretError.Error(), "mend that, or copy the file from another node; until then wgcnid does not start here")
	case f.Helper.Running && r != nil && r.SecretsError != "":
		return t.warn("it can be read now, but wgcnid goes on with what it read earlier: "+r.SecretsError, "wait a few seconds; if it stays, restart wgcnid")
	}
	return t.ok(fmt.Sprintf("%d secret(s), and nobody else may read them", f.Files.SecretIDs))
}

// checkWireGuard looks at the interface itself.
func checkWireGuard(f Facts) Check {
	name := f.Config.Interface
	t := topic{"wireguard", "WireGuard", "interface " + name + ", and what runs it"}
	l := f.Plan.Observed.Link
	switch {
	case f.Tunnel.Kind != "" && f.Tunnel.Kind != "wireguard" && f.Tunnel.Kind != "tuntap":
		return t.fail(fmt.Sprintf("%s exists, and is a %s interface of somebody else", name, f.Tunnel.Kind),
			fmt.Sprintf("remove it with `ip link delete %s`, or set \"interface\" to another name", name))
	case f.Plan.Error != nil:
		return t.fail(f.Plan.Error.Error(), "do what it says; wgcnid makes the interface again within seconds")
	case l.Name == "" && f.Mesh.Key == (wgtypes.Key{}):
		return t.fail(name+" is missing: this node has not joined yet", "start wgcnid")
	case l.Name == "" && f.Mesh.Forgotten:
		return t.fail(name+" is missing: the mesh has forgotten this node", "stop wgcnid, run `wgcnid leave --purge` and start it")
	case l.Name == "" && !f.Helper.Running:
		return t.fail(name+" is missing, and wgcnid does not run", "start wgcnid")
	case l.Name == "":
		return t.fail(name+" is missing, and wgcnid cannot make it", "its log says why; `modprobe wireguard` may help")
	case !l.Up:
		return t.fail(name+" is down", fmt.Sprintf("`ip link set %s up`, and find out who took it down; wgcnid takes it up within seconds, if it runs", name))
	case l.PublicKey != f.Mesh.Key:
		return t.fail(fmt.Sprintf("%s has another key (%s) than %s", name, l.PublicKey, f.Files.KeyPath), "restart wgcnid, which sets it")
	case f.Tunnel.Kind == "tuntap" && f.Tunnel.KernelHasIt:
		return t.warn("userspace WireGuard runs it, though this kernel has WireGuard: slower than need be",
			fmt.Sprintf("`ip link delete %s`: wgcnid makes it anew within seconds, in the kernel", name))
	case f.Tunnel.Kind == "tuntap":
		process := fmt.Sprintf("process %d", f.Tunnel.PID)
		if f.Tunnel.PID == 0 {
			process = "in a process that cannot be seen from here"
		}
		return t.note(fmt.Sprintf("userspace WireGuard, %s, MTU %d: this kernel has none", process, l.MTU), "the kernel's is faster: a kernel with CONFIG_WIREGUARD, 5.6 or later")
	}
	return t.ok(fmt.Sprintf("the kernel's WireGuard, up, MTU %d", l.MTU))
}

func checkPort(f Facts) Check {
	port := f.Config.ListenPort
	t := topic{"port", "UDP port", fmt.Sprintf("who listens on UDP port %d", port)}
	l := f.Plan.Observed.Link
	switch {
	case l.Name == "":
		if len(f.Tunnel.Holders) > 0 && f.Tunnel.Holders[0].PID != 0 {
			return t.fail(fmt.Sprintf("%s, and %s is not there", holdersText(f.Tunnel.Holders), f.Config.Interface), f.portMend())
		}
		return t.ok("nobody: " + f.Config.Interface + " is not there")
	case l.ListenPort == port && l.Up:
		return t.ok(f.Config.Interface + " does")
	case len(f.Tunnel.Holders) > 0:
		return t.fail(fmt.Sprintf("%s; WireGuard cannot have it, so that no peer reaches this node", holdersText(f.Tunnel.Holders)), f.portMend())
	}
	if l.ListenPort == port {
		return t.fail(f.Config.Interface+" would, and is down", "see \"WireGuard\"")
	}
	return t.fail(fmt.Sprintf("%s listens on %d instead", f.Config.Interface, l.ListenPort), "wgcnid sets it within seconds; if it stays, its log says why")
}

func holdersText(holders []Holder) string {
	var out []string
	for _, h := range holders {
		if h.PID == 0 {
			out = append(out, "a program that cannot be seen from here (in another container, or the kernel)")
			continue
		}
		out = append(out, fmt.Sprintf("process %d (%s)", h.PID, h.Name))
	}
	return "taken by " + strings.Join(out, " and ")
}

func (f Facts) portMend() string {
	return fmt.Sprintf("end that program (`ss -ulpn sport = :%d` shows it), or set \"listenPort\" to another port", f.Config.ListenPort)
}

func checkTables(f Facts) Check {
	t := topic{"nftables", "nftables", "table inet wgcni, which drops what would leave in the clear"}
	if f.Plan.Tables != nil {
		return t.fail("nftables cannot be used: "+f.Plan.Tables.Error(), "a kernel with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET, and CAP_NET_ADMIN")
	}
	if f.Plan.Error != nil {
		return t.ok("nftables can be used")
	}
	const mend = "wgcnid puts it back within seconds, if it runs; find out who did it (`nft monitor`)"
	observed := f.Plan.Observed.Filter
	switch {
	case observed.Broken:
		return t.fail("its chains or rules were changed", mend)
	case observed.Interface == "" && f.Plan.State.Filter.Interface != "":
		return t.fail("it is missing: nothing holds plaintext back", mend)
	case f.Plan.Unverified && !f.strictUplinks():
		return t.note("whole, but this kernel cannot tell where packets come from: whoever is next to this node reaches its pods, one way, with the address of one of them as source",
			"Linux 5.18 or later can; for IPv4 `sysctl -w net.ipv4.conf.all.rp_filter=1` does the same")
	}
	return t.ok("whole")
}

// strictUplinks reports whether all uplinks refuse what would not be answered by them.
func (f Facts) strictUplinks() bool {
	for _, name := range f.Network.Uplinks {
		// The greater of all and the interface's own counts (IN_DEV_RPFILTER).
		if max(f.Network.ReversePath["all"], f.Network.ReversePath[name]) != 1 {
			return false
		}
	}
	return len(f.Network.Uplinks) > 0 && !slices.Contains(f.families(), true) // there is none for IPv6
}

// checkPlan names what differs, and leaves out what another check has said.
func checkPlan(f Facts) Check {
	t := topic{"plan", "Kernel as planned", "interface, peers, routes, rules and filter against what this node knows of the mesh"}
	switch {
	case f.Plan.Error != nil:
		return t.fail("could not be compared: "+f.Plan.Error.Error(), "do what it says")
	case len(f.Plan.Pending) > 0:
		const most = 3
		text := strings.TrimSpace(mesh.Text(f.Plan.Pending[:min(len(f.Plan.Pending), most)]))
		text = strings.ReplaceAll(text, "\n", "; ")
		if more := len(f.Plan.Pending) - most; more > 0 {
			text += fmt.Sprintf("; and %d more", more)
		}
		if !f.Helper.Running {
			return t.fail("the kernel lacks: "+text, "start wgcnid, or run `wgcnid sync` once")
		}
		return t.fail("the kernel lacks, although wgcnid runs: "+text, "its log says why; `wgcnid sync` tries at once and prints the error")
	}
	return t.ok(fmt.Sprintf("nothing differs: %d peers, %d routes, %d pods", len(f.Plan.Observed.Peers), len(f.Plan.Observed.Routes), len(f.Plan.Pods)))
}
