package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// ErrLeft says that this node's record was replaced by a tombstone while the
// helper ran: somebody wants the node out of the mesh.
var ErrLeft = errors.New("this node was removed from the mesh")

const (
	// resyncInterval is Loop.Resync where it is not set.
	resyncInterval = 10 * time.Second
	// passGap is the least time between the starts of two passes, so that a
	// storm of events costs a few passes and not one each. The first event after
	// a quiet time is served at once.
	passGap = 10 * time.Millisecond
	// retryAfter is when a pass that failed is tried again.
	retryAfter = time.Second
	// storeTimeout bounds the wait for a store that another process holds.
	storeTimeout = 5 * time.Second
)

// LoopKernel is a Kernel that tells of changes, and of the network below.
type LoopKernel interface {
	Kernel
	UnderlayKernel
	HearingKernel
	Watch(context.Context) (<-chan kernel.Event, error)
}

// Registry is where records come from and go to; a *registry.Registry.
type Registry interface {
	Publish(ctx context.Context, record registry.Record, seen uint64) error
	Snapshot(context.Context) (registry.Snapshot, error)
	Watch(context.Context) <-chan registry.Update
	SetTrust(registry.Trust)
	String() string
}

var _ Registry = (*registry.Registry)(nil)

// Loop keeps a node's kernel as planned, and its record published, for ever.
// All fields but Adopt, Report, Passed and Resync are required.
type Loop struct {
	// Load reads the configuration; it is read again at every resync, since
	// what it finds in other files (flannel's) may come later.
	Load     func() (config.Config, error)
	Key      wgtypes.Key // public
	Kernel   LoopKernel
	Registry Registry
	Resolver *Resolver
	Log      *slog.Logger
	Now      func() time.Time
	// Adopt returns the attachments that the runtime knows of. It is asked at
	// the start, and when the store had to be replaced.
	Adopt func(config.Config) ([]store.Attachment, error)
	// Report is told after every pass how things stand.
	Report func(Report)
	// Passed is told of every pass, in the loop's own time: it must not wait for
	// anything. Optional.
	Passed func(Passed)
	// Resync is how often everything is looked at although nothing has told of a
	// change, 10 s if it is zero: WireGuard's peers change without a word.
	Resync time.Duration

	config      config.Config
	trust       registry.Trust
	pairs       *identity.Pairs
	known       store.Known
	saved       store.Known // what peers.db holds
	underlay    kernel.Underlay
	fresh       *registry.Snapshot // what the registry said last; nil before its first word
	away        error              // why the registry cannot be read, nil if it can
	awaySince   time.Time
	observed    *mesh.State // what the kernel holds as far as is known; nil: ask it
	planned     *mesh.State // the last plan that was carried out; nil before there is one
	moved       map[wgtypes.Key]bool
	joined      bool             // our record was in the registry at some time of this run
	failing     string           // what the last pass failed with
	unpublished string           // what the last attempt to publish failed with
	refusals    refusals         // of the registry's last word
	rival       bool             // somebody else publishes under our name
	outcast     bool             // our key is revoked, and that was said
	pods        []mesh.Pod       // attached to this node, as of the last pass
	published   *registry.Record // what was published since the registry's last word
	heard       bool             // the registry has told something since our record was last offered
	offered     uint64           // the latest revision of our record that was offered in this run
	publisher   *publisher
	held        []mesh.Claim // single pods, as the registry has them of us
	telling     bool
	told        *Announced // what the plugin was told last

	unpublishedSince time.Time
	secretsError     string // why the secrets could not be read again
	fragments        string // why full-size packets leave in fragments
	forwarding       string // why packets of others are lost here
	unfit            string // the pods' links that could not be given the tunnel's MTU

	calls          calls // of the plain machines that enter by this node
	unreached      unreached
	nodesUnreached []Unreached // as of the last look at the kernel
	liveness       *liveness
}

