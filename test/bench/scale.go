package main

import (
	"context"
	"fmt"

	"github.com/wgcni/wgcni/test/cluster"
)

// flat is how much slower a verb may be where there is more of something.
var flat = atMost(1.10)

// load is a host with pods and peers.
type load struct {
	name  string
	pods  int
	peers int

	host                     *host
	inside, outside, control *subject
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
		l.inside = l.host.wgcni(l.name, insideNetwork)
		l.outside = l.host.wgcni(l.name, outsideNetwork)
		l.control = &subject{name: baseline, host: l.host, plugin: "tuning", stanza: map[string]any{"mtu": 1400}, network: insideNetwork}
		own := []*subject{l.inside, l.outside, l.control}
		if err := makePods(ctx, own); err != nil {
			return nil, err
		}
		if err := l.attachPods(ctx, b); err != nil {
			return nil, err
		}
		subjects = append(subjects, own...)
	}
	if err := warmUp(ctx, subjects); err != nil {
		return nil, err
	}
	rounds := b.rounds(60, 8)
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
		s := l.host.wgcni("wgcni", insideNetwork)
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
		{"wgcni, pod outside the node's prefix", func(l *load) *subject { return l.outside }, flat},
		{"tuning", func(l *load) *subject { return l.control }, budget{}},
	} {
		for _, v := range []struct {
			name string
			of   func(*subject) verb
		}{
			{"ADD", func(x *subject) verb { return x.add }},
			{"DEL", func(x *subject) verb { return x.del }},
		} {
			for i, l := range loads {
				r := v.of(kind.of(l)).row(fmt.Sprintf("%s %s: %s", v.name, kind.name, l.name),
					v.of(kind.of(loads[0])), loads[0].name, kind.limit)
				if i == 0 {
					r.ratio, r.to, r.budget = 0, "", budget{}
				}
				s.rows = append(s.rows, r)
			}
		}
	}
	s.notes = append(s.notes,
		"pods are real ones, each attached by bridge and by an ADD of wgcni; peers are in the registry file, the tunnel and the routes",
		"tuning is there to tell what the kernel itself takes longer for with more interfaces and routes")
	return s
}
