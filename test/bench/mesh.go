package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

// residentBudget is what a helper that knows 5,000 nodes may hold in memory, in bytes.
const residentBudget = 64 << 20

// budgetNodes is the size of mesh that the budgets are for.
const budgetNodes = 5000

// giant is one node with a mesh of its own, in which it is the only real one.
type giant struct {
	name    string
	nodes   int
	node    *cluster.Node
	shelf   shelf
	secret  identity.Secret
	trust   registry.Trust
	records []registry.Record

	process *cluster.Process
	sees    *witness
	helper  *host // wgcnid without its tunnel, for settle
	tunnel  int   // 0: in the kernel

	cold, warm   beginning
	quiet        time.Duration // CPU time of the helper in a minute of nothing
	settled      int64         // resident memory of the helper after that, in bytes
	change       verb          // one node's record: until the pass was reported
	tunnelMemory int64         // resident, in bytes
}

// beginning is what a start has cost.
type beginning struct {
	took   time.Duration // from the start of the process to the first report of the whole plan
	cpu    time.Duration
	tunnel time.Duration // CPU time of the tunnel
	peak   int64         // resident memory, in bytes
}

// benchMesh measures one wgcnid that holds a mesh of up to 5,000 nodes.
func benchMesh(ctx context.Context, b *bench) ([]section, error) {
	giants := []*giant{
		{name: "10 nodes, etcd", nodes: 10},
		{name: "1,000 nodes, etcd", nodes: 1000},
		{name: "5,000 nodes, etcd", nodes: budgetNodes},
		{name: "5,000 nodes, file", nodes: budgetNodes},
	}
	c, err := cluster.New(ctx, cluster.Options{Nodes: len(giants)})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	if err := makeGiants(ctx, c, giants); err != nil {
		return nil, err
	}
	r, err := newReports()
	if err != nil {
		return nil, err
	}
	defer func() { b.errs = append(b.errs, r.close()) }()
	for _, g := range giants {
		b.progress("mesh: cold start with %s", g.name)
		if g.cold, err = g.start(ctx, r); err != nil {
			return nil, err
		}
	}
	if err := b.rest(ctx, giants); err != nil {
		return nil, err
	}
	changes := b.rounds(20, 5)
	for i := range changes {
		b.progress("mesh: change %d of %d", i+1, changes)
		for _, g := range giants {
			if err := g.changeOne(ctx); err != nil {
				return nil, err
			}
		}
	}
	for _, g := range giants {
		b.progress("mesh: warm start with %s", g.name)
		if err := g.reboot(ctx); err != nil {
			return nil, err
		}
		if g.warm, err = g.start(ctx, r); err != nil {
			return nil, err
		}
		g.sees.close()
	}
	return []section{meshSection(giants)}, nil
}

// makeGiants gives each its mesh, of sealed records.
func makeGiants(ctx context.Context, c *cluster.Cluster, giants []*giant) error {
	etcd, err := c.StartEtcd(ctx, cluster.EtcdOptions{})
	if err != nil {
		return err
	}
	for i, g := range giants {
		g.node = c.Nodes[i]
		if g.secret, err = identity.NewSecret(time.Now()); err != nil {
			return err
		}
		g.trust.Secrets = identity.Secrets{g.secret}
		if g.records, err = makeRecords(g.nodes, g.trust); err != nil {
			return err
		}
		if strings.HasSuffix(g.name, "file") {
			g.shelf = inFile(filepath.Join(c.Shared, g.node.Name+".json"))
		} else {
			client, err := dialEtcd(g.node, etcd)
			if err != nil {
				return err
			}
			g.shelf = inEtcd{etcd, client, "/" + g.node.Name + "/"}
		}
		if err := g.shelf.fill(ctx, g.records); err != nil {
			return err
		}
	}
	return nil
}

// start starts wgcnid and waits until the kernel holds all peers and wgcnid says so.
func (g *giant) start(ctx context.Context, r *reports) (s beginning, err error) {
	if err := g.node.Configure(cluster.NetworkOptions{
		Secrets: []string{g.secret.Reveal()},
		Stanza:  map[string]any{"clusterCIDRs": []string{clusterCIDR, "fd00:244::/32"}, "registry": g.shelf.registry()},
	}); err != nil {
		return s, err
	}
	if g.sees, err = watchNode(g.node, r); err != nil {
		return s, err
	}
	begun := monotonic()
	if g.process, err = g.node.StartHelper(); err != nil {
		return s, err
	}
	done, err := g.sees.awaitRoutes(ctx, g.nodes)
	if err != nil {
		return s, fmt.Errorf("%w; log of wgcnid:\n%.4000s", err, g.process.Log)
	}
	helper, tunnel, err := findWgcnid(g.node)
	if err != nil {
		return s, err
	}
	g.helper, g.tunnel = &host{Node: g.node, helper: []int{helper}}, tunnel
	s.took = done - begun
	if s.cpu, err = cpuTime(helper); err != nil {
		return s, err
	}
	if tunnel != 0 {
		if s.tunnel, err = cpuTime(tunnel); err != nil {
			return s, err
		}
	}
	if s.peak, err = memory(helper, "VmHWM"); err != nil {
		return s, err
	}
	return s, awaitPeers(ctx, g.node, g.nodes)
}

