package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go4.org/netipx"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
)

// fileOptions say how a machine's file is to look.
type fileOptions struct {
	qr         bool
	noFailover bool
	allowedIPs []string
	keyFile    string // on the machine

	private identity.PrivateKey // zero: not known
	via     []string            // instead of the record's; optional
}

func (f *fileOptions) flags(fs *pflag.FlagSet) {
	fs.BoolVar(&f.qr, "qr", false, "draw it for the camera of a phone")
	fs.BoolVar(&f.noFailover, "no-failover", false, "name the first entry node only, and leave the hooks out (phones, macOS, Windows)")
	fs.StringArrayVar(&f.allowedIPs, "allowed-ips", nil, "what the machine reaches through the tunnel; may be repeated (default: all of the mesh)")
	fs.StringVar(&f.keyFile, "key-path", "", "file on the machine that wg-quick is to read the private key from")
}

func (f *fileOptions) check() error {
	for _, text := range f.allowedIPs {
		for word := range strings.SplitSeq(text, ",") {
			if _, err := netip.ParsePrefix(strings.TrimSpace(word)); err != nil {
				return fmt.Errorf("--allowed-ips: %q is no range such as 10.244.0.0/16", word)
			}
		}
	}
	if f.keyFile != "" && (f.keyFile[0] != '/' || strings.Trim(f.keyFile, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-") != "") {
		return fmt.Errorf("--key-path: %q goes into a command line: want an absolute path of letters, digits, '/', '.', '_' and '-'", f.keyFile)
	}
	if f.qr && f.keyFile != "" {
		return errors.New("--qr: a phone reads its private key from no file: leave --key-path out")
	}
	return nil
}

func peerConfigCommand(o *options) *cobra.Command {
	var f fileOptions
	var renew bool
	var private string
	cmd := &cobra.Command{
		Use:   "config NAME",
		Short: "Print a peer's file again",
		Long: `Print a peer's file again, as it has to be now: entry nodes, ranges and preshared
keys may have changed since. The private key is not in it, since nobody keeps it:
put that of the old file in its place, have it read on the machine (--key-path), or
give it here (--private-key-file).

The preshared keys in it are derived from the cluster secret that the peer's record
is sealed with. Before an old secret is deleted, --renew seals the record with the
present one. The file that the machine has is then of no use any more.`,
		Example: "  wgcnid peer config laptop\n  wgcnid peer config phone --via node-b --qr\n  wgcnid peer config laptop --renew",
		Args:    onePeer,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			if err := f.check(); err != nil {
				return err
			}
			v, err := viewMesh(cmd.Context(), c)
			if err != nil {
				return err
			}
			r, err := v.peer(args[0])
			if err != nil {
				return err
			}
			if private != "" {
				if f.private, err = readPrivateKey(cmd.InOrStdin(), private, r); err != nil {
					return err
				}
			}
			if private != "" || len(v.registry.Trust().Secrets) > 0 {
				if err := notForOthers(cmd.OutOrStdout(), "begin with `umask 077`"); err != nil {
					return err
				}
			}
			if renew {
				if r, err = v.renew(cmd.Context(), c, r); err != nil {
					return err
				}
				aside(cmd, fmt.Sprintf("%s is sealed with secret %s now: its old file is of no use any more.", r.Name, r.Seal.Secret))
			}
			return v.printPeer(cmd, c, r, f)
		},
	}
	f.flags(cmd.Flags())
	cmd.Flags().StringArrayVar(&f.via, "via", nil, "entry node to name first, of those it has; may be repeated")
	cmd.Flags().StringVar(&private, "private-key-file", "", "file here with the machine's private key, - for stdin: it is then part of what is printed")
	cmd.Flags().BoolVar(&renew, "renew", false, "seal the peer's record with this node's present secret")
	return cmd
}

// readPrivateKey reads the private key of a machine that was added.
func readPrivateKey(stdin io.Reader, path string, r registry.Record) (key identity.PrivateKey, err error) {
	if path == "-" {
		text, rerr := io.ReadAll(io.LimitReader(stdin, 1<<10))
		if rerr != nil {
			return key, fmt.Errorf("--private-key-file: %w", rerr)
		}
		key, err = identity.ParsePrivateKey(string(text))
	} else {
		key, err = identity.LoadPrivateKey(path)
	}
	if err == nil && key.Public() != r.PublicKey {
		err = fmt.Errorf("it is not the private key of %s", r.Name)
	}
	if err != nil {
		return identity.PrivateKey{}, fmt.Errorf("--private-key-file: %w", err)
	}
	return key, nil
}

