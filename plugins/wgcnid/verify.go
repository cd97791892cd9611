package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/doctor"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
	"github.com/wgcni/wgcni/pkg/verify"
)

// verifyOptions are the flags of `wgcnid verify`.
type verifyOptions struct {
	asJSON bool
	pod    string
	count  int
}

func verifyCommand(o *options) *cobra.Command {
	var v verifyOptions
	cmd := &cobra.Command{
		Use:   "verify [PEER]",
		Short: "Show by packets that traffic to the peers is encrypted",
		Long: `Show by packets that traffic to the peers is encrypted. It pings the address that a
peer has in the tunnel, from a pod of this node where there is one, with a random
marker in each packet, and looks at all interfaces meanwhile:

  in the tunnel  packets with the marker on the WireGuard interface: they entered it
  in the clear   packets with the marker on an interface to the network; must be 0
  wireguard      WireGuard's packets to and from the peer's endpoint
  answers        the peer has decrypted them, and its answers came back

It may run while there is other traffic, and changes nothing. The exit status is 1
if something was in the clear, or if nothing could be shown.`,
		Example: "  wgcnid verify\n  wgcnid verify node-b --count 20\n  wgcnid verify --pod default/web-0\n  wgcnid verify --json | jq .encrypted",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := verifyPeers(cmd.Context(), *o, v, args)
			if err != nil {
				return err
			}
			if err := printVerification(cmd.OutOrStdout(), r, v.asJSON); err != nil {
				return err
			}
			if !r.Encrypted {
				return errors.New("not all of it could be shown to be encrypted")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&v.asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&v.pod, "pod", "", "pod of this node to send from: namespace/name, or the beginning of its container ID (default: any pod, else the node itself)")
	cmd.Flags().IntVar(&v.count, "count", 5, "packets to each peer, 1 to 1000")
	return cmd
}

// Verification is what `wgcnid verify --json` prints.
type Verification struct {
	Node      string          `json:"node"`
	Encrypted bool            `json:"encrypted"` // all of it was shown to be
	From      string          `json:"from"`      // the pod or the node that sent
	Watched   []string        `json:"watched"`   // interfaces on which nothing may be in the clear
	Missed    int             `json:"missed"`    // packets that could not be looked at
	Peers     []verify.Result `json:"peers"`
}

func verifyPeers(ctx context.Context, o options, v verifyOptions, names []string) (out Verification, err error) {
	if v.count < 1 || v.count > 1000 {
		return out, fmt.Errorf("--count: %d is out of range: use 1 to 1000", v.count)
	}
	c, err := o.loadLast()
	if err != nil {
		return out, err
	}
	if os.Geteuid() != 0 {
		return out, errors.New("packets are shown to root only: run it as root")
	}
	k, err := kernel.Open(kernel.Config{Interface: c.Interface})
	if err != nil {
		return out, err
	}
	defer k.Close()
	state, err := k.Observe()
	if err != nil {
		return out, err
	}
	if state.Link.Name == "" {
		return out, fmt.Errorf("interface %s is missing, so that nothing can be encrypted: start wgcnid, or see what `wgcnid doctor` says", c.Interface)
	}
	known, _, err := store.LoadKnown(ctx, c.StateDir)
	if err != nil {
		return out, err
	}
	vo := verify.Options{Count: v.count, Tunnels: []string{c.Interface}}
	if state.Spare.Link.Name != "" {
		vo.Tunnels = append(vo.Tunnels, state.Spare.Link.Name)
	}
	if vo.Targets, err = verifyTargets(state, known.Records, c.NodeName, names); err != nil {
		return out, err
	}
	pods, err := localPods(ctx, c)
	if err != nil {
		return out, err
	}
	out.Node, out.From = c.NodeName, "node "+c.NodeName
	from, err := choosePod(pods, v.pod, vo.Targets)
	if err != nil {
		return out, err
	}
	if from != nil {
		vo.Namespace = from.Sandbox
		out.From = fmt.Sprintf("pod %s (%s)", cmp.Or(from.Pod, from.ContainerID), strings.Join(texts(from.Addresses), " "))
	}
	if vo.Watched, err = towardsNetwork(c.Interface, c.FwMark, pods, vo.Targets); err != nil {
		return out, err
	}
	out.Watched = vo.Watched
	out.Peers, out.Missed, err = verify.Run(ctx, vo)
	out.Encrypted = len(out.Peers) > 0 && !slices.ContainsFunc(out.Peers, func(r verify.Result) bool { return r.Verdict != verify.Encrypted })
	return out, err
}

// verifyTargets are the peers of that name, or all that have an address in the
// tunnel and run wgcnid.
func verifyTargets(s mesh.State, records registry.Snapshot, self string, names []string) (out []verify.Target, err error) {
	var all []string
	for _, r := range records.Records() {
		if r.Left || r.Name == self {
			continue
		}
		i := slices.IndexFunc(s.Peers, func(p mesh.Peer) bool { return p.PublicKey == r.PublicKey })
		if i < 0 || len(r.Via) > 0 && len(names) == 0 { // a plain machine may be asleep
			continue
		}
		all = append(all, r.Name)
		address := doctor.TunnelAddress(r, s.Peers[i], s.Routes)
		if len(names) > 0 && r.Name != names[0] || !address.IsValid() {
			continue
		}
		endpoint := s.Peers[i].Endpoint
		if p, ok := s.PeerFor(address); ok { // by the second interface, while keys are replaced
			endpoint = p.Endpoint
		}
		out = append(out, verify.Target{Name: r.Name, Address: address, Endpoint: endpoint})
	}
	switch {
	case len(out) > 0:
		return out, nil
	case len(names) > 0 && slices.Contains(all, names[0]):
		return nil, fmt.Errorf("%s has no address that the kernel's routes lead to through the tunnel: `wgcnid doctor %s` says why", names[0], names[0])
	case len(names) > 0:
		return nil, fmt.Errorf("this node has no peer %q: it has %s", names[0], few(all, "none"))
	}
	if len(all) > 0 {
		return nil, fmt.Errorf("the kernel's routes lead through the tunnel to none of the peers (%s): `wgcnid doctor` says why", few(all, "none"))
	}
	return nil, errors.New("this node has no peers yet: there is nothing to send to")
}

// localPods are the pods whose namespaces are still there.
func localPods(ctx context.Context, c config.Config) ([]store.Attachment, error) {
	st, err := store.OpenAttachments(ctx, c.RunDir)
	if err != nil {
		return nil, err
	}
	defer st.Close()
	pods, err := st.All()
	return slices.DeleteFunc(pods, func(a store.Attachment) bool { return a.Sandbox == "" || kernel.SandboxID(a.Sandbox) == 0 }), err
}

// choosePod is the pod that was asked for, else one that has an address of each
// family that is sent to, else nil: the node itself.
func choosePod(pods []store.Attachment, wish string, targets []verify.Target) (*store.Attachment, error) {
	var names []string
	for i, at := range pods {
		if wish != "" && (at.Pod == wish || strings.HasPrefix(at.ContainerID, wish)) {
			return &pods[i], nil
		}
		names = append(names, cmp.Or(at.Pod, at.ContainerID))
	}
	if wish != "" {
		return nil, fmt.Errorf("there is no pod %q on this node: there are %s", wish, few(names, "none"))
	}
	for i, at := range pods {
		reaches := func(t verify.Target) bool {
			return slices.ContainsFunc(at.Addresses, func(a netip.Addr) bool { return a.Is4() == t.Address.Is4() })
		}
		if !slices.ContainsFunc(targets, func(t verify.Target) bool { return !reaches(t) }) {
			return &pods[i], nil
		}
	}
	return nil, nil
}

// towardsNetwork are the interfaces on which nothing of ours may be in the clear:
// all but loopback, the tunnel, and those that lead to pods of this node. What leads
// to a peer's endpoint is among them, whatever else it is.
func towardsNetwork(tunnel string, mark uint32, pods []store.Attachment, targets []verify.Target) ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	toPods, toPeers := map[int]bool{}, map[int]bool{}
	for _, at := range pods {
		for _, a := range at.Addresses {
			if routes, err := netlink.RouteGet(a.AsSlice()); err == nil && len(routes) > 0 {
				toPods[routes[0].LinkIndex] = true
			}
		}
	}
	for _, t := range targets {
		if !t.Endpoint.IsValid() {
			continue
		}
		routes, err := netlink.RouteGetWithOptions(t.Endpoint.Addr().AsSlice(), &netlink.RouteGetOptions{Mark: mark})
		if err == nil && len(routes) > 0 {
			toPeers[routes[0].LinkIndex] = true
		}
	}
	var out []string
	for _, l := range links {
		a := l.Attrs()
		own := a.Flags&net.FlagLoopback != 0 || a.Name == tunnel || a.Name == mesh.SpareInterface(tunnel) || toPods[a.Index] || toPods[a.MasterIndex]
		if a.Flags&net.FlagUp != 0 && (toPeers[a.Index] || !own) {
			out = append(out, a.Name)
		}
	}
	slices.Sort(out)
	return out, nil
}

