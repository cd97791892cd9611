package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/google/nftables"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// Sources are where the facts come from.
type Sources struct {
	Config   config.Config
	Kernel   *kernel.Kernel
	Registry *registry.Registry
	Trust    registry.Trust
	// TrustError says why the cluster's secrets cannot be read.
	TrustError error
	// Report returns the helper's last word, nil if there is none. Required.
	Report  func() *reconcile.Report
	CNIDir  string
	BinDir  string // optional: of the CNI plugins; found by default
	Version string
	Peers   []string // optional: only these; all by default
	Quick   bool     // send nothing
}

// How long some things may take.
const (
	registryPatience = 5 * time.Second
	settlePatience   = 3 * time.Second // for the helper to mend what differs
	settlePause      = 200 * time.Millisecond
	// noticePatience is for the helper to notice what has been changed in its files,
	// which it reads again every ten seconds.
	noticePatience = 12 * time.Second
)

// Gather looks at all there is. What cannot be looked at is a fact too, so that
// there is no error.
func Gather(ctx context.Context, s Sources) Facts {
	f := Facts{
		Now: time.Now(), Version: s.Version, Quick: s.Quick, Config: s.Config, Chain: GatherChains(ctx, s.CNIDir, s.BinDir, s.Config),
		Helper: Helper{Running: reconcile.HelperAlive(s.Config.RunDir)},
	}
	f.Files = gatherFiles(s)
	f.Mesh = gatherMesh(ctx, s, f.Now)
	f.Plan = gatherPlan(ctx, s, f)
	f.Helper.Report = s.Report() // now: one that has only just started had the time to say something
	f.Mesh.Conflicts = f.Plan.conflicts
	f.Tunnel = gatherTunnel(s.Config, f.Plan)
	f.Network = gatherNetwork(s, f)
	f.Rules, f.RulesError = gatherRules(ctx)
	f.Peers = gatherPeers(ctx, s, f)
	return f
}

func gatherFiles(s Sources) Files {
	f := Files{KeyPath: identity.Path(s.Config.StateDir), SecretPath: s.Config.SecretFile, SecretError: s.TrustError, SecretIDs: len(s.Trust.Secrets)}
	_, f.KeyError = identity.Load(s.Config.StateDir)
	f.KeyMode, f.StateMode = mode(f.KeyPath), mode(s.Config.StateDir)
	f.NextPath = identity.NextPath(s.Config.StateDir)
	f.NextMode = mode(f.NextPath)
	f.Keys, f.KeysError = identity.LoadKeys(s.Config.StateDir)
	f.Ordered = identity.Ordered(s.Config.StateDir)
	return f
}

func mode(path string) uint32 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return uint32(info.Mode().Perm())
}

func gatherMesh(ctx context.Context, s Sources, now time.Time) Mesh {
	m := Mesh{Store: s.Registry.String()}
	if key, err := identity.Load(s.Config.StateDir); err == nil {
		m.Key = key.Public()
	}
	known, _, err := store.LoadKnown(ctx, s.Config.StateDir)
	if err == nil {
		if complete, err := reconcile.Bootstrap(s.Config, known, s.Kernel, now); err == nil {
			known = complete
		}
	}
	m.Known = known
	if m.Key == (wgtypes.Key{}) && mode(identity.Path(s.Config.StateDir)) != 0 {
		m.Key = known.Self.PublicKey // the key is there, and cannot be read: that is one fault, not many
	}
	m.Forgotten = reconcile.Forgotten(s.Config.NodeName, m.Key, known)
	ctx, cancel := context.WithTimeout(ctx, registryPatience)
	defer cancel()
	begin := time.Now()
	m.Fresh, m.RegistryError = s.Registry.Snapshot(ctx)
	m.Took = time.Since(begin)
	if m.RegistryError == nil {
		_, m.Stale = registry.Merge(m.Known.Records, m.Fresh)
	}
	if s.Config.Registry.Type != config.RegistryEtcd {
		m.WriteError = writable(s.Config.Registry.Path)
	}
	return m
}

// writable asks the kernel; the registry's file is replaced, so that it is the
// folder that counts.
func writable(path string) error {
	if err := unix.Access(filepath.Dir(path), unix.W_OK); err != nil {
		return fmt.Errorf("folder %s cannot be written to: %w", filepath.Dir(path), err)
	}
	if err := unix.Access(path+".lock", unix.W_OK); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s.lock cannot be written to: %w", path, err)
	}
	return nil
}

// gatherPlan compares the kernel with the plan. What differs while the helper runs
// is looked at again: it may be about to be mended.
func gatherPlan(ctx context.Context, s Sources, f Facts) Plan {
	p := Plan{Tables: tables()}
	if verifies, err := s.Kernel.FilterVerifiesSources(); err == nil { // else there is no table, which is said anyway
		p.Unverified = !verifies
	}
	pass := reconcile.Pass{
		Config: s.Config, Kernel: s.Kernel, Known: f.Mesh.Known, Key: f.Mesh.Key,
		Pairs: identity.NewPairs(f.Mesh.Key, s.Trust.Secrets), Context: mesh.Context{Now: f.Now},
	}
	patience := settlePatience
	if changedLately(f.Now, s.Config.SecretFile, s.CNIDir, identity.Path(s.Config.StateDir)) {
		patience = noticePatience
	}
	for deadline := time.Now().Add(patience); ; {
		var o reconcile.Outcome
		if o, p.Error = pass.Compare(ctx); p.Error == nil {
			if s.TrustError != nil { // which keys there should be is not known
				keepPresharedKeys(&o, pass.Context)
			}
			p.Observed, p.State, p.Pending, p.Pods, p.conflicts = o.Observed, o.Plan.State, o.Ops, o.Pods, o.Plan.Conflicts
		}
		settled := p.Error == nil && len(p.Pending) == 0
		if settled || !f.Helper.Running || time.Now().After(deadline) || ctx.Err() != nil {
			return p
		}
		time.Sleep(settlePause)
		if known, _, err := store.LoadKnown(ctx, s.Config.StateDir); err == nil && known.MTU != 0 {
			pass.Known = known
		}
		pass.Context.Now = time.Now()
	}
}

// changedLately reports whether a file or folder is so young that the helper may not
// have seen it.
func changedLately(now time.Time, paths ...string) bool {
	return slices.ContainsFunc(paths, func(path string) bool {
		info, err := os.Stat(path)
		return err == nil && now.Sub(info.ModTime()).Abs() < noticePatience
	})
}

func keepPresharedKeys(o *reconcile.Outcome, c mesh.Context) {
	o.Plan.TakePresharedKeys(o.Observed)
	o.Ops = mesh.Diff(o.Observed, o.Plan.State, c)
}

// tables asks whether this kernel has nftables, and lets us use it.
func tables() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	_, err = c.ListTables()
	return err
}

func gatherRules(ctx context.Context) (Ruleset, error) {
	rules, err := readNftables()
	if err != nil {
		return rules, err
	}
	legacy, err := readLegacy(ctx)
	rules.Chains = append(rules.Chains, legacy.Chains...)
	if legacy.Unread != "" {
		rules.Unread = legacy.Unread
	}
	return rules, err
}
