package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/wgcni/wgcni/test/cluster"
)

// fileBudget is how long an announcement by a shared file may take.
const fileBudget = 25 * time.Millisecond

// messenger is a way for news to get from one node to another.
type messenger interface {
	// measure takes its samples of one round.
	measure(ctx context.Context) error
	// forget drops the samples.
	forget()
}

// benchAnnounce measures for how long a pod outside of its node's prefix is
// unknown to another node, in turns by each registry and by etcd alone.
func benchAnnounce(ctx context.Context, b *bench) ([]section, error) {
	c, err := cluster.New(ctx, cluster.Options{Nodes: 4})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	etcd, err := c.StartEtcd(ctx, cluster.EtcdOptions{})
	if err != nil {
		return nil, err
	}
	byEtcd, err := newPair(ctx, c, c.Nodes[:2], etcd.Registry(nil))
	if err != nil {
		return nil, err
	}
	byFile, err := newPair(ctx, c, c.Nodes[2:], inFile(filepath.Join(c.Shared, "mesh.json")).registry())
	if err != nil {
		return nil, err
	}
	alone, err := newBare(ctx, etcd, c.Nodes[:2])
	if err != nil {
		return nil, err
	}
	defer alone.close()
	messengers := []messenger{alone, byEtcd, byFile}
	hosts := append(byEtcd.hosts(), byFile.hosts()...)
	rounds := b.rounds(100, 20)
	for i := range rounds + 1 {
		b.progress("announce: round %d of %d", i, rounds)
		for _, j := range rand.Perm(len(messengers)) {
			if err := settle(ctx, hosts); err != nil {
				return nil, err
			}
			if err := messengers[j].measure(ctx); err != nil {
				return nil, err
			}
			if i == 0 { // it warms up
				messengers[j].forget()
			}
		}
	}
	if err := errors.Join(byEtcd.end(ctx), byFile.end(ctx)); err != nil {
		return nil, err
	}
	s := announceSection(alone, byEtcd, byFile)
	s.title = fmt.Sprintf("A pod outside of its node's prefix, %d rounds", rounds)
	return []section{s}, nil
}

// pair is two nodes of a mesh of their own: a pod comes and goes on one, and the
// other has to know.
type pair struct {
	from, to *host
	pod      *subject
	seen     *routeWatch // of to

	announced, withdrawn samples // seconds
	helpers              samples // CPU time of both wgcnid for one of each, in seconds
}

func newPair(ctx context.Context, c *cluster.Cluster, nodes []*cluster.Node, registry map[string]any) (*pair, error) {
	var p pair
	var err error
	if p.seen, err = watchRoutes(nodes[1]); err != nil {
		return nil, err
	}
	if p.from, err = startHost(c, nodes[0], registry); err != nil {
		return nil, err
	}
	if p.to, err = startHost(c, nodes[1], registry); err != nil {
		return nil, err
	}
	for _, h := range p.hosts() {
		if err := h.join(ctx, 1); err != nil {
			return nil, err
		}
	}
	p.pod = p.from.wgcni(outsideNetwork)
	return &p, makePods(ctx, []*subject{p.pod})
}

func (p *pair) hosts() []*host { return []*host{p.from, p.to} }

// address is the pod's, as it is announced.
func (p *pair) address() netip.Prefix {
	return netip.PrefixFrom(p.pod.pod.IPv4(), p.pod.pod.IPv4().BitLen())
}

func (p *pair) measure(ctx context.Context) error {
	if err := p.pod.prepare(ctx); err != nil {
		return err
	}
	if err := settle(ctx, p.hosts()); err != nil {
		return err
	}
	before, err := p.cpu()
	if err != nil {
		return err
	}
	for _, v := range []struct {
		verb  func() error
		there bool
		into  *samples
	}{{p.pod.timeADD, true, &p.announced}, {p.pod.timeDEL, false, &p.withdrawn}} {
		took, err := p.time(ctx, v.verb, v.there)
		if err != nil {
			return err
		}
		*v.into = append(*v.into, took)
		if err := settle(ctx, p.hosts()); err != nil {
			return err
		}
	}
	after, err := p.cpu()
	p.helpers = append(p.helpers, (after - before).Seconds())
	return err
}

// time returns how long after the verb's end the other node has the route, or
// has it no more, in seconds. It is negative where wgcnid was quicker than the
// verb.
func (p *pair) time(ctx context.Context, verb func() error, there bool) (float64, error) {
	if err := verb(); err != nil {
		return 0, err
	}
	at, err := p.seen.awaitOne(ctx, p.address(), there)
	return (at - p.pod.ended).Seconds(), err
}

func (p *pair) cpu() (sum time.Duration, err error) {
	for _, h := range p.hosts() {
		t, err := h.helperCPU()
		if err != nil {
			return 0, err
		}
		sum += t
	}
	return sum, nil
}

func (p *pair) forget() { p.announced, p.withdrawn, p.helpers = nil, nil, nil }

