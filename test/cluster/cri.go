package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	containerdSocket = "/run/containerd/containerd.sock"
	containerdConfig = "/etc/containerd/config.toml"
	containerdRunc   = "/etc/containerd/runc"
	containerdImage  = "/run/pause.tar"
)

// runcScript takes out the only thing that a sandbox wants of a controller, CPU
// shares, since the machine's control groups may have none; see cgroupScript.
// containerd 1 could leave it out itself (disable_cgroup), containerd 2 can't.
const runcScript = `#!/bin/sh
for arg; do
	[ "$last" != --bundle ] || sed -i 's/"shares":2//' "$arg/config.json"
	last=$arg
done
exec runc "$@"
`

// RuntimeBinDir is where a containerd's node has its plugins: containerd is told
// one folder, which is the node's own, so that the installer may write there.
const RuntimeBinDir = "/var/lib/cni/bin"

// ContainerdOptions say which containerd to start. The zero value is Debian's.
type ContainerdOptions struct {
	Dir string // optional: folder with containerd and its shim; PATH by default
}

// Containerd is a real containerd on a node, which is asked through the CRI as
// kubelet does it. Its pods are sandboxes without containers; runc runs them, in
// control groups of the node's own.
type Containerd struct {
	*Process // the last one that was started

	node    *Node
	options ContainerdOptions
	client  *grpc.ClientConn
}

// StartContainerd starts a containerd with the image for its sandboxes, and waits
// until it answers. Its state is in /var/lib/containerd, which survives a reboot,
// and its plugins, all those of the cluster but wgcni, are in [RuntimeBinDir].
func (n *Node) StartContainerd(ctx context.Context, o ContainerdOptions) (*Containerd, error) {
	c := &Containerd{node: n, options: o}
	for _, plugin := range []string{"bridge", "host-local", "loopback"} {
		link := n.Path(filepath.Join(RuntimeBinDir, plugin))
		err := os.MkdirAll(filepath.Dir(link), 0o755)
		if err == nil {
			err = os.Symlink(filepath.Join(n.cluster.BinDir, plugin), link)
		}
		if err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("start containerd on %s: %w", n.Name, err)
		}
	}
	if err := c.Start(ctx); err != nil {
		return nil, err
	}
	if err := writePauseImage(n.Path(containerdImage), filepath.Join(n.cluster.BinDir, "containerd", "pause")); err != nil {
		return nil, err
	}
	_, err := n.Run(ctx, "ctr", "--namespace", "k8s.io", "images", "import", "--snapshotter", "native", containerdImage)
	return c, err
}

// Start starts a containerd that was stopped, killed, or whose node was rebooted.
func (c *Containerd) Start(ctx context.Context) error {
	ctx, cancel := withDefaultTimeout(ctx, time.Minute)
	defer cancel()
	err := c.start(ctx)
	if err != nil && c.Process != nil {
		err = fmt.Errorf("%w; its log:\n%s", err, c.Log)
	}
	if err != nil {
		return fmt.Errorf("start containerd on %s: %w", c.node.Name, err)
	}
	return nil
}

func (c *Containerd) start(ctx context.Context) (err error) {
	if err := c.node.WriteFile(containerdConfig, c.config(), 0o600); err != nil {
		return err
	}
	if err := c.node.WriteFile(containerdRunc, runcScript, 0o755); err != nil {
		return err
	}
	command := []string{"containerd", "--config", containerdConfig}
	if dir := c.options.Dir; dir != "" { // the shim is found by PATH
		command[0] = filepath.Join(dir, command[0])
		command = append([]string{"env", strings.Replace(searchPath, "=", "="+dir+":", 1)}, command...)
	}
	if c.Process, err = c.node.startGrouped(command[0], command[1:]...); err != nil {
		return err
	}
	if c.client != nil {
		_ = c.client.Close() // for the socket of before a reboot
	}
	if c.client, err = grpc.NewClient("unix:"+c.node.Path(containerdSocket),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}}),
	); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-c.Done():
			cancel(errors.New("it has ended"))
		case <-ctx.Done():
		}
	}()
	return Poll(ctx, "containerd to answer", func() error {
		_, err := c.runtime().Version(ctx, &cri.VersionRequest{})
		return errors.Join(err, context.Cause(ctx))
	})
}

