package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"os"
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
// All fields but Adopt, Lock, Report, Passed and Resync are required.
type Loop struct {
	// Load reads the configuration; it is read again at every resync, since
	// what it finds in other files (flannel's) may come later.
	Load     func() (config.Config, error)
	Keys     identity.Keys // which it changes when they are rotated
	Kernel   LoopKernel
	Registry Registry
	Resolver *Resolver
	Log      *slog.Logger
	Now      func() time.Time
	// Adopt returns the attachments that the runtime knows of. It is asked at
	// the start, and when the store had to be replaced.
	Adopt func(config.Config) ([]store.Attachment, error)
	// Lock is that of HoldHelperLock. Where the run folder is removed it is taken
	// anew: it is the caller's to close when Run has returned.
	Lock *os.File
	// Report is told after every pass how things stand.
	Report func(Report)
	// Passed is told of every pass, in the loop's own time: it must not wait for
	// anything. Optional.
	Passed func(Passed)
	// Resync is how often everything is looked at although nothing has told of a
	// change: WireGuard's peers change without a word. If it is zero, as often as
	// the mesh is small; see untilResync.
	Resync time.Duration

	config      config.Config
	trust       registry.Trust
	pairs       *identity.Pairs
	known       store.Known // who changes a record of it says so by noteChanged
	saved       *store.KnownFile
	stale       []string // names by which the registry holds an earlier record than is known
	saveFirst   bool     // before the next plan is carried out: see save
	planner     planner
	underlay    kernel.Underlay
	fadingSince time.Time          // when the underlay began to have fewer addresses than that
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
	configError      string // the same of the configuration
	fragments        string // why full-size packets leave in fragments
	forwarding       string // why packets of others are lost here
	unfit            string // the pods' links that could not be given the tunnel's MTU

	calls          calls // of the plain machines that enter by this node
	unreached      unreached
	nodesUnreached []Unreached // as of the last look at the kernel
	liveness       *liveness

	crossings     *crossings
	turning       RotationReport // of this node's rotation, as of the last look
	rotateAll     time.Time      // when this node's operator last asked all nodes to rotate
	rotationError string
	// rekeyed is set while the interface has not got the new key yet. What was heard
	// until rekeyedAt was meant for the one before, and all later for the new one:
	// nobody else is told of it earlier.
	rekeyed   bool
	rekeyedAt time.Time
	answers   answers
	unwatch   context.CancelFunc // ends the watch over the store
	complete  bool               // attachments.db has all pods, as of the last look at it
	looks     looks
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
	storeEvents := l.watch(ctx)
	updates := l.Registry.Watch(ctx)
	resolved := make(chan struct{}, 1)
	l.Resolver.Changed = func() { poke(resolved) }
	l.publisher = newPublisher(ctx, l.Registry)
	resync := time.NewTimer(l.untilResync())
	defer resync.Stop()
	looking, spent := false, time.Duration(0) // at everything
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	l.awaitFirstWord(ctx, updates)
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
			looking, spent = true, cpuTime()
			l.resync(ctx)
		case <-look.C:
			evicted, err := l.evicted()
			if err != nil {
				return err
			}
			if evicted {
				storeEvents = l.watch(ctx)
			}
			if heard, rotated := l.listen(ctx), l.rotate(l.Now()); !heard && !rotated && !evicted {
				continue
			}
		case <-wake.C:
			due = false
			last = l.Now()
			_, err := l.pass(ctx)
			if looking {
				looking = false
				l.looks.add(cpuTime() - spent)
				resync.Reset(l.untilResync())
			}
			if errors.Is(err, ErrLeft) {
				return err
			} else if err != nil {
				due = true
				wake.Reset(retryAfter)
			} else if len(l.moved) > 0 {
				due = true
				wake.Reset(passGap)
			} else if d := l.settling(last); d > 0 {
				due = true
				wake.Reset(d)
			}
			continue
		}
		if !due || l.Now().Sub(last) > passGap {
			due = true
			wake.Reset(min(max(passGap-l.Now().Sub(last), 0), passGap)) // whatever the clock says
		}
	}
}

// firstWord is how long a helper that starts anew waits for the registry.
const firstWord = 2 * time.Second

// awaitFirstWord lets the registry speak before the first pass, where the kernel holds
// a tunnel already. The disk is of the last helper's last pass: what has changed since,
// or was not saved any more, the kernel would lose again until the registry is heard.
func (l *Loop) awaitFirstWord(ctx context.Context, updates <-chan registry.Update) {
	if held, err := l.Kernel.Observe(); err != nil || held.Link.Name == "" {
		return
	}
	select {
	case u, ok := <-updates:
		if ok {
			l.hear(u)
		}
	case <-time.After(firstWord):
	case <-ctx.Done():
	}
}