func printVerification(w io.Writer, v Verification, asJSON bool) error {
	if asJSON {
		return printJSON(w, v)
	}
	var b strings.Builder
	clear, shown := 0, 0
	for _, r := range v.Peers {
		switch r.Verdict {
		case verify.Plaintext:
			clear++
		case verify.Encrypted:
			shown++
		}
	}
	switch {
	case clear > 0:
		fmt.Fprintf(&b, "NOT encrypted: traffic to %d of %s was seen in the clear.\n", clear, counted(len(v.Peers), "peer", "peers"))
	case shown == len(v.Peers):
		fmt.Fprintf(&b, "Encrypted: traffic to %s, and their answers; nothing was seen in the clear.\n", counted(shown, "peer", "peers"))
	default:
		fmt.Fprintf(&b, "Not shown for %d of %s; nothing was seen in the clear.\n", len(v.Peers)-shown, counted(len(v.Peers), "peer", "peers"))
	}
	fmt.Fprintf(&b, "sent from  %s\nwatched    %s\n\n", v.From, few(v.Watched, "no interface"))
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PEER\tADDRESS\tSENT\tANSWERS\tIN THE TUNNEL\tIN THE CLEAR\tWIREGUARD OUT\tIN\tVERDICT")
	for _, r := range v.Peers {
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n", r.Peer, r.Address, r.Sent, r.Answered, r.InTunnel, r.InClear, r.WireGuardOut, r.WireGuardIn, r.Verdict)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, r := range v.Peers {
		if r.Reason != "" {
			fmt.Fprintf(&b, "%s: %s\n", r.Peer, oneLine(r.Reason))
		}
	}
	_, err := io.WriteString(w, printable(b.String()))
	return err
}
