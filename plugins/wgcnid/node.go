package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	current "github.com/containernetworking/cni/pkg/types/100"
	"google.golang.org/grpc/grpclog"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/kernel/userspace"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/registry/etcd"
	"github.com/wgcni/wgcni/pkg/registry/file"
	"github.com/wgcni/wgcni/pkg/store"
)

// openStore is the one place that knows which stores there are.
func openStore(r config.Registry) registry.Store {
	if r.Type == config.RegistryEtcd {
		// What gRPC would say on stderr comes as an error too.
		grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
		return etcd.New(etcd.Config(r.Etcd))
	}
	return file.New(r.Path)
}

// openRegistry opens the registry, and trusts whom the configuration trusts.
func openRegistry(c config.Config) (*registry.Registry, error) {
	trust, err := reconcile.ReadTrust(c)
	return registry.New(openStore(c.Registry), trust), err
}

// openKernel connects to the kernel, with userspace WireGuard for one that has none.
func openKernel(c config.Config) (*kernel.Kernel, error) {
	return kernel.Open(kernel.Config{
		Interface:  c.Interface,
		PrivateKey: identity.Revealer(c.StateDir),
		StartTunnel: func(name string, mtu int) error {
			return userspace.Start(name, mtu, tunnelLog(c, name))
		},
	})
}

// tunnelLog is where a tunnel process logs, and beside which it counts.
func tunnelLog(c config.Config, name string) string {
	file := "tunnel.log"
	if name != c.Interface { // the second one, while keys are rotated
		file = "tunnel-" + name + ".log"
	}
	return filepath.Join(c.RunDir, file)
}

// newLoop wires up the loop of a node.
func newLoop(o options, c config.Config, k *kernel.Kernel, log *slog.Logger) (*reconcile.Loop, error) {
	keys, err := identity.LoadOrCreateKeys(c.StateDir, time.Now())
	if err != nil {
		return nil, err
	}
	r, err := openRegistry(c)
	if err != nil {
		return nil, err
	}
	loop := &reconcile.Loop{
		Load:     o.load,
		Keys:     keys,
		Kernel:   k,
		Registry: r,
		Resolver: &reconcile.Resolver{Lookup: net.DefaultResolver.LookupNetIP, Changed: func() {}},
		Log:      log,
		Now:      time.Now,
		Resync:   o.resync,
		Adopt:    cachedAttachments,
		Report:   func(r reconcile.Report) { writeReport(c.RunDir, r, log) },
	}
	k.PresharedKey = loop.PresharedKey
	return loop, nil
}

func reportPath(runDir string) string { return filepath.Join(runDir, "helper.json") }

// writeReport leaves for `wgcnid status` what only the helper knows.
func writeReport(runDir string, r reconcile.Report, log *slog.Logger) {
	text, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = durable.Replace(reportPath(runDir), text, 0o600)
	}
	if err != nil {
		log.Warn("cannot write the report for `wgcnid status`", "error", err)
	}
}

func readReport(runDir string) (r reconcile.Report, err error) {
	text, err := os.ReadFile(reportPath(runDir))
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(text, &r)
}

// cachedAttachments reads libcni's result cache: pods that were there before
// wgcni, or that a damaged store has lost.
func cachedAttachments(c config.Config) ([]store.Attachment, error) {
	return adoptable(libcni.CacheDir, c)
}

func adoptable(cacheDir string, c config.Config) ([]store.Attachment, error) {
	cni := libcni.NewCNIConfigWithCacheDir(nil, cacheDir, nil)
	cached, err := cni.GetCachedAttachments("")
	if err != nil {
		return nil, err
	}
	var out []store.Attachment
	var errs []error
	for _, a := range cached {
		if a.NetNS != "" && kernel.SandboxID(a.NetNS) == 0 {
			continue // the pod is gone
		}
		list, err := libcni.ConfListFromBytes(a.Config)
		if err == nil && a.Network != c.Name && !chainsWgcni(list) {
			continue
		}
		var at store.Attachment
		if err == nil {
			at, err = fromCache(cni, list, a)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("cached result of %s: %w", a.ContainerID, err))
			continue
		}
		if at.SandboxID == 0 {
			continue // gone as well, or nobody knows where it is
		}
		at.Since = cachedSince(cacheDir, a)
		out = append(out, at)
	}
	return out, errors.Join(errs...)
}

// chainsWgcni is true of the networks whose pods ADD would have recorded. Pods of
// our own network may be older than its wgcni entry.
func chainsWgcni(list *libcni.NetworkConfigList) bool {
	return slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Type == config.PluginType })
}

// cachedSince is when libcni kept a result, which is just after the ADD; zero if
// that cannot be told.
func cachedSince(cacheDir string, a *libcni.NetworkAttachment) time.Time {
	info, err := os.Stat(filepath.Join(cacheDir, "results", a.Network+"-"+a.ContainerID+"-"+a.IfName))
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

func fromCache(cni *libcni.CNIConfig, list *libcni.NetworkConfigList, a *libcni.NetworkAttachment) (store.Attachment, error) {
	cached, err := cni.GetNetworkListCachedResult(list, &libcni.RuntimeConf{ContainerID: a.ContainerID, IfName: a.IfName, NetNS: a.NetNS})
	if err != nil || cached == nil {
		return store.Attachment{}, errors.Join(err, errors.New("no result"))
	}
	result, err := current.NewResultFromResult(cached)
	if err != nil {
		return store.Attachment{}, err
	}
	netns := a.NetNS
	if netns == "" {
		netns = resultSandbox(result, a.IfName)
	}
	at := store.Attachment{
		Network: a.Network, ContainerID: a.ContainerID, IfName: a.IfName,
		Sandbox: netns, SandboxID: kernel.SandboxID(netns),
	}
	at.Addresses = store.ResultAddresses(result, a.IfName)
	return at, nil
}

// resultSandbox is the network namespace that a CNI result has a pod's interface in.
// libcni caches the pod's own since 1.2 only; containerd 1 has an older one.
func resultSandbox(result *current.Result, ifname string) string {
	for _, i := range result.Interfaces {
		if i.Name == ifname && i.Sandbox != "" {
			return i.Sandbox
		}
	}
	return ""
}

// teardown takes away all of ours that the kernel holds, and what the node kept
// for this boot. Routes go first and the guard last, see mesh.Diff.
func teardown(_ context.Context, c config.Config, k *kernel.Kernel, log *slog.Logger) error {
	if err := reconcile.Clear(k, log); err != nil {
		return err
	}
	// What was known of the mesh would build the tunnel again at the next ADD.
	for _, path := range []string{store.KnownPath(c.StateDir), store.KnownPath(c.StateDir) + ".lock"} {
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return removeFolder(c.RunDir, "")
}
