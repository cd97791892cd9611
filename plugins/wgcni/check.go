package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

// errCheck is the code of a pod that is not as ADD left it: the first that the
// CNI spec leaves to plugins.
const errCheck uint = 100

// convergence is how long CHECK waits for the helper to finish what it is at.
const convergence = 2 * time.Second

// check compares the pod, and the node as far as pods depend on it, with the plan.
func check(args *skel.CmdArgs) error {
	r, err := readRequest(args)
	if err != nil {
		return err
	}
	conf, want := r.conf, r.at
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	k, err := kernel.Open(kernel.Config{Interface: conf.Interface})
	if err != nil {
		return err
	}
	defer k.Close()
	pass, err := wholePass(ctx, conf, k)
	if err != nil {
		return err
	}
	outcome, linkErr, err := settled(ctx, args, pass, k)
	if err != nil {
		return err
	}
	if err := checkStored(outcome.Pods, want); err != nil {
		return err
	}
	if linkErr != nil {
		return linkErr
	}
	if !reconcile.HelperAlive(conf.RunDir) {
		return faultf(errCheck, "start it: `systemctl start wgcnid`, or `wgcnid run`", errors.New("wgcnid does not run on this node"))
	}
	if len(outcome.Ops) > 0 {
		return faultf(errCheck, "look at wgcnid's log; `wgcnid sync` applies it by hand", fmt.Errorf("the kernel differs from the plan by:\n%s", mesh.Text(outcome.Ops)))
	}
	return nil
}

// settled compares until nothing differs, or the time that convergence may take is
// over. The second value is what is wrong with the pod's link.
func settled(ctx context.Context, args *skel.CmdArgs, pass reconcile.Pass, k *kernel.Kernel) (outcome reconcile.Outcome, linkErr, err error) {
	deadline := time.Now().Add(convergence)
	for {
		outcome, err = pass.Compare(ctx)
		if err != nil {
			return outcome, nil, err
		}
		linkErr = checkLink(args, pass)
		if len(outcome.Ops) == 0 && linkErr == nil || time.Now().After(deadline) {
			return outcome, linkErr, nil
		}
		time.Sleep(50 * time.Millisecond)
		if pass, err = wholePass(ctx, pass.Config, k); err != nil {
			return outcome, nil, err
		}
	}
}

func checkStored(pods []store.Attachment, want store.Attachment) error {
	i := slices.IndexFunc(pods, sameAs(want))
	switch {
	case i < 0:
		return faultf(types.ErrUnknownContainer, "recreate the pod", fmt.Errorf("container %s, interface %s: not recorded on this node", want.ContainerID, want.IfName))
	case !slices.Equal(pods[i].Addresses, want.Addresses):
		return faultf(errCheck, "recreate the pod", fmt.Errorf("container %s: recorded with addresses %v, prevResult has %v", want.ContainerID, pods[i].Addresses, want.Addresses))
	}
	return nil
}

func checkLink(args *skel.CmdArgs, pass reconcile.Pass) error {
	link, err := kernel.OpenPodLink(args.Netns, args.IfName)
	if err != nil {
		return err
	}
	defer link.Close()
	limit, err := link.Fit(pass.MTU())
	if err != nil {
		return err
	}
	if have := link.MTU(); have > limit {
		return faultf(errCheck, "recreate the pod, or set the MTU of its link", fmt.Errorf("interface %s has MTU %d, the tunnel carries %d", args.IfName, have, limit))
	}
	return nil
}

// status says whether an ADD could be served, and if not, whether the pods that
// exist are cut off as well. containerd asks every few seconds: it looks at a few
// files and one interface, waits for no lock while all is well, and does not read the peers.
func status(args *skel.CmdArgs) error {
	conf, err := config.Parse(args.StdinData)
	if err != nil {
		return faultf(types.ErrPluginNotAvailable, "correct the wgcni entry in the network configuration list", err)
	}
	notReady := func(mend string, err error) error {
		code := types.ErrPluginNotAvailable
		if podsAttached(conf.RunDir) {
			code = types.ErrLimitedConnectivity
		}
		return faultf(code, mend, err)
	}
	if err := writable(conf.RunDir); err != nil {
		return notReady("make it a folder that root may write to", fmt.Errorf("runDir %s: %w", conf.RunDir, err))
	}
	if _, err := identity.Load(conf.StateDir); errors.Is(err, identity.ErrNoKey) {
		return notReady("start wgcnid on this node", err)
	} else if err != nil {
		return notReady("see the message", err)
	}
	k, err := kernel.Open(kernel.Config{Interface: conf.Interface})
	if err != nil {
		return notReady("see the message", err)
	}
	defer k.Close()
	up, err := k.LinkUp()
	if err != nil {
		return notReady("see the message", err)
	}
	if !up && (podsAttached(conf.RunDir) || !kernel.HasWireGuard()) {
		return notReady("start wgcnid on this node", fmt.Errorf("interface %s is missing or down: pods reach no other node", conf.Interface))
	}
	return nil
}

// statusWait bounds STATUS's wait for the store.
const statusWait = 30 * time.Millisecond

// podsAttached reports whether there are pods that could be cut off. A store
// that is in use, or cannot be read, is taken to have some.
func podsAttached(runDir string) bool {
	if _, err := os.Stat(store.AttachmentsPath(runDir)); err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusWait)
	defer cancel()
	st, err := store.OpenAttachments(ctx, runDir)
	if err != nil {
		return true
	}
	defer func() { _ = st.Close() }() // nothing was written
	all, err := st.All()
	return err != nil || len(all) > 0
}

func writable(dir string) error {
	err := unix.Access(dir, unix.W_OK)
	if errors.Is(err, unix.ENOENT) { // ADD makes it
		return os.MkdirAll(dir, 0o700)
	}
	return err
}

// publicKey is the zero key while the node has none.
func publicKey(stateDir string) (wgtypes.Key, error) {
	key, err := identity.Load(stateDir)
	if errors.Is(err, identity.ErrNoKey) {
		return wgtypes.Key{}, nil
	}
	if err != nil {
		return wgtypes.Key{}, err
	}
	return key.Public(), nil
}
