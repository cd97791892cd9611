package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/durable"
)

const (
	// keepPoll is how often the keeper looks by itself.
	keepPoll = 500 * time.Millisecond
	// keepGather is how long it lets changes come together before it looks.
	keepGather = 20 * time.Millisecond
	// keepGrace is how long another file has to be the first network until it is
	// followed, and how long a displaced file is looked at: an agent that deletes its
	// file and writes it anew is not to move the node onto another network.
	keepGrace = 5 * time.Second
)

// Keep keeps an installation as it was made, until ctx ends: the copy follows its
// source, and a copy, entry, binary or secret that somebody has altered or deleted
// is put back, within a second. It does nothing while stateDir has no record, or
// one that is being removed, and looks again. Each change is one line of the log.
func Keep(ctx context.Context, stateDir, cniDir string, log *slog.Logger) {
	newKeeper(stateDir, cniDir, log).run(ctx)
}

// Repair is one look of the keeper.
func Repair(stateDir, cniDir string, log *slog.Logger) {
	k := newKeeper(stateDir, cniDir, log)
	defer k.close()
	k.look()
}

type keeper struct {
	stateDir string
	log      *slog.Logger
	watch    watch
	beside   string // the plugin's binary as it came with wgcnid
	poll     time.Duration
	grace    time.Duration
	now      func() time.Time

	swept bool
	said  map[string]string // the warnings that stand
	// the entry could not be seen to since then; zero: it can
	unable time.Time
	// another file than the source is the first network, since then
	another string
	since   time.Time
	late    []lateFile
	plugin  stamp
	secret  [2]stamp
}

// lateFile is a file that an edit has displaced.
type lateFile struct {
	displaced
	name  string
	until time.Time
}

func newKeeper(stateDir, cniDir string, log *slog.Logger) *keeper {
	beside := ""
	if self, err := os.Executable(); err == nil {
		beside = filepath.Join(filepath.Dir(self), config.PluginType)
	}
	return &keeper{
		stateDir: stateDir, log: log, watch: watch{folder: cniDir, open: fsnotify.NewWatcher},
		beside: beside, poll: keepPoll, grace: keepGrace, now: time.Now, said: map[string]string{},
	}
}

func (k *keeper) run(ctx context.Context) {
	defer k.close()
	ticker := time.NewTicker(k.poll)
	defer ticker.Stop()
	var gather <-chan time.Time
	k.watch.look() // before the first look, so that no change falls between
	k.look()
	for {
		events, failures := k.watch.events()
		select {
		case <-ctx.Done():
			return
		case _, open := <-events:
			if !open { // the poll begins another one
				k.watch.close()
			}
		case <-failures: // such as an overflow, which lost events
		case <-gather:
			gather = nil
			k.look()
			continue
		case <-ticker.C:
			k.watch.look()
			k.look()
			continue
		}
		if gather == nil {
			gather = time.After(keepGather)
		}
	}
}

func (k *keeper) close() {
	k.watch.close()
	for _, l := range k.late {
		l.close()
	}
	k.late = nil
}

// look compares the node with the record, and mends. While another process changes
// the installation it leaves that to it.
func (k *keeper) look() {
	if r, err := Load(k.stateDir); err != nil || r.Stage == Removing {
		if !errors.Is(err, fs.ErrNotExist) {
			k.warn("record", err)
		}
		return
	}
	held, err := tryLock(k.stateDir)
	if held == nil {
		k.warn("lock", err)
		return
	}
	defer held.Close()
	r, err := Load(k.stateDir)
	if err != nil || r.Stage == Removing {
		return
	}
	k.warn("record", nil)
	if !k.swept {
		k.sweep(r)
		k.swept = true
	}
	was := r
	k.keepPlugin(&r)
	err = k.keepChain(&r)
	k.warnOfChain(err)
	k.warn("secret", k.keepSecret(r))
	if err == nil {
		r.Stage = Installed
	}
	if !reflect.DeepEqual(was, r) {
		k.warn("save", r.save(k.stateDir))
	}
}

// sweep clears up after a process that was killed. Files that it had displaced are
// looked at for a while, as those that this one displaces.
func (k *keeper) sweep(r Record) {
	removeLeftovers(k.stateDir, filepath.Dir(r.Plugin.Path))
	durable.Sweep(r.CNIDir)
	for _, d := range recoverTaken(r.CNIDir) {
		name := takenName.FindStringSubmatch(filepath.Base(d.path))[1]
		k.late = append(k.late, lateFile{displaced: d, name: name, until: k.now().Add(k.grace)})
	}
}

// warn logs a fault once, and again only after it has changed.
func (k *keeper) warn(about string, err error) {
	if err == nil {
		delete(k.said, about)
		return
	}
	if text := err.Error(); k.said[about] != text {
		k.said[about] = text
		k.log.Warn("cannot keep the installation", "error", err)
	}
}

