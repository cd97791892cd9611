package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/wgcni/wgcni/test/cluster"
	"github.com/wgcni/wgcni/test/matrix"
)

// refusedCells are primaries whose pods' packets never come through the node's
// routing: unencrypted in silence, if they were let pass.
func (b *bed) refusedCells() (cells []cell) {
	for _, kind := range []string{"macvlan", "ipvlan", "host-device"} {
		for _, f := range families {
			cells = append(cells, cell{
				matrix.Cell{Table: matrix.Primaries, Row: kind, Detail: "host-local", Column: string(f), Outcome: matrix.Refused},
				func(ctx context.Context) error { return b.runRefused(ctx, kind, f) },
			})
		}
	}
	return cells
}

func (b *bed) runRefused(ctx context.Context, kind string, f family) (err error) {
	n := b.Nodes[0]
	// host-device moves an interface of the node; of those that are no end of a veth
	// every kernel here has macvlan.
	driver := kind
	if kind == "host-device" {
		driver = "macvlan"
	}
	if out, err := n.Run(ctx, "ip", "link", "add", "spare0", "link", "eth0", "type", driver); err != nil {
		if strings.Contains(out, "Unknown device type") || strings.Contains(out, "not supported") {
			return fmt.Errorf("%w: %w", errImpossible, err)
		}
		return err
	}
	defer func() {
		_, derr := n.Run(context.WithoutCancel(ctx), "ip", "link", "delete", "spare0")
		err = errors.Join(err, derr)
	}()
	o := network{primary: func(n *cluster.Node, f family) map[string]any {
		p := map[string]any{"type": kind, "master": "eth0", "ipam": hostLocal(n, f)}
		if kind == "host-device" {
			delete(p, "master")
			p["device"] = "spare0"
		}
		return p
	}}
	if err := b.configure(ctx, o, f); err != nil {
		return err
	}
	// AddPod does what a runtime does after an ADD that failed: DEL.
	p, err := n.AddPod(ctx, cluster.NetworkName, "refused", cluster.PodOptions{Sysctls: noDAD})
	if err == nil {
		return errors.Join(fmt.Errorf("%s was not refused", kind), p.Delete(ctx))
	}
	for _, want := range []string{"bypass", "chain wgcni after", "such as bridge or ptp"} {
		if !strings.Contains(err.Error(), want) {
			return fmt.Errorf("the error does not say %q: %w", want, err)
		}
	}
	if strings.Contains(err.Error(), "delete pod") {
		return fmt.Errorf("DEL after the refused ADD: %w", err)
	}
	return b.awaitNothingLeft(ctx, []*cluster.Pod{{Netns: cluster.NetnsPath("refused")}})
}
