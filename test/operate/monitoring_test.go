package operate

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
)

const monitoring = "../../conflist/monitoring"

func promtool(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "promtool", args...)
	cmd.Dir = monitoring
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %v: %v\n%s", args, err, out)
	}
}

// The alerts say what they should, when they should, and each is tested.
func TestAlerts(t *testing.T) {
	promtool(t, "check", "rules", "alerts.yml")
	promtool(t, "test", "rules", "alerts_test.yml")
	alerts, tests := read(t, "alerts.yml"), read(t, "alerts_test.yml")
	names := regexp.MustCompile(`(?m)- alert: (\w+)$`).FindAllStringSubmatch(alerts, -1)
	if len(names) < 10 {
		t.Errorf("%d alerts", len(names))
	}
	for _, n := range names {
		if !strings.Contains(tests, fmt.Sprintf(`ALERTS{alertname=%q, alertstate="firing"`, n[1])) {
			t.Errorf("no test has %s fire", n[1])
		}
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(monitoring, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// panel is as much of Grafana's as is looked at.
type panel struct {
	ID         int
	Type       string
	Title      string
	Datasource struct{ UID string }
	GridPos    struct{ X, Y, W, H int }
	Targets    []struct{ RefID, Expr string }
}

func dashboard(t *testing.T) (panels []panel) {
	t.Helper()
	var d struct {
		UID, Title string
		Panels     []panel
	}
	if err := json.Unmarshal([]byte(read(t, "dashboard.json")), &d); err != nil || d.UID != "wgcni" || len(d.Panels) < 10 {
		t.Fatalf("dashboard: %v, %q, %d panels", err, d.UID, len(d.Panels))
	}
	return d.Panels
}

// Every panel of the dashboard has its place, and asks what Prometheus understands.
func TestDashboard(t *testing.T) {
	ids, taken := map[int]bool{}, map[[2]int]string{}
	var rules bytes.Buffer
	rules.WriteString("groups:\n- name: dashboard\n  rules:\n")
	for _, p := range dashboard(t) {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q", p.ID, p.Title)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other, is := taken[[2]int{x, y}]; is || x >= 24 {
					t.Fatalf("%q lies on %q, or outside", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Datasource.UID != "${datasource}" || len(p.Targets) == 0 {
			t.Errorf("%q asks %q for %d things", p.Title, p.Datasource.UID, len(p.Targets))
		}
		for _, target := range p.Targets {
			expr := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*").Replace(target.Expr)
			fmt.Fprintf(&rules, "  - {record: panel%d%s, expr: %q}\n", p.ID, target.RefID, expr)
		}
	}
	file := filepath.Join(t.TempDir(), "rules.yml")
	if err := os.WriteFile(file, rules.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}

// asked finds metrics in PromQL, with the labels that are asked of them.
var asked = regexp.MustCompile(`\b((?:wgcni|process)_[a-z_]+)(\{[^}]*\})?`)

// checkMonitoring holds the alerts and the dashboard against what a node serves:
// every metric is there, with every label.
func checkMonitoring(t *testing.T, families map[string]*dto.MetricFamily) {
	t.Helper()
	var exprs []string
	for _, m := range regexp.MustCompile(`(?s)expr: (.*?)\n        ?\w+:`).FindAllStringSubmatch(read(t, "alerts.yml"), -1) {
		exprs = append(exprs, m[1])
	}
	for _, p := range dashboard(t) {
		for _, target := range p.Targets {
			exprs = append(exprs, target.Expr)
		}
	}
	found := 0
	for _, expr := range exprs {
		for _, m := range asked.FindAllStringSubmatch(expr, -1) {
			found++
			name := m[1]
			if families[name] == nil {
				name = regexp.MustCompile(`_(bucket|count|sum)$`).ReplaceAllString(name, "")
			}
			if families[name] == nil {
				t.Errorf("%s: no node serves it", m[1])
				continue
			}
			has := map[string]bool{"instance": true, "job": true, "le": true}
			for _, series := range families[name].GetMetric() {
				for _, l := range series.GetLabel() {
					has[l.GetName()] = true
				}
			}
			for _, l := range regexp.MustCompile(`(\w+)\s*(?:=~|!=|!~|=)`).FindAllStringSubmatch(m[2], -1) {
				if !has[l[1]] {
					t.Errorf("%s has no label %s", name, l[1])
				}
			}
		}
	}
	if found < 30 {
		t.Errorf("%d metrics are asked for in %d expressions", found, len(exprs))
	}
}
