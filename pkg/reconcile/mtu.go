package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// UnderlayKernel tells of the network below.
type UnderlayKernel interface {
	Underlay() (kernel.Underlay, error)
	MTUOf(netip.Addr) (int, error)
}

var _ UnderlayKernel = (*kernel.Kernel)(nil)

// Underlay is the network below the tunnel, as the default routes show it. Where a
// configured endpoint is an address of another interface (that of a private network
// between the nodes), its MTU counts as well: the peers are behind it.
func Underlay(k UnderlayKernel, c config.Config) (kernel.Underlay, error) {
	u, err := k.Underlay()
	if err != nil {
		return u, err
	}
	endpoint, perr := netip.ParseAddrPort(c.Endpoint)
	if perr != nil { // none, or a name
		return u, nil
	}
	mtu, err := k.MTUOf(endpoint.Addr().Unmap())
	if mtu != 0 && (u.MTU == 0 || mtu < u.MTU) {
		u.MTU = mtu
	}
	return u, err
}

// FindMTU is the tunnel's MTU, in bytes: by the underlay, and by the families of
// all endpoints there are. It does not go below what the cluster's families need.
func FindMTU(c config.Config, u kernel.Underlay, self registry.Record, records registry.Snapshot) int {
	return findMTU(c, u, anyWide(self, records))
}

func findMTU(c config.Config, u kernel.Underlay, wide bool) int {
	return max(room(u, wide), mesh.LeastMTU(c.Bounds().All()))
}

// room is what fits into the underlay's packets. Without an underlay it is what
// Ethernet allows.
func room(u kernel.Underlay, wide bool) int {
	var endpoints []netip.AddrPort
	if wide {
		endpoints = append(endpoints, netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	}
	return mesh.Room(cmp.Or(u.MTU, 1500), endpoints)
}

// anyWide goes by all records, so that every node comes to the same overhead.
func anyWide(self registry.Record, records registry.Snapshot) bool {
	if wide(self) {
		return true
	}
	for _, r := range records.Nodes {
		if wide(*r) {
			return true
		}
	}
	return false
}

// wide reports whether an endpoint of a machine is an IPv6 address, as a name may
// turn out to be.
func wide(r registry.Record) bool {
	return slices.ContainsFunc(r.Endpoints, func(e string) bool {
		a, err := netip.ParseAddrPort(e)
		return err != nil || !a.Addr().Unmap().Is4()
	})
}

// FragmentsNote says why full-size packets leave this node in fragments, and what
// can be done about it; "" if they do not.
func FragmentsNote(c config.Config, u kernel.Underlay, known store.Known) string {
	return fragmentsNote(c, u, mtuOf(c, known), anyWide(known.Self, known.Records))
}

func fragmentsNote(c config.Config, u kernel.Underlay, mtu int, wide bool) string {
	fits := room(u, wide)
	if u.MTU == 0 || mtu <= fits {
		return ""
	}
	mend := fmt.Sprintf("set \"mtu\" to %d at most, or leave it out", fits)
	if least := mesh.LeastMTU(c.Bounds().All()); fits < least {
		mend = fmt.Sprintf("the ranges in the tunnel need an MTU of %d, so raise the underlay's to %d", least, u.MTU+least-fits)
	}
	return fmt.Sprintf("packets of more than %d bytes leave in fragments, since the tunnel's MTU of %d does not fit into the underlay's %d: %s", fits, mtu, u.MTU, mend)
}

// MTU of the interface and of the pods' links, in bytes: as configured, else as found.
func (p Pass) MTU() int { return mtuOf(p.Config, p.Known) }

func mtuOf(c config.Config, known store.Known) int { return cmp.Or(c.MTU, known.MTU) }

// PodLink is one pod's link; a *kernel.PodLink. Sizes are in bytes.
type PodLink interface {
	MTU() int
	// Fit is the MTU that it may have over a tunnel of that MTU.
	Fit(tunnel int) (int, error)
	// SetMTU sets it. The node's end gets no less, and no more than most.
	SetMTU(mtu, most int) error
}

var _ PodLink = (*kernel.PodLink)(nil)

// FitLink gives a pod's link the MTU that goes with the tunnel's, notes in at what
// it did, and returns the link's MTU, in bytes. A link that somebody wants smaller
// stays so: its MTU follows the tunnel's up to LinkMTU, which is what it had before
// we changed it, or what it was given since by somebody else (the tuning plugin
// behind us in the chain, a person).
func FitLink(at *store.Attachment, link PodLink, tunnel int) (int, error) {
	wished := link.MTU()
	if at.LinkMTU != 0 {
		set, err := link.Fit(at.TunnelMTU)
		if err != nil {
			return 0, err
		}
		if wished == min(at.LinkMTU, set) { // that was us
			wished = at.LinkMTU
		}
	}
	fit, err := link.Fit(tunnel)
	if err != nil {
		return 0, err
	}
	at.LinkMTU, at.TunnelMTU = wished, tunnel
	mtu := min(wished, fit)
	return mtu, link.SetMTU(mtu, fit)
}

// fitLinks does it for the pods that were there before the tunnel had its MTU. It
// comes after the plan was recorded as applied: an ADD that was earlier is among
// pods, and a later one goes by the record. No lock is held meanwhile.
func (p Pass) fitLinks(ctx context.Context, pods []store.Attachment) (fitted []store.Attachment, err error) {
	var errs []error
	for _, at := range pods {
		if at.TunnelMTU == p.MTU() || at.Sandbox == "" {
			continue
		}
		if err := fitPod(&at, p.MTU()); err != nil {
			errs = append(errs, fmt.Errorf("pod %s: %w", at.ContainerID, err))
		} else if at.TunnelMTU == p.MTU() {
			fitted = append(fitted, at)
		}
	}
	if len(fitted) > 0 {
		errs = append(errs, withStore(ctx, p.Config.RunDir, func(st *store.Attachments) error { return st.SetMTU(fitted...) }))
	}
	return fitted, errors.Join(errs...)
}

// fitPod leaves at as it is where the pod is gone, and will be swept.
func fitPod(at *store.Attachment, tunnel int) error {
	if kernel.SandboxGone(at.Sandbox, at.SandboxID) {
		return nil
	}
	link, err := kernel.OpenPodLink(at.Sandbox, at.IfName)
	if errors.Is(err, kernel.ErrBypassesHost) {
		at.TunnelMTU = tunnel // whatever it sends does not come this way
		return nil
	}
	if err != nil {
		return err
	}
	defer link.Close()
	_, err = FitLink(at, link, tunnel)
	return err
}
