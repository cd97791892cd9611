package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// FlannelSubnetFile is where flanneld tells the node's ranges.
const FlannelSubnetFile = "/run/flannel/subnet.env"

// FlannelOptions describe flannel's network.
type FlannelOptions struct {
	Backend string // required: vxlan or host-gw
	// IPv4 and IPv6 are the pods' ranges of the whole cluster; at least one.
	IPv4, IPv6 netip.Prefix
}

// Flannel is a real flanneld on every node, whose network lies in an etcd.
type Flannel struct {
	etcd   *Etcd
	prefix string
}

// NewFlannel writes flannel's network to an etcd. No flanneld runs yet.
func NewFlannel(ctx context.Context, e *Etcd, o FlannelOptions) (*Flannel, error) {
	f := &Flannel{etcd: e, prefix: path.Join("/flannel", o.Backend, o.IPv4.String(), o.IPv6.String())}
	config := map[string]any{"EnableIPv4": o.IPv4.IsValid(), "EnableIPv6": o.IPv6.IsValid(), "Backend": map[string]any{"Type": o.Backend}}
	if o.IPv4.IsValid() {
		config["Network"] = o.IPv4.String()
	}
	if o.IPv6.IsValid() {
		config["IPv6Network"] = o.IPv6.String()
	}
	text, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	_, err = e.Ctl(ctx, "put", f.prefix+"/config", string(text))
	return f, err
}

// Start starts flanneld on a node and waits until it has said what the node's
// ranges are, and has begun its work.
func (f *Flannel) Start(ctx context.Context, n *Node) (*Process, error) {
	p, err := n.Start(filepath.Join(n.cluster.BinDir, "flanneld"), "--ip-masq",
		"--etcd-endpoints", strings.Join(f.etcd.Endpoints(), ","), "--etcd-prefix", f.prefix)
	if err != nil {
		return nil, err
	}
	ctx, cancel := withDefaultTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := p.WaitFor(ctx, "Running backend."); err != nil {
		return p, fmt.Errorf("%w\n%s", err, p.Log)
	}
	return p, nil
}

// RemoveFlannel removes what flanneld leaves on a node when it ends.
func (n *Node) RemoveFlannel(ctx context.Context) error {
	_, err := n.Run(ctx, "sh", "-c", `for l in flannel.1 flannel-v6.1; do ip link delete $l 2>/dev/null; done
ip route flush root 10.244.0.0/16; ip -6 route flush root fd00:244::/32
for t in iptables ip6tables; do $t -t nat -F; $t -F; $t -t nat -X; $t -X; done 2>/dev/null
rm -rf /run/flannel`)
	return err
}
