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

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/test/cluster"
)

const (
	// budgetNodes is the size of mesh that the budgets are for.
	budgetNodes = 5000
	// residentBudget is what wgcnid may hold in memory then, in bytes.
	residentBudget = 64 << 20
)

// holder is a node that holds a mesh of its own, in which no other node is real.
type holder struct {
	name    string
	nodes   int
	file    bool // else etcd
	node    *cluster.Node
	shelf   shelf
	secret  identity.Secret
	records []registry.Record

	process *cluster.Process
	helper  *host // with wgcnid's own process alone, which is what is accounted
	tunnel  int   // its userspace tunnel; 0: in the kernel

	cold, warm   beginning
	quiet        time.Duration // CPU time in a minute of nothing
	settled      int64         // resident memory after that, in bytes
	tunnelMemory int64         // the same of the tunnel
	change       verb          // until the pass was reported
}

// beginning is what a start has cost.
type beginning struct {
	took   time.Duration // from the start of the process to the last route
	cpu    time.Duration // until all is done: on the disk as well, and the peers greeted
	tunnel time.Duration // the same of the tunnel
	peak   int64         // resident memory, in bytes
}

// benchMesh measures what a mesh of up to 5,000 nodes costs one of them.
func benchMesh(ctx context.Context, b *bench) ([]section, error) {
	holders := []*holder{
		{name: "10 nodes, etcd", nodes: 10},
		{name: "1,000 nodes, etcd", nodes: 1000},
		{name: "5,000 nodes, etcd", nodes: budgetNodes},
		{name: "5,000 nodes, file", nodes: budgetNodes, file: true},
	}
	c, err := cluster.New(ctx, cluster.Options{Nodes: len(holders)})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	etcd, err := c.StartEtcd(ctx, cluster.EtcdOptions{})
	if err != nil {
		return nil, err
	}
	client, err := dialEtcd(c.Underlay, etcd)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	for i, h := range holders {
		b.progress("mesh: cold start with %s", h.name)
		h.node, h.shelf = c.Nodes[i], inEtcd{etcd, client, "/" + c.Nodes[i].Name + "/"}
		if h.file {
			h.shelf = inFile(filepath.Join(c.Shared, h.node.Name+".json"))
		}
		if err := h.makeMesh(ctx); err != nil {
			return nil, err
		}
		if h.cold, err = h.start(ctx); err != nil {
			return nil, err
		}
	}
	if err := b.rest(ctx, holders); err != nil {
		return nil, err
	}
	changes := b.rounds(20, 5)
	for i := range changes {
		b.progress("mesh: change %d of %d", i+1, changes)
		for _, h := range holders {
			if err := h.changeOne(ctx); err != nil {
				return nil, err
			}
		}
	}
	for _, h := range holders {
		b.progress("mesh: warm start with %s", h.name)
		if err := errors.Join(h.process.Stop(ctx), h.node.Reboot(ctx)); err != nil {
			return nil, err
		}
		if h.warm, err = h.start(ctx); err != nil {
			return nil, err
		}
	}
	return []section{meshSection(holders)}, nil
}

// makeMesh fills the registry with the sealed records of nodes.
func (h *holder) makeMesh(ctx context.Context) (err error) {
	if h.secret, err = identity.NewSecret(time.Now()); err != nil {
		return err
	}
	if h.records, err = makeRecords(h.nodes, h.trust()); err != nil {
		return err
	}
	return h.shelf.fill(ctx, h.records)
}

func (h *holder) trust() registry.Trust {
	return registry.Trust{Secrets: identity.Secrets{h.secret}}
}

// start starts wgcnid and waits until the node holds the mesh.
func (h *holder) start(ctx context.Context) (s beginning, err error) {
	if err := h.node.Configure(cluster.NetworkOptions{
		Secrets: []string{h.secret.Reveal()},
		Stanza:  map[string]any{"clusterCIDRs": []string{clusterCIDR, "fd00:244::/32"}, "registry": h.shelf.registry()},
	}); err != nil {
		return s, err
	}
	seen, err := watchRoutes(h.node)
	if err != nil {
		return s, err
	}
	defer seen.close()
	begun := monotonic()
	if h.process, err = h.node.StartHelper(); err != nil {
		return s, err
	}
	done, err := seen.awaitAll(ctx, h.nodes)
	if err == nil {
		err = awaitPeers(ctx, h.node, h.nodes)
	}
	if err != nil {
		return s, fmt.Errorf("%w; log of wgcnid:\n%.4000s", err, h.process.Log)
	}
	s.took = done - begun
	helper, tunnel, err := findWgcnid(h.node)
	if err != nil {
		return s, err
	}
	h.helper, h.tunnel = &host{Node: h.node, helper: []int{helper}}, tunnel
	if err := settle(ctx, []*host{h.helper}); err != nil {
		return s, err
	}
	if s.cpu, err = cpuTime(helper); err != nil {
		return s, err
	}
	if tunnel != 0 {
		if s.tunnel, err = cpuTime(tunnel); err != nil {
			return s, err
		}
	}
	s.peak, err = memory(helper, "VmHWM")
	return s, err
}

