package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/store"
)

// sweep forgets attachments whose sandbox is gone: their DEL never came.
func (l *Loop) sweep(ctx context.Context) {
	err := withStore(ctx, l.config.RunDir, func(st *store.Attachments) error {
		all, err := st.All()
		if err != nil {
			return err
		}
		var gone []store.Attachment
		for _, at := range all {
			if kernel.SandboxGone(at.Sandbox, at.SandboxID) {
				gone = append(gone, at)
				l.Log.Info("forgot a pod whose network namespace is gone", "container", at.ContainerID, "ifname", at.IfName, "addresses", at.Addresses)
			}
		}
		l.pods = store.Pods(all)
		if len(gone) == 0 {
			return nil
		}
		return st.Delete(gone...)
	})
	if err != nil {
		l.Log.Warn("cannot sweep the store", "error", err)
	}
}

// adoptIfNew adopts where the store is new: after a boot, and when a damaged one
// was replaced, by whomever.
func (l *Loop) adoptIfNew(ctx context.Context) {
	err := withStore(ctx, l.config.RunDir, func(st *store.Attachments) (err error) {
		l.complete, err = st.Complete()
		if d := st.Damaged(); d != nil {
			l.logDamaged(d)
		}
		return err
	})
	switch {
	case err != nil:
		l.Log.Warn("cannot read the store", "error", err)
	case !l.complete:
		l.complete = l.adopt(ctx)
	}
}

func (l *Loop) logDamaged(d *store.Damaged) {
	l.Log.Warn(d.Error(), "mend", "nothing to do: it is filled again from the runtime's cached results")
}

// adopt takes in the pods that the runtime knows and the store does not, and reports
// whether the store is complete now.
func (l *Loop) adopt(ctx context.Context) bool {
	var found []store.Attachment
	var err error
	if l.Adopt != nil {
		if found, err = l.Adopt(l.config); err != nil {
			l.Log.Warn("cannot read the runtime's cached results", "error", err)
		}
	}
	err = withStore(ctx, l.config.RunDir, func(st *store.Attachments) error {
		all, err := st.All()
		if err != nil {
			return err
		}
		known := map[[2]string]bool{}
		for _, at := range all {
			known[[2]string{at.ContainerID, at.IfName}] = true
		}
		for _, at := range found {
			if known[[2]string{at.ContainerID, at.IfName}] {
				continue
			}
			if err := st.Put(at); err != nil {
				return err
			}
			l.Log.Info("adopted a pod", "container", at.ContainerID, "ifname", at.IfName, "addresses", at.Addresses)
		}
		return st.SetComplete()
	})
	if err != nil {
		l.Log.Warn("cannot adopt pods", "error", err)
	}
	return err == nil
}

// podsChanged reports whether the store holds other pods than the last pass
// planned with, as far as a plan depends on them: pods inside the node's own
// prefixes come and go without a pass, unless another node claims them. It waits
// for the verb that woke us to end.
func (l *Loop) podsChanged(ctx context.Context) bool {
	changed := true
	err := withStore(ctx, l.config.RunDir, func(st *store.Attachments) error {
		all, err := st.All()
		if err != nil {
			return err
		}
		complete, err := st.Complete()
		if err != nil {
			return err
		}
		now := store.Pods(all)
		changed = !complete || l.matters(now, l.pods)
		if complete { // else some are yet to be adopted
			l.pods = now
		}
		return nil
	})
	return changed || err != nil // the pass says what is wrong
}

// matters reports whether a plan or a record depends on what differs between
// two sorted lists of pods.
func (l *Loop) matters(now, before []mesh.Pod) bool {
	var changed []netip.Addr
	for i, j := 0, 0; i < len(now) || j < len(before); {
		switch {
		case j == len(before) || i < len(now) && now[i].Addr.Less(before[j].Addr):
			changed = append(changed, now[i].Addr)
			i++
		case i == len(now) || before[j].Addr.Less(now[i].Addr):
			changed = append(changed, before[j].Addr)
			j++
		default:
			if !now[i].Equal(before[j]) {
				changed = append(changed, now[i].Addr)
			}
			i, j = i+1, j+1
		}
	}
	outside := func(a netip.Addr) bool {
		return !slices.ContainsFunc(l.known.Self.Prefixes, func(c mesh.Claim) bool { return c.Prefix.Contains(a) })
	}
	if len(changed) == 0 || slices.ContainsFunc(changed, outside) {
		return len(changed) > 0
	}
	for c := range Rivals(l.known.Records, l.config.NodeName) {
		if slices.ContainsFunc(changed, c.Prefix.Contains) {
			return true
		}
	}
	return false
}

func withStore(ctx context.Context, runDir string, f func(*store.Attachments) error) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	st, err := store.OpenAttachments(ctx, runDir)
	if err != nil {
		return err
	}
	return errors.Join(f(st), st.Close())
}

// storePoll is how often the store is looked at where inotify cannot be had.
const storePoll = time.Second

// watchStore tells when the store of this boot was written to.
func watchStore(ctx context.Context, runDir string, log *slog.Logger) <-chan struct{} {
	changed := make(chan struct{}, 1)
	path := store.AttachmentsPath(runDir)
	w, err := fsnotify.NewWatcher()
	if err == nil {
		err = errors.Join(os.MkdirAll(runDir, 0o700), w.Add(runDir))
	}
	if err != nil {
		log.Warn("cannot watch the store; looking every second", "path", path, "error", err,
			"mend", "raise fs.inotify.max_user_watches or max_user_instances")
		go poll(ctx, path, changed)
		return changed
	}
	go func() {
		defer w.Close()
		for {
			select {
			case e := <-w.Events:
				if filepath.Base(e.Name) == filepath.Base(path) && e.Has(fsnotify.Write|fsnotify.Create|fsnotify.Remove) {
					poke(changed)
				}
			case <-w.Errors: // some events were lost
				poke(changed)
			case <-ctx.Done():
				return
			}
		}
	}()
	return changed
}

func poll(ctx context.Context, path string, changed chan struct{}) {
	var last os.FileInfo
	for {
		now, err := os.Stat(path)
		if err == nil && (last == nil || now.ModTime() != last.ModTime() || now.Size() != last.Size() || !os.SameFile(now, last)) {
			poke(changed)
			last = now
		}
		select {
		case <-time.After(storePoll):
		case <-ctx.Done():
			return
		}
	}
}