// rest looks at what it costs that nothing happens, for all of them at once.
func (b *bench) rest(ctx context.Context, giants []*giant) error {
	span := b.span(time.Minute, 20*time.Second)
	var hosts []*host
	for _, g := range giants {
		hosts = append(hosts, g.helper)
	}
	if err := settle(ctx, hosts); err != nil {
		return err
	}
	for _, g := range giants {
		cpu, err := g.helper.helperCPU()
		if err != nil {
			return err
		}
		g.quiet = -cpu
	}
	b.progress("mesh: nothing, for %v", span)
	select {
	case <-time.After(span):
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, g := range giants {
		cpu, err := g.helper.helperCPU()
		if err != nil {
			return err
		}
		g.quiet = time.Duration(float64(g.quiet+cpu) * float64(time.Minute) / float64(span))
		if g.settled, err = memory(g.helper.helper[0], "VmRSS"); err != nil {
			return err
		}
		if g.tunnel != 0 {
			if g.tunnelMemory, err = memory(g.tunnel, "VmRSS"); err != nil {
				return err
			}
		}
	}
	return nil
}

// changeOne gives one node another endpoint, as if it had been moved.
func (g *giant) changeOne(ctx context.Context) error {
	r := &g.records[rand.IntN(len(g.records))]
	endpoint := netip.MustParseAddrPort(r.Endpoints[0])
	r.Endpoints = []string{netip.AddrPortFrom(endpoint.Addr(), endpoint.Port()+1).String()}
	r.Revision = registry.NextRevision(r.Revision, time.Now())
	var err error
	if *r, err = g.trust.Seal(*r); err != nil {
		return err
	}
	if err := settle(ctx, []*host{g.helper}); err != nil {
		return err
	}
	before, err := g.helper.helperCPU()
	if err != nil {
		return err
	}
	begun := monotonic()
	if err := g.shelf.put(ctx, *r); err != nil {
		return err
	}
	done, err := g.sees.awaitReport(ctx, begun)
	if err != nil {
		return err
	}
	if err := settle(ctx, []*host{g.helper}); err != nil {
		return err
	}
	after, err := g.helper.helperCPU()
	if err != nil {
		return err
	}
	g.change.take(timing{Elapsed: done - begun, CPU: after - before})
	return cluster.Poll(ctx, fmt.Sprintf("%s at %s", r.Name, r.Endpoints[0]), func() error {
		out, err := g.node.Run(ctx, "wg", "show", "wgcni0", "endpoints")
		if err == nil && !strings.Contains(out, r.PublicKey.String()+"\t"+r.Endpoints[0]) {
			err = errors.New("it has not moved")
		}
		return err
	})
}

// reboot leaves the node with what it knows of the mesh, and nothing in its kernel.
func (g *giant) reboot(ctx context.Context) error {
	if err := g.process.Stop(ctx); err != nil {
		return err
	}
	g.sees.close()
	return g.node.Reboot(ctx)
}

func meshSection(giants []*giant) section {
	s := section{title: "A mesh of thousands, held by one node", figures: [3]string{"time", "memory", "cpu"}}
	for _, g := range giants {
		var scaled, resident budget
		if g.nodes == budgetNodes {
			scaled, resident = atLeast(100), atMost(1)
		}
		cold := g.cold.row(g.name + ": cold start")
		cold.ratio, cold.to, cold.budget = g.cold.cpu.Seconds()/g.change.cpu.median(), "one node changed", scaled
		s.rows = append(s.rows, cold, g.warm.row(g.name+": warm start"), row{
			what: g.name + ": one node changed", time: milliseconds(g.change.elapsed.median()), cpu: milliseconds(g.change.cpu.median()),
		}, row{
			what: g.name + ": at rest, for a minute", memory: mebibytes(g.settled), cpu: milliseconds(g.quiet.Seconds()),
			ratio: float64(g.settled) / residentBudget, to: mebibytes(residentBudget), budget: resident,
		})
		if g.tunnel != 0 {
			s.rows = append(s.rows, row{
				what: g.name + ": userspace tunnel, cold start", memory: mebibytes(g.tunnelMemory), cpu: milliseconds(g.cold.tunnel.Seconds()),
			})
		}
	}
	s.notes = append(s.notes,
		"records are sealed and tunnels have preshared keys; until all peers are in the kernel and wgcnid has said so; memory is resident, of a start the peak",
		"a warm start is that of a node which has booted with what it knew before; one node changed is another endpoint, by the median")
	return s
}

func (s beginning) row(what string) row {
	return row{what: what, time: milliseconds(s.took.Seconds()), memory: mebibytes(s.peak), cpu: milliseconds(s.cpu.Seconds())}
}
