package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Bridge is the underlay's interface that all nodes are linked by. Every frame
// between two nodes can be captured there.
const Bridge = "br0"

// Gateway4 and Gateway6 are the underlay's own addresses, the nodes' default
// gateways.
var (
	Gateway4 = netip.MustParseAddr("192.0.2.1")
	Gateway6 = netip.MustParseAddr("2001:db8:1::1")
)

// maxMachines keeps the addresses inside 192.0.2.0/24.
const maxMachines = 240

// Options describe a cluster. The zero value is a cluster without nodes.
type Options struct {
	Nodes  int    // how many; named node-a, node-b, ...
	MTU    int    // optional: of all links; 1500 by default
	Rate   string // optional: shapes each link in both directions, as "1gbit"
	BinDir string // optional: folder with cnitool and the plugins; .bin of the repository by default
}

// Cluster is a set of nodes, linked by an underlay network.
type Cluster struct {
	// Underlay is the machine with the bridge that links the nodes.
	Underlay *Machine
	// Nodes are in the order of their addresses.
	Nodes []*Node
	// Machines are those that are no nodes; see AddMachine.
	Machines []*Node
	// Shared is a folder that is the same on the host and on all machines.
	Shared string
	// BinDir is the folder with cnitool and the plugins.
	BinDir string

	opts Options
	dir  string
	loss map[string]int // per mille, by node name
}

// New makes a cluster and waits until each node reaches its gateways. Close
// removes it.
func New(ctx context.Context, o Options) (*Cluster, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("make a cluster: needs root, to make namespaces")
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.BinDir == "" {
		root, err := RepoRoot()
		if err != nil {
			return nil, fmt.Errorf("make a cluster: no folder with plugins given: %w", err)
		}
		o.BinDir = filepath.Join(root, ".bin")
	}
	dir, err := os.MkdirTemp("", "wgcni-cluster-")
	if err != nil {
		return nil, fmt.Errorf("make a cluster: %w", err)
	}
	c := &Cluster{
		Shared: filepath.Join(dir, "shared"),
		BinDir: o.BinDir,
		opts:   o,
		dir:    dir,
		loss:   map[string]int{},
	}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	// The first machine's init removes our files if we are killed, so nothing
	// but that machine's start may come between.
	m, err := startMachine(ctx, "underlay", filepath.Join(c.dir, "underlay"), c.dir)
	if err != nil {
		return err
	}
	c.Underlay = m
	if err := os.Mkdir(c.Shared, 0o755); err != nil {
		return fmt.Errorf("make the shared folder: %w", err)
	}
	if err := m.Do(func() error { return makeBridge(c.opts.MTU) }); err != nil {
		return fmt.Errorf("make the underlay's bridge: %w", err)
	}
	for i := range c.opts.Nodes {
		if _, err := c.AddNode(ctx, nodeName(i)); err != nil {
			return err
		}
	}
	return nil
}

// AddNode starts one more machine on the underlay, with the next free
// addresses. The name, at most 15 characters, is also that of its port on the
// bridge.
func (c *Cluster) AddNode(ctx context.Context, name string) (*Node, error) {
	i := len(c.Nodes)
	if i >= firstMachine {
		return nil, fmt.Errorf("add node %s: the underlay has addresses for %d nodes only", name, firstMachine)
	}
	return c.addMachine(ctx, name, i, &c.Nodes)
}

// Node returns the node of that name, or the machine that is none, or nil.
func (c *Cluster) Node(name string) *Node {
	for _, n := range slices.Concat(c.Nodes, c.Machines) {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// Close stops all machines and removes the cluster's files. It goes on after errors.
func (c *Cluster) Close() error {
	var errs []error
	for _, n := range slices.Concat(c.Nodes, c.Machines) {
		errs = append(errs, n.Close())
	}
	if c.Underlay != nil {
		errs = append(errs, c.Underlay.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(c.dir))...)
}

// NewT makes a cluster of n nodes for a test, which fails if that can't be
// done, and removes it at the test's end.
func NewT(t testing.TB, n int) *Cluster {
	t.Helper()
	return NewWithT(t, Options{Nodes: n})
}

// NewWithT is [NewT] with options.
func NewWithT(t testing.TB, o Options) *Cluster {
	t.Helper()
	c, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("remove the cluster: %v", err)
		}
	})
	return c
}

// RepoRoot returns the folder with the go.mod at or above the working directory.
func RepoRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the repository: %w", err)
	}
	for at := dir; ; at = filepath.Dir(at) {
		if _, err := os.Stat(filepath.Join(at, "go.mod")); err == nil {
			return at, nil
		}
		if at == filepath.Dir(at) {
			return "", fmt.Errorf("find the repository: no go.mod in %s or above", dir)
		}
	}
}

// nodeName is node-a ... node-z, node-aa, ...
func nodeName(i int) string {
	letters := ""
	for i++; i > 0; i = (i - 1) / 26 {
		letters = string(rune('a'+(i-1)%26)) + letters
	}
	return "node-" + letters
}
