package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
)

// peerAddition is what the flags of `peer add` say. All are optional.
type peerAddition struct {
	publicKey string
	via       []string
	addresses []string
	endpoint  string
	segments  []string
	nat       bool
	subnets   []string
	replace   bool
}

func peerAddCommand(o *options) *cobra.Command {
	var a peerAddition
	var f fileOptions
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Let a machine in, and print the file for it",
		Long: `Let a machine in that runs nothing but WireGuard, and print the complete file for
wg-quick(8), or with --qr for the WireGuard app of a phone. The private key is made
here and shown this once; nobody keeps it. For a machine that has made its own
(` + "`wg genkey`" + `) give --public-key: the file then reads the private key there.

The machine enters by the nodes of --via, the preferred one first; with several of
them the file has two hooks that watch the one in use and go on to the next. Its
address is the lowest free one of "peerCIDRs", in each family.

With --nat only its entry nodes know the machine's addresses, and what it sends into
the mesh carries theirs. It may then have a whole site behind it (--subnet), whose
addresses may be in use at other sites too.`,
		Example: "  wgcnid peer add laptop > laptop.conf          # after `umask 077`\n  wgcnid peer add phone --qr\n" +
			"  wgcnid peer add laptop --via node-a --via node-b --public-key $(wg pubkey < laptop.key)\n  wgcnid peer add branch --nat --subnet 192.168.1.0/24",
		Args: onePeer,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.loadLast()
			if err != nil {
				return err
			}
			if err := notForOthers(cmd.OutOrStdout(), "begin with `umask 077`"); err != nil {
				return err
			}
			key, own, err := a.key()
			if err != nil {
				return err
			}
			if err := f.check(); err != nil {
				return err
			}
			if own {
				f.keyFile = cmp.Or(f.keyFile, "/etc/wireguard/"+args[0]+".key")
			} else if f.keyFile != "" {
				return errors.New("--key-path: the private key is made here, unless --public-key is given")
			}
			v, err := viewMesh(cmd.Context(), c)
			if err != nil {
				return err
			}
			r, err := v.addPeer(cmd.Context(), c, args[0], key.public, a)
			if err != nil {
				return err
			}
			f.private = key.private
			if err := v.printPeer(cmd, c, r, f); err != nil {
				return err
			}
			aside(cmd, v.afterAdding(r, f)...)
			return nil
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&a.publicKey, "public-key", "", "the machine's own public key (default: a key is made here)")
	fs.StringArrayVar(&a.via, "via", nil, "node by which it enters; may be repeated, the preferred one first (default: the gateways, else this node)")
	fs.StringArrayVar(&a.addresses, "address", nil, "its address inside \"peerCIDRs\", at most one a family (default: the lowest free one)")
	fs.StringVar(&a.endpoint, "endpoint", "", "host:port where it can be called (default: it is behind NAT, and calls)")
	fs.StringArrayVar(&a.segments, "segment", nil, "segment that it belongs to; may be repeated")
	fs.BoolVar(&a.nat, "nat", false, "have its entry nodes rewrite its addresses to their own")
	fs.StringArrayVar(&a.subnets, "subnet", nil, "range behind the machine, with --nat; may be repeated")
	fs.BoolVar(&a.replace, "replace", false, "take the place of the peer of that name, with its addresses and without its key")
	f.flags(fs)
	return cmd
}

type peerKey struct {
	public  wgtypes.Key
	private identity.PrivateKey // zero: the machine has it
}

// key reports whether the key is the machine's own.
func (a peerAddition) key() (k peerKey, own bool, err error) {
	if a.publicKey == "" {
		k.private, err = identity.NewPrivateKey()
		k.public = k.private.Public()
		return k, false, err
	}
	k.public, err = wgtypes.ParseKey(strings.TrimSpace(a.publicKey))
	if err != nil || k.public == (wgtypes.Key{}) {
		// Not quoted: somebody may have given the private one.
		return k, true, errors.New("--public-key: not a key as `wg pubkey` prints it")
	}
	return k, true, nil
}

