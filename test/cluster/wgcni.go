package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/wgcni/wgcni/pkg/reconcile"
)

// NetworkName is that of the networks in conflist/.
const NetworkName = "pods"

// SecretFile is where Configure writes a cluster's secrets on each node.
const SecretFile = "/etc/wgcni/secret"

// ConflistFile is where Configure writes a node's conflist, in [ConfDir].
const ConflistFile = "10-pods.conflist"

// NetworkOptions describe the pod network of a node. The zero value is
// conflist/bridge.conflist with nothing but its ranges and its registry changed.
type NetworkOptions struct {
	Example    string         // file in conflist/; bridge.conflist by default
	CNIVersion string         // optional
	Stanza     map[string]any // optional: keys of the wgcni entry to set; nil values delete
	Plain      bool           // leave the wgcni entry out
	Secrets    []string       // optional: the cluster's secrets, which Configure writes to SecretFile
	Primary    map[string]any // optional: keys of the primary's entry to set
	Chain      []any          // optional: more entries behind wgcni
	Replace    []string       // optional: pairs of texts in the example, and what stands in their place
}

// PodCIDRs are the ranges that Configure gives to a node; none to a machine without CNI.
func (n *Node) PodCIDRs() []netip.Prefix {
	if n.bare() {
		return nil
	}
	return []netip.Prefix{
		netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n.index+1)),
		netip.MustParsePrefix(fmt.Sprintf("fd00:244:%x::/64", n.index+1)),
	}
}

// RegistryFile is the shared file of the cluster's registry.
func (c *Cluster) RegistryFile() string { return filepath.Join(c.Shared, "mesh.json") }

// Conflist returns an example of conflist/ as it has to be on this node.
func (n *Node) Conflist(o NetworkOptions) (string, error) {
	own := n.PodCIDRs()
	list, err := o.read("10.244.1.0/24", own[0].String(), "fd00:244:1::/64", own[1].String())
	if err != nil {
		return "", err
	}
	if o.CNIVersion != "" {
		list["cniVersion"] = o.CNIVersion
	}
	entries, _ := list["plugins"].([]any)
	if len(entries) < 2 {
		return "", fmt.Errorf("conflist/%s: want a primary plugin and wgcni", o.Example)
	}
	set(entries[0], o.Primary)
	n.own(entries[len(entries)-1], o)
	if o.Plain {
		entries = entries[:len(entries)-1]
	}
	list["plugins"] = append(entries, o.Chain...)
	out, err := json.MarshalIndent(list, "", "  ")
	return string(out), err
}

func set(entry any, keys map[string]any) {
	object, _ := entry.(map[string]any)
	for key, value := range keys {
		if value == nil {
			delete(object, key)
		} else {
			object[key] = value
		}
	}
}

// Configure writes the node's conflist, and its secrets if there are any; on a
// machine that is no node the bare stanza. A helper that runs reads the old files
// or the new ones.
func (n *Node) Configure(o NetworkOptions) error {
	write, file := n.Conflist, filepath.Join(ConfDir, ConflistFile)
	if n.bare() {
		write, file = n.Stanza, StanzaFile
	}
	text, err := write(o)
	if err != nil {
		return err
	}
	if len(o.Secrets) > 0 {
		if err := n.replaceFile(SecretFile, strings.Join(o.Secrets, "\n")+"\n", 0o600); err != nil {
			return err
		}
	}
	return n.replaceFile(file, text, 0o644)
}

// replaceFile writes a file aside and renames it.
func (n *Node) replaceFile(p, content string, perm os.FileMode) error {
	if err := n.WriteFile(p+".new", content, perm); err != nil {
		return err
	}
	if err := os.Rename(n.Path(p+".new"), n.Path(p)); err != nil {
		return fmt.Errorf("machine %s: %w", n.Name, err)
	}
	return nil
}

// Wgcnid runs a command of the helper's command line on the node and returns its output.
func (n *Node) Wgcnid(ctx context.Context, args ...string) (string, error) {
	return n.Run(ctx, filepath.Join(n.cluster.BinDir, "wgcnid"), append(n.configFlag(), args...)...)
}

// StartHelper starts `wgcnid run`.
func (n *Node) StartHelper() (*Process, error) {
	return n.Start(filepath.Join(n.cluster.BinDir, "wgcnid"), append(n.configFlag(), "run")...)
}

// Status is as much of `wgcnid status --json` as tests look at.
type Status struct {
	Node    string   `json:"node"`
	Verdict string   `json:"verdict"`
	OK      bool     `json:"ok"`
	Helper  bool     `json:"helperRunning"`
	Pods    int      `json:"pods"`
	Pending []string `json:"pending"`
	Seal    *struct {
		SealedBy string   `json:"sealedBy"`
		Accepted []string `json:"accepted"`
		Unsealed []string `json:"unsealed"`
	} `json:"seal"`
	Peers   []PeerStatus `json:"peers"`
	Dropped struct {
		Out struct{ Packets uint64 } `json:"out"`
		In  struct{ Packets uint64 } `json:"in"`
	} `json:"plaintextDropped"`
	// Report is the helper's last word; nil before its first.
	Report *reconcile.Report `json:"report"`
}

// PeerStatus is one of its peers.
type PeerStatus struct {
	Name         string         `json:"name"`
	PublicKey    string         `json:"publicKey"`
	PresharedKey bool           `json:"presharedKey"`
	State        string         `json:"state"`
	Endpoint     netip.AddrPort `json:"endpoint"`
	AllowedIPs   []netip.Prefix `json:"allowedIPs"`
	NodeTraffic  string         `json:"nodeTraffic"`
}

// Status asks `wgcnid status --json`.
func (n *Node) Status(ctx context.Context) (s Status, err error) {
	cmd := n.Command(ctx, filepath.Join(n.cluster.BinDir, "wgcnid"), append(n.configFlag(), "status", "--json")...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return s, fmt.Errorf("wgcnid status on %s: %w: %s", n.Name, err, strings.TrimSpace(stderr.String()))
	}
	return s, json.Unmarshal(out, &s)
}

// JoinAll configures every node, starts its helper, and waits until each knows
// all others and its kernel holds the plan. The helpers are in the nodes' order.
func (c *Cluster) JoinAll(ctx context.Context, o NetworkOptions) ([]*Process, error) {
	var helpers []*Process
	for _, n := range c.Nodes {
		if err := n.Configure(o); err != nil {
			return helpers, err
		}
		h, err := n.StartHelper()
		if err != nil {
			return helpers, err
		}
		helpers = append(helpers, h)
	}
	err := c.AwaitConverged(ctx)
	if err != nil {
		for i, h := range helpers {
			err = errors.Join(err, fmt.Errorf("log of %s:\n%s", c.Nodes[i].Name, h.Log))
		}
	}
	return helpers, err
}

// AwaitConverged waits until each node has every other as a peer and its kernel holds the plan.
func (c *Cluster) AwaitConverged(ctx context.Context) error {
	ctx, cancel := withDefaultTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, n := range c.Nodes {
		err := Poll(ctx, n.Name+" to have converged", func() error {
			s, err := n.Status(ctx)
			switch {
			case err != nil:
				return err
			case !s.OK:
				return fmt.Errorf("%s %v", s.Verdict, s.Pending)
			case len(s.Peers) != len(c.Nodes)-1:
				return fmt.Errorf("%d peers of %d", len(s.Peers), len(c.Nodes)-1)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
