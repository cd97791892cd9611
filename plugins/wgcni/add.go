package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/ns"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

// announceTimeout bounds the wait for a pod outside of the node's prefixes to be
// announced to the others. It takes milliseconds while all is well.
const announceTimeout = 2 * time.Second

// addTimeout bounds the wait for the store, which others hold for milliseconds.
const addTimeout = 10 * time.Second

// settleTime is how long an ADD tries to apply the whole plan. The helper may be at it
// too, and know more: what this ADD saw or planned is no longer so by then. Nor does a
// userspace tunnel that it has just started answer at once.
const settleTime = 2 * time.Second

// add records the pod and makes the node's plan hold for it. It talks to nobody
// but the kernel and the node's own disk, where the helper says what it has
// announced: the registry being away never keeps a pod from starting.
func add(args *skel.CmdArgs) error {
	r, err := readRequest(args)
	if err != nil {
		return err
	}
	conf, at, result := r.conf, r.at, r.result
	if err := notOwnNetns(args); err != nil {
		return err
	}
	link, err := kernel.OpenPodLink(args.Netns, args.IfName)
	if err != nil {
		return err
	}
	defer link.Close()

	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	mtu, own, err := attach(ctx, conf, &at, link)
	if err != nil {
		return err
	}
	awaitAnnounced(ctx, conf, at, own)
	for _, i := range result.Interfaces {
		if i.Sandbox != "" && i.Name == args.IfName {
			i.Mtu = mtu
		}
	}
	return types.PrintResult(result, conf.CNIVersion)
}

// notOwnNetns refuses the namespace that we run in. skel asks too, but after
// ADD: the pod would be recorded by then, and an interface of the node's own changed.
func notOwnNetns(args *skel.CmdArgs) error {
	if override := args.NetnsOverride; override == "1" || strings.EqualFold(override, "true") {
		return nil
	}
	own, err := ns.CheckNetNS(args.Netns)
	switch {
	case err != nil: // a *types.Error, which must not become a non-nil error unseen
		return faultf(err.Code, err.Details, errors.New(err.Msg))
	case own:
		return faultf(types.ErrInvalidNetNS, "give the pod a network namespace of its own", fmt.Errorf("netns %s is the node's own", args.Netns))
	}
	return nil
}

// awaitAnnounced waits a bounded time until the other nodes can know of a pod
// that none of this node's prefixes covers.
func awaitAnnounced(ctx context.Context, conf config.Config, at store.Attachment, own []netip.Prefix) {
	outside := slices.DeleteFunc(slices.Clone(at.Addresses), func(a netip.Addr) bool {
		return slices.ContainsFunc(own, func(p netip.Prefix) bool { return p.Contains(a) })
	})
	if len(outside) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, announceTimeout)
	defer cancel()
	if err := reconcile.AwaitAnnounced(ctx, conf.RunDir, outside, at.Since); err != nil {
		warn("pod %s: other nodes do not reach it yet: %v", at.ContainerID, err)
	}
}

// attach stores the attachment and applies what follows from it, to the pod's link
// as well. It returns the link's MTU, in bytes, and the node's own prefixes. An ADD
// that is repeated keeps the time of the first.
func attach(ctx context.Context, conf config.Config, at *store.Attachment, link *kernel.PodLink) (mtu int, own []netip.Prefix, err error) {
	k, err := kernel.Open(kernel.Config{Interface: conf.Interface, PrivateKey: identity.Revealer(conf.StateDir)})
	if err != nil {
		return 0, nil, err
	}
	defer k.Close()

	pause, deadline := 10*time.Millisecond, time.Now().Add(settleTime)
	for {
		applied, mtu, err := attachShort(ctx, conf, at, link, k)
		if err != nil {
			return 0, nil, fmt.Errorf("record the pod in %s: %w", store.AttachmentsPath(conf.RunDir), err)
		}
		if applied != nil {
			return mtu, applied.Prefixes, nil
		}
		// Nothing has been applied since the node booted, or not from this
		// configuration, or somebody broke it: the whole plan, from what is known.
		pass, err := wholePass(ctx, conf, k)
		if err != nil {
			return 0, nil, errors.Join(err, detach(ctx, conf.RunDir, nil, sameAs(*at)))
		}
		err = applyWhole(ctx, pass, at)
		switch {
		case err == nil:
			if mtu, err = reconcile.FitLink(at, link, pass.MTU()); err != nil { // as the pass has, but this one must not fail
				return 0, nil, errors.Join(err, detach(ctx, conf.RunDir, &conf, sameAs(*at)))
			}
			return mtu, pass.Applied().Prefixes, nil
		case time.Now().After(deadline):
			return 0, nil, errors.Join(err, detach(ctx, conf.RunDir, nil, sameAs(*at)))
		}
		time.Sleep(pause)
		pause *= 2
	}
}

