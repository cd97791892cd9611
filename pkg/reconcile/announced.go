package reconcile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// Announced is what the helper tells ADD of this node's record: the others reach
// a pod outside of the node's prefixes once the registry holds its claim.
type Announced struct {
	Pods []mesh.Claim `json:"pods,omitempty"` // as the registry holds them
	// Problem says why nothing can be announced just now; empty if nothing is wrong.
	Problem string `json:"problem,omitempty"`
}

func (a Announced) equal(b Announced) bool {
	return a.Problem == b.Problem && slices.EqualFunc(a.Pods, b.Pods, func(p, q mesh.Claim) bool { return p.Prefix == q.Prefix && p.Since.Equal(q.Since) })
}

// covers reports whether a pod's address has been announced since it was attached.
func (a Announced) covers(addr netip.Addr, since time.Time) bool {
	since = mesh.ClaimTime(since)
	return slices.ContainsFunc(a.Pods, func(c mesh.Claim) bool { return c.Prefix.Contains(addr) && !c.Since.Before(since) })
}

func announcedPath(runDir string) string { return filepath.Join(runDir, "announced.json") }

// beginTelling takes back what an earlier helper told, and what one that was killed
// left beside it.
func (l *Loop) beginTelling() error {
	l.telling = true
	durable.Sweep(l.config.RunDir, l.config.StateDir)
	if err := os.Remove(announcedPath(l.config.RunDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// tell writes for ADD what has been announced, where that has changed. An ADD may
// be waiting for it.
func (l *Loop) tell() {
	now := Announced{Pods: l.held}
	switch {
	case l.forgotten():
		now.Problem = "the mesh has forgotten this node"
	case l.rival:
		now.Problem = "another node publishes under this node's name"
	case l.away != nil:
		now.Problem = "the registry cannot be read: " + l.away.Error()
	case l.unpublished != "":
		now.Problem = "this node's record cannot be published: " + l.unpublished
	}
	if !l.telling || l.told != nil && now.equal(*l.told) {
		return
	}
	text, err := json.Marshal(now)
	if err == nil {
		err = durable.Replace(announcedPath(l.config.RunDir), text, 0o600)
	}
	if err != nil {
		l.Log.Warn("cannot tell the plugin what has been announced; an ADD may wait for it in vain", "error", err)
		return
	}
	l.told = &now
}

// announcePoll is how often AwaitAnnounced looks at first, and at most; it looks
// less often the longer it takes.
const (
	announcePoll    = time.Millisecond
	announcePollMax = 20 * time.Millisecond
)

// AwaitAnnounced waits until the helper has announced the addresses of a pod that
// was attached at since. The error says why it gave up: there is no helper, it has
// nobody to tell, or ctx ended. The pod works all the same, once it is announced.
func AwaitAnnounced(ctx context.Context, runDir string, addrs []netip.Addr, since time.Time) error {
	for pause := announcePoll; ; pause = min(2*pause, announcePollMax) {
		a, err := readAnnounced(runDir)
		waiting := slices.DeleteFunc(slices.Clone(addrs), func(addr netip.Addr) bool { return err == nil && a.covers(addr, since) })
		switch {
		case len(waiting) == 0:
			return nil
		case !HelperAlive(runDir):
			return errors.New("wgcnid does not run on this node")
		case err == nil && a.Problem != "":
			return errors.New(a.Problem)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wgcnid has not announced %v yet", waiting)
		case <-time.After(pause):
		}
	}
}

func readAnnounced(runDir string) (a Announced, err error) {
	text, err := os.ReadFile(announcedPath(runDir))
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(text, &a)
}
