package cluster

import (
	"context"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
)

// ConfDir is where a node's network configurations are.
const ConfDir = "/etc/cni/net.d"

// PodOptions are what a container runtime may tell the plugins about a pod.
type PodOptions struct {
	IfName         string            // optional: the pod's interface; eth0 by default
	Args           map[string]string // optional: CNI_ARGS, such as K8S_POD_NAME
	CapabilityArgs string            // optional: CAP_ARGS, a JSON object
	PluginDir      string            // optional: folder of the plugins; the cluster's BinDir by default
	Sysctls        map[string]string // optional: keys below net of the pod's namespace, set before it is attached
}

// Pod is a network namespace that cnitool has attached to a network.
type Pod struct {
	Name    string
	Node    *Node
	Network string // the conflist's name
	Netns   string // path inside the node
	IfName  string

	Result Result
	// Raw is the result as the plugins gave it.
	Raw string

	env []string
}

// Result is the part of a CNI result that traffic needs. The field names are
// the CNI specification's.
type Result struct {
	CNIVersion string `json:"cniVersion"`
	Interfaces []struct {
		Name    string `json:"name"`
		MAC     string `json:"mac"`
		MTU     int    `json:"mtu"`
		Sandbox string `json:"sandbox"`
	} `json:"interfaces"`
	IPs []ResultIP `json:"ips"`
}

// ResultIP is one address of a CNI result.
type ResultIP struct {
	Address   netip.Prefix `json:"address"`
	Gateway   netip.Addr   `json:"gateway"`
	Interface *int         `json:"interface"`
}

// ContainerID returns the container ID that cnitool derives from the path of a
// network namespace (cni v1.3.1, cnitool/cmd/root.go).
func ContainerID(netns string) string {
	sum := sha512.Sum512([]byte(netns))
	return fmt.Sprintf("cnitool-%x", sum[:10])
}

// NetnsPath is where `ip netns add` puts a namespace.
func NetnsPath(name string) string { return filepath.Join("/run/netns", name) }

// WriteConflist writes a network configuration to the node's [ConfDir]. The
// file name, such as 10-pods.conflist, decides the order.
func (n *Node) WriteConflist(file, content string) error {
	return n.WriteFile(filepath.Join(ConfDir, file), content, 0o644)
}

// AddPod makes a network namespace and attaches it with cnitool. When that
// fails it detaches and removes it, as a runtime does. Without a network the
// namespace stays unattached.
func (n *Node) AddPod(ctx context.Context, network, name string, o PodOptions) (*Pod, error) {
	p := &Pod{Name: name, Node: n, Network: network, Netns: NetnsPath(name), IfName: o.IfName}
	if p.IfName == "" {
		p.IfName = "eth0"
	}
	p.env = []string{"CNI_IFNAME=" + p.IfName}
	if len(o.Args) > 0 {
		var pairs []string
		for k, v := range o.Args {
			pairs = append(pairs, k+"="+v)
		}
		p.env = append(p.env, "CNI_ARGS="+strings.Join(pairs, ";"))
	}
	if o.CapabilityArgs != "" {
		p.env = append(p.env, "CAP_ARGS="+o.CapabilityArgs)
	}
	if o.PluginDir != "" {
		p.env = append(p.env, "CNI_PATH="+o.PluginDir)
	}
	if _, err := n.Run(ctx, "ip", "netns", "add", name); err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, err)
	}
	if err := p.attach(ctx, o.Sysctls); err != nil {
		// The caller's time may be up, the cleaning still has to be done.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
		defer cancel()
		return nil, errors.Join(fmt.Errorf("add pod %s: %w", name, err), p.Delete(ctx))
	}
	return p, nil
}

