package operate

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/test/cluster"
)

// While nothing changes nothing is logged, however often everything is looked at;
// what changes is one line; and a line has the same keys in both formats.
func TestAQuietNodeLogsNothing(t *testing.T) {
	c := cluster.NewT(t, 2)
	formats := []string{"text", "json"}
	var helpers []*cluster.Process
	for i, n := range c.Nodes {
		if err := n.Configure(cluster.NetworkOptions{}); err != nil {
			t.Fatal(err)
		}
		h, err := n.Start(filepath.Join(c.BinDir, "wgcnid"), "run", "--log", formats[i], "--resync", "100ms")
		if err != nil {
			t.Fatal(err)
		}
		helpers = append(helpers, h)
	}
	if err := c.AwaitConverged(t.Context()); err != nil {
		t.Fatal(err)
	}
	resyncs := func(n *cluster.Node, times int) {
		t.Helper()
		var last time.Time
		seen := -1
		err := cluster.Poll(t.Context(), fmt.Sprintf("%d passes of %s", times, n.Name), func() error {
			var report struct{ At time.Time }
			text, err := n.ReadFile("/run/wgcni/helper.json")
			if err != nil {
				return err
			}
			if err := json.Unmarshal([]byte(text), &report); err != nil {
				return err
			}
			if report.At.After(last) {
				last = report.At
				seen++
			}
			if seen < times {
				return fmt.Errorf("%d", seen)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range c.Nodes { // each hears of the other's record, and of its own
		resyncs(n, 3)
	}
	before := []string{helpers[0].Log.String(), helpers[1].Log.String()}
	for _, n := range c.Nodes {
		resyncs(n, 10)
	}
	for i, h := range helpers {
		if more := strings.TrimPrefix(h.Log.String(), before[i]); more != "" {
			t.Errorf("%s says, while nothing happens:\n%s", c.Nodes[i].Name, more)
		}
	}
	// Now something does: somebody takes the route away.
	for _, n := range c.Nodes {
		if _, err := n.Run(t.Context(), "ip", "route", "flush", "table", "30567"); err != nil {
			t.Fatal(err)
		}
	}
	for i, h := range helpers {
		if err := cluster.Poll(t.Context(), "the repair to be logged", func() error {
			if more := strings.TrimPrefix(h.Log.String(), before[i]); strings.Count(more, "ip route replace") != 3 || strings.Count(more, "\n") != 3 {
				return fmt.Errorf("it says %q", more)
			}
			return nil
		}); err != nil {
			t.Errorf("%s: %v", c.Nodes[i].Name, err)
		}
		if err := h.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	text, asJSON := textKeys(helpers[0].Log.String()), jsonKeys(t, helpers[1].Log.String())
	for _, want := range []string{"starting", "apply", "stopping; traffic goes on"} {
		if len(text[want]) < 3 || len(asJSON[want]) < 3 {
			t.Errorf("a line %q has the keys %q and %q", want, text[want], asJSON[want])
		}
	}
	for msg, keys := range text {
		if other, both := asJSON[msg]; both {
			if diff := cmp.Diff(keys, other); diff != "" {
				t.Errorf("%s (-text +json):\n%s", msg, diff)
			}
		}
	}
}

var textKey = regexp.MustCompile(`(?:^| )([A-Za-z]+)=("(?:[^"\\]|\\.)*"|\S*)`)

// textKeys are the keys of each message, in order.
func textKeys(log string) map[string][]string {
	out := map[string][]string{}
	for line := range strings.Lines(log) {
		var keys []string
		msg := ""
		for _, m := range textKey.FindAllStringSubmatch(strings.TrimSpace(line), -1) {
			if keys = append(keys, m[1]); m[1] == "msg" {
				msg = strings.Trim(m[2], `"`)
			}
		}
		slices.Sort(keys)
		out[msg] = keys
	}
	return out
}

func jsonKeys(t *testing.T, log string) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for line := range strings.Lines(log) {
		fields := map[string]any{}
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Errorf("not one object a line: %v: %s", err, line)
			continue
		}
		msg, _ := fields["msg"].(string)
		out[msg] = slices.Sorted(maps.Keys(fields))
	}
	return out
}
