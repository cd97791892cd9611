package reconcile

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/wgcni/wgcni/pkg/kernel"
)

// lookBelow reads the underlay and reports whether it has changed.
func (l *Loop) lookBelow() bool {
	u, err := Underlay(l.Kernel, l.config)
	if err != nil {
		l.Log.Warn("cannot read the underlay", "error", err)
		return false
	}
	now := l.Now()
	if !lessOf(u, l.underlay) {
		l.fadingSince = time.Time{}
	} else if l.fadingSince.IsZero() {
		l.fadingSince = now
	}
	if !l.fadingSince.IsZero() && (len(u.All) == 0 || now.Sub(l.fadingSince) < fadingFor) {
		return false
	}
	changed := fmt.Sprint(u) != fmt.Sprint(l.underlay)
	l.underlay = u
	return changed
}

// fadingFor is how long an address has to be gone until that is believed, where no
// other came for it. A route or address that is exchanged, or goes and comes with its
// link, moves no node; one family's goes a moment before the other's.
const fadingFor = 2 * time.Second

// lessOf reports whether u is what before was, less some addresses.
func lessOf(u, before kernel.Underlay) bool {
	return len(u.All) < len(before.All) && !slices.ContainsFunc(u.All, func(a netip.Addr) bool { return !slices.Contains(before.All, a) })
}
