package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

func keyRotateCommand(o *options) *cobra.Command {
	var order identity.Order
	var noWait bool
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace this node's key, or those of all nodes",
		Long: `Replace this node's key by a new one, without losing a packet, and show how far it
is. The helper does it: when this command is ended, it goes on.

With --cluster every node replaces its key; each does it on its own.

A rotation waits for nodes that do not answer on its second port: they run an older
version, the port is not open, or wgcnid does not run there. --force does so no
longer: the tunnels with those nodes break when the key goes, until they have read
the new one from the registry. A machine that runs nothing but WireGuard has the key
in its file, and never follows: give it a new file (` + "`wgcnid peer config`" + `) after
--force.`,
		Example: "  wgcnid key rotate\n  wgcnid key rotate --cluster\n  wgcnid key rotate --no-wait && wgcnid key show\n  wgcnid key rotate --force   # what has not followed by now is cut off for a while",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			order.At = time.Now()
			return rotate(cmd.Context(), cmd.OutOrStdout(), c, order, noWait)
		},
	}
	cmd.Flags().BoolVar(&order.Cluster, "cluster", false, "have every node replace its key")
	cmd.Flags().BoolVar(&order.Force, "force", false, "wait for nobody any more: what has not moved breaks until it knows the new key")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "give the order, and do not wait until it is done")
	return cmd
}

// rotate gives the order and watches it being carried out.
func rotate(ctx context.Context, w io.Writer, c config.Config, order identity.Order, noWait bool) error {
	if c.SparePort == 0 {
		return errors.New("there is no \"rotationPort\", without which no key is replaced")
	}
	before, err := identity.LoadKeys(c.StateDir)
	if err != nil {
		return err
	}
	records, err := knownRecords(ctx, c)
	if err != nil {
		return err
	}
	say := func(format string, args ...any) { fmt.Fprintln(w, printable(fmt.Sprintf(format, args...))) }
	if note := plainNote(c, records, order); note != "" {
		say("%s", note)
	}
	if before.Stage != mesh.Resting {
		say("A rotation is going on already, ordered at %s.", localTime(before.Answered))
	}
	// One that is going on is not to be followed by another.
	if before.Stage == mesh.Resting || order.Cluster || order.Force {
		if err := identity.WriteOrder(c.StateDir, order); err != nil {
			return err
		}
	}
	switch alive := reconcile.HelperAlive(c.RunDir); {
	case noWait && alive:
		say("Ordered; `wgcnid key show` tells how far it is.")
		return nil
	case noWait:
		say("Ordered; wgcnid does not run on this node, and begins when it does.")
		return nil
	case !alive:
		return errors.New("wgcnid does not run on this node: the order is kept, and carried out when it runs: `systemctl start wgcnid`")
	}
	p := progress{config: c, before: before, keys: map[string]wgtypes.Key{}, order: order, say: say, started: time.Now()}
	for _, r := range records.Records() {
		p.keys[r.Name] = r.PublicKey
	}
	return p.watch(ctx)
}

func knownRecords(ctx context.Context, c config.Config) (registry.Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	known, _, err := store.LoadKnown(ctx, c.StateDir)
	return known.Records, err
}

// plainNote says which machines have the key in their files; "" if there are none.
func plainNote(c config.Config, records registry.Snapshot, order identity.Order) string {
	var machines []string
	for _, r := range records.Records() {
		if r.Enters(c.NodeName) || order.Cluster && !r.Left && len(r.Via) > 0 {
			machines = append(machines, r.Name)
		}
	}
	whose := "this node's key"
	if order.Cluster {
		whose = "nodes' keys"
	}
	switch {
	case len(machines) == 0:
		return ""
	case order.Force:
		return fmt.Sprintf("Plain machines know %s from their files, and are cut off by this until they have new ones: %s. Afterwards: `wgcnid peer config %s`.", whose, names(machines), machines[0])
	}
	return fmt.Sprintf("Plain machines know %s from their files, and hold the rotation until `wgcnid key rotate --force`: %s. After that each needs a new file: `wgcnid peer config %s`.",
		whose, names(machines), machines[0])
}

