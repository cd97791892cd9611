package reconcile

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
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

// Kernel is what plans are carried into.
type Kernel interface {
	Observe() (mesh.State, error)
	Apply([]mesh.Op) error
}

var _ Kernel = (*kernel.Kernel)(nil)

// Facts joins what the configuration, the key, the mesh and the pods say.
func Facts(c config.Config, key wgtypes.Key, pairs *identity.Pairs, known store.Known, pods []netip.Addr) mesh.Facts {
	f := ownFacts(c, key, known, pods)
	f.Revoked = map[wgtypes.Key]string{}
	own := sealedBy(c, pairs, known)
	for _, r := range known.Records.Nodes {
		if revoked, ok := r.Revoked(); ok && (f.Revoked[revoked] == "" || r.Name < f.Revoked[revoked]) {
			f.Revoked[revoked] = r.Name
		}
		if !r.Left && r.Name != c.NodeName {
			f.Nodes = append(f.Nodes, peerNode(*r, known.Endpoints[r.Name], pairs, own))
		}
	}
	return f
}

// ownFacts are those of this node alone.
func ownFacts(c config.Config, key wgtypes.Key, known store.Known, pods []netip.Addr) mesh.Facts {
	f := mesh.Facts{Settings: c.Settings, LocalPods: pods}
	f.MTU = mtuOf(c, known)
	f.Self = node(known.Self, netip.AddrPort{})
	f.Self.Name, f.Self.PublicKey, f.Self.Endpoint = c.NodeName, key, ownEndpoint(known.Self)
	published, there := known.Records.Record(c.NodeName)
	f.Self.CallsOnly = c.CallsOnly || there && !published.Left && len(published.Endpoints) == 0
	f.Self.Hosts = publishedHosts(c, known)
	return f
}

// sealedBy names the secret that the others see our record sealed with, not the one
// that the next record will have: both ends of a tunnel choose its key by the same two.
func sealedBy(c config.Config, pairs *identity.Pairs, known store.Known) identity.SecretID {
	if published, there := known.Records.Record(c.NodeName); there && !published.Left {
		return published.Seal.Secret
	}
	return pairs.Current()
}

// peerNode is another machine, with the key of the tunnel to it.
func peerNode(r registry.Record, endpoint netip.AddrPort, pairs *identity.Pairs, own identity.SecretID) mesh.Node {
	n := node(r, endpoint)
	if psk, ok := pairs.PresharedKey(own, r.Seal.Secret, r.PublicKey); ok {
		n.PresharedKey = mesh.FingerprintOf(psk)
	}
	return n
}

// ownEndpoint is the one that the others take, but for those who cannot use its
// family: a claim that covers it is to be settled alike on all nodes. A DNS name
// is left out.
func ownEndpoint(r registry.Record) netip.AddrPort {
	for _, e := range r.Endpoints {
		if a, err := netip.ParseAddrPort(e); err == nil {
			return a
		}
	}
	return netip.AddrPort{}
}

// Forgotten reports whether the mesh has revoked a node's key.
func Forgotten(name string, key wgtypes.Key, known store.Known) bool {
	r, _ := known.Records.Record(name)
	revoked, ok := r.Revoked()
	return ok && revoked == key
}

// Machines are all that take part, and what each may send and receive for.
// Endpoints are those that are written as addresses.
func Machines(c config.Config, records registry.Snapshot) ([]mesh.Node, mesh.Ownership) {
	var nodes []mesh.Node
	revoked := map[wgtypes.Key]string{}
	for _, r := range records.Records() {
		if key, ok := r.Revoked(); ok {
			revoked[key] = r.Name
		}
		if !r.Left {
			nodes = append(nodes, node(r, ownEndpoint(r)))
		}
	}
	return nodes, mesh.Owners(nodes, c.Bounds(), revoked)
}

func node(r registry.Record, endpoint netip.AddrPort) mesh.Node {
	return mesh.Node{
		Name: r.Name, PublicKey: r.PublicKey, Endpoint: endpoint, CallsOnly: len(r.Endpoints) == 0,
		Prefixes: r.Prefixes, Pods: r.Pods, Hosts: r.Hosts, Addresses: r.Addresses, Since: r.Since,
		Location: r.Location, Role: r.Role, Segments: r.Segments, CalledInside: r.CalledInside, Silent: r.Silent, Via: r.Via, Masqueraded: r.Masqueraded,
	}
}

// Digest names the settings that a plan is made from. It tells the plugin
// whether the plan that was applied is still the one it was configured for.
func Digest(s mesh.Settings) string {
	text, err := json.Marshal(s)
	if err != nil {
		panic(err) // Settings has nothing that could fail
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8])
}

