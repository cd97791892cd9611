package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/wgcni/wgcni/test/cluster"
)

// The subjects that the budgets refer to.
const (
	baseline = "tuning, MTU 1400"
	idlePort = "portmap, no mapping"
)

// chained are the plugins that are timed side by side on one node.
func chained(h *host) []*subject {
	mappings := map[string]any{
		"runtimeConfig": map[string]any{"portMappings": []map[string]any{
			{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
		}},
		"capabilities": map[string]bool{"portMappings": true},
	}
	rate := map[string]any{"ingressRate": 1e8, "ingressBurst": 1e7, "egressRate": 1e8, "egressBurst": 1e7}
	subjects := []*subject{
		h.tuning(),
		{name: idlePort, plugin: "portmap", stanza: map[string]any{"capabilities": mappings["capabilities"]}},
		{name: "portmap, one mapping", plugin: "portmap", stanza: mappings},
		{name: "bandwidth", plugin: "bandwidth", stanza: rate, fresh: true}, // DEL leaves a qdisc
		{name: "firewall", plugin: "firewall"},
		{name: "sbr", plugin: "sbr", fresh: true}, // DEL leaves the routes where ADD moved them to
	}
	for _, s := range subjects {
		s.host, s.network = h, insideNetwork
	}
	return append(subjects, h.wgcni(insideNetwork))
}

// start is a program that is started and ends at once.
type start struct {
	name string
	execution
	cost verb
}

// starts are what any verb costs before its work begins.
func starts(ctx context.Context, h *host, scratch string) ([]*start, error) {
	trivial := filepath.Join(scratch, "trivial")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", trivial, "./test/bench/trivial")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	root, err := cluster.RepoRoot()
	if err != nil {
		return nil, err
	}
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the trivial program: %w: %s", err, out)
	}
	version := func(plugin string) execution {
		return execution{
			Path:  filepath.Join(h.bin, plugin),
			Env:   []string{"CNI_COMMAND=VERSION"},
			Stdin: []byte(`{"cniVersion":"1.0.0"}`),
		}
	}
	return []*start{
		{name: "a Go program that does nothing", execution: execution{Path: trivial}},
		{name: "tuning VERSION", execution: version("tuning")},
		{name: "wgcni VERSION", execution: version("wgcni")},
	}, nil
}

// benchVerbs times ADD and DEL of all chained reference plugins and of wgcni.
func benchVerbs(ctx context.Context, b *bench) ([]section, error) {
	c, err := cluster.New(ctx, cluster.Options{Nodes: 1})
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	h, err := newHost(ctx, c, c.Nodes[0], 0)
	if err != nil {
		return nil, err
	}
	subjects := chained(h)
	if err := makePods(ctx, subjects); err != nil {
		return nil, err
	}
	programs, err := starts(ctx, h, c.Shared)
	if err != nil {
		return nil, err
	}
	if err := warmUp(ctx, subjects); err != nil {
		return nil, err
	}
	rounds := b.rounds(50, 10)
	for i := range rounds {
		b.progress("ADD and DEL: round %d of %d", i+1, rounds)
		if err := round(ctx, subjects); err != nil {
			return nil, err
		}
		for _, p := range programs {
			t, err := h.timer.time(p.execution)
			if err != nil {
				return nil, err
			}
			p.cost.take(t)
		}
	}
	table := verbSection(subjects)
	table.title = fmt.Sprintf("ADD and DEL, whole process, %d rounds", rounds)
	return []section{table, startSection(programs, subjects)}, h.timer.close()
}

// verbs are those that are timed.
var verbs = []struct {
	name string
	of   func(*subject) verb
}{
	{"ADD", func(x *subject) verb { return x.add }},
	{"DEL", func(x *subject) verb { return x.del }},
}

func verbSection(subjects []*subject) section {
	var s section
	named := map[string]*subject{}
	for _, x := range subjects {
		named[x.name] = x
	}
	for _, v := range verbs {
		for _, x := range subjects {
			limit := budget{}
			if x.plugin == "wgcni" {
				limit = atMost(1.5)
			}
			s.rows = append(s.rows, v.of(x).row(v.name+" "+x.name, v.of(named[baseline]), "tuning", limit))
		}
		against := v.of(named["wgcni"]).row(v.name+" wgcni", v.of(named[idlePort]), idlePort, atMost(1))
		against.median, against.p90, against.cpu = "", "", ""
		s.rows = append(s.rows, against)
	}
	return s
}

// startSection tells how much of wgcni's time is its start, and how much work.
func startSection(programs []*start, subjects []*subject) section {
	s := section{title: "Where the time goes"}
	wgcni, tuning := subjects[len(subjects)-1], subjects[0]
	bare := map[string]verb{}
	for _, p := range programs {
		bare[p.name] = p.cost
		s.rows = append(s.rows, p.cost.row(p.name, tuning.add, "tuning ADD", budget{}))
	}
	work := func(what string, v, start verb) {
		s.rows = append(s.rows, row{
			what:   what,
			median: milliseconds(v.elapsed.median() - start.elapsed.median()),
			cpu:    milliseconds(v.cpu.median() - start.cpu.median()),
			ratio:  1 - start.elapsed.median()/v.elapsed.median(),
			to:     "the whole verb",
		})
	}
	work("work of tuning ADD", tuning.add, bare["tuning VERSION"])
	work("work of wgcni ADD", wgcni.add, bare["wgcni VERSION"])
	work("work of tuning DEL", tuning.del, bare["tuning VERSION"])
	work("work of wgcni DEL", wgcni.del, bare["wgcni VERSION"])
	s.notes = append(s.notes, "VERSION starts the same binary and prints a line; work is what a verb takes longer than that")
	return s
}
