package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/wgcni/wgcni/test/cluster"
)

// flat is how much slower a verb may be where there is more of something.
var flat = atMost(1.10)

// load is a host with pods and peers.
type load struct {
	name  string
	pods  int
	peers int

	host   *host
	inside *subject
	// optional: a pod outside the node's prefix, which needs a route and a set
	// element of its own, and tuning for comparison
	outside, control *subject
}

// subjects are those that the load has.
func (l *load) subjects() []*subject {
	return slices.DeleteFunc([]*subject{l.inside, l.outside, l.control}, func(s *subject) bool { return s == nil })
}

// benchScale times wgcni on nodes that have nothing, many pods, or many peers.
func benchScale(ctx context.Context, b *bench) ([]section, error) {
	loads := []*load{
		{name: "0 pods, 0 peers"},
		{name: fmt.Sprintf("%d pods", b.rounds(250, 50)), pods: b.rounds(250, 50)},
		{name: "1,000 peers", peers: 1000},
		{name: "5,000 peers", peers: 5000},
	}
	c, err := cluster.New(ctx, cluster.Options{Nodes: len(loads)})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	var subjects []*subject
	for i, l := range loads {
		b.progress("scale: a node with %s", l.name)
		if l.host, err = newHost(ctx, c, c.Nodes[i], l.peers); err != nil {
			return nil, err
		}
		l.inside = l.host.wgcni(insideNetwork)
		if extreme := i == 0 || i == len(loads)-1; extreme {
			l.outside = l.host.wgcni(outsideNetwork)
		}
		if l.peers != 1000 {
			l.control = l.host.tuning()
		}
		if err := makePods(ctx, l.subjects()); err != nil {
			return nil, err
		}
		if err := l.attachPods(ctx, b); err != nil {
			return nil, err
		}
		subjects = append(subjects, l.subjects()...)
	}
	if err := warmUp(ctx, subjects); err != nil {
		return nil, err
	}
	rounds := b.rounds(30, 5)
	for i := range rounds {
		b.progress("scale: round %d of %d", i+1, rounds)
		if err := round(ctx, subjects); err != nil {
			return nil, err
		}
	}
	for _, l := range loads {
		if err := l.host.timer.close(); err != nil {
			return nil, err
		}
	}
	s := scaleSection(loads)
	s.title = fmt.Sprintf("ADD and DEL as the node fills, %d rounds", rounds)
	return []section{s}, nil
}

// attachPods fills the node with real pods, each attached by a real ADD.
func (l *load) attachPods(ctx context.Context, b *bench) error {
	for i := range l.pods {
		b.progress("scale: pod %d of %d", i+1, l.pods)
		s := l.host.wgcni(insideNetwork)
		var err error
		if s.pod, err = l.host.AddPod(ctx, s.network, fmt.Sprintf("pod-%d", i), cluster.PodOptions{}); err != nil {
			return err
		}
		e, err := s.verb("ADD", s.pod.Raw)
		if err != nil {
			return err
		}
		if _, err := l.host.timer.time(e); err != nil {
			return err
		}
	}
	return nil
}

func scaleSection(loads []*load) section {
	var s section
	for _, kind := range []struct {
		name  string
		of    func(*load) *subject
		limit budget
	}{
		{"wgcni", func(l *load) *subject { return l.inside }, flat},
		{"wgcni, pod outside the prefix", func(l *load) *subject { return l.outside }, flat},
		{"tuning", func(l *load) *subject { return l.control }, budget{}},
	} {
		for _, v := range verbs {
			for i, l := range loads {
				x := kind.of(l)
				if x == nil {
					continue
				}
				r := v.of(x).row(fmt.Sprintf("%s %s: %s", v.name, kind.name, l.name),
					v.of(kind.of(loads[0])), loads[0].name, kind.limit)
				if i == 0 {
					r.ratio, r.to, r.budget = 0, "", budget{}
				}
				s.rows = append(s.rows, r)
			}
		}
		s.rows = append(s.rows, helperRows(kind.name, loads, kind.of)...)
	}
	s.notes = append(s.notes,
		"pods are real ones, each attached by bridge and by an ADD of wgcni; peers are in the registry file, the tunnel and the routes",
		"tuning tells what the kernel itself takes longer for with more interfaces and routes")
	return s
}

// helperRows show what a verb makes wgcnid do afterwards: nobody waits for it,
// but it is done on the same CPUs.
func helperRows(kind string, loads []*load, of func(*load) *subject) []row {
	var rows []row
	for _, l := range loads {
		if x := of(l); x != nil && x.plugin == "wgcni" {
			rows = append(rows, row{
				what: fmt.Sprintf("wgcnid, after %s: %s", kind, l.name),
				cpu:  milliseconds(x.helper.median()),
			})
		}
	}
	return rows
}
