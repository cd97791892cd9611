package doctor

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/install"
)

// bypassing are the primary plugins whose pods never come by this node's routing,
// so that ADD refuses them.
var bypassing = []string{"macvlan", "ipvlan", "host-device", "vlan", "sriov", "ib-sriov"}

// harmless are the plugins that may stand behind wgcni: they leave the addresses alone.
var harmless = []string{"portmap", "bandwidth", "firewall", "tuning", "sbr", "loopback", "wgcni"}

// ExamineChains checks the CNI folder. Facts may be nil, where there is no working
// configuration: then the folder is all there is to look at.
func ExamineChains(c Chains, f *Facts) []Check {
	if f != nil && f.Config.Bare {
		return []Check{topic{"conflist", "Conflist", "the configuration file"}.ok("this machine has no CNI, and no pods")}
	}
	out := []Check{checkConflist(c)}
	if ours := c.ours(); ours != nil {
		out = append(out, checkOrder(*ours), checkBinaries(c))
		if f != nil {
			out = append(out, checkVersion(c, f.Version))
		}
	}
	if c.Install != nil {
		out = append(out, checkInstalled(c))
	}
	return out
}

// checkConflist looks which file the runtime takes: the first by name.
func checkConflist(c Chains) Check {
	t := topic{"conflist", "Conflist", "the network configurations in " + c.Dir + ", of which the runtime takes the first by name"}
	ours := c.ours()
	taken := func(f ChainFile) string { return filepath.Join(c.Dir, f.Name) }
	switch {
	case c.DirError != nil:
		return t.fail(c.DirError.Error(), "install the cluster's network plugin first; if the runtime has another folder, name it with --cni-dir")
	case len(c.Files) == 0:
		return t.fail("there is none", "install the cluster's network plugin first, then run `wgcnid install`")
	case c.Files[0].Error != nil:
		return t.fail(fmt.Sprintf("%s is what the runtime takes, and it cannot: %v", taken(c.Files[0]), c.Files[0].Error), "write it again, or remove it")
	case ours == nil:
		return t.fail(fmt.Sprintf("%s (network %s, plugins %s) does not chain wgcni, and no other does: pods start without it", taken(c.Files[0]), c.Files[0].Network, strings.Join(c.Files[0].Plugins, ", ")),
			"run `wgcnid install --entry FILE`, or add the wgcni entry to its plugins")
	case c.Containerd.MaxConfNum >= 0 && c.Containerd.MaxConfNum != 1 && c.Install != nil && c.Install.Mode == install.Copy:
		return t.fail(fmt.Sprintf("containerd loads several networks at once (max_conf_num = %d in %s): pods get the network of %s as well, without wgcni", c.Containerd.MaxConfNum, c.Containerd.File, filepath.Base(c.Install.Source)),
			"set max_conf_num = 1 there and restart containerd, or run `wgcnid install --in-place`")
	case c.Containerd.ConfDir != "" && filepath.Clean(c.Containerd.ConfDir) != filepath.Clean(c.Dir):
		return t.warn(fmt.Sprintf("containerd reads %s (conf_dir in %s), and wgcnid reads %s", c.Containerd.ConfDir, c.Containerd.File, c.Dir),
			"run wgcnid with --cni-dir "+c.Containerd.ConfDir)
	case ours.Name != c.Files[0].Name:
		return t.fail(fmt.Sprintf("the runtime takes %s, which does not chain wgcni; %s does: pods start without it", taken(c.Files[0]), ours.Name),
			fmt.Sprintf("if %s is the cluster's network, run `wgcnid install --entry FILE`; else move it out of the folder", taken(c.Files[0])))
	}
	return t.ok(fmt.Sprintf("%s, network %s: %s", taken(*ours), ours.Network, strings.Join(ours.Plugins, ", ")))
}

