package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/store"
)

// delTimeout keeps DEL within a second, whatever it waits for.
const delTimeout = 700 * time.Millisecond

// del forgets the pod. It never fails: DELs run in reverse order and stop at the
// first error, so that ours would leak the pod's address in the primary's IPAM
// (containerd#12130, cilium#8313). What it could not do, the helper's sweep does.
func del(args *skel.CmdArgs) error {
	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("internal fault: %v", p)
			}
		}()
		ctx, cancel := context.WithTimeout(context.Background(), delTimeout)
		defer cancel()
		done <- detachOne(ctx, config.RunDirOf(args.StdinData), validConfig(args.StdinData), args.ContainerID, args.IfName)
	}()
	var err error
	select {
	case err = <-done:
	case <-time.After(delTimeout + 100*time.Millisecond):
		err = errors.New("not done in time")
	}
	if err != nil {
		warn("DEL of %s %s: %v; left to wgcnid, which forgets pods whose network namespace is gone", args.ContainerID, args.IfName, err)
	}
	logVerb("DEL", args, err)
	return nil
}

// validConfig is nil for a configuration that ADD would refuse: DEL then does
// what it can without.
func validConfig(stdin []byte) *config.Config {
	conf, err := config.Parse(stdin)
	if err != nil {
		return nil
	}
	return &conf
}

// detachOne is detach for one attachment. It does not read the others if it
// needs nothing of the kernel.
func detachOne(ctx context.Context, runDir string, conf *config.Config, containerID, ifname string) error {
	return withStore(ctx, runDir, func(st *store.Attachments) error {
		at, there, err := st.Get(containerID, ifname)
		if err == nil && !there {
			return nil
		}
		applied, ok, _ := st.Applied()
		if err == nil && ok && conf != nil && len(reconcile.PodChange(*conf, applied.Prefixes, nil, []store.Attachment{at})) == 0 {
			return st.Delete(at)
		}
		return detachFrom(st, conf, sameAs(store.Attachment{ContainerID: containerID, IfName: ifname}))
	})
}

// detach removes the attachments that match, and takes back in the kernel the
// addresses that no other attachment holds. Without a configuration only the
// store is changed.
func detach(ctx context.Context, runDir string, conf *config.Config, gone func(store.Attachment) bool) error {
	return withStore(ctx, runDir, func(st *store.Attachments) error { return detachFrom(st, conf, gone) })
}

func withStore(ctx context.Context, runDir string, f func(*store.Attachments) error) error {
	if _, err := os.Stat(store.AttachmentsPath(runDir)); errors.Is(err, fs.ErrNotExist) {
		return nil // nothing was ever attached since this node booted
	}
	st, err := store.OpenAttachments(ctx, runDir)
	if err != nil {
		return err
	}
	err = f(st)
	if d := st.Damaged(); d != nil {
		warn("%v", d)
	}
	return errors.Join(err, st.Close())
}

func detachFrom(st *store.Attachments, conf *config.Config, gone func(store.Attachment) bool) error {
	before, err := st.All()
	if err != nil {
		return err
	}
	after := slices.DeleteFunc(slices.Clone(before), gone)
	if len(after) == len(before) {
		return nil
	}
	leaving := slices.DeleteFunc(slices.Clone(before), func(at store.Attachment) bool { return !gone(at) })
	if err := st.Delete(leaving...); err != nil {
		return err
	}
	applied, ok, err := st.Applied()
	if err != nil || !ok || conf == nil {
		return err
	}
	ops := reconcile.PodChange(*conf, applied.Prefixes, before, after)
	if len(ops) == 0 {
		return nil
	}
	k, err := kernel.Open(kernel.Config{Interface: conf.Interface})
	if err != nil {
		return err
	}
	defer k.Close()
	return k.Apply(ops)
}

// gc forgets the attachments of this network that the runtime does not list.
func gc(args *skel.CmdArgs) error {
	conf, err := config.Parse(args.StdinData)
	if err != nil {
		return err
	}
	valid, given, err := validAttachments(args.StdinData)
	if err != nil || !given {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	return detach(ctx, conf.RunDir, &conf, func(at store.Attachment) bool {
		return at.Network == conf.Name && !valid[types.GCAttachment{ContainerID: at.ContainerID, IfName: at.IfName}]
	})
}

// validAttachments reads the list that the runtime gives. An empty list says that
// none is valid; a list that is missing, or null, says nothing at all. The CNI
// spec and libcni disagree about the key (containernetworking/cni#1101).
func validAttachments(stdin []byte) (valid map[types.GCAttachment]bool, given bool, err error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(stdin, &keys); err != nil {
		return nil, false, faultf(types.ErrDecodingFailure, "", fmt.Errorf("read the network configuration: %w", err))
	}
	valid = map[types.GCAttachment]bool{}
	for _, key := range []string{"cni.dev/valid-attachments", "cni.dev/attachments"} {
		var list []types.GCAttachment
		if err := json.Unmarshal(orNull(keys[key]), &list); err != nil {
			return nil, false, faultf(types.ErrDecodingFailure, "", fmt.Errorf("%s: %w", key, err))
		}
		for _, a := range list {
			valid[a] = true
		}
		given = given || list != nil
	}
	return valid, given, nil
}

func orNull(raw json.RawMessage) json.RawMessage {
	if raw == nil {
		return json.RawMessage("null")
	}
	return raw
}