// Once does a single pass, after asking the registry once, and returns what it
// did.
func (l *Loop) Once(ctx context.Context) (Outcome, error) {
	if err := l.begin(ctx); err != nil {
		return Outcome{}, err
	}
	l.publisher = &publisher{wake: make(chan struct{}, 1)}
	snapshot, err := l.Registry.Snapshot(ctx)
	l.hear(registry.Update{Snapshot: snapshot, Err: err})
	outcome, err := l.pass(ctx)
	if o := l.publisher.pending(); o != nil {
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
	l.known, l.saved = known, store.NewKnownFile(l.config.StateDir, known)
	if l.known.Records.Nodes == nil {
		l.known.Records = registry.NewSnapshot()
	}
	if l.known.Endpoints == nil {
		l.known.Endpoints = map[string]netip.AddrPort{}
	}
	l.liveness = newLiveness(l.known.Self.Silent)
	l.rotateAll, l.rekeyedAt = l.known.Self.RotateAll, l.Keys.Since
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
	l.planner.members.read(l.known.Records, l.config.NodeName) // what the registry says differs from that
	l.sweep(ctx)
	return nil
}

// PresharedKey is for kernel.Config.
func (l *Loop) PresharedKey(peer wgtypes.Key, f mesh.Fingerprint) (wgtypes.Key, error) {
	if psk, ok := l.pairs.ByFingerprint(peer, f); ok {
		return psk, nil
	}
	return l.pairs.For(l.Keys.Spare()).Reveal(peer, f)
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
	changed, stale := l.take(u)
	l.saveFirst = l.saveFirst || l.planner.members.rekeyed(l.known.Records, changed)
	l.noteChanged(changed...)
	news := l.refusals.hear(l.config.NodeName, u.Snapshot.Invalid, stale, l.Now())
	for _, r := range news[:min(len(news), manyRefused)] {
		l.Log.Warn("record refused", "node", r.Node, "kind", r.Kind, "error", r.Reason)
	}
	if more := len(news) - manyRefused; more > 0 {
		l.Log.Warn("more records refused", "records", more, "mend", "`wgcnid nodes` lists all")
	}
	l.fresh, l.published = &u.Snapshot, nil
	if ours, _ := l.known.Records.Record(l.config.NodeName); ours.Left && !l.joined && ours.Revision > l.known.Self.Revision {
		// We were forgotten while we were away, and may have lost our prefixes to
		// others. Joining again begins anew.
		l.known.Self = ours
	}
}

// take merges what the registry says into what is known. What was stale is looked at
// again: it goes on to be refused.
func (l *Loop) take(u registry.Update) (changed []string, stale []registry.Stale) {
	names := slices.Concat(u.Changed, l.stale)
	if len(u.Changed) == 0 {
		names = slices.Collect(maps.Keys(u.Snapshot.Nodes))
	}
	slices.Sort(names)
	changed, stale = l.known.Records.Take(u.Snapshot, slices.Compact(names))
	l.stale = l.stale[:0]
	for _, s := range stale {
		l.stale = append(l.stale, s.Name)
	}
	return changed, stale
}

// noteChanged says that known has other records of these names than before.
func (l *Loop) noteChanged(names ...string) {
	l.planner.members.note(names...)
	l.saved.Note(names...)
}

// pass makes the kernel, the disk and the registry agree with what is known.
func (l *Loop) pass(ctx context.Context) (Outcome, error) {
	now := l.Now()
	if l.removed() {
		return Outcome{}, ErrLeft
	}
	l.planner.members.read(l.known.Records, l.config.NodeName)
	l.resolveEndpoints(ctx, now)
	l.describeSelf(now)
	l.known.MTU = findMTU(l.config, l.underlay, l.wide())
	l.warnOfFragments()
	l.warnOfForwarding()
	// Others hear of our pods while we work: the verbs have applied here what
	// concerns the pods themselves.
	l.announce(now)

	if !l.complete {
		l.adoptIfNew(ctx)
	}
	if l.saveFirst {
		l.save(ctx)
	}
	look := mesh.Context{Now: now, Moved: l.moved}
	o, err := Pass{
		Config: l.config, Kernel: l.Kernel, Known: l.known, Key: l.Keys.Current, Pairs: l.pairs, Observed: l.observed, Context: look,
		Rotation: l.rotation(), planner: &l.planner,
	}.Run(ctx)
	if o.Damaged != nil {
		l.logDamaged(o.Damaged)
	}
	if l.complete = l.complete && o.Complete; err == nil && !l.complete {
		if l.adoptIfNew(ctx); l.complete { // else our record would lack the pods for a moment
			l.observed = nil
			return l.pass(ctx)
		}
	}
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
		looked := l.observed == nil
		plan := o.Plan.State // a pointer into the outcome would keep all of it
		l.observed, l.planned, l.moved = &plan, &plan, nil
		l.crossed(o, l.Now())
		if looked {
			if l.findAstray(o); len(l.moved) > 0 {
				l.observed = nil
			}
		}
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
	l.known.Self = SelfRecord(l.config, l.Keys.Current, l.underlay, l.pods, Rivals(l.known.Records, l.config.NodeName), l.known.Self, now)
	l.known.Self.Pods = append(l.known.Self.Pods, carried...)
	l.known.Self.Rotation = registry.Rotation{
		Next: l.Keys.Spare(), SparePort: uint16(l.config.SparePort), Stage: l.Keys.Stage, KeySince: l.Keys.Since, RotateAll: l.rotateAll,
	}
	if l.config.Role == mesh.RoleGateway {
		l.known.Self.Silent = l.liveness.silences()
	}
}

func (l *Loop) resolveEndpoints(ctx context.Context, now time.Time) {
	changed := l.planner.members.resolve(ctx, l.Resolver, l.underlay.Addresses, l.known.Endpoints, now, func(r registry.Record) {
		l.setMoved(r.PublicKey)
		l.setMoved(r.Next)
	})
	l.saved.Note(changed...)
}

// wide reports whether an endpoint of any machine may need an IPv6 header's room.
func (l *Loop) wide() bool { return l.planner.members.wide || wide(l.known.Self) }

// save writes what has changed to the disk. It comes after the kernel: traffic
// does not wait for a disk. But a peer's new key comes first: of the one before nothing
// is left in the kernel, and a helper that is killed in between must not go back to it.
func (l *Loop) save(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := l.saved.Save(ctx, l.known); err != nil {
		l.Log.Error("cannot save what is known of the mesh; after a reboot this node would need the registry", "error", err)
	}
	l.saveFirst = false
}
