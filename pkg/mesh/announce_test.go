package mesh_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// attached are pods that were attached at(since).
func attached(since int, addresses ...string) (pods []mesh.Pod) {
	for _, a := range addrs(addresses...) {
		pods = append(pods, mesh.Pod{Addr: a, Since: at(since)})
	}
	return pods
}

func TestAnnounce(t *testing.T) {
	cluster, own := prefixes("10.244.0.0/16", "fd00::/16"), prefixes("10.244.1.0/24")
	plus := slices.Concat[[]mesh.Claim]
	for _, tt := range []struct {
		name   string
		pods   []mesh.Pod
		before []mesh.Claim
		rivals []mesh.Claim
		want   []mesh.Claim
	}{
		{"inside the prefix", attached(1, "10.244.1.9"), nil, nil, nil},
		{"outside of the cluster", attached(1, "192.168.0.9"), nil, nil, nil},
		{
			"merged, as new as the newest", slices.Concat(attached(1, "10.244.9.5"), attached(3, "10.244.9.4"), attached(2, "10.244.9.8")),
			nil, nil, plus(claims(3, "10.244.9.4/31"), claims(2, "10.244.9.8/32")),
		},
		{
			"IPv4 in IPv6, and twice", slices.Concat(attached(1, "::ffff:10.244.9.4", "fd00:8::1"), attached(4, "10.244.9.4")), nil, nil,
			plus(claims(4, "10.244.9.4/32"), claims(1, "fd00:8::1/128")),
		},
		{
			"one left the group", attached(1, "10.244.9.5"), claims(3, "10.244.9.4/31"), nil,
			claims(1, "10.244.9.5/32"),
		},
		{
			"what is contested stays single, with its own time", slices.Concat(attached(1, "10.244.9.5"), attached(3, "10.244.9.4")),
			claims(3, "10.244.9.4/31"), claims(2, "10.244.9.5/32"),
			plus(claims(3, "10.244.9.4/32"), claims(1, "10.244.9.5/32")),
		},
		{
			"contested by a merged claim", attached(1, "10.244.9.4", "10.244.9.5"), claims(1, "10.244.9.4/31"), claims(9, "10.244.9.0/29"),
			claims(1, "10.244.9.4/32", "10.244.9.5/32"),
		},
		{"back in the own prefix, while another still claims it", attached(8, "10.244.1.9"), nil, claims(7, "10.244.1.9/32"), claims(8, "10.244.1.9/32")},
		{"not known since when", attached(-1, "10.244.9.4"), nil, nil, claims(9, "10.244.9.4/32")},
		{"not known since when, announced before", attached(-1, "10.244.9.4"), claims(2, "10.244.9.4/31"), nil, claims(2, "10.244.9.4/32")},
		{"not known since when, and contested", attached(-1, "10.244.9.4"), nil, claims(5, "10.244.9.4/32"), []mesh.Claim{{Prefix: prefixes("10.244.9.4/32")[0], Since: at(5).Add(-time.Millisecond)}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for i := range tt.pods {
				if tt.pods[i].Since.Equal(at(-1)) {
					tt.pods[i].Since = time.Time{}
				}
			}
			a := mesh.Announcement{Prefixes: own, ClusterCIDRs: cluster, Pods: tt.pods, Before: mesh.Node{Pods: tt.before}, Rivals: slices.Values(tt.rivals)}
			_, got := mesh.Announce(a, at(9))
			if diff := cmp.Diff(tt.want, got, byEqual); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			a.Before.Pods = got
			if _, again := mesh.Announce(a, at(10)); cmp.Diff(got, again, byEqual) != "" {
				t.Errorf("announced again (-want +got):\n%s", cmp.Diff(got, again, byEqual))
			}
		})
	}
}