// renew seals a peer's record with the present secret. All of its entry nodes have
// to do so first: a tunnel's key is by the older of its two ends' secrets, so that
// it would change once more under the file that is printed now.
func (v meshView) renew(ctx context.Context, c config.Config, r registry.Record) (registry.Record, error) {
	current := v.registry.Trust().Secrets.Current()
	if current == "" {
		return r, errors.New(`--renew: this node has no cluster secret ("clusterSecretFile"), so that there is nothing to seal with`)
	}
	names, _, err := v.present(r, r.Via)
	if err != nil {
		return r, err
	}
	entries, err := v.entries(c, names, len(r.Endpoints) > 0)
	if err != nil {
		return r, err
	}
	for _, e := range entries {
		if e.Seal.Secret != current {
			return r, fmt.Errorf("--renew: %s, by which %s enters, does not use secret %s yet: make it the first line of the secret file there, and try again", e.Name, r.Name, current)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	seen := r.Revision
	r.Revision = registry.NextRevision(seen, time.Now())
	if r, err = v.registry.Trust().Seal(r); err != nil {
		return r, err
	}
	if err := v.registry.Publish(ctx, r, seen); err != nil {
		return r, fmt.Errorf("the nodes cannot be told: %w", err)
	}
	return r, nil
}

// printPeer prints a machine's file, and notes on stderr what it does not tell.
func (v meshView) printPeer(cmd *cobra.Command, c config.Config, r registry.Record, f fileOptions) error {
	w, notes, err := v.peerFile(c, r, f)
	if err != nil {
		return err
	}
	if f.qr {
		if w.privateKey == "" {
			return errors.New("--qr: a phone can do nothing without the private key, which nobody has kept: give it (--private-key-file), or remove the peer and add it again")
		}
		return printQR(cmd.OutOrStdout(), w.text(false))
	}
	aside(cmd, notes...)
	// Not through printable: it may hold nothing that has not been looked at.
	_, err = fmt.Fprint(cmd.OutOrStdout(), w.text(true))
	return err
}

// peerFile is a machine's file, and notes on it.
func (v meshView) peerFile(c config.Config, r registry.Record, f fileOptions) (w wgQuick, notes []string, err error) {
	names := r.Via
	if len(f.via) > 0 {
		if names, err = v.preferred(r, f.via); err != nil {
			return w, nil, err
		}
	}
	names, notes, err = v.present(r, names)
	if err != nil {
		return w, nil, err
	}
	entries, err := v.entries(c, names, len(r.Endpoints) > 0)
	if err != nil {
		return w, nil, err
	}
	single := f.qr || f.noFailover || len(entries) == 1
	if single {
		entries = entries[:1]
	}
	w = wgQuick{
		name: r.Name, keyFile: f.keyFile, mtu: min(defaultPeerMTU, orInt(v.mtu, defaultPeerMTU)),
		keepalive: len(r.Endpoints) == 0, hooks: !single, listenPort: portOf(r.Endpoints),
	}
	if f.private.Public() == r.PublicKey {
		w.privateKey = f.private.Reveal().String()
	}
	for _, p := range claimed(r) {
		if p.IsSingleIP() {
			w.addresses = append(w.addresses, p)
		}
	}
	secrets := v.registry.Trust().Secrets
	for _, e := range entries {
		entry := wgEntry{name: e.Name, publicKey: e.PublicKey, tunnel: w.usable(tunnelOf(c, e))}
		entry.presharedKey, _ = identity.NewPairs(e.PublicKey, secrets).PresharedKey(e.Seal.Secret, r.Seal.Secret, r.PublicKey)
		if len(e.Endpoints) > 0 {
			entry.endpoint = e.Endpoints[0]
		}
		if e.Seal.Secret != secrets.Current() && r.Seal.Secret == secrets.Current() {
			notes = append(notes, fmt.Sprintf("%s does not use secret %s yet: when it does, print this file again.", e.Name, secrets.Current()))
		}
		if w.hooks && len(entry.tunnel) == 0 {
			w.hooks = false
			notes = append(notes, fmt.Sprintf("%s has no address in the tunnel that the machine could watch: the file has no hooks that change over.", e.Name))
		}
		w.entries = append(w.entries, entry)
	}
	if !w.hooks {
		w.entries = w.entries[:1]
	}
	w.reach, w.partly, err = v.reach(c, r, entries, f)
	w.reach = w.usable(w.reach)
	return w, notes, err
}

// defaultPeerMTU fits through a path of 1500 bytes, whichever family the endpoint is of.
const defaultPeerMTU = 1420

func orInt(n, otherwise int) int {
	if n == 0 {
		return otherwise
	}
	return n
}

// portOf is where the machine has to listen so that its endpoint is true; "" for any.
func portOf(endpoints []string) string {
	if len(endpoints) == 0 {
		return ""
	}
	return endpoints[0][strings.LastIndexByte(endpoints[0], ':')+1:]
}

// preferred puts the named entry nodes first.
func (v meshView) preferred(r registry.Record, names []string) ([]string, error) {
	for _, name := range names {
		if !slices.Contains(r.Via, name) {
			return nil, fmt.Errorf("--via: %s does not enter by %s, but by %s", r.Name, name, strings.Join(r.Via, ", "))
		}
	}
	out := slices.Clone(names)
	for _, name := range r.Via {
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out, nil
}

// present leaves out the entry nodes that are no members any more, and notes it.
func (v meshView) present(r registry.Record, names []string) (out, notes []string, err error) {
	for _, name := range names {
		if e, known := v.records.Record(name); known && !e.Left {
			out = append(out, name)
			continue
		}
		notes = append(notes, fmt.Sprintf("%s, by which %s enters, is no member any more and left out.", name, r.Name))
	}
	if len(out) == 0 {
		return nil, nil, fmt.Errorf("none of the nodes by which %s enters is a member any more (%s): add it anew, `wgcnid peer add %s --replace --via NODE`", r.Name, strings.Join(r.Via, ", "), r.Name)
	}
	return out, notes, nil
}

// tunnelOf are the addresses that an entry node itself has in the tunnel.
func tunnelOf(c config.Config, e registry.Record) (out []netip.Prefix) {
	n := mesh.Node{Prefixes: e.Prefixes}
	for _, a := range n.TunnelAddresses() {
		if slices.ContainsFunc(slices.Concat(c.ClusterCIDRs, c.ExternalCIDRs), func(p netip.Prefix) bool { return p.Contains(a) }) {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

// reach is what the machine sends into the tunnel: all of the mesh's ranges, but
// where there are segments exactly what it may talk to. The entries' endpoints stay
// outside: the tunnel would lead into itself.
func (v meshView) reach(c config.Config, r registry.Record, entries []registry.Record, f fileOptions) (out []netip.Prefix, partly bool, err error) {
	var all netipx.IPSetBuilder
	segmented := slices.ContainsFunc(v.records.Records(), func(r registry.Record) bool { return !r.Left && len(r.Segments) > 0 })
	switch {
	case len(f.allowedIPs) > 0:
		for _, text := range f.allowedIPs {
			for word := range strings.SplitSeq(text, ",") {
				if p, err := netip.ParsePrefix(strings.TrimSpace(word)); err == nil { // f.check has seen to it
					all.AddPrefix(p)
				}
			}
		}
	case segmented && !r.Masqueraded:
		for _, p := range v.talksTo(c, r, entries[0].Name) {
			all.AddPrefix(p)
		}
	default:
		for _, p := range slices.Concat(c.ClusterCIDRs, c.ExternalCIDRs, c.PeerCIDRs) {
			all.AddPrefix(p)
		}
	}
	for _, e := range entries {
		for _, endpoint := range e.Endpoints {
			if at, err := netip.ParseAddrPort(endpoint); err == nil {
				all.Remove(at.Addr().Unmap())
			}
		}
	}
	set, err := all.IPSet()
	if err != nil {
		return nil, false, err
	}
	return set.Prefixes(), segmented && !r.Masqueraded && len(f.allowedIPs) == 0, nil
}

// talksTo are the ranges of those whom a machine may talk to when that node carries it.
func (v meshView) talksTo(c config.Config, r registry.Record, by string) (out []netip.Prefix) {
	nodes, owners := reconcile.Machines(c, v.records)
	owners.Carrier[r.Name] = by
	topology := mesh.NewTopology(nodes, owners.Carrier)
	for _, n := range nodes {
		if n.Name == r.Name || owners.Refused[n.Name] || topology.Path(r.Name, n.Name) == nil {
			continue
		}
		out = append(out, owners.Prefixes[n.Name]...)
		for _, h := range owners.Hosts[n.Name] {
			if slices.ContainsFunc(c.ExternalCIDRs, func(p netip.Prefix) bool { return p.Contains(h.Prefix.Addr()) }) {
				out = append(out, h.Prefix)
			}
		}
	}
	return out
}
