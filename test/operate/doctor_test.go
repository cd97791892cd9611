package operate

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/doctor"
	"github.com/wgcni/wgcni/test/cluster"
)

// diagnose runs the doctor on a node, and checks that its exit status says the same.
func diagnose(t *testing.T, c *cluster.Cluster, n *cluster.Node, args ...string) []doctor.Check {
	t.Helper()
	cmd := n.Command(t.Context(), filepath.Join(c.BinDir, "wgcnid"), append([]string{"doctor", "--json", "--bin-dir", c.BinDir}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var d struct {
		OK     bool           `json:"ok"`
		Checks []doctor.Check `json:"checks"`
	}
	if jerr := json.Unmarshal(out, &d); jerr != nil {
		t.Fatalf("wgcnid doctor: %v: %s\n%s", err, stderr.String(), out)
	}
	if failed := doctor.Count(d.Checks, doctor.Fail) > 0; failed != (err != nil) || failed == d.OK {
		t.Errorf("the exit status is %v, ok is %v; %s", err, d.OK, describe(d.Checks))
	}
	return d.Checks
}

func describe(checks []doctor.Check) string {
	var b strings.Builder
	for _, c := range checks {
		if c.Level != doctor.OK {
			fmt.Fprintf(&b, "\n%s %s: %s\n  mend: %s", c.Level, c.ID, c.Found, c.Mend)
		}
	}
	return b.String()
}

// healthy fails the test for every alarm.
func healthy(t *testing.T, checks []doctor.Check) {
	t.Helper()
	if len(checks) < 20 {
		t.Errorf("%d checks only", len(checks))
	}
	if doctor.Count(checks, doctor.Fail)+doctor.Count(checks, doctor.Warn) > 0 {
		t.Errorf("false alarms on a healthy node:%s", describe(checks))
	}
	for _, c := range checks {
		if c.ID == "" || c.Title == "" || c.Looked == "" || c.Found == "" {
			t.Errorf("%+v says too little", c)
		}
	}
}

func TestDoctorHealthy(t *testing.T) {
	c, _, _ := cluster.NewMeshT(t, 3, 1, cluster.NetworkOptions{})
	for _, n := range c.Nodes {
		healthy(t, diagnose(t, c, n))
	}
	out, err := c.Nodes[0].Wgcnid(t.Context(), "doctor", "--bin-dir", c.BinDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(out)
}
