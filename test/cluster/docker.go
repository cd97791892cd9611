package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
)

// ContainerBridge is the name of Docker's bridge.
const ContainerBridge = "docker0"

// Docker is what Docker makes on a machine, without Docker: its bridge, its
// masquerading, and its filter, which lets nobody in.
type Docker struct {
	node     *Node
	v4, v6   netip.Prefix // the bridge's own addresses
	mtu      int
	attached int
}

// StartDocker sets a machine up as dockerd would with this daemon.json, of which
// it reads bip, fixed-cidr-v6 and mtu.
func (n *Node) StartDocker(ctx context.Context, daemonJSON []byte) (*Docker, error) {
	var o struct {
		BIP         netip.Prefix `json:"bip"`
		FixedCIDRv6 netip.Prefix `json:"fixed-cidr-v6"`
		MTU         int          `json:"mtu"`
	}
	if err := json.Unmarshal(daemonJSON, &o); err != nil {
		return nil, fmt.Errorf("start docker on %s: %w", n.Name, err)
	}
	d := &Docker{node: n, v4: o.BIP, v6: netip.PrefixFrom(o.FixedCIDRv6.Addr().Next(), o.FixedCIDRv6.Bits()), mtu: o.MTU}
	script := fmt.Sprintf(`ip link add %[1]s mtu %[2]d type bridge
echo 0 >/proc/sys/net/ipv6/conf/%[1]s/accept_dad
ip address add %[3]s dev %[1]s
ip address add %[4]s dev %[1]s nodad
ip link set %[1]s up
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
%[5]s%[6]s`, ContainerBridge, d.mtu, d.v4, d.v6, dockerRules("iptables", d.v4.Masked()), dockerRules("ip6tables", d.v6.Masked()))
	if _, err := n.Run(ctx, "sh", "-e", "-c", script); err != nil {
		return nil, fmt.Errorf("start docker on %s: %w", n.Name, err)
	}
	return d, nil
}

// dockerRules are those of Docker 28.5 for its default bridge
// (integration/network/bridge/iptablesdoc/generated/new-daemon.md in moby), with
// the policy that it sets where it has switched forwarding on.
func dockerRules(iptables string, subnet netip.Prefix) string {
	var b strings.Builder
	for _, line := range []string{
		"-t nat -A POSTROUTING -s " + subnet.String() + " ! -o docker0 -j MASQUERADE",
		"-P FORWARD DROP", "-N DOCKER", "-N DOCKER-BRIDGE", "-N DOCKER-CT", "-N DOCKER-FORWARD", "-N DOCKER-USER",
		"-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-FORWARD",
		"-A DOCKER ! -i docker0 -o docker0 -j DROP",
		"-A DOCKER-BRIDGE -o docker0 -j DOCKER",
		"-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
		"-A DOCKER-FORWARD -j DOCKER-CT", "-A DOCKER-FORWARD -j DOCKER-BRIDGE", "-A DOCKER-FORWARD -i docker0 -j ACCEPT",
	} {
		fmt.Fprintf(&b, "%s -w %s\n", iptables, line)
	}
	return b.String()
}

// AddContainer attaches a container to the bridge, with the next free addresses.
func (d *Docker) AddContainer(ctx context.Context, name string) (*Pod, error) {
	p, err := d.node.AddPod(ctx, "", name, PodOptions{})
	if err != nil {
		return nil, err
	}
	d.attached++
	gateways := []netip.Prefix{d.v4, d.v6}
	script := fmt.Sprintf("ip link add %[1]s mtu %[2]d type veth peer name eth0 mtu %[2]d netns %[1]s\nip link set %[1]s master %[3]s up\nip -n %[1]s link set eth0 up\n", name, d.mtu, ContainerBridge)
	for _, gateway := range gateways {
		a := gateway.Addr()
		for range d.attached {
			a = a.Next()
		}
		own := netip.PrefixFrom(a, gateway.Bits())
		p.Result.IPs = append(p.Result.IPs, ResultIP{Address: own, Gateway: gateway.Addr()})
		noDAD := ""
		if a.Is6() {
			noDAD = " nodad"
		}
		script += fmt.Sprintf("ip -n %[1]s address add %[2]s dev eth0%[4]s\nip -n %[1]s route add default via %[3]s\n", name, own, gateway.Addr(), noDAD)
	}
	if _, err := d.node.Run(ctx, "sh", "-e", "-c", script); err != nil {
		return nil, fmt.Errorf("add container %s: %w", name, err)
	}
	return p, nil
}