// Run keeps at it until ctx ends. It then leaves the kernel as it is: traffic
// goes on. The error is nil, or ErrLeft, or says why it could not begin.
func (l *Loop) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := l.begin(ctx); err != nil {
		return err
	}
	if err := l.beginTelling(); err != nil {
		return err
	}
	kernelEvents, err := l.Kernel.Watch(ctx)
	if err != nil {
		return err
	}
	storeEvents := watchStore(ctx, l.config.RunDir, l.Log)
	updates := l.Registry.Watch(ctx)
	resolved := make(chan struct{}, 1)
	l.Resolver.Changed = func() { poke(resolved) }
	l.publisher = newPublisher(ctx, l.Registry)
	resync := time.NewTicker(cmp.Or(l.Resync, resyncInterval))
	defer resync.Stop()
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	wake := time.NewTimer(0) // the first pass is due at once
	due, last := true, time.Time{}

	for {
		select {
		case <-ctx.Done():
			l.publisher.wait()
			return nil
		case e, ok := <-kernelEvents:
			if !ok {
				if ctx.Err() == nil {
					return errors.New("the kernel's notifications ended")
				}
				kernelEvents = nil
			}
			if e.Ours {
				l.observed = nil
			}
			if e.Underlay && !l.lookBelow() && !e.Ours {
				continue
			}
		case <-storeEvents:
			if l.config.PodCIDRsLater { // a pod has its address: they can be had by now
				l.resync(ctx)
			}
			if !l.podsChanged(ctx) {
				continue
			}
		case <-resolved:
		case u, ok := <-updates:
			if ok { // closed when ctx ends
				l.hear(u)
			}
		case result := <-l.publisher.results:
			l.hearPublished(result)
			l.tell()
		case <-resync.C:
			l.resync(ctx)
		case <-look.C:
			if !l.listen() {
				continue
			}
		case <-wake.C:
			due = false
			last = l.Now()
			if _, err := l.pass(ctx); errors.Is(err, ErrLeft) {
				return err
			} else if err != nil {
				due = true
				wake.Reset(retryAfter)
			} else if d := l.settling(last); d > 0 {
				due = true
				wake.Reset(d)
			}
			continue
		}
		if !due || l.Now().Sub(last) > passGap {
			due = true
			wake.Reset(max(passGap-l.Now().Sub(last), 0))
		}
	}
}

// Once does a single pass, after asking the registry once, and returns what it
// did. Where publish is false only the kernel is touched: a running helper does
// the rest.
func (l *Loop) Once(ctx context.Context, publish bool) (Outcome, error) {
	if err := l.begin(ctx); err != nil {
		return Outcome{}, err
	}
	l.publisher = &publisher{wake: make(chan struct{}, 1)}
	if publish {
		snapshot, err := l.Registry.Snapshot(ctx)
		l.hear(registry.Update{Snapshot: snapshot, Err: err})
	}
	outcome, err := l.pass(ctx)
	if o := l.publisher.pending(); publish && o != nil {
		err = errors.Join(err, l.Registry.Publish(ctx, o.record, o.seen))
	}
	return outcome, err
}

func (l *Loop) begin(ctx context.Context) (err error) {
	if l.config, err = l.Load(); err != nil {
		return err
	}
	opening, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	known, damaged, err := store.LoadKnown(opening, l.config.StateDir)
	if err != nil {
		return err
	}
	if damaged != nil {
		l.Log.Warn(damaged.Error(), "mend", "nothing to do: it is filled again from the registry")
	}
	l.known, l.saved = known.Clone(), known
	if l.known.Records.Nodes == nil {
		l.known.Records = registry.NewSnapshot()
	}
	l.liveness = newLiveness(l.known.Self.Silent)
	if !l.lookBelow() && l.underlay.MTU == 0 && l.config.Endpoint == "" {
		l.Log.Warn("no default route: this node has no address that others could reach it at", "mend", "set \"endpoint\", unless it lies behind NAT")
	}
	for _, p := range l.config.PodCIDRs {
		if !slices.ContainsFunc(l.config.Bounds().Claimable(), func(q netip.Prefix) bool { return q.Overlaps(p) && q.Bits() <= p.Bits() }) {
			l.Log.Warn("a range of this node's pods is inside neither clusterCIDRs nor externalCIDRs: its traffic is not encrypted", "range", p, "mend", "add it to clusterCIDRs on every node")
		}
	}
	if err := l.readSecrets(); err != nil {
		return err
	}
	l.sweep(ctx)
	return nil
}

