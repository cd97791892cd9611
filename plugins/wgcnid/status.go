package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/graph"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

func statusCommand(o *options) *cobra.Command {
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show whether pod traffic is encrypted, and every peer",
		Long: `Show whether pod traffic is encrypted, and every peer. What is shown is read from
the kernel, so that it is true whether wgcnid runs or not.`,
		Example: "  wgcnid status\n  wgcnid status --watch\n  wgcnid status --json | jq '.peers[] | select(.state != \"connected\")'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			for {
				s, err := readStatus(cmd.Context(), *o)
				if err != nil {
					return err
				}
				if watch && !asJSON {
					fmt.Fprint(out, "\x1b[H\x1b[2J") // home, clear
				}
				if err := printStatus(out, s, asJSON); err != nil || !watch {
					return err
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(time.Second):
				}
			}
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&watch, "watch", false, "print it again every second, until Ctrl-C")
	return cmd
}

// Status is what `wgcnid status --json` prints.
type Status struct {
	Time       time.Time       `json:"time"`
	Node       string          `json:"node"`
	PublicKey  string          `json:"publicKey,omitempty"`
	KeySince   time.Time       `json:"keySince,omitzero"` // when the key came into use
	Encryption mesh.Encryption `json:"encryption"`
	Answer     Answer          `json:"answer"`    // to whether its traffic is encrypted
	Verdict    string          `json:"verdict"`   // one sentence
	OK         bool            `json:"ok"`        // the kernel holds the plan, tunnel included
	Interface  *LinkStatus     `json:"interface"` // null: there is none
	Helper     bool            `json:"helperRunning"`
	Registry   string          `json:"registry"`
	Seal       *SealStatus     `json:"seal"` // null: whoever can write to the registry is trusted
	// Forwarding says why packets are lost that this machine should carry for others; "" if they are not.
	Forwarding string         `json:"forwarding,omitempty"`
	Pods       int            `json:"pods"`
	Prefixes   []netip.Prefix `json:"prefixes,omitempty"` // this node's own
	Machine    *MachineStatus `json:"machine,omitempty"`  // null: it is a node of a cluster
	Peers      []PeerStatus   `json:"peers"`
	Dropped    kernel.Drops   `json:"plaintextDropped"`
	Pending    []string       `json:"pending,omitempty"` // ops that the kernel still lacks
	Nodes      *NodeTraffic   `json:"nodeTraffic"`       // null: it is not encrypted
	// Report is the helper's last word, and so may be old.
	Report *reconcile.Report `json:"report,omitempty"`
}

// LinkStatus is the WireGuard interface.
type LinkStatus struct {
	Name       string `json:"name"`
	MTU        int    `json:"mtu"` // bytes
	Up         bool   `json:"up"`
	ListenPort int    `json:"listenPort"`
	// Fragments says why full-size packets leave in fragments; "" if they do not.
	Fragments string `json:"fragments,omitempty"`
}

// PeerStatus is one line of the table.
type PeerStatus struct {
	Name          string         `json:"name"`
	PublicKey     string         `json:"publicKey"`
	PresharedKey  bool           `json:"presharedKey"` // the tunnel has one
	Endpoint      netip.AddrPort `json:"endpoint"`     // "" if not known
	LastHandshake time.Time      `json:"lastHandshake,omitzero"`
	ReceiveBytes  int64          `json:"receiveBytes"`
	TransmitBytes int64          `json:"transmitBytes"`
	AllowedIPs    []netip.Prefix `json:"allowedIPs"`
	State         string         `json:"state"`
	// NodeTraffic is what becomes of the traffic between the two machines; "" without encryptNodes.
	NodeTraffic string `json:"nodeTraffic,omitempty"`
	// Plain says that it runs nothing but WireGuard; see `wgcnid peer`.
	Plain bool `json:"plain,omitempty"`
	// Reason is why it is not connected, and what to do about it; "" if it is.
	Reason string `json:"reason,omitempty"`
}

// The states of a peer.
const (
	stateConnected  = "connected"    // a handshake within the last three minutes
	stateIdle       = "idle"         // none lately; the next packet starts one
	stateWaiting    = "no handshake" // never one
	stateNoEndpoint = "no endpoint"  // it has to call us
	stateMissing    = "missing"      // planned, and not in the kernel
)

var peerStates = []string{stateConnected, stateIdle, stateWaiting, stateNoEndpoint, stateMissing}