// applyWhole runs the pass. What keeps the tunnel alone from working fails no pod.
func applyWhole(ctx context.Context, pass reconcile.Pass, at *store.Attachment) error {
	outcome, err := pass.Run(ctx)
	switch {
	case errors.Is(err, kernel.ErrNoWireGuard):
		warn("pod %s: no traffic to other nodes until wgcnid runs: %v", at.ContainerID, err)
	case errors.Is(err, kernel.ErrPortTaken) && guarded(ctx, pass): // what other programs do fails no pod
		warn("pod %s: no traffic to other nodes until that port is free: %v", at.ContainerID, err)
	case err != nil:
		return err
	}
	if outcome.LinksError != nil {
		warn("%v", outcome.LinksError)
	}
	return nil
}

// guarded reports whether the kernel holds all of the plan but what is to be done to
// the WireGuard interface.
func guarded(ctx context.Context, pass reconcile.Pass) bool {
	o, err := pass.Compare(ctx)
	return err == nil && !slices.ContainsFunc(o.Ops, func(op mesh.Op) bool { return !mesh.NeedsLink(op) })
}

// attachShort stores the attachment, and applies the little that it changes if
// the node has its plan already, which it then returns with the MTU of the pod's
// link. It does both under the store's lock, so that the kernel and the store agree
// whatever ADDs and DELs run beside it, and whatever MTU the helper is about to
// give to all links.
func attachShort(ctx context.Context, conf config.Config, at *store.Attachment, link *kernel.PodLink, k *kernel.Kernel) (plan *store.Applied, mtu int, err error) {
	st, err := store.OpenAttachments(ctx, conf.RunDir)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	before, err := affected(st, at)
	if d := st.Damaged(); d != nil {
		warn("%v", d)
	}
	if err != nil {
		return nil, 0, err
	}
	applied, ok, err := st.Applied()
	if err != nil {
		return nil, 0, err
	}
	short := ok && applied.Settings == reconcile.Digest(conf.Settings)
	if short {
		if mtu, err = reconcile.FitLink(at, link, applied.MTU); err != nil {
			return nil, 0, err
		}
	}
	if err := st.Put(*at); err != nil || !short {
		return nil, 0, err
	}
	after := append(slices.DeleteFunc(slices.Clone(before), sameAs(*at)), *at)
	if err := k.Apply(reconcile.PodChange(conf, applied.Prefixes, before, after)); err != nil {
		warn("pod %s: %v; applying the whole plan", at.ContainerID, err)
		return nil, 0, nil
	}
	return &applied, mtu, nil
}

// affected returns the attachments that the plan before and after an ADD must be
// made from for the two to differ by all that the ADD changes, and by nothing
// less: an ADD that is repeated applies its part again, since the first may have
// been cut off; it keeps the time of the first. All others matter only to one that
// takes addresses away. What the first did to the link's MTU is told from what
// others want.
func affected(st *store.Attachments, at *store.Attachment) ([]store.Attachment, error) {
	old, there, err := st.Get(at.ContainerID, at.IfName)
	if there && old.SandboxID == at.SandboxID {
		at.LinkMTU, at.TunnelMTU = old.LinkMTU, old.TunnelMTU
	}
	switch {
	case err == nil && !there:
		return nil, nil
	case err == nil && slices.Equal(old.Addresses, at.Addresses):
		at.Since = old.Since
		return nil, nil
	}
	return st.All()
}

// wholePass plans from what the node knows of the mesh.
func wholePass(ctx context.Context, conf config.Config, k *kernel.Kernel) (reconcile.Pass, error) {
	known, damaged, err := store.LoadKnown(ctx, conf.StateDir)
	if err != nil {
		return reconcile.Pass{}, err
	}
	if damaged != nil {
		warn("%v", damaged)
	}
	now := time.Now()
	if known, err = reconcile.Bootstrap(conf, known, k, now); err != nil {
		return reconcile.Pass{}, err
	}
	key, err := publicKey(conf.StateDir)
	if err != nil {
		return reconcile.Pass{}, err
	}
	pairs, err := reconcile.ReadPairs(conf, key)
	if err != nil {
		return reconcile.Pass{}, err
	}
	k.PresharedKey = pairs.Reveal
	return reconcile.Pass{Config: conf, Kernel: k, Known: known, Key: key, Pairs: pairs, Context: mesh.Context{Now: now}}, nil
}

// sameAs matches the attachment of the same container and interface.
func sameAs(at store.Attachment) func(store.Attachment) bool {
	return func(o store.Attachment) bool { return o.ContainerID == at.ContainerID && o.IfName == at.IfName }
}
