package reconcile_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/kernel/kerneltest"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

func TestPodChange(t *testing.T) {
	c := testConfig(t)
	c.ClusterCIDRs = prefixes("10.244.0.0/16", "fd00:244::/48")
	own := prefixes("10.244.1.0/24", "fd00:244:0:1::/64")
	outside6 := netip.MustParseAddr("fd00:244:0:c8::7")
	for _, tt := range []struct {
		name          string
		before, after []store.Attachment
		want          string
	}{
		{"none", nil, nil, ""},
		{"inside the prefixes", nil, []store.Attachment{pod("x", addrs("10.244.1.5", "fd00:244:0:1::5")...)}, ""},
		{"outside of the cluster", nil, []store.Attachment{pod("x", addrs("172.16.0.1")...)}, ""},
		{
			"comes", nil,
			[]store.Attachment{pod("x", outsider)},
			"nft set pods: +10.244.200.7\nip route replace throw 10.244.200.7/32 table 77\n",
		},
		{
			"comes with both families",
			[]store.Attachment{pod("x", neighbour)},
			[]store.Attachment{pod("x", neighbour), pod("y", outsider, outside6)},
			"nft set pods: +10.244.200.7 +fd00:244:0:c8::7\nip route replace throw 10.244.200.7/32 table 77\nip route replace throw fd00:244:0:c8::7/128 table 77\n",
		},
		{
			"goes",
			[]store.Attachment{pod("x", outsider)},
			nil,
			"nft set pods: -10.244.200.7\nip route delete throw 10.244.200.7/32 table 77\n",
		},
		{ // containernetworking/plugins ipmasq_nftables_linux.go: ADD x for A, ADD x for B, DEL A: B keeps x
			"one of two that have the address goes",
			[]store.Attachment{pod("x", outsider), pod("y", outsider)},
			[]store.Attachment{pod("y", outsider)},
			"",
		},
		{
			"changes its address",
			[]store.Attachment{pod("x", outsider)},
			[]store.Attachment{pod("x", neighbour)},
			"nft set pods: +10.244.200.6 -10.244.200.7\nip route replace throw 10.244.200.6/32 table 77\nip route delete throw 10.244.200.7/32 table 77\n",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ops := reconcile.PodChange(c, own, tt.before, tt.after)
			if diff := cmp.Diff(tt.want, mesh.Text(ops)); diff != "" {
				t.Errorf("ops (-want +got):\n%s", diff)
			}
			for _, op := range ops {
				if !mesh.Local(op) {
					t.Errorf("not local: %s", op)
				}
			}
		})
	}
}

// What ADD does by itself is what a whole pass would do.
func TestPodChangeAgreesWithRun(t *testing.T) {
	p, k := newPass(t)
	run(t, p)
	if err := change(p.Config, k, pod("late", neighbour), true); err != nil {
		t.Fatal(err)
	}
	if err := change(p.Config, k, pod("outside"), false); err != nil {
		t.Fatal(err)
	}
	if o := run(t, p); len(o.Ops) != 0 {
		t.Errorf("the pass had more to do:\n%s", mesh.Text(o.Ops))
	}
}

// A range that this node turns out to have later (flannel writes its subnet file
// when it starts) takes over the pods that were guarded one by one. None of them
// is cut off on the way.
func TestPodsStayReachableWhenTheirRangeIsFound(t *testing.T) {
	for _, later := range []string{"found", "lost"} {
		t.Run(later, func(t *testing.T) {
			p, k := newPass(t)
			k.AddForeignRoute(mesh.Route{Prefix: netip.MustParsePrefix("10.244.200.0/24"), Table: kerneltest.MainTable}, "cni1")
			narrow, wide := p.Known.Self.Prefixes, claims(epoch, "10.244.1.0/24", "10.244.200.0/24")
			if later == "lost" {
				narrow, wide = wide, narrow
			}
			p.Known.Self.Prefixes = narrow
			run(t, p)
			p.Known.Self.Prefixes = wide
			stepwise := &steps{fakeKernel: k, after: func(op mesh.Op) {
				if got := k.Verdict(netip.MustParseAddr("192.0.2.1"), outsider); got != kerneltest.Local {
					t.Errorf("a pod of this node is %s after %s", got, op)
				}
				if s, _ := k.Kernel.Observe(); !covered(s.Filter, outsider) {
					t.Errorf("the filter would drop a pod's traffic after %s", op)
				}
			}}
			p.Kernel = stepwise
			run(t, p)
			if stepwise.n < 3 {
				t.Errorf("%d ops only", stepwise.n)
			}
		})
	}
}

func covered(f mesh.Filter, a netip.Addr) bool {
	for _, p := range f.Local {
		if p.Contains(a) {
			return true
		}
	}
	for _, p := range f.Pods {
		if p == a {
			return true
		}
	}
	return false
}

// steps applies one op at a time.
type steps struct {
	*fakeKernel
	after func(mesh.Op)
	n     int
}

func (s *steps) Apply(ops []mesh.Op) error {
	for _, op := range ops {
		if err := s.fakeKernel.Apply([]mesh.Op{op}); err != nil {
			return err
		}
		s.n++
		s.after(op)
	}
	return nil
}

// Routes of a dead process stay for ever (flannel#2554); ours do not.
func TestClear(t *testing.T) {
	p, k := newPass(t)
	k.AddForeignRoute(mesh.Route{Prefix: netip.MustParsePrefix("10.244.2.0/24"), Table: 77, Metric: 50}, "flannel.1")
	k.AddForeignRule(mesh.Rule{Priority: 100, FwMark: 0x200, Table: 2004})
	foreign := k.String()
	run(t, p)
	var log logLines
	if err := reconcile.Clear(k, log.logger()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(foreign, k.String()); diff != "" {
		t.Errorf("kernel (-want +got):\n%s", diff)
	}
	if log.count("apply") == 0 {
		t.Error("what was removed is not logged")
	}
	if err := reconcile.Clear(k, log.logger()); err != nil {
		t.Errorf("once more: %v", err)
	}
}