func checkOrder(f ChainFile) Check {
	t := topic{"chain", "Chain", "the order of the plugins in " + f.Name}
	i := slices.Index(f.Plugins, config.PluginType)
	primary := f.Plugins[0]
	strangers := slices.DeleteFunc(slices.Clone(f.Plugins[i+1:]), func(p string) bool { return slices.Contains(harmless, p) })
	switch {
	case i == 0:
		return t.fail("wgcni comes first, before there is a pod address to encrypt: no pod starts", "put its entry behind the plugin that gives the pods their addresses")
	case slices.Contains(bypassing, primary):
		return t.fail(fmt.Sprintf("the packets of %s pods bypass this node's routing, so that nothing here could encrypt them: no pod starts", primary),
			"use a primary plugin whose pods go through the node: bridge, ptp, flannel, or a cloud's with veth pairs")
	case strings.Count(strings.Join(f.Plugins, " ")+" ", config.PluginType+" ") > 1:
		return t.warn("wgcni is chained twice", "leave one entry")
	case len(strangers) > 0:
		return t.note(fmt.Sprintf("%s runs after wgcni: addresses that it changes are not encrypted", strings.Join(strangers, ", ")), "put wgcni behind it, if it does")
	}
	return t.ok(fmt.Sprintf("%s gives the addresses, wgcni comes after it", primary))
}

func checkBinaries(c Chains) Check {
	t := topic{"plugins", "Plugins", "the programs of the chain in " + c.BinDir}
	if len(c.Missing) > 0 {
		mend := "put them there, or name the runtime's folder with --bin-dir"
		if slices.Contains(c.Missing, config.PluginType) {
			mend = "run `wgcnid install` for wgcni; or name the runtime's folder with --bin-dir"
		}
		return t.fail(fmt.Sprintf("%s is missing or not executable: no pod starts", strings.Join(c.Missing, ", ")), mend)
	}
	return t.ok("all are there")
}

func checkVersion(c Chains, version string) Check {
	t := topic{"version", "Version", "the versions of wgcnid and of " + filepath.Join(c.BinDir, config.PluginType)}
	switch {
	case slices.Contains(c.Missing, config.PluginType):
		return t.ok("wgcnid " + version + "; the plugin is missing")
	case c.PluginError != nil:
		return t.fail(c.PluginError.Error(), "run `wgcnid install`, which puts the right one there")
	case c.PluginVersion != version:
		return t.warn(fmt.Sprintf("the plugin is %s, wgcnid is %s", c.PluginVersion, version), "run `wgcnid install` with the newer of the two")
	}
	return t.ok("both are " + version)
}

// checkInstalled compares the copy that install made with what it was made from.
func checkInstalled(c Chains) Check {
	r := c.Install
	t := topic{"install", "Installed", fmt.Sprintf("the configuration that `wgcnid install` made (%s)", r.Target)}
	file := func(path string) *ChainFile {
		for i := range c.Files {
			if c.Files[i].Name == filepath.Base(path) {
				return &c.Files[i]
			}
		}
		return nil
	}
	source, target := file(r.Source), file(r.Target)
	mend := "wgcnid renews it within a second while it runs: start it; or run `wgcnid install` again"
	switch {
	case r.Stage != install.Installed:
		return t.warn("it was stopped half way ("+string(r.Stage)+")", "run `wgcnid install` or `wgcnid uninstall` again, whichever it was: it goes on from there")
	case target == nil:
		return t.fail("it is gone: pods start without wgcni", mend)
	case r.Mode != install.Copy:
		return t.ok("the entry stands in the primary's own file (" + string(r.Mode) + ")")
	case source == nil:
		return t.warn(r.Source+", which it was made from, is gone; pods still start, by the copy", "if the cluster has another network now, run `wgcnid install --entry FILE` for that; else `wgcnid uninstall`")
	case target.Error == nil && source.Error == nil && !extends(target.raw, source.raw):
		return t.fail(r.Source+" has changed since, and the copy has not", mend)
	}
	return t.ok("it is that of " + r.Source + ", with the entry of wgcni")
}

// extends reports whether a chain has all plugins of another one, in their order. It
// may have more: wgcni, and those of programs that put theirs into the first list, as
// istio-cni and linkerd-cni do.
func extends(chain, base []string) bool {
	for _, plugin := range chain {
		if len(base) > 0 && install.SameJSON([]byte(plugin), []byte(base[0])) {
			base = base[1:]
		}
	}
	return len(base) == 0
}