// config is in a version that containerd 1.6 to 2.4 read. The host's /opt, which
// the machines share, is kept out of it. The snapshotter is the one that needs
// nothing of the file system below; without CAP_SYS_RESOURCE nobody may have a
// lower oom_score_adj than his parent.
func (c *Containerd) config() string {
	return fmt.Sprintf(`version = 2
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = %q
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, PauseImage, containerdRunc, RuntimeBinDir, ConfDir)
}

func (c *Containerd) runtime() cri.RuntimeServiceClient { return cri.NewRuntimeServiceClient(c.client) }

// Stop ends containerd as systemd does. Its pods go on.
func (c *Containerd) Stop(ctx context.Context) error {
	err := c.Process.Stop(ctx)
	return errors.Join(err, c.client.Close())
}

// Kill ends containerd with SIGKILL. Its pods go on.
func (c *Containerd) Kill() error {
	return errors.Join(c.Process.Kill(), c.client.Close())
}

// Version is what containerd says of itself.
func (c *Containerd) Version(ctx context.Context) (string, error) {
	v, err := c.runtime().Version(ctx, &cri.VersionRequest{})
	return v.GetRuntimeVersion(), err
}

// Ready reports whether containerd says that the node's network is ready, as
// kubelet asks every few seconds, and why it is not.
func (c *Containerd) Ready(ctx context.Context) (ready bool, message string, err error) {
	s, err := c.runtime().Status(ctx, &cri.StatusRequest{})
	if err != nil {
		return false, "", err
	}
	for _, condition := range s.GetStatus().GetConditions() {
		if condition.GetType() == "NetworkReady" {
			return condition.GetStatus(), condition.GetMessage(), nil
		}
	}
	return false, "", errors.New("containerd says nothing of NetworkReady")
}

// Network returns the network configurations that containerd has loaded, as JSON.
// It loads them again some time after a file has changed.
func (c *Containerd) Network(ctx context.Context) (string, error) {
	s, err := c.runtime().Status(ctx, &cri.StatusRequest{Verbose: true})
	return s.GetInfo()["cniconfig"], err
}

// Sandbox is a pod that containerd made.
type Sandbox struct {
	*Pod
	// ID is the container ID that the plugins are told.
	ID string

	containerd *Containerd
}

// RunPod makes a sandbox in the network that containerd has chosen.
func (c *Containerd) RunPod(ctx context.Context, name string) (*Sandbox, error) {
	ctx, cancel := withDefaultTimeout(ctx, time.Minute)
	defer cancel()
	run, err := c.runtime().RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: c.node.Name + "-" + name},
		Linux:    &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{}}},
	}})
	if err != nil {
		return nil, fmt.Errorf("run pod %s on %s: %w", name, c.node.Name, err)
	}
	return c.Sandbox(ctx, run.GetPodSandboxId())
}

// Sandbox asks containerd for one of its pods.
func (c *Containerd) Sandbox(ctx context.Context, id string) (*Sandbox, error) {
	s, err := c.runtime().PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		return nil, fmt.Errorf("ask for pod %s on %s: %w", id, c.node.Name, err)
	}
	name := s.GetStatus().GetMetadata().GetName()
	netns, err := sandboxNetns(s.GetInfo()["info"])
	if err != nil {
		return nil, fmt.Errorf("pod %s on %s: %w", name, c.node.Name, err)
	}
	p := &Pod{Name: name, Node: c.node, Network: NetworkName, IfName: "eth0", Netns: netns}
	texts := []string{s.GetStatus().GetNetwork().GetIp()}
	for _, more := range s.GetStatus().GetNetwork().GetAdditionalIps() {
		texts = append(texts, more.GetIp())
	}
	for _, text := range texts {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("pod %s on %s: %w", name, c.node.Name, err)
		}
		p.Result.IPs = append(p.Result.IPs, ResultIP{Address: netip.PrefixFrom(addr, addr.BitLen())})
	}
	return &Sandbox{Pod: p, ID: id, containerd: c}, nil
}

// sandboxNetns finds the network namespace in what a verbose status tells, which
// is an OCI runtime's configuration among other things.
func sandboxNetns(info string) (string, error) {
	var told struct {
		RuntimeSpec struct {
			Linux struct {
				Namespaces []struct{ Type, Path string }
			}
		}
	}
	if err := json.Unmarshal([]byte(info), &told); err != nil {
		return "", fmt.Errorf("parse what containerd tells: %w", err)
	}
	for _, ns := range told.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" {
			return strings.Replace(ns.Path, "/var/run/", "/run/", 1), nil
		}
	}
	return "", fmt.Errorf("containerd tells of no network namespace: %s", info)
}

// Sandboxes lists the IDs of the pods that containerd knows, ready or not.
func (c *Containerd) Sandboxes(ctx context.Context) (ids []string, err error) {
	list, err := c.runtime().ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	for _, s := range list.GetItems() {
		ids = append(ids, s.GetId())
	}
	return ids, err
}

// DeletePod stops and removes a pod, as kubelet does. containerd detaches it at
// each of the two.
func (c *Containerd) DeletePod(ctx context.Context, id string) error {
	if _, err := c.runtime().StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stop pod %s on %s: %w", id, c.node.Name, err)
	}
	if _, err := c.runtime().RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("remove pod %s on %s: %w", id, c.node.Name, err)
	}
	return nil
}

// Delete stops and removes the pod; see [Containerd.DeletePod].
func (s *Sandbox) Delete(ctx context.Context) error { return s.containerd.DeletePod(ctx, s.ID) }

// ContainerID returns the container ID that the plugins know the pod by.
func (s *Sandbox) ContainerID() string { return s.ID }