// end makes sure that the route which was waited for was no empty promise: the
// peer may send from the pod's address, and no longer when the pod is gone.
func (p *pair) end(ctx context.Context) error {
	for _, v := range []struct {
		verb  func() error
		there bool
	}{{p.pod.timeADD, true}, {p.pod.timeDEL, false}} {
		if _, err := p.time(ctx, v.verb, v.there); err != nil {
			return err
		}
		if err := cluster.Poll(ctx, fmt.Sprintf("%s among the allowed IPs of %s: %v", p.address(), p.to, v.there), func() error {
			out, err := p.to.Run(ctx, "wg", "show", "wgcni0", "allowed-ips")
			if err == nil && strings.Contains(out, p.address().String()) != v.there {
				err = fmt.Errorf("allowed are %s", strings.TrimSpace(out))
			}
			return err
		}); err != nil {
			return err
		}
	}
	p.seen.close()
	return errors.Join(p.from.timer.close(), p.to.timer.close())
}

// bare is etcd alone: a put by one node until the event at another.
type bare struct {
	from, to *clientv3.Client
	events   clientv3.WatchChan
	value    string
	stop     context.CancelFunc

	seen samples // seconds
}

// bareKey is none that wgcnid looks at.
const bareKey = "/bench/bare"

// newBare puts the record that the first node has published, under another key.
func newBare(ctx context.Context, e *cluster.Etcd, nodes []*cluster.Node) (*bare, error) {
	var b bare
	var err error
	if b.from, err = dialEtcd(nodes[0], e); err != nil {
		return nil, err
	}
	if b.to, err = dialEtcd(nodes[1], e); err != nil {
		return nil, errors.Join(err, b.from.Close())
	}
	ctx, b.stop = context.WithCancel(ctx)
	got, err := b.from.Get(ctx, "/wgcni/nodes/"+nodes[0].Name)
	if err == nil && (len(got.Kvs) != 1 || !json.Valid(got.Kvs[0].Value)) {
		err = errors.New("it is not there")
	}
	if err != nil {
		b.close()
		return nil, fmt.Errorf("read the record of %s: %w", nodes[0], err)
	}
	b.value = string(got.Kvs[0].Value)
	b.events = b.to.Watch(ctx, bareKey, clientv3.WithCreatedNotify())
	if err := b.next(ctx); err != nil { // that it has begun
		b.close()
		return nil, err
	}
	return &b, nil
}

func (b *bare) close() {
	b.stop()
	_ = b.from.Close() // nothing is underway
	_ = b.to.Close()
}

// next waits for what the watch tells next.
func (b *bare) next(ctx context.Context) error {
	select {
	case e := <-b.events:
		if err := e.Err(); err != nil {
			return fmt.Errorf("watch etcd: %w", err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("watch etcd: %w", ctx.Err())
	}
}

// measure takes two samples, as many as an ADD and a DEL give.
func (b *bare) measure(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	for range 2 {
		put := make(chan error, 1)
		begun := monotonic()
		go func() { // the event may be quicker than the answer
			_, err := b.from.Put(ctx, bareKey, b.value)
			put <- err
		}()
		err := b.next(ctx)
		b.seen = append(b.seen, (monotonic() - begun).Seconds())
		if err := errors.Join(err, <-put); err != nil {
			return fmt.Errorf("put to etcd: %w", err)
		}
	}
	return nil
}

func (b *bare) forget() { b.seen = nil }

func announceSection(alone *bare, byEtcd, byFile *pair) section {
	const direct = "etcd alone"
	s := section{figures: [3]string{"median", "p99", "cpu"}}
	s.rows = append(s.rows, alone.seen.row(direct+": put to watch"))
	for _, p := range []struct {
		name  string
		of    *pair
		to    string
		unit  float64 // seconds
		limit budget
	}{
		{"etcd", byEtcd, direct, alone.seen.median(), atMost(2)},
		{"file", byFile, fileBudget.String(), fileBudget.Seconds(), atMost(1)},
	} {
		announced := p.of.announced.row(p.name + ": ADD returned to route set on another node")
		announced.ratio, announced.to, announced.budget = p.of.announced.median()/p.unit, p.to, p.limit
		withdrawn := p.of.withdrawn.row(p.name + ": DEL returned to route gone on another node")
		withdrawn.ratio, withdrawn.to = p.of.withdrawn.median()/p.unit, p.to
		s.rows = append(s.rows, announced, withdrawn, row{
			what: p.name + ": wgcnid of both nodes, ADD and DEL", cpu: milliseconds(p.of.helpers.median()),
		})
	}
	s.notes = append(s.notes, "the allowed IP is set before the route; etcd has one member, and syncs to this machine's disk, as the file does")
	return s
}

func (s samples) row(what string) row {
	return row{what: what, median: milliseconds(s.median()), p99: milliseconds(s.quantile(0.99))}
}