// Pass is one observe, diff and apply.
type Pass struct {
	Config config.Config
	Kernel Kernel
	Known  store.Known
	Key    wgtypes.Key // public; zero if the node has none yet
	// Pairs derive the tunnels' preshared keys; nil for a mesh without a secret.
	Pairs   *identity.Pairs
	Context mesh.Context
	// Rotation is taken from the kernel as it is where it is nil.
	Rotation *Rotation
	// Observed is used instead of asking the kernel. Optional.
	Observed *mesh.State

	planner *planner // of a Loop, whose passes have much in common; nil: none
}

// Outcome is what a Pass did.
type Outcome struct {
	Observed mesh.State
	Plan     mesh.Plan
	Ops      []mesh.Op // empty: the kernel held the plan already
	Pods     []store.Attachment
	Complete bool           // the store has all pods, as far as is known
	Damaged  *store.Damaged // the store, if it had to be replaced

	// Fitted are the pods whose links were given the tunnel's MTU. LinksError says
	// which could not be, and why; Run itself does not fail for it.
	Fitted     []store.Attachment
	LinksError error

	Took Took
}

// Compare observes and plans, and changes nothing: Ops is what Run would do.
func (p Pass) Compare(ctx context.Context) (o Outcome, err error) {
	// The kernel first, then the store: ADD writes in the other order, so that
	// nothing which is seen in the kernel can be missing from the store.
	if p.Observed != nil {
		o.Observed = *p.Observed
	} else {
		begun := time.Now()
		o.Observed, err = p.Kernel.Observe()
		o.Took.Observe = time.Since(begun)
		if err != nil {
			return o, err
		}
	}
	err = withStore(ctx, p.Config.RunDir, func(st *store.Attachments) error { return p.plan(&o, st) })
	return o, err
}

// plan reads the pods and plans with them. While the store may lack some, the
// pods that the kernel guards are taken for pods as well.
func (p Pass) plan(o *Outcome, st *store.Attachments) error {
	pods, err := st.All()
	if err != nil {
		return fmt.Errorf("read %s: %w", store.AttachmentsPath(p.Config.RunDir), err)
	}
	complete, err := st.Complete()
	if err != nil {
		return fmt.Errorf("read %s: %w", store.AttachmentsPath(p.Config.RunDir), err)
	}
	o.Pods, o.Complete, o.Damaged = pods, complete, st.Damaged()
	addrs := store.Addresses(pods)
	if !complete {
		addrs = append(addrs, o.Observed.Filter.Pods...)
	}
	begun := time.Now()
	o.Plan = p.newPlan(o.Observed, addrs)
	o.Ops = mesh.Diff(o.Observed, o.Plan.State, p.Context)
	o.Took.Plan += time.Since(begun)
	return nil
}

func (p Pass) newPlan(observed mesh.State, pods []netip.Addr) mesh.Plan {
	rotation := RotationOf(observed, p.Known)
	if p.Rotation != nil {
		rotation = *p.Rotation
	}
	if p.planner != nil {
		return p.planner.update(p, rotation, pods)
	}
	facts := Facts(p.Config, p.Key, p.Pairs, p.Known, pods)
	facts.Now = p.Context.Now
	if rotation.enter(&facts, p.Config) {
		for i := range facts.Nodes {
			rotation.cross(&facts.Nodes[i], p)
		}
	}
	return mesh.NewPlan(facts)
}

// planner plans for a Loop: as often as not nothing has changed since the last pass,
// and next to nothing nearly always.
type planner struct {
	members members
	mesh.Planner
}

// update is newPlan. The members are those that p knows of.
func (l *planner) update(p Pass, rotation Rotation, pods []netip.Addr) mesh.Plan {
	facts := ownFacts(p.Config, p.Key, p.Known, pods)
	facts.Now, facts.Revoked = p.Context.Now, l.members.revoked
	nodes := l.members.asNodes(p.Pairs, sealedBy(p.Config, p.Pairs, p.Known))
	if rotation.enter(&facts, p.Config) {
		nodes = slices.Clone(nodes)
		for i := range nodes {
			n := *nodes[i]
			if rotation.cross(&n, p) {
				nodes[i] = &n
			}
		}
	}
	return l.Update(facts, nodes)
}