// readSecrets reads the cluster's secrets, and where they or what they are good
// for have changed looks at every record anew, at those of the disk too.
func (l *Loop) readSecrets() error {
	trust, err := ReadTrust(l.config)
	if err != nil {
		return err
	}
	if l.pairs != nil && trust.Equal(l.trust) {
		return nil
	}
	l.trust, l.pairs = trust, identity.NewPairs(l.Key, trust.Secrets)
	l.Registry.SetTrust(trust)
	for name, r := range l.known.Records.Nodes {
		if err := trust.Check(*r); err != nil {
			delete(l.known.Records.Nodes, name)
			l.Log.Warn("a record that was known is no longer trusted", "error", err)
		}
	}
	return nil
}

// PresharedKey is for kernel.Config.
func (l *Loop) PresharedKey(peer wgtypes.Key, f mesh.Fingerprint) (wgtypes.Key, error) {
	return l.pairs.Reveal(peer, f)
}

// lookBelow reads the underlay and reports whether it has changed.
func (l *Loop) lookBelow() bool {
	u, err := Underlay(l.Kernel, l.config)
	if err != nil {
		l.Log.Warn("cannot read the underlay", "error", err)
		return false
	}
	if len(u.All) == 0 && len(l.underlay.All) != 0 {
		return false // a default route that is gone for a moment moves no node
	}
	changed := fmt.Sprint(u) != fmt.Sprint(l.underlay)
	l.underlay = u
	return changed
}

// hear takes in what the registry says.
func (l *Loop) hear(u registry.Update) {
	l.heard = true
	if u.Err != nil {
		if l.away == nil {
			l.awaySince = l.Now()
		}
		l.away = u.Err
		// Whatever it had of us may be gone: our record is offered until it is taken.
		l.fresh, l.published = &registry.Snapshot{}, nil
		l.Log.Warn("registry cannot be read; going on with what is known", "registry", l.Registry.String(), "error", u.Err)
		return
	}
	if l.away != nil {
		l.Log.Info("registry can be read again", "registry", l.Registry.String())
		l.away = nil
	}
	merged, stale := registry.Merge(l.known.Records, u.Snapshot)
	news := l.refusals.hear(l.config.NodeName, u.Snapshot.Invalid, stale, l.Now())
	for _, r := range news[:min(len(news), manyRefused)] {
		l.Log.Warn("record refused", "node", r.Node, "kind", r.Kind, "error", r.Reason)
	}
	if more := len(news) - manyRefused; more > 0 {
		l.Log.Warn("more records refused", "records", more, "mend", "`wgcnid nodes` lists all")
	}
	l.known.Records, l.fresh, l.published = merged, &u.Snapshot, nil
	if ours, _ := merged.Record(l.config.NodeName); ours.Left && !l.joined && ours.Revision > l.known.Self.Revision {
		// We were forgotten while we were away, and may have lost our prefixes to
		// others. Joining again begins anew.
		l.known.Self = ours
	}
}