func readStatus(ctx context.Context, o options) (Status, error) {
	c, err := o.loadLast()
	if err != nil {
		return Status{}, err
	}
	if os.Geteuid() != 0 {
		return Status{}, errors.New("the kernel tells its WireGuard peers to root only: run it as root")
	}
	k, err := kernel.Open(kernel.Config{Interface: c.Interface})
	if err != nil {
		return Status{}, err
	}
	defer k.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	now := time.Now()
	v, err := viewNode(ctx, c, k, now)
	if err != nil {
		return Status{}, err
	}
	known, public, outcome := v.known, v.public, v.outcome
	s := Status{
		Time: now, Node: c.NodeName, Encryption: c.Encryption,
		Helper: reconcile.HelperAlive(c.RunDir), Registry: openStore(c.Registry).String(), Seal: sealStatus(v.trust, v.secretsErr, known.Records),
		Pods: len(outcome.Pods), Prefixes: outcome.Plan.Filter.Local,
		Peers: peerStatuses(outcome, now),
	}
	for i, p := range s.Peers {
		r, _ := known.Records.Record(p.Name)
		s.Peers[i].Plain = len(r.Via) > 0
		s.Peers[i].Reason = peerReason(s.Peers[i], r.Endpoints, s.Helper)
	}
	s.Forwarding = reconcile.ForwardingNote(c, known, kernel.Forwards)
	s.Nodes = nodeTraffic(c, outcome, s.Peers, now)
	s.Machine = machineStatus(c, outcome, known)
	if l := outcome.Observed.Link; l.Name != "" {
		s.Interface = &LinkStatus{Name: l.Name, MTU: l.MTU, Up: l.Up, ListenPort: l.ListenPort}
		if u, err := reconcile.Underlay(k, c); err == nil { // else nothing is known of it
			s.Interface.Fragments = reconcile.FragmentsNote(c, u, known)
		}
	}
	if public != (wgtypes.Key{}) {
		s.PublicKey = public.String()
	}
	if keys, err := identity.LoadKeys(c.StateDir); err == nil { // else `wgcnid doctor` says why not
		s.KeySince = keys.Since
	}
	for _, op := range outcome.Ops {
		s.Pending = append(s.Pending, op.String())
	}
	if s.Dropped, err = k.Drops(); err != nil {
		return Status{}, err
	}
	if r, err := readReport(c.RunDir); err == nil {
		s.Report = &r
	}
	s.OK, s.Answer, s.Verdict = verdict(s, c, reconcile.Forgotten(c.NodeName, public, known))
	return s, nil
}

// nodeView is what this node knows, and its kernel against the plan that follows.
type nodeView struct {
	known      store.Known
	public     wgtypes.Key // zero: it has none yet
	trust      registry.Trust
	secretsErr error // why the secrets cannot be read; the kernel's keys then count as planned
	outcome    reconcile.Outcome
}

// viewNode looks at this node, and changes nothing.
func viewNode(ctx context.Context, c config.Config, k *kernel.Kernel, now time.Time) (v nodeView, err error) {
	if v.known, v.public, err = readNode(ctx, c, k, now); err != nil {
		return v, err
	}
	v.trust, v.secretsErr = reconcile.ReadTrust(c)
	pass := reconcile.Pass{
		Config: c, Kernel: k, Known: v.known, Key: v.public, Pairs: identity.NewPairs(v.public, v.trust.Secrets), Context: mesh.Context{Now: now},
	}
	if v.outcome, err = pass.Compare(ctx); err == nil && v.secretsErr != nil {
		takePresharedKeys(&v.outcome, pass.Context)
	}
	return v, err
}

// readNode reads what this node knows of the mesh, and its public key: zero if
// it has none yet.
func readNode(ctx context.Context, c config.Config, k *kernel.Kernel, now time.Time) (known store.Known, public wgtypes.Key, err error) {
	if known, _, err = store.LoadKnown(ctx, c.StateDir); err != nil {
		return known, public, err
	}
	if known, err = reconcile.Bootstrap(c, known, k, now); err != nil {
		return known, public, err
	}
	key, err := identity.Load(c.StateDir)
	if errors.Is(err, identity.ErrNoKey) {
		return known, public, nil
	}
	if err == nil {
		public = key.Public()
	}
	return known, public, err
}

