package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// AddImage makes an image of a container's files, and its program the entry point.
func (c *Containerd) AddImage(ctx context.Context, name string, of Container) error {
	var files []file
	for inside, at := range of.Image {
		content, err := os.ReadFile(at)
		if err != nil {
			return err
		}
		files = append(files, file{strings.TrimPrefix(inside, "/"), 0o755, content})
	}
	const archive = "/run/image.tar"
	if err := writeImage(c.node.Path(archive), name, of.Args[0], files...); err != nil {
		return err
	}
	_, err := c.node.Run(ctx, "ctr", "--namespace", "k8s.io", "images", "import", "--snapshotter", "native", archive)
	return err
}

// RuntimeContainer is a container that containerd runs, alone in a pod that has the
// node's network.
type RuntimeContainer struct {
	ID string

	containerd *Containerd
	sandbox    string
	log        string // on the node
}

// The parts of /proc that kubelet has a runtime hide, and make read-only, unless a
// pod says otherwise (pkg/securitycontext/util.go of Kubernetes).
var (
	maskedPaths   = []string{"/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// StartContainer starts a container as kubelet has it done: under the runtime's own
// seccomp profile, which is RuntimeDefault.
func (c *Containerd) StartContainer(ctx context.Context, name, image string, o Container) (*RuntimeContainer, error) {
	namespaces := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}
	seccomp := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	logs := filepath.Join("/run/logs", name)
	for _, m := range o.Mounts { // which is kubelet's part
		if err := os.MkdirAll(c.node.Path(m.Source), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(c.node.Path(logs), 0o755); err != nil {
		return nil, err
	}
	pod := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "wgcni", Uid: c.node.Name + "-" + name}, LogDirectory: logs,
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: namespaces, Seccomp: seccomp}},
	}
	sandbox, err := c.runtime().RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return nil, fmt.Errorf("run the pod of %s on %s: %w", name, c.node.Name, err)
	}
	config := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: image}, Args: o.Args[1:], LogPath: "log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			Capabilities: &cri.Capability{AddCapabilities: o.Capabilities, DropCapabilities: []string{"ALL"}},
			RunAsUser:    &cri.Int64Value{Value: int64(o.UID)}, RunAsGroup: &cri.Int64Value{Value: int64(o.UID)},
			ReadonlyRootfs: !o.Writable, NoNewPrivs: o.NoNewPrivs, NamespaceOptions: namespaces, Seccomp: seccomp,
			MaskedPaths: maskedPaths, ReadonlyPaths: readonlyPaths,
		}},
	}
	for _, e := range o.Env {
		key, value, _ := strings.Cut(e, "=")
		config.Envs = append(config.Envs, &cri.KeyValue{Key: key, Value: []byte(value)})
	}
	for _, m := range o.Mounts {
		propagation := cri.MountPropagation_PROPAGATION_PRIVATE
		if m.Propagates {
			propagation = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		}
		config.Mounts = append(config.Mounts, &cri.Mount{HostPath: m.Source, ContainerPath: m.Target, Readonly: m.ReadOnly, Propagation: propagation})
	}
	for _, d := range o.Devices {
		config.Devices = append(config.Devices, &cri.Device{HostPath: d, ContainerPath: d, Permissions: "rwm"})
	}
	made, err := c.runtime().CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: sandbox.GetPodSandboxId(), Config: config, SandboxConfig: pod})
	if err != nil {
		return nil, fmt.Errorf("create container %s on %s: %w", name, c.node.Name, err)
	}
	if _, err := c.runtime().StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.GetContainerId()}); err != nil {
		return nil, fmt.Errorf("start container %s on %s: %w", name, c.node.Name, err)
	}
	return &RuntimeContainer{ID: made.GetContainerId(), containerd: c, sandbox: sandbox.GetPodSandboxId(), log: filepath.Join(logs, "log")}, nil
}

// Log is what the container has written.
func (r *RuntimeContainer) Log() string {
	text, err := r.containerd.node.ReadFile(r.log)
	if err != nil {
		return err.Error()
	}
	return text
}

// Wait waits for the container's end and returns its exit status.
func (r *RuntimeContainer) Wait(ctx context.Context) (status int, err error) {
	err = Poll(ctx, "container "+r.ID+" to end", func() error {
		s, err := r.containerd.runtime().ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: r.ID})
		if err == nil && s.GetStatus().GetState() != cri.ContainerState_CONTAINER_EXITED {
			err = fmt.Errorf("it is %s: %s", s.GetStatus().GetState(), r.Log())
		}
		status = int(s.GetStatus().GetExitCode())
		return err
	})
	return status, err
}

// Stop ends the container with SIGTERM, and removes it with its pod.
func (r *RuntimeContainer) Stop(ctx context.Context) error {
	if _, err := r.containerd.runtime().StopContainer(ctx, &cri.StopContainerRequest{ContainerId: r.ID, Timeout: 10}); err != nil {
		return fmt.Errorf("stop container %s: %w", r.ID, err)
	}
	return r.containerd.DeletePod(ctx, r.sandbox)
}
