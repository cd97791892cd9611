package chaos

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestResultIsKept(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(ResultsEnv, dir)
	t.Setenv(LengthEnv, "1h")
	t.Setenv(SeedEnv, "18446744073709551615")
	loss, err := Begin("loss")
	if err != nil {
		t.Fatal(err)
	}
	loss.Began = time.Date(2026, 1, 2, 23, 59, 0, 0, time.UTC)
	loss.Done = map[string]int{"ADD": 1234567, "DEL": 999, "outage": 999, "rotation": 0}
	loss.Bad, loss.What, loss.Of, loss.Unit, loss.Version = 0, "lost", 1000, "datagrams", "v1"
	leak := loss
	leak.Campaign, leak.Length, leak.Bad, leak.What, leak.Unit = "leak", Duration(90*time.Second), 3, "plaintext", "packets"
	loss.Note = "of 3 streams"
	for _, r := range []Result{loss, leak} {
		if err := r.Save(); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]Result{leak, loss}, got); d != "" {
		t.Errorf("(-saved +loaded):\n%s", d)
	}
	want := `| campaign | length | seed | what was done | result | date | version |
|---|--:|--:|---|---|---|---|
| leak | 1m30s | 18446744073709551615 | 1,234,567 ADD, 999 DEL, 999 outage, 0 rotation | 3 plaintext of 1,000 packets | 2026-01-02 | ` + "`v1`" + ` |
| loss | 1h | 18446744073709551615 | 1,234,567 ADD, 999 DEL, 999 outage, 0 rotation | **0 lost of 1,000 datagrams**; of 3 streams | 2026-01-02 | ` + "`v1`" + ` |
`
	if d := cmp.Diff(want, Table(got)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	loss.Done["a rarity"] = 1
	if short := loss.done(3); short != "1,234,567 ADD, 999 DEL, 999 outage, and 1 of 2 other kinds" {
		t.Error(short)
	}
	readme, err := Replace("before\n"+beginMark+"\nold\n"+endMark+"\nafter\n", want)
	if err != nil || readme != "before\n"+beginMark+"\n"+want+endMark+"\nafter\n" {
		t.Errorf("%v, %s", err, readme)
	}
	if _, err := Replace("before\n"+endMark, want); err == nil || !strings.Contains(err.Error(), beginMark) {
		t.Errorf("without a mark: %v", err)
	}
}

func TestBeginReadsTheEnvironment(t *testing.T) {
	for name, values := range map[string][]string{LengthEnv: {"20", "-1m", "0s", "soon"}, SeedEnv: {"-1", "x", "1.5"}} {
		for _, value := range values {
			t.Run(name+"="+value, func(t *testing.T) {
				t.Setenv(name, value)
				if _, err := Begin("leak"); err == nil || !strings.Contains(err.Error(), name) {
					t.Errorf("%v; want it to name %s", err, name)
				}
			})
		}
	}
	t.Setenv(LengthEnv, "")
	t.Setenv(SeedEnv, "")
	r, err := Begin("leak")
	if err != nil || time.Duration(r.Length) != Short || r.Seed == 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestDrawIsBySeed: the same seed, the same actions; each worker has its own.
func TestDrawIsBySeed(t *testing.T) {
	sequence := func(seed uint64, worker string) (out []int) {
		c := &campaign{Result: Result{Seed: seed}, t: t}
		r := c.random(worker)
		actions := []action{{weight: 1}, {weight: 0}, {weight: 3}}
		for range 400 {
			out = append(out, draw(actions, r).weight)
		}
		return out
	}
	first := sequence(1, "a")
	if d := cmp.Diff(first, sequence(1, "a")); d != "" {
		t.Error(d)
	}
	if cmp.Equal(first, sequence(2, "a")) || cmp.Equal(first, sequence(1, "b")) {
		t.Error("another seed, or worker, and the same actions")
	}
	count := map[int]int{}
	for _, w := range first {
		count[w]++
	}
	if count[0] > 0 || count[1] < 60 || count[3] < 240 {
		t.Errorf("drawn %v times; want one of four, none, three of four", count)
	}
}