func peerStatuses(o reconcile.Outcome, now time.Time) []PeerStatus {
	have := map[wgtypes.Key]mesh.Peer{}
	for _, p := range mesh.BothPlanes(o.Plan.State, o.Observed) {
		have[p.PublicKey] = p
	}
	out := []PeerStatus{}
	for _, want := range o.Plan.Peers {
		p, ok := have[want.PublicKey]
		if !ok {
			p = want
		}
		out = append(out, PeerStatus{
			Name: want.Name, PublicKey: p.PublicKey.String(), PresharedKey: p.PresharedKey != mesh.Fingerprint{}, Endpoint: p.Endpoint, LastHandshake: p.LastHandshake,
			ReceiveBytes: p.ReceiveBytes, TransmitBytes: p.TransmitBytes, AllowedIPs: p.AllowedIPs,
			State: peerState(p, ok, now),
		})
	}
	slices.SortFunc(out, func(a, b PeerStatus) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func peerState(p mesh.Peer, present bool, now time.Time) string {
	switch {
	case !present:
		return stateMissing
	case !p.LastHandshake.IsZero() && now.Sub(p.LastHandshake) < mesh.HandshakeFresh:
		return stateConnected
	case !p.LastHandshake.IsZero():
		return stateIdle
	case !p.Endpoint.IsValid():
		return stateNoEndpoint
	}
	return stateWaiting
}

func printStatus(w io.Writer, s Status, asJSON bool) error {
	if asJSON {
		return printJSON(w, s)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s. %s\n", s.Answer, s.Verdict)
	fmt.Fprintf(&b, "\n%s\n", s.head())
	if s.Interface != nil {
		fmt.Fprintf(&b, "interface  %s, UDP port %d, MTU %d, public key %s\n", s.Interface.Name, s.Interface.ListenPort, s.Interface.MTU, s.PublicKey)
		if s.Interface.Fragments != "" {
			fmt.Fprintf(&b, "           %s\n", s.Interface.Fragments)
		}
	}
	if note := s.rotation(); note != "" {
		fmt.Fprintf(&b, "rotation   %s\n", note)
	}
	fmt.Fprintf(&b, "helper     %s\n", map[bool]string{true: "running", false: "NOT running: traffic flows, changes are not followed"}[s.Helper])
	fmt.Fprintf(&b, "registry   %s%s\n", s.Registry, registryNote(s))
	fmt.Fprintf(&b, "seal       %s\n", sealNote(s))
	if s.Nodes != nil {
		fmt.Fprintf(&b, "nodes      %s%s\n", map[bool]string{true: "besides their pods: "}[s.Machine != nil], s.Nodes.note(s.Peers))
	}
	if s.Forwarding != "" {
		fmt.Fprintf(&b, "forwarding %s\n", s.Forwarding)
	}
	fmt.Fprintf(&b, "dropped    %d plaintext packets on their way out, %d on their way in\n\n", s.Dropped.Out.Packets, s.Dropped.In.Packets)

	if err := printPeerTable(&b, s); err != nil {
		return err
	}
	if s.Report != nil {
		printReport(&b, s)
	}
	if s.Nodes != nil {
		s.Nodes.print(&b, s.Time)
	}
	for _, op := range s.Pending {
		fmt.Fprintln(&b, "pending:", op)
	}
	_, err := io.WriteString(w, printable(b.String()))
	return err
}

// printPeerTable has a column for why some are not connected, where some are not.
func printPeerTable(w io.Writer, s Status) error {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	reasons := slices.ContainsFunc(s.Peers, func(p PeerStatus) bool { return p.Reason != "" })
	fmt.Fprintf(t, "PEER\tENDPOINT\tHANDSHAKE\tRECEIVED\tSENT\tPREFIXES\tSTATE%s\n", map[bool]string{true: "\tREASON"}[reasons])
	for _, p := range s.Peers {
		endpoint := "-"
		if p.Endpoint.IsValid() {
			endpoint = p.Endpoint.String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s", p.Name, endpoint, ago(s.Time, p.LastHandshake),
			size(p.ReceiveBytes), size(p.TransmitBytes), list(p.AllowedIPs), p.State)
		if reasons {
			fmt.Fprintf(t, "\t%s", oneLine(p.Reason))
		}
		fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		fmt.Fprintln(w, strings.TrimRight(line, " \n"))
	}
	return nil
}

func ago(now, then time.Time) string {
	if then.IsZero() {
		return "never"
	}
	return max(now.Sub(then), 0).Round(time.Second).String() + " ago"
}

// size prints bytes as `wg show` does.
func size(n int64) string { return graph.Bytes(n, 2) }

// list prints at most a few prefixes.
func list(prefixes []netip.Prefix) string { return few(texts(prefixes), "none") }

func texts[T fmt.Stringer](values []T) (out []string) {
	for _, v := range values {
		out = append(out, v.String())
	}
	return out
}

// few prints at most four words, and how many more there are.
func few(words []string, none string) string {
	const most = 4
	if len(words) == 0 {
		return none
	}
	text := strings.Join(words[:min(len(words), most)], " ")
	if more := len(words) - most; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}