// Run makes the kernel hold the plan. What concerns this node's own pods is
// applied under the store's lock, so that it agrees with the store whatever
// ADDs and DELs run beside it; the rest, which may take long, is not.
//
// An error that Is kernel.ErrNoWireGuard means that all but the tunnel is in place.
func (p Pass) Run(ctx context.Context) (Outcome, error) {
	o, err := p.Compare(ctx)
	if err != nil {
		return o, err
	}
	if local, _ := split(o.Ops); len(local) > 0 {
		if err := p.applyLocal(ctx, &o); err != nil {
			return o, err
		}
	}
	_, others := split(o.Ops)
	begun := time.Now()
	err = p.Kernel.Apply(others)
	if len(o.Ops) > 0 {
		o.Took.Apply += time.Since(begun)
	}
	if err == nil || errors.Is(err, kernel.ErrNoWireGuard) {
		pods, rerr := p.recordApplied(ctx, o.Pods)
		err = errors.Join(err, rerr)
		o.Fitted, o.LinksError = p.fitLinks(ctx, pods)
	}
	return o, err
}

// applyLocal looks at the store once more, now under its lock, and applies the local part.
func (p Pass) applyLocal(ctx context.Context, o *Outcome) error {
	return withStore(ctx, p.Config.RunDir, func(st *store.Attachments) error {
		pods, err := st.All()
		if err != nil {
			return err
		}
		if !slices.Equal(store.Addresses(pods), store.Addresses(o.Pods)) {
			if err := p.plan(o, st); err != nil {
				return err
			}
		}
		local, _ := split(o.Ops)
		begun := time.Now()
		defer func() { o.Took.Apply += time.Since(begun) }()
		return p.Kernel.Apply(local)
	})
}

// split is mesh.Split, but where single pods are given up their range goes with
// them: one that was found just now has to be there before they go.
func split(ops []mesh.Op) (local, others []mesh.Op) {
	givesUp := slices.ContainsFunc(ops, func(o mesh.Op) bool {
		pods, ok := o.(mesh.SetFilterPods)
		_, route := o.(mesh.RemoveRoute)
		return ok && len(pods.Remove) > 0 || route && mesh.Local(o)
	})
	if !givesUp {
		return mesh.Split(ops)
	}
	for _, o := range ops {
		_, filter := o.(mesh.SetFilter)
		route, ok := o.(mesh.SetRoute)
		if mesh.Local(o) || filter || ok && route.Route.Type == mesh.Throw {
			local = append(local, o)
		} else {
			others = append(others, o)
		}
	}
	return local, others
}

// recordApplied lets the plugin's verbs take the short way from now on. It returns
// the pods that are not known to go by this record yet, of those seen before.
func (p Pass) recordApplied(ctx context.Context, seen []store.Attachment) (pods []store.Attachment, err error) {
	now := p.Applied()
	pods = seen
	err = withStore(ctx, p.Config.RunDir, func(st *store.Attachments) error {
		was, ok, err := st.Applied()
		if same := ok && was.Settings == now.Settings && was.MTU == now.MTU && slices.Equal(was.Prefixes, now.Prefixes); err != nil || same {
			return err
		}
		if err := st.SetApplied(now); err != nil {
			return err
		}
		pods, err = st.All() // those too that came while we were at it
		return err
	})
	return pods, err
}

// Applied describes the plan for the plugin's verbs.
func (p Pass) Applied() store.Applied {
	out := store.Applied{Settings: Digest(p.Config.Settings), MTU: p.MTU(), At: p.Context.Now}
	for _, c := range p.Known.Self.Prefixes {
		out.Prefixes = append(out.Prefixes, c.Prefix)
	}
	return out
}

// PodChange is the part of the plan that one pod's coming or going changes: the
// ops between the plan before and the plan after, both without any other node.
// Its cost does not grow with the mesh.
func PodChange(c config.Config, prefixes []netip.Prefix, before, after []store.Attachment) []mesh.Op {
	self := mesh.Node{Name: c.NodeName}
	for _, p := range prefixes {
		self.Prefixes = append(self.Prefixes, mesh.Claim{Prefix: p})
	}
	plan := func(pods []store.Attachment) mesh.State {
		return mesh.NewPlan(mesh.Facts{Settings: c.Settings, Self: self, LocalPods: store.Addresses(pods)}).State
	}
	return mesh.Diff(plan(before), plan(after), mesh.Context{Now: time.Time{}})
}

// Clear removes all of ours from the kernel.
func Clear(k Kernel, log *slog.Logger) error {
	observed, err := k.Observe()
	if err != nil {
		return err
	}
	ops := mesh.Diff(observed, mesh.State{}, mesh.Context{})
	for _, op := range ops {
		log.Info("apply", "op", op.String())
	}
	return k.Apply(ops)
}