// rest looks at what it costs that nothing happens, on all of them at once.
func (b *bench) rest(ctx context.Context, holders []*holder) error {
	span := b.span(time.Minute, 20*time.Second)
	for _, h := range holders {
		cpu, err := h.helper.helperCPU()
		if err != nil {
			return err
		}
		h.quiet = -cpu
	}
	b.progress("mesh: nothing happens for %v", span)
	select {
	case <-time.After(span):
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, h := range holders {
		cpu, err := h.helper.helperCPU()
		if err != nil {
			return err
		}
		h.quiet = time.Duration(float64(h.quiet+cpu) * float64(time.Minute) / float64(span))
		if h.settled, err = memory(h.helper.helper[0], "VmRSS"); err != nil {
			return err
		}
		if h.tunnel != 0 {
			if h.tunnelMemory, err = memory(h.tunnel, "VmRSS"); err != nil {
				return err
			}
		}
	}
	return nil
}

// changeOne gives one node another endpoint, as if it had been moved.
func (h *holder) changeOne(ctx context.Context) error {
	r := &h.records[rand.IntN(len(h.records))]
	before := netip.MustParseAddrPort(r.Endpoints[0])
	r.Endpoints = []string{netip.AddrPortFrom(before.Addr(), config.DefaultListenPort+1+uint16(rand.IntN(1000))).String()}
	r.Revision = registry.NextRevision(r.Revision, time.Now())
	var err error
	if *r, err = h.trust().Seal(*r); err != nil {
		return err
	}
	if err := settle(ctx, []*host{h.helper}); err != nil {
		return err
	}
	idle, err := h.helper.helperCPU()
	if err != nil {
		return err
	}
	took, err := untilReport(ctx, h.node, func() error { return h.shelf.put(ctx, *r) })
	if err != nil {
		return err
	}
	if err := settle(ctx, []*host{h.helper}); err != nil {
		return err
	}
	cpu, err := h.helper.helperCPU()
	if err != nil {
		return err
	}
	h.change.take(timing{Elapsed: took, CPU: cpu - idle})
	return cluster.Poll(ctx, fmt.Sprintf("%s at %s", r.Name, r.Endpoints[0]), func() error {
		out, err := h.node.Run(ctx, "wg", "show", "wgcni0", "endpoints")
		if err == nil && !strings.Contains(out, r.PublicKey.String()+"\t"+r.Endpoints[0]) {
			err = errors.New("it is not there")
		}
		return err
	})
}

func meshSection(holders []*holder) section {
	s := section{title: "A mesh, as one of its nodes holds it", figures: [3]string{"time", "memory", "cpu"}}
	for _, h := range holders {
		var scaled, resident budget
		if h.nodes == budgetNodes {
			scaled, resident = atLeast(100), atMost(1)
		}
		cold := h.cold.row(h.name + ": cold start")
		cold.ratio, cold.to, cold.budget = h.cold.cpu.Seconds()/h.change.cpu.median(), "one node changed, cpu", scaled
		s.rows = append(s.rows, cold, h.warm.row(h.name+": warm start"), row{
			what: h.name + ": one node changed", time: milliseconds(h.change.elapsed.median()), cpu: milliseconds(h.change.cpu.median()),
		}, row{
			what: h.name + ": nothing happens for a minute", memory: mebibytes(h.settled), cpu: milliseconds(h.quiet.Seconds()),
			ratio: float64(h.settled) / residentBudget, to: mebibytes(residentBudget), budget: resident,
		})
		if h.tunnel != 0 {
			s.rows = append(s.rows, row{
				what: h.name + ": cold start, userspace tunnel", memory: mebibytes(h.tunnelMemory), cpu: milliseconds(h.cold.tunnel.Seconds()),
			})
		}
	}
	s.notes = append(s.notes,
		"of wgcnid alone, but for the userspace tunnel's own process; memory is resident, for a start its peak",
		"records are sealed, tunnels have preshared keys; a start takes until all peers and their routes are in the kernel; a warm one is that of a node that has booted, and knows the mesh from before",
		fmt.Sprintf("one node changed is another endpoint: the median of %d, until wgcnid has written to its disk what it did", len(holders[0].change.cpu)))
	return s
}

func (s beginning) row(what string) row {
	return row{what: what, time: milliseconds(s.took.Seconds()), memory: mebibytes(s.peak), cpu: milliseconds(s.cpu.Seconds())}
}
