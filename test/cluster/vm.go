package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// StanzaFile is where Configure writes the bare stanza of a machine that is no node.
const StanzaFile = "/etc/wgcni/wgcni.json"

// firstMachine is the index of the first machine that is no node: 192.0.2.200.
const firstMachine = 190

// MachineCIDRs hold the underlay addresses of all machines that AddMachine
// starts, and no node's.
func MachineCIDRs() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("192.0.2.192/26"), netip.MustParsePrefix("2001:db8:1::200/120")}
}

// AddMachine starts a machine on the underlay that is no node: it has no CNI, and
// wgcnid reads a bare stanza there, from StanzaFile. It is listed in Machines. All
// else is as with AddNode.
func (c *Cluster) AddMachine(ctx context.Context, name string) (*Node, error) {
	i := firstMachine + len(c.Machines)
	if i >= maxMachines {
		return nil, fmt.Errorf("add machine %s: the underlay has addresses for %d of them only", name, maxMachines-firstMachine)
	}
	return c.addMachine(ctx, name, i, &c.Machines)
}

func (c *Cluster) addMachine(ctx context.Context, name string, index int, to *[]*Node) (*Node, error) {
	if c.Node(name) != nil {
		return nil, fmt.Errorf("add %s: there is a machine of that name", name)
	}
	m, err := startMachine(ctx, name, filepath.Join(c.dir, name), "")
	if err != nil {
		return nil, err
	}
	n := &Node{Machine: m, IPv4: nodeIPv4(index), IPv6: nodeIPv6(index), cluster: c, index: index}
	*to = append(*to, n) // at once, so that Close finds it
	return n, n.connect(ctx)
}

// bare reports whether the machine is no node.
func (n *Node) bare() bool { return n.index >= firstMachine }

// Stanza returns the wgcni entry of an example of conflist/ as a machine that is
// no node has it, in a file of its own. The example is a conflist or a bare stanza.
func (n *Node) Stanza(o NetworkOptions) (string, error) {
	example, err := o.read()
	if err != nil {
		return "", err
	}
	stanza := example
	if entries, ok := example["plugins"].([]any); ok && len(entries) > 0 {
		stanza, _ = entries[len(entries)-1].(map[string]any)
	}
	n.own(stanza, o)
	out, err := json.MarshalIndent(stanza, "", "  ")
	return string(out), err
}

// read returns the example that the options name.
func (o NetworkOptions) read(replace ...string) (example map[string]any, err error) {
	root, err := RepoRoot()
	if err != nil {
		return nil, err
	}
	name := o.Example
	if name == "" {
		name = "bridge.conflist"
	}
	text, err := os.ReadFile(filepath.Join(root, "conflist", name))
	if err != nil {
		return nil, err
	}
	edited := strings.NewReplacer(slices.Concat(o.Replace, replace)...).Replace(string(text))
	if err := json.Unmarshal([]byte(edited), &example); err != nil {
		return nil, fmt.Errorf("conflist/%s: %w", name, err)
	}
	return example, nil
}

// own sets the keys of a wgcni entry that differ from cluster to cluster.
func (n *Node) own(stanza any, o NetworkOptions) {
	set(stanza, map[string]any{"registry": map[string]any{"type": "file", "path": n.cluster.RegistryFile()}})
	if len(o.Secrets) > 0 {
		set(stanza, map[string]any{"clusterSecretFile": SecretFile})
	}
	set(stanza, o.Stanza)
}

// configFlag has wgcnid read the stanza of a machine that is no node.
func (n *Node) configFlag() []string {
	if n.bare() {
		return []string{"--config", StanzaFile}
	}
	return nil
}
