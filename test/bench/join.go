package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/test/cluster"
)

// crowd is nodes that all join one mesh at the same time.
type crowd struct {
	nodes   []*cluster.Node
	seen    []*routeWatch
	helpers []*cluster.Process

	took               samples       // of each node, from the first start to its last route, in seconds
	cpu, tunnels, etcd time.Duration // of all processes of the kind
	revisions          int64         // of etcd, each of them a record that was written
}

// benchJoin measures how long real nodes take to find each other when all start
// at once.
func benchJoin(ctx context.Context, b *bench) ([]section, error) {
	wanted := b.rounds(100, 10)
	nodes, err := roomForNodes(wanted)
	if err != nil {
		return nil, err
	}
	c, err := cluster.New(ctx, cluster.Options{})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	for i := range nodes {
		b.progress("join: machine %d of %d", i+1, nodes)
		if _, err := c.AddNode(ctx, fmt.Sprintf("node-%d", i+1)); err != nil {
			return nil, err
		}
	}
	etcd, err := c.StartEtcd(ctx, cluster.EtcdOptions{})
	if err != nil {
		return nil, err
	}
	client, err := dialEtcd(c.Underlay, etcd)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	j, err := newCrowd(c, etcd)
	if err != nil {
		return nil, err
	}
	before, err := etcdRevision(ctx, client)
	if err != nil {
		return nil, err
	}
	b.progress("join: %d nodes start", nodes)
	if err := j.join(ctx); err != nil {
		return nil, err
	}
	if err := j.account(c); err != nil {
		return nil, err
	}
	for i, n := range c.Nodes {
		b.progress("join: a look at node %d of %d", i+1, nodes)
		if err := awaitPeers(ctx, n, nodes-1); err != nil {
			return nil, err
		}
	}
	after, err := etcdRevision(ctx, client)
	if err != nil {
		return nil, err
	}
	j.revisions = after - before
	s := j.section()
	if nodes < wanted {
		s.notes = append(s.notes, fmt.Sprintf("not %d: this machine has no more instances of inotify (fs.inotify.max_user_instances)", wanted))
	}
	return []section{s}, nil
}

// inotifyOfNode is how many instances of inotify a node needs: its wgcnid has one.
const inotifyOfNode = 1

// spareInotify are the instances of inotify that are left to others.
const spareInotify = 16

// roomForNodes returns how many of the wanted nodes this machine has room for.
// Machines have instances of inotify each for itself. Here all nodes are one user
// of one kernel, and share them.
func roomForNodes(wanted int) (int, error) {
	const file = "/proc/sys/fs/inotify/max_user_instances"
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("read the limit of inotify: %w", err)
	}
	limit, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("read the limit of inotify: %s: %w", file, err)
	}
	used := 0
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, f := range files {
		if to, err := os.Readlink(f); err == nil && to == "anon_inode:inotify" {
			used++
		}
	}
	n := room(wanted, limit-used, inotifyOfNode)
	if n < 2 {
		return 0, fmt.Errorf("%d of %d instances of inotify are in use: raise fs.inotify.max_user_instances", used, limit)
	}
	return n, nil
}

// room is how many of the wanted nodes there is room for, if each needs so many
// of what is free.
func room(wanted, free, each int) int {
	return max(min(wanted, (free-spareInotify)/each), 0)
}

// newCrowd makes the cluster's nodes ready to start.
func newCrowd(c *cluster.Cluster, etcd *cluster.Etcd) (*crowd, error) {
	secret, err := identity.NewSecret(time.Now())
	if err != nil {
		return nil, err
	}
	n := len(c.Nodes)
	j := &crowd{nodes: c.Nodes, helpers: make([]*cluster.Process, n), took: make(samples, n)}
	for _, n := range c.Nodes {
		if err := n.Configure(cluster.NetworkOptions{
			Secrets: []string{secret.Reveal()}, Stanza: map[string]any{"registry": etcd.Registry(nil)},
		}); err != nil {
			return nil, err
		}
		r, err := watchRoutes(n)
		if err != nil {
			return nil, err
		}
		j.seen = append(j.seen, r)
	}
	return j, nil
}

// join starts all helpers and waits until each node has the routes to all others.
func (j *crowd) join(ctx context.Context) error {
	others := 0
	for _, n := range j.nodes[1:] {
		others += len(n.PodCIDRs())
	}
	errs := make([]error, len(j.nodes))
	var all sync.WaitGroup
	begun := monotonic()
	for i, n := range j.nodes {
		all.Go(func() {
			defer j.seen[i].close()
			if j.helpers[i], errs[i] = n.StartHelper(); errs[i] != nil {
				return
			}
			at, err := j.seen[i].awaitAll(ctx, others)
			if j.took[i] = (at - begun).Seconds(); err != nil {
				errs[i] = fmt.Errorf("%w; log of wgcnid:\n%.2000s", err, j.helpers[i].Log)
			}
		})
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return err // what the others lack has the same cause
		}
	}
	return nil
}

// account sums what the processes have run for by now.
func (j *crowd) account(c *cluster.Cluster) error {
	machines := []*cluster.Machine{c.Underlay}
	for _, n := range c.Nodes {
		machines = append(machines, n.Machine)
	}
	for _, m := range machines {
		found, err := m.Processes()
		if err != nil {
			return err
		}
		for _, p := range found {
			var sum *time.Duration
			switch name := filepath.Base(p.Args[0]); {
			case name == "etcd":
				sum = &j.etcd
			case name == "wgcnid" && len(p.Args) > 1 && p.Args[1] == userspace.Command:
				sum = &j.tunnels
			case name == "wgcnid":
				sum = &j.cpu
			default: // such as nsenter
				continue
			}
			t, err := cpuTime(p.HostPID)
			if err != nil {
				return err
			}
			*sum += t
		}
	}
	if j.cpu == 0 || j.etcd == 0 {
		return errors.New("find wgcnid and etcd: no such processes")
	}
	return nil
}

func (j *crowd) section() section {
	n := float64(len(j.nodes))
	s := section{title: fmt.Sprintf("%d nodes join at once, etcd", len(j.nodes)), figures: [3]string{"time", "revisions", "cpu"}}
	s.rows = append(s.rows,
		row{what: "until half of the nodes have all peers", time: milliseconds(j.took.median())},
		row{what: "until the last node has all peers", time: milliseconds(j.took.quantile(1))},
		row{what: "etcd", count: fmt.Sprint(j.revisions), cpu: milliseconds(j.etcd.Seconds()), ratio: float64(j.revisions) / n, to: "one for each node"},
		row{what: "wgcnid, of each node", cpu: milliseconds(j.cpu.Seconds() / n)},
	)
	all := j.cpu + j.etcd + j.tunnels
	if j.tunnels != 0 {
		s.rows = append(s.rows, row{what: "userspace tunnel, of each node", cpu: milliseconds(j.tunnels.Seconds() / n)})
	}
	s.rows = append(s.rows, row{what: "all", cpu: milliseconds(all.Seconds())})
	s.notes = append(s.notes, fmt.Sprintf("from the first start on, until a node has the routes of %d others, whose records and tunnels are keyed by one secret; all share this machine's CPUs and disk", len(j.nodes)-1))
	return s
}
