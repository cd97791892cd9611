package reconcile

import (
	"context"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/identity"
)

// WireGuard tells nobody when its peers change, nor does the kernel when a sysctl
// does: that takes a look. A look costs what the mesh is large, so a small one is
// looked at twice a second, and one of thousands of nodes every 10 s.
const (
	resyncLeast = 500 * time.Millisecond
	resyncMost  = 10 * time.Second
	// resyncShare bounds what looking costs to one part in so many of a CPU.
	resyncShare = 50
	// manyLooks tell what one costs.
	manyLooks = 5
)

// untilResync is the pause until the next look at everything.
func (l *Loop) untilResync() time.Duration {
	if l.Resync != 0 {
		return l.Resync
	}
	return min(max(resyncShare*l.looks.cost(), resyncLeast), resyncMost)
}

// looks are what the last looks at everything have used of a CPU, manyLooks at most.
type looks []time.Duration

func (l *looks) add(used time.Duration) {
	*l = append(*l, used)
	*l = (*l)[max(len(*l)-manyLooks, 0):]
}

// cost is the least of them: caches that are cold, the garbage collector and other
// work of the process only add to what a look takes. It is 0 until it can be told.
func (l looks) cost() time.Duration {
	if len(l) < manyLooks {
		return 0
	}
	return slices.Min(l)
}

// cpuTime is what this process has used so far. A machine that is busy with other
// things makes a look take long, and no dearer.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// resync looks at everything anew.
func (l *Loop) resync(ctx context.Context) {
	l.observed = nil
	l.saved.NoteAll()
	if c, err := l.Load(); err == nil {
		c.RunDir, c.StateDir = l.config.RunDir, l.config.StateDir // they need a restart
		l.config, l.configError = c, ""
	} else if l.configError != err.Error() { // else it would be said at every resync
		l.Log.Warn("configuration cannot be read; going on with the last one", "error", err)
		l.configError = err.Error()
	}
	if err := l.readSecrets(); err != nil {
		if l.secretsError != err.Error() { // else it would be said at every resync
			l.Log.Error("the cluster's secrets cannot be read; going on with the last ones", "error", err)
		}
		l.secretsError = err.Error()
	} else {
		l.secretsError = ""
	}
	l.lookBelow()
	l.sweep(ctx)
}

// readSecrets reads the cluster's secrets, and where they or what they are good
// for have changed looks at every record anew, at those of the disk too.
func (l *Loop) readSecrets() error {
	trust, err := ReadTrust(l.config)
	if err != nil {
		return err
	}
	if l.pairs != nil && trust.Equal(l.trust) {
		return nil
	}
	l.trust, l.pairs = trust, identity.NewPairs(l.Keys.Current, trust.Secrets)
	l.Registry.SetTrust(trust)
	for name, r := range l.known.Records.Nodes {
		if err := trust.Check(*r); err != nil {
			delete(l.known.Records.Nodes, name)
			l.noteChanged(name)
			l.Log.Warn("a record that was known is no longer trusted", "error", err)
		}
	}
	return nil
}
