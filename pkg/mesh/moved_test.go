package mesh_test

import (
	"slices"
	"testing"

	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// ADD x for A, ADD x for B, DEL x for A late: meanwhile A's own pods reach x at B
// as well. A node knows best where a pod is that it has not claimed yet, or claims
// by the better right.
func TestPodThatMoved(t *testing.T) {
	const pod, inside = "10.244.200.7", "10.244.1.7"
	for _, tt := range []struct {
		name   string
		ours   []mesh.Claim
		theirs []mesh.Claim
		change func(*mesh.Facts)
		pod    string
		want   string
	}{
		{"it has moved", claims(1, pod+"/32"), claims(2, pod+"/32"), nil, pod, "encrypted:k2"},
		{"it has come back", claims(3, pod+"/32"), claims(2, pod+"/32"), nil, pod, kerneltest.Plaintext},
		{"it has just come", nil, claims(2, pod+"/32"), nil, pod, kerneltest.Plaintext},
		{"into a group", claims(1, pod+"/32"), claims(2, "10.244.200.0/29"), nil, pod, "encrypted:k2"},
		{"not into an older group", claims(3, pod+"/32"), claims(2, "10.244.200.0/29"), nil, pod, kerneltest.Plaintext},
		{"out of the own prefix", claims(1, inside+"/32"), claims(2, inside+"/32"), nil, inside, "encrypted:k2"},
		{"back into the own prefix", claims(3, inside+"/32"), claims(2, inside+"/32"), nil, inside, kerneltest.Plaintext},
		{"a node without a key decides nothing", claims(1, pod+"/32"), claims(2, pod+"/32"), func(f *mesh.Facts) { f.Self.PublicKey = key(0) }, pod, kerneltest.Plaintext},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := mesh.Facts{
				Settings: settings("10.244.0.0/16"), Self: node("a", 1, "10.244.1.0/24"), Nodes: []mesh.Node{node("b", 2, "10.244.2.0/24")},
				LocalPods: addrs(tt.pod),
			}
			f.Self.Pods, f.Nodes[0].Pods = tt.ours, tt.theirs
			if tt.change != nil {
				tt.change(&f)
			}
			p := mesh.NewPlan(f)
			k := newKernel(p.State)
			if got := k.Verdict(addr("10.244.1.5"), addr(tt.pod)); got != tt.want {
				t.Errorf("%s, want %s\n%s", got, tt.want, k)
			}
			if local := slices.Contains(p.Filter.Pods, addr(tt.pod)); local != (tt.want == kerneltest.Plaintext && tt.pod == pod) {
				t.Errorf("among the filter's pods: %v", local)
			}
		})
	}
}