// progress follows an order.
type progress struct {
	config  config.Config
	before  identity.Keys          // when it was given
	keys    map[string]wgtypes.Key // of the others, then
	order   identity.Order
	say     func(format string, args ...any)
	started time.Time

	said    string    // last
	absent  time.Time // since when the helper is; zero: it is there
	own     bool      // this node is done
	wavered bool      // it has been said that nothing begins
}

const (
	progressPause = 200 * time.Millisecond
	// absentPatience is what a helper that is started anew takes, and more.
	absentPatience = 10 * time.Second
	// beginPatience is for an order that the helper has taken to show.
	beginPatience = 10 * time.Second
)

// watch tells what changes until all is done.
func (p *progress) watch(ctx context.Context) error {
	for {
		done, err := p.look(ctx, time.Now())
		if done || err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.New("no longer waiting: the rotation goes on; `wgcnid key show` tells how far it is")
		case <-time.After(progressPause):
		}
	}
}

// look says what is new, and whether all is done.
func (p *progress) look(ctx context.Context, now time.Time) (done bool, err error) {
	keys, err := identity.LoadKeys(p.config.StateDir)
	if err != nil {
		return false, err
	}
	switch {
	case reconcile.HelperAlive(p.config.RunDir):
		p.absent = time.Time{}
	case p.absent.IsZero():
		p.absent = now
	case now.Sub(p.absent) > absentPatience:
		return false, errors.New("wgcnid has ended on this node: the rotation goes on when it runs again: `systemctl start wgcnid`")
	}
	if !p.own && p.replaced(keys) {
		p.own = true
		p.news(fmt.Sprintf("Done: this node's key is %s now, after %s.", keys.Current, now.Sub(p.started).Round(100*time.Millisecond)))
	}
	switch {
	case p.own && !p.order.Cluster:
		return true, nil
	case p.own:
		return p.others(ctx)
	case keys.Stage != mesh.Resting:
		report := &reconcile.RotationReport{}
		if r, err := readReport(p.config.RunDir); err == nil && r.Rotation != nil {
			report = r.Rotation
		}
		if report.Stage == keys.Stage { // else it is of before
			p.news(upper(rotationNote(report)) + ".")
		}
	case now.Sub(p.started) > beginPatience && !p.wavered && !identity.Ordered(p.config.StateDir):
		p.wavered = true
		p.news("wgcnid has taken the order, and has not begun yet: its log says why.")
	}
	return false, nil
}

// replaced reports whether the rotation that was ordered, or was going on, has
// come to its end.
func (p *progress) replaced(keys identity.Keys) bool {
	if keys.Stage != mesh.Resting {
		return false
	}
	return p.before.Stage == mesh.Back || keys.Current != p.before.Current
}

// others says how many nodes have done it.
func (p *progress) others(ctx context.Context) (done bool, err error) {
	records, err := knownRecords(ctx, p.config)
	if err != nil {
		return false, err
	}
	var waiting, never []string
	done, all := true, 0
	for _, r := range records.Records() {
		switch {
		case r.Left || r.Name == p.config.NodeName || !runsWgcnid(p.config, r):
			continue
		case !rotates(r):
			never = append(never, r.Name)
			continue
		case r.Stage != mesh.Resting || r.PublicKey == p.keys[r.Name]: // its clock may be wrong
			waiting = append(waiting, r.Name)
			done = false
		}
		all++
	}
	text := fmt.Sprintf("%d of %d other nodes have a new key", all-len(waiting), all)
	if len(waiting) > 0 {
		text += "; not yet: " + few(waiting, "")
	}
	if len(never) > 0 {
		text += "; their version rotates no keys: " + few(never, "")
	}
	p.news(text + ".")
	return done, nil
}

// news prints a line that differs from the last.
func (p *progress) news(line string) {
	if line != p.said {
		p.say("%s", line)
	}
	p.said = line
}

func upper(s string) string {
	if s == "" {
		return s
	}
	return string(s[0]-'a'+'A') + s[1:]
}