// warnOfChain is warn for a fault that may be gone in a moment: a file that is just
// being written.
func (k *keeper) warnOfChain(err error) {
	switch {
	case err == nil:
		k.unable = time.Time{}
		k.warn("conflist", nil)
	case k.unable.IsZero():
		k.unable = k.now()
	case k.now().Sub(k.unable) >= k.grace/2:
		k.warn("conflist", err)
	}
}

// keepChain sees to the entry.
func (k *keeper) keepChain(r *Record) error {
	if r.Mode == ByHand {
		return nil
	}
	f, err := readFolder(r.CNIDir, r)
	if err != nil {
		return err
	}
	k.follow(f, r)
	k.takeLate(f, r.Entry)
	if r.Mode == InPlace {
		return k.keepInPlace(f, r)
	}
	changes, err := keepCopy(f, r)
	for _, c := range changes {
		if err := c.apply(); err != nil {
			return err
		}
		k.log.Info("installation: "+c.Text, "file", c.Path)
	}
	return err
}

// follow changes to another source, as the runtime would without us: the network
// that is the first now, if it has been that for a while.
func (k *keeper) follow(f folder, r *Record) {
	first, ok := f.first()
	_, there := f.find(r.Source)
	if !ok || first.file == r.Source || r.Pinned || first.fault != nil || r.Mode == InPlace && there {
		k.another = ""
		return
	}
	if k.another != first.file {
		k.another, k.since = first.file, k.now()
	}
	if k.now().Sub(k.since) < k.grace {
		return
	}
	k.log.Info("installation: another network is the first now, and wgcni is chained to that", "file", filepath.Join(f.path, first.file), "before", r.Source)
	r.Source, k.another = first.file, ""
	if r.Mode == InPlace {
		r.Target = r.Source
	}
}

// keepCopy decides about the copy. The error says why it cannot follow its source;
// the copy then stays as it is.
func keepCopy(f folder, r *Record) (out []Change, err error) {
	name, err := f.nameCopy(r.Target)
	if err != nil {
		return nil, err
	}
	present, there := f.find(r.Target)
	want := present.data
	src, ok := f.find(r.Source)
	switch {
	case !ok:
		err = fmt.Errorf("%s is gone: its copy %s stays, so that pods start and are encrypted; when the file is back it is followed again, and `wgcnid uninstall` removes the copy", filepath.Join(f.path, r.Source), r.Target)
	case src.fault != nil:
		err = fmt.Errorf("%s: %w: its copy %s stays as it is until that is mended", filepath.Join(f.path, r.Source), src.fault, r.Target)
	case Chains(src.list): // by hand since
		want = src.list
	default:
		if want, err = Insert(src.list, []byte(r.Entry)); err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(f.path, r.Source), err)
		}
	}
	if err != nil && !there {
		return nil, err // there is nothing to keep
	}
	target := filepath.Join(f.path, name)
	switch now, _ := f.find(name); {
	case follows(now.data, want, r.Made):
	case name != r.Target:
		out = append(out, Change{Path: target, New: want, Mode: 0o644, Text: "another file has come before the copy, which gets a name that sorts first again"})
	case !there:
		out = append(out, Change{Path: target, New: want, Mode: 0o644, Text: "the copy was deleted, and is put back"})
	default:
		out = append(out, Change{Path: target, Old: now.data, New: want, Mode: 0o644, Text: "the copy is made anew, as its original or itself was changed"})
	}
	r.Target = name
	if err == nil {
		r.Made = hashOf(want)
	}
	return append(out, f.deleteCopies(name, name+" has taken its place")...), err
}

// keepInPlace puts the entry back, or takes over what it was changed to by hand.
func (k *keeper) keepInPlace(f folder, r *Record) error {
	path := r.target()
	n, ok := f.find(r.Target)
	switch {
	case !ok:
		return fmt.Errorf("%s is gone: no pod can be guarded until it is back; if another file has its place run `wgcnid install --in-place`", path)
	case n.fault != nil:
		return fmt.Errorf("%s: %w", path, n.fault)
	case Chains(n.list) && (r.Stage == Installed || chainsEntry(n.list, r.Entry)):
		l, err := scan(n.list)
		if err != nil {
			return err
		}
		text := l.plugins[l.ours(n.list)[0]].of(n.list)
		if _, err := config.Parse(text); err == nil && !SameJSON(text, []byte(r.Entry)) {
			k.log.Info("installation: the entry was changed, and is kept as it is now", "file", path)
			r.Entry = string(text)
		}
		return nil
	}
	return k.insert(f, n.file, n.data, n.data, r.Entry)
}

// insert puts the entry into list and that in the place of old.
func (k *keeper) insert(f folder, name string, old, list []byte, entry string) error {
	path := filepath.Join(f.path, name)
	want, err := Insert(list, []byte(entry))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	d, err := edit(path, old, want)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if d.file != nil {
		k.late = append(k.late, lateFile{displaced: d, name: name, until: k.now().Add(k.grace)})
	}
	k.log.Info("installation: the file was rewritten without the entry, which is put back", "file", path)
	return nil
}