// addPeer publishes the record of a new machine.
//
// Two machines that are added at one moment may choose the same address, and a
// registry compares no two names. So each looks again when its record is there,
// and whoever then finds another with its address takes the next: the later of the
// two always does, since the earlier is there by then. Where both do, they pause
// for unequal times and choose again.
func (v *meshView) addPeer(ctx context.Context, c config.Config, name string, key wgtypes.Key, a peerAddition) (registry.Record, error) {
	r, err := v.newPeer(c, name, key, a)
	if err != nil {
		return r, err
	}
	old, _ := v.records.Record(name)
	if !old.Left && len(a.addresses) == 0 {
		for _, p := range claimed(old) {
			if p.IsSingleIP() {
				a.addresses = append(a.addresses, p.Addr().String())
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	seen := old.Revision
	for {
		if err := v.takeAddresses(c, &r, a); err != nil {
			return r, err
		}
		now := time.Now()
		r.Revision = registry.NextRevision(seen, now)
		r.Since = mesh.ClaimTime(now)
		for i := range r.Prefixes {
			r.Prefixes[i].Since = r.Since
		}
		if r, err = v.registry.Trust().Seal(r); err != nil {
			return r, err
		}
		if err = v.registry.Publish(ctx, r, seen); errors.Is(err, registry.ErrStale) {
			return r, fmt.Errorf("%s was added or removed by somebody else just now: look with `wgcnid peer list`, and try again", name)
		} else if err != nil {
			return r, fmt.Errorf("the nodes cannot be told: %w", err)
		}
		seen = r.Revision
		fresh, err := v.registry.Snapshot(ctx)
		if err != nil {
			return r, fmt.Errorf("%s is added, and nobody can tell whether its address is its own: %w; remove it (`wgcnid peer remove %s`) and try again", name, err, name)
		}
		v.records, v.stale = registry.Merge(v.records, fresh)
		rival := v.sharesAddress(r)
		if rival == "" {
			return r, nil
		}
		if len(a.addresses) > 0 {
			return r, errors.Join(fmt.Errorf("--address: %s took it at the same moment", rival), v.bury(ctx, name, false))
		}
		select {
		case <-time.After(rand.N(100 * time.Millisecond)):
		case <-ctx.Done():
			return r, errors.Join(fmt.Errorf("%s: no address of its own: %w", name, ctx.Err()), v.bury(context.WithoutCancel(ctx), name, false))
		}
	}
}

// newPeer is the record but for its addresses, which are there if they were given.
func (v meshView) newPeer(c config.Config, name string, key wgtypes.Key, a peerAddition) (registry.Record, error) {
	r := registry.Record{Name: name, PublicKey: key, Revision: 1, Since: time.Now(), Place: registry.Place{Masqueraded: a.nat}}
	r.Segments = slices.Compact(slices.Sorted(slices.Values(a.segments)))
	if a.endpoint != "" {
		r.Endpoints = []string{a.endpoint}
	}
	if err := r.Validate(); err != nil {
		return r, err
	}
	if len(c.PeerCIDRs) == 0 {
		return r, errors.New(`"peerCIDRs" is not set, and the machine needs an address: set it to a range of its own on every node, such as "peerCIDRs": ["10.99.0.0/24"]`)
	}
	if v.away != nil {
		return r, fmt.Errorf("the registry is away: %w", v.away)
	}
	if err := v.nameFree(name, a.replace); err != nil {
		return r, err
	}
	for _, other := range v.records.Records() {
		if revoked, ok := other.Revoked(); ok && revoked == key {
			return r, fmt.Errorf("--public-key: it was revoked when %s was removed: make a new one with `wg genkey`", other.Name)
		}
		if !other.Left && other.PublicKey == key && (other.Name != name || !a.replace) {
			return r, fmt.Errorf("--public-key: %s has the same: each machine needs a key of its own", other.Name)
		}
	}
	entries, err := v.entries(c, a.via, a.endpoint != "")
	if err != nil {
		return r, err
	}
	for _, e := range entries {
		r.Via = append(r.Via, e.Name)
		if !a.nat && !mesh.MayCarry(e.Segments, r.Segments) {
			return r, fmt.Errorf("--via: %s is in segments that %s is not in (it has %s), and would let others of them in to it: choose another node, or add them with --segment", e.Name, name, segmentNames(e.Segments))
		}
	}
	switch {
	case a.nat && len(a.segments) > 0:
		return r, errors.New("--segment: with --nat the machine is seen as its entry node, and so in the segments of that")
	case !a.nat && len(a.subnets) > 0:
		return r, errors.New("--subnet: only with --nat; a machine whose ranges others are to reach runs wgcnid (\"subnets\")")
	}
	return r, v.endpointApart(r)
}

func (v meshView) nameFree(name string, replace bool) error {
	r, known := v.records.Record(name)
	switch {
	case !known || r.Left:
		return nil
	case len(r.Via) > 0 && replace:
		return nil
	case len(r.Via) > 0:
		return fmt.Errorf("there is a peer %s: print its file again (`wgcnid peer config %s`), remove it (`wgcnid peer remove %s`), or put another in its place (--replace)", name, name, name)
	}
	return fmt.Errorf("%s is the name of a node: choose another", name)
}

func segmentNames(segments []string) string {
	if len(segments) == 0 {
		return "none"
	}
	return strings.Join(segments, ", ")
}

// endpointApart keeps an endpoint out of what is reached through the tunnel.
func (v meshView) endpointApart(r registry.Record) error {
	for _, e := range r.Endpoints {
		at, err := netip.ParseAddrPort(e)
		if err != nil {
			continue // a name
		}
		for _, other := range v.records.Records() {
			for _, claim := range slices.Concat(other.Prefixes, other.Pods) {
				if !other.Left && claim.Prefix.Contains(at.Addr().Unmap()) {
					return fmt.Errorf("--endpoint: %s lies inside %s of %s: the tunnel would lead into itself", e, claim.Prefix, other.Name)
				}
			}
		}
	}
	return nil
}

// afterAdding is what to do next.
func (v meshView) afterAdding(r registry.Record, f fileOptions) []string {
	lines := []string{fmt.Sprintf("%s is added: %s, by %s.", r.Name, few(texts(claimed(r)), ""), strings.Join(r.Via, ", then "))}
	switch {
	case f.qr:
		lines = append(lines, "Scan it with the WireGuard app. The private key in it is kept nowhere: it is not shown again.")
	case f.keyFile != "":
		lines = append(lines, "Put the file on the machine as /etc/wireguard/wgcni.conf, and start it there: wg-quick up wgcni", "It reads the private key from "+f.keyFile+".")
	default:
		lines = append(lines, "Put the file on the machine as /etc/wireguard/wgcni.conf (mode 0600), and start it there: wg-quick up wgcni",
			"The private key in it is kept nowhere: it is not shown again.")
	}
	if note := v.unheard(r.Name); note != "" {
		lines = append(lines, "Some nodes may not let it in: "+note)
	}
	return lines
}
