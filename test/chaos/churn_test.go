package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// marker is in all that pods send: wherever it is seen on the underlay it is a leak,
// whatever the packet's addresses are.
var marker = []byte("in the clear: this must never be seen")

// sends has a pod send to wherever pods may be, until it is stopped or the test ends.
func (a *arena) sends(from cluster.Endpointer, rate int) (*cluster.Spray, error) {
	return cluster.StartSpray(from, cluster.SprayOptions{To: a.whereabouts(), Rate: rate, Payload: marker})
}

// A churn is pods on one node that come and go, at addresses that others have had.
// They send all the time: before their ADD, and after their DEL.
type churn struct {
	pods     []*cluster.BarePod
	attached []bool
	sends    []*cluster.Spray
}

// newChurn makes pods without addresses, for which nobody has called a plugin.
func (a *arena) newChurn(n *cluster.Node, pods, rate int) *churn {
	a.t.Helper()
	c := &churn{attached: make([]bool, pods)}
	for i := range pods {
		p, err := n.AddBarePod(a.t.Context(), fmt.Sprintf("bare%d", i), a.options)
		if err != nil {
			a.t.Fatal(err)
		}
		c.pods = append(c.pods, p)
		if rate == 0 {
			continue
		}
		s, err := a.sends(p, rate)
		if err != nil {
			a.t.Fatal(err)
		}
		a.t.Cleanup(func() { _ = s.Stop() })
		c.sends = append(c.sends, s)
	}
	return c
}

// call is a pod's ADD, at an address which another may have, or its DEL. Some are
// killed midway, as by a runtime that is out of patience.
func (c *churn) call(ctx context.Context, r *rand.Rand) (string, error) {
	i := r.IntN(len(c.pods))
	p := c.pods[i]
	kill, limit := r.IntN(6) == 0, time.Duration(r.IntN(30_000))*time.Microsecond
	late, spot := r.IntN(5) == 0, spots[r.IntN(len(spots))]
	verb, kind := "ADD", "ADDs"
	switch {
	case c.attached[i]:
		verb, kind = "DEL", "DELs"
	case late && len(p.Addresses()) > 0: // its address may be another's by now
		verb, kind = "DEL", "late DELs"
	default:
		if err := p.SetAddresses(spot...); err != nil {
			return "ADD", err
		}
	}
	if kill {
		kind = verb + "s killed"
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	// Whatever a killed call has done, a DEL must come.
	c.attached[i] = verb == "ADD" || kill
	return fmt.Sprintf("%s: %s %v", kind, p, p.Addresses()), p.Call(ctx, verb)
}

// settle leaves no pod whose last call was killed.
func (c *churn) settle(ctx context.Context) error {
	for i, p := range c.pods {
		if !c.attached[i] {
			continue
		}
		if err := p.Call(ctx, "DEL"); err != nil {
			return err
		}
		c.attached[i] = false
	}
	return nil
}

// guests are pods that cnitool attaches to a real bridge, and that send until they
// are gone.
type guests struct {
	arena *arena
	rate  int // 0: they are silent
	named int
	here  []guest
}

type guest struct {
	*cluster.Pod
	sends *cluster.Spray
}

const maxGuests = 6

// call has one come or go.
func (g *guests) call(ctx context.Context, r *rand.Rand) (string, error) {
	i := r.IntN(maxGuests)
	if i >= len(g.here) {
		return g.come(ctx, g.arena.Nodes[g.arena.anyNode(r)])
	}
	return g.goes(ctx, i)
}

func (g *guests) come(ctx context.Context, n *cluster.Node) (string, error) {
	g.named++
	name := fmt.Sprintf("guest%d", g.named)
	what := fmt.Sprintf("ADDs by cnitool: %s/%s", n, name)
	p, err := n.AddPod(ctx, cluster.NetworkName, name, cluster.PodOptions{})
	if err != nil {
		return what, err
	}
	one := guest{Pod: p}
	if g.rate > 0 {
		one.sends, err = g.arena.sends(p, g.rate)
	}
	g.here = append(g.here, one)
	return what, err
}

// goes deletes one in the midst of what it sends.
func (g *guests) goes(ctx context.Context, i int) (string, error) {
	p := g.here[i]
	g.here = append(g.here[:i], g.here[i+1:]...)
	err := p.Delete(ctx)
	if p.sends != nil {
		err = errors.Join(err, p.sends.Stop())
	}
	return "DELs by cnitool: " + p.String(), err
}

// settle sends all home.
func (g *guests) settle(ctx context.Context) error {
	var errs []error
	for len(g.here) > 0 {
		_, err := g.goes(ctx, 0)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
