package main

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestVerdict(t *testing.T) {
	for _, tt := range []struct {
		budget budget
		ratio  float64
		want   string
		missed bool
	}{
		{atMost(1.5), 1.2, "<= 1.50 ok", false},
		{atMost(1.1), 1.1049, "<= 1.10 ok", false},
		{atMost(1.1), 1.11, "<= 1.10 MISSED", true},
		{atLeast(0.95), 0.9451, ">= 0.95 ok", false},
		{atLeast(0.95), 0.94, ">= 0.95 MISSED", true},
		{atMost(1.1), math.NaN(), "<= 1.10 MISSED", true},
		{atLeast(0.95), math.NaN(), ">= 0.95 MISSED", true},
	} {
		if got := tt.budget.verdict(tt.ratio); got != tt.want {
			t.Errorf("%+v.verdict(%v) = %q, want %q", tt.budget, tt.ratio, got, tt.want)
		}
		if got := (row{ratio: tt.ratio, budget: tt.budget}).missed(); got != tt.missed {
			t.Errorf("%+v at %v: missed %v, want %v", tt.budget, tt.ratio, got, tt.missed)
		}
	}
}

// example has all that a table can have.
var example = []section{
	{
		title: "Verbs",
		rows: []row{
			{what: "ADD tuning", median: "6.00 ms", p90: "10.00 ms", cpu: "5.50 ms"},
			{what: "ADD wgcni", median: "12.00 ms", p90: "14.00 ms", cpu: "11.00 ms", ratio: 2, to: "tuning", budget: atMost(1.5)},
		},
		notes: []string{"a note"},
	},
	{
		title: "Throughput",
		rows:  []row{{what: "wgcni", median: "900 Mbit/s", ratio: 0.96, to: "plain", budget: atLeast(0.95)}},
	},
}

func TestText(t *testing.T) {
	want := `Verbs             median       p90       cpu  ratio  to      budget
  ADD tuning     6.00 ms  10.00 ms   5.50 ms
  ADD wgcni     12.00 ms  14.00 ms  11.00 ms   2.00  tuning  <= 1.50 MISSED
  (a note)

Throughput        median       p90       cpu  ratio  to      budget
  wgcni       900 Mbit/s                       0.96  plain   >= 0.95 ok

`
	if diff := cmp.Diff(want, text(example)); diff != "" {
		t.Error(diff)
	}
}

func TestMarkdown(t *testing.T) {
	want := `| Verbs | median | p90 | cpu | ratio | to | budget |
| --- | ---: | ---: | ---: | ---: | --- | --- |
| ADD tuning | 6.00 ms | 10.00 ms | 5.50 ms |  |  |  |
| ADD wgcni | 12.00 ms | 14.00 ms | 11.00 ms | 2.00 | tuning | <= 1.50 MISSED |

a note

| Throughput | median | p90 | cpu | ratio | to | budget |
| --- | ---: | ---: | ---: | ---: | --- | --- |
| wgcni | 900 Mbit/s |  |  | 0.96 | plain | >= 0.95 ok |

`
	if diff := cmp.Diff(want, markdown(example)); diff != "" {
		t.Error(diff)
	}
}

// TestFigures: a section may have columns of its own.
func TestFigures(t *testing.T) {
	mixed := []section{
		{title: "Verbs", rows: []row{{what: "ADD", median: "6 ms", p90: "9 ms", p99: "hidden", memory: "hidden", cpu: "5 ms"}}},
		{title: "News", figures: [3]string{"median", "p99", "cpu"}, rows: []row{{what: "etcd", median: "1 ms", p90: "hidden", p99: "2 ms"}}},
		{title: "Mesh", figures: [3]string{"time", "memory", "cpu"}, rows: []row{{what: "start", time: "3 s", memory: "4 MiB", cpu: "2 s"}}},
		{title: "Join", figures: [3]string{"time", "revisions", "cpu"}, rows: []row{{what: "etcd", count: "7", ratio: 1, to: "nodes"}}},
	}
	want := `Verbs    median        p90   cpu  ratio  to     budget
  ADD      6 ms       9 ms  5 ms

News     median        p99   cpu  ratio  to     budget
  etcd     1 ms       2 ms

Mesh       time     memory   cpu  ratio  to     budget
  start     3 s      4 MiB   2 s

Join       time  revisions   cpu  ratio  to     budget
  etcd                   7         1.00  nodes

`
	if diff := cmp.Diff(want, text(mixed)); diff != "" {
		t.Error(diff)
	}
}

func TestMissed(t *testing.T) {
	if n, of := missed(example); n != 1 || of != 2 {
		t.Errorf("%d of %d budgets missed, want 1 of 2", n, of)
	}
}