func (p *Pod) attach(ctx context.Context, sysctls map[string]string) error {
	err := p.Do(func() error {
		for key, value := range sysctls {
			if err := sysctl(key, value); err != nil {
				return err
			}
		}
		return loopbackUp()
	})
	if err != nil {
		return err
	}
	if p.Network == "" {
		return nil
	}
	if p.Raw, err = p.CNI(ctx, "add"); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(p.Raw), &p.Result); err != nil {
		return fmt.Errorf("parse the CNI result %s: %w", p.Raw, err)
	}
	return nil
}

// CNI runs cnitool on the node for a network namespace, and returns what it
// printed to stdout. The verb is add, check, del, gc or status.
func (n *Node) CNI(ctx context.Context, verb, network, netns string) (string, error) {
	return n.cnitool(ctx, verb, network, netns, nil)
}

// CNI runs cnitool for the pod, with the options that it was added with.
func (p *Pod) CNI(ctx context.Context, verb string) (string, error) {
	return p.Node.cnitool(ctx, verb, p.Network, p.Netns, p.env)
}

func (n *Node) cnitool(ctx context.Context, verb, network, netns string, env []string) (string, error) {
	cmd := n.CNICommand(ctx, verb, network, netns)
	cmd.Env = append(cmd.Env, env...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		// cobra explains the command line after each error.
		text, _, _ := strings.Cut(stderr.String(), "Usage:\n")
		return stdout.String(), fmt.Errorf("cnitool %s %s %s on %s: %w: %s", verb, network, netns, n.Name, err, strings.TrimSpace(text))
	}
	return stdout.String(), nil
}

// CNICommand returns the command that CNI runs, for those who need its
// environment, output or process.
func (n *Node) CNICommand(ctx context.Context, verb, network, netns string) *exec.Cmd {
	cmd := n.Command(ctx, filepath.Join(n.cluster.BinDir, "cnitool"), verb, network, netns)
	cmd.Env = append(cmd.Env, "NETCONFPATH="+ConfDir, "CNI_PATH="+n.cluster.BinDir)
	return cmd
}

// Delete detaches the pod with cnitool and removes its namespace, even when
// the former fails.
func (p *Pod) Delete(ctx context.Context) error {
	var err error
	if p.Network != "" {
		_, err = p.CNI(ctx, "del")
	}
	if _, nerr := p.Node.Run(ctx, "ip", "netns", "delete", p.Name); nerr != nil {
		err = errors.Join(err, nerr)
	}
	if err != nil {
		return fmt.Errorf("delete pod %s: %w", p.Name, err)
	}
	return nil
}

// IPv4 returns the pod's first IPv4 address, or the zero Addr.
func (p *Pod) IPv4() netip.Addr { return p.addr(netip.Addr.Is4) }

// IPv6 returns the pod's first IPv6 address, or the zero Addr.
func (p *Pod) IPv6() netip.Addr { return p.addr(netip.Addr.Is6) }

func (p *Pod) addr(is func(netip.Addr) bool) netip.Addr {
	for _, ip := range p.Result.IPs {
		if is(ip.Address.Addr()) {
			return ip.Address.Addr()
		}
	}
	return netip.Addr{}
}

// ContainerID returns the container ID that the plugins know the pod by.
func (p *Pod) ContainerID() string { return ContainerID(p.Netns) }

// String returns node and name of the pod.
func (p *Pod) String() string { return p.Node.Name + "/" + p.Name }

// Do calls f on an operating system thread in the pod's network namespace; see
// [Endpointer].
func (p *Pod) Do(f func() error) error { return doIn(p.Node.Path(p.Netns), f) }

// Command returns a command that runs in the pod's network namespace, and in
// all others of its node. See [Machine.Command]; /sys is the node's.
func (p *Pod) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return p.Node.command(ctx, p.Node.Path(p.Netns), name, args)
}

// Run runs a command in the pod's network namespace; see [Machine.Run].
func (p *Pod) Run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := output(p.Command(ctx, name, args...))
	if err != nil {
		return out, fmt.Errorf("in %s: %w", p, err)
	}
	return out, nil
}