// The order of the own prefixes stays: the first of a family has the tunnel address.
func TestAnnouncePrefixes(t *testing.T) {
	a := mesh.Announcement{
		Prefixes:     prefixes("10.244.7.3/24", "192.168.0.0/24", "10.244.1.0/24", "10.244.7.0/24", "fd00:7::/64"),
		ClusterCIDRs: prefixes("10.244.0.0/16", "fd00::/16"), Before: mesh.Node{Prefixes: claims(1, "10.244.1.0/24")},
	}
	own, _ := mesh.Announce(a, at(9))
	want := slices.Concat(claims(9, "10.244.7.0/24"), claims(1, "10.244.1.0/24"), claims(9, "fd00:7::/64"))
	if diff := cmp.Diff(want, own, byEqual); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A pod that has just come is newer than the claim of the node that it left, whose
// clock may be ahead; one that has left for there is not, however late its DEL.
func TestAnnounceAgainstClocks(t *testing.T) {
	now := at(9)
	ahead := []mesh.Claim{{Prefix: prefixes("10.244.9.4/32")[0], Since: now.Add(20 * time.Second)}}
	pod := mesh.Pod{Addr: addr("10.244.9.4"), Since: now.Add(-time.Second)}
	a := mesh.Announcement{Prefixes: prefixes("10.244.1.0/24"), ClusterCIDRs: prefixes("10.244.0.0/16"), Pods: []mesh.Pod{pod}, Rivals: slices.Values(ahead)}
	_, arrived := mesh.Announce(a, now)
	if len(arrived) != 1 || !arrived[0].Since.After(ahead[0].Since) {
		t.Fatalf("a pod that has just come: %v, the other has it since %v", arrived, ahead[0].Since)
	}
	a.Before.Pods = arrived
	ahead[0].Since = arrived[0].Since.Add(time.Second) // it went back there
	if _, left := mesh.Announce(a, now.Add(time.Second)); len(left) != 1 || !left[0].Since.Equal(arrived[0].Since) {
		t.Errorf("a pod that has left: %v, want the claim to keep its time %v", left, arrived[0].Since)
	}
	a.Before.Pods = claims(9, "10.244.9.4/31")
	if _, left := mesh.Announce(a, now.Add(time.Second)); len(left) != 1 || !left[0].Since.Equal(pod.Since) {
		t.Errorf("a pod of a group that has left: %v, want its own time %v", left, pod.Since)
	}
	a.Before.Pods = nil
	if _, late := mesh.Announce(a, now.Add(time.Hour)); len(late) != 1 || !late[0].Since.Equal(pod.Since) {
		t.Errorf("a pod of an hour ago that was never announced: %v, want its own time %v", late, pod.Since)
	}
}

// What a node announces covers exactly its pods, and announcing it again changes nothing.
func TestAnnounceRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	cluster, own := prefixes("10.1.2.192/26"), prefixes("10.1.2.224/29")
	var before mesh.Node
	for i := range 500 {
		var pods []mesh.Pod
		var rivals []mesh.Claim
		contested := map[netip.Addr]bool{}
		for range rng.IntN(4) {
			p := randomPrefix(rng, bases[0])
			rivals = append(rivals, mesh.Claim{Prefix: p.Masked(), Since: at(i - rng.IntN(9))})
			for a := range cover([]netip.Prefix{p}) {
				contested[a] = true
			}
		}
		want := map[netip.Addr]bool{}
		for range rng.IntN(20) {
			p := mesh.Pod{Addr: randomPrefix(rng, bases[0]).Addr(), Since: at(i - rng.IntN(9))}
			pods = append(pods, p)
			if !own[0].Contains(p.Addr) || contested[p.Addr] {
				want[p.Addr] = true
			}
		}
		a := mesh.Announcement{Prefixes: own, ClusterCIDRs: cluster, Pods: pods, Before: before, Rivals: slices.Values(rivals)}
		gotOwn, single := mesh.Announce(a, at(i))
		var got []netip.Prefix
		for _, c := range single {
			got = append(got, c.Prefix)
			if contested[c.Prefix.Addr()] && !c.Prefix.IsSingleIP() {
				t.Fatalf("contested, and merged: %v", c)
			}
		}
		if diff := cmp.Diff(want, cover(got), byEqual); diff != "" {
			t.Fatalf("pods %v (-want +got):\n%s", pods, diff)
		}
		before.Prefixes, before.Pods = gotOwn, single
		a.Before = before
		if _, again := mesh.Announce(a, at(i+1)); cmp.Diff(single, again, byEqual) != "" {
			t.Fatalf("announced again (-want +got):\n%s", cmp.Diff(single, again, byEqual))
		}
	}
}
