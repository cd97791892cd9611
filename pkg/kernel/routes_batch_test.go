package kernel_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// The kernel refuses some of many routes: each is told of by name, wherever it
// stands, and all others are set.
func TestSomeRoutesRefused(t *testing.T) {
	const routes = 300
	for name, refuse := range map[string]func(i int) bool{
		"none":       func(int) bool { return false },
		"every 7th":  func(i int) bool { return i%7 == 0 },
		"around 64":  func(i int) bool { return i%64 == 63 || i%64 == 0 },
		"the last":   func(i int) bool { return i == routes-1 },
		"runs of 90": func(i int) bool { return i/90%2 == 0 },
		"all":        func(int) bool { return true },
	} {
		for _, family := range []string{"10.244.%d.%d/32", "fd00:244:1::%x:%x/128"} {
			t.Run(name+" "+family[:2], func(t *testing.T) { someRoutesRefused(t, routes, family, refuse) })
		}
	}
}

func someRoutesRefused(t *testing.T, routes int, family string, refuse func(i int) bool) {
	const table = 777
	k := open(t)
	apply(t, k, plan(mesh.Facts{Nodes: []mesh.Node{node(1, "10.244.1.0/24", "fd00:244:1::/64")}}))
	var ops []mesh.Op
	want := map[netip.Prefix]bool{}
	for i := range routes {
		r := mesh.Route{Prefix: netip.MustParsePrefix(fmt.Sprintf(family, 100+i/256, i%256)), Table: table, Type: mesh.ViaLink}
		if refuse(i) {
			r.Source = netip.MustParseAddr("192.0.2.77") // not one of this machine's
			if r.Prefix.Addr().Is6() {
				r.Source = netip.MustParseAddr("2001:db8::77")
			}
		} else {
			want[r.Prefix] = true
		}
		ops = append(ops, mesh.SetRoute{Route: r, Link: k.Interface})
	}
	text := ""
	if err := k.Apply(ops); err != nil {
		text = err.Error()
	}
	for _, op := range ops {
		refused := !want[op.(mesh.SetRoute).Route.Prefix]
		if named := strings.Contains(text, op.String()+": "); named != refused {
			t.Errorf("%s: named as refused: %v, want %v", op, named, refused)
		}
	}
	observed, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range observed.Routes {
		if r.Table == table && !want[r.Prefix] {
			t.Errorf("%s is there, and was to be refused", r.Prefix)
		}
		delete(want, r.Prefix)
	}
	if len(want) > 0 {
		t.Errorf("%d routes are missing", len(want))
	}
}