// resync looks at everything anew.
func (l *Loop) resync(ctx context.Context) {
	l.observed = nil
	if c, err := l.Load(); err != nil {
		l.Log.Warn("configuration cannot be read; going on with the last one", "error", err)
	} else {
		c.RunDir, c.StateDir = l.config.RunDir, l.config.StateDir // they need a restart
		l.config = c
	}
	if err := l.readSecrets(); err != nil {
		if l.secretsError != err.Error() { // else it would be said at every resync
			l.Log.Error("the cluster's secrets cannot be read; going on with the last ones", "error", err)
		}
		l.secretsError = err.Error()
	} else {
		l.secretsError = ""
	}
	l.lookBelow()
	l.sweep(ctx)
}

// pass makes the kernel, the disk and the registry agree with what is known.
func (l *Loop) pass(ctx context.Context) (Outcome, error) {
	now := l.Now()
	if l.removed() {
		return Outcome{}, ErrLeft
	}
	l.resolveEndpoints(ctx, now)
	l.describeSelf(now)
	l.known.MTU = FindMTU(l.config, l.underlay, l.known.Self, l.known.Records)
	l.warnOfFragments()
	l.warnOfForwarding()
	// Others hear of our pods while we work: the verbs have applied here what
	// concerns the pods themselves.
	l.announce(now)

	l.adoptIfNew(ctx)
	look := mesh.Context{Now: now, Moved: l.moved}
	o, err := Pass{
		Config: l.config, Kernel: l.Kernel, Known: l.known, Key: l.Key, Pairs: l.pairs, Observed: l.observed, Context: look,
	}.Run(ctx)
	if l.observed == nil && err == nil {
		l.lookForNodes(o, now)
	}
	if err == nil || err.Error() != l.failing { // else they would be said every second
		l.logOps(o.Ops)
	}
	mended := 0
	if err != nil {
		l.observed = nil
		if text := err.Error(); text != l.failing {
			l.Log.Error("pass failed; trying again every second", "error", err)
			l.failing = text
		}
	} else {
		l.failing = ""
		if l.observed == nil {
			mended = repairs(l.planned, o, look)
		}
		plan := o.Plan.State // a pointer into the outcome would keep all of it
		l.observed, l.planned, l.moved = &plan, &plan, nil
		l.pods = store.Pods(o.Pods)
		l.describeSelf(now)
	}
	l.logLinks(o)
	l.announce(now)
	l.tell()
	l.save(ctx)
	l.report(o, err, mended)
	return o, err
}

func (l *Loop) describeSelf(now time.Time) {
	carried := l.carried(l.known.Self.Pods, now)
	l.logCarried(l.entered(), carried)
	l.known.Self = SelfRecord(l.config, l.Key, l.underlay, l.pods, Rivals(l.known.Records, l.config.NodeName), l.known.Self, now)
	l.known.Self.Pods = append(l.known.Self.Pods, carried...)
	if l.config.Role == mesh.RoleGateway {
		l.known.Self.Silent = l.liveness.silences()
	}
}

func (l *Loop) resolveEndpoints(ctx context.Context, now time.Time) {
	resolved := make(map[string]netip.AddrPort, len(l.known.Endpoints))
	for name, r := range l.known.Records.Nodes {
		if r.Left || name == l.config.NodeName {
			continue
		}
		before := l.known.Endpoints[name]
		e := l.Resolver.Endpoint(ctx, *r, l.underlay.Addresses, before, now)
		if !e.IsValid() {
			continue
		}
		resolved[name] = e
		if before.IsValid() && before != e {
			if l.moved == nil {
				l.moved = map[wgtypes.Key]bool{}
			}
			l.moved[r.PublicKey] = true
		}
	}
	l.known.Endpoints = resolved
}

// save writes what has changed to the disk. It comes after the kernel: traffic
// does not wait for a disk.
func (l *Loop) save(ctx context.Context) {
	if l.known.Equal(l.saved) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := store.SaveKnown(ctx, l.config.StateDir, l.saved, l.known); err != nil {
		l.Log.Error("cannot save what is known of the mesh; after a reboot this node would need the registry", "error", err)
		return
	}
	l.saved = l.known.Clone()
}
