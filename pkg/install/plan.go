package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/rogpeppe/go-internal/diff"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/durable"
)

// Change is what happens to one file.
type Change struct {
	Path string
	Old  []byte // nil: it is not there
	New  []byte // nil: it is deleted
	Mode fs.FileMode
	// Origin is the file that a new one is made of. The diff is then against that.
	Origin     string
	originData []byte
	// Foreign files belong to another program: mode and owner stay as they are.
	Foreign bool
	// Quiet is content that is not shown: a binary, a secret.
	Quiet bool
	// Text says what is done, and why.
	Text string
}

// Plan is all that is to be done, in this order.
type Plan struct {
	Changes []Change
	// Notes are for the operator; they change nothing.
	Notes []string
	// Record is that of the node afterwards.
	Record Record

	folders []string // that the changes need
}

// Print writes what would be done as unified diffs; of binaries and secrets it
// says it in a line.
func (p Plan) Print(w io.Writer) error {
	for _, c := range p.Changes {
		if _, err := fmt.Fprintf(w, "%s: %s\n", c.Path, c.Text); err != nil {
			return err
		}
		if c.Quiet {
			continue
		}
		from, to, old := c.Path, c.Path, c.Old
		switch {
		case c.New == nil:
			to = os.DevNull
		case c.Old == nil && c.Origin != "":
			from, old = c.Origin, c.originData
		case c.Old == nil:
			from = os.DevNull
		}
		if _, err := w.Write(diff.Diff(from, old, to, c.New)); err != nil {
			return err
		}
	}
	return nil
}

// apply does one change.
func (c Change) apply() error {
	switch {
	case c.New == nil:
		return durable.Remove(c.Path)
	case c.Foreign:
		d, err := edit(c.Path, c.Old, c.New)
		d.close()
		if err != nil {
			return fmt.Errorf("%s: %w", c.Path, err)
		}
		return nil
	}
	return durable.Replace(c.Path, c.New, c.Mode)
}

// placement decides about a file that is copied to a place: mode 0755 for a
// binary. Had is what the record of an earlier run says, if there was one.
func placement(from, to string, mode fs.FileMode, had *Placed) (Placed, []Change, error) {
	data, err := os.ReadFile(from)
	if err != nil {
		return Placed{}, nil, err
	}
	p := Placed{Path: to, From: from, SHA256: hashOf(data)}
	there, err := os.ReadFile(to)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return p, nil, err
	}
	present := err == nil
	same := present && bytes.Equal(there, data)
	if had != nil && had.Path == to {
		p.Found = had.Found && same
	} else {
		p.Found = same
	}
	if same {
		if info, err := os.Stat(to); err != nil || info.Mode().Perm() == mode {
			return p, nil, err
		}
	}
	c := Change{Path: to, New: data, Mode: mode, Quiet: true, Text: "is placed, from " + from}
	if present {
		c.Old, c.Text = there, "is replaced by "+from
	}
	return p, []Change{c}, nil
}

// bypassing are the primary plugins whose pods never come by the node's routing.
var bypassing = []string{"macvlan", "ipvlan", "host-device", "sriov", "ib-sriov-cni"}

// chain decides about the network configurations: the entry into the copy or the
// source, copies that are not needed any more out. Had is the record of an
// earlier run, if there was one; r has the entry, the mode and the source's name.
func chain(f folder, r Record, had *Record) (Record, []Change, error) {
	src, err := f.source(r.Source)
	if err == nil {
		r.Source = src.file
	} else if errors.Is(err, ErrUnready) && had != nil && r.Mode == Copy {
		if again, ok := f.fromCopy(*had); ok {
			src, r.Source, err = again, had.Source, nil
		}
	}
	if err != nil {
		return r, nil, err
	}
	if kind := src.primary(); slices.Contains(bypassing, kind) {
		return r, nil, fmt.Errorf("%s: the pods of %s send past the node's routing, where wgcni encrypts: it would refuse each of them", filepath.Join(f.path, src.file), kind)
	}
	path := filepath.Join(f.path, src.file)
	placedHere := had != nil && had.Mode == InPlace && had.Target == src.file
	base := src.list
	if Chains(src.list) && !placedHere {
		r.Mode, r.Target, r.Made = ByHand, src.file, ""
		return r, f.deleteCopies("", path+" has the entry itself"), nil
	}
	if placedHere && r.Mode == Copy {
		if base, err = Remove(src.list); err != nil {
			return r, nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	want, err := Insert(base, []byte(r.Entry))
	if err != nil {
		return r, nil, fmt.Errorf("%s: %w", path, err)
	}
	if _, err := config.ParseFile(want); err != nil {
		return r, nil, fmt.Errorf("%s with the entry: %w", path, err)
	}
	if r.Mode == InPlace {
		if src.single() {
			return r, nil, fmt.Errorf("%s is the configuration of a single plugin, and nothing can be chained to it in place: install without --in-place, which makes a list of it", path)
		}
		r.Target, r.Made = src.file, ""
		out := f.deleteCopies("", "the entry is in "+path)
		if bytes.Equal(want, src.data) || chainsEntry(src.data, r.Entry) {
			return r, out, nil
		}
		return r, append([]Change{{Path: path, Old: src.data, New: want, Foreign: true, Text: "gets the entry, in place"}}, out...), nil
	}
	return chainCopy(f, r, src, want, base)
}

// chainCopy is chain for the mode copy.
func chainCopy(f folder, r Record, src network, want, base []byte) (Record, []Change, error) {
	if first, ok := f.first(); ok && first.file != src.file && !f.copied(src) {
		return r, nil, fmt.Errorf("the runtime takes %s, which sorts before %s, and a copy of the latter would take its place: name that one, or install with --in-place", filepath.Join(f.path, first.file), src.file)
	}
	present := r.Target
	if n, ok := f.find(present); !ok || !f.copied(n) {
		present = ""
		if all := f.copies(); len(all) > 0 {
			present = all[0]
		}
	}
	name, err := f.nameCopy(present)
	if err != nil {
		return r, nil, err
	}
	r.Target = name
	var out []Change
	target := filepath.Join(f.path, name)
	switch now, ok := f.find(name); {
	case !ok:
		out = append(out, Change{
			Path: target, New: want, Mode: 0o644, Origin: filepath.Join(f.path, src.file), originData: src.data,
			Text: "is a copy of " + src.file + " with the entry; it sorts first, so the runtime takes it",
		})
	case !follows(now.data, want, r.Made):
		out = append(out, Change{Path: target, Old: now.data, New: want, Mode: 0o644, Text: "is made anew of " + src.file})
	}
	r.Made = hashOf(want)
	if !f.copied(src) && !bytes.Equal(base, src.list) {
		out = append(out, Change{Path: filepath.Join(f.path, src.file), Old: src.data, New: base, Foreign: true, Text: "loses the entry, which is in " + name + " now"})
	}
	return r, append(out, f.deleteCopies(name, name+" has taken its place")...), nil
}

// follows reports whether a copy is what it should be. Others may have added to it
// since it was made: a plugin that its source has lost meanwhile is no such addition.
func follows(now, want []byte, made string) bool {
	return bytes.Equal(now, want) || hashOf(want) == made && extends(now, want)
}

// fromCopy returns what the copy was made of, where the source is away: the copy
// has all of it.
func (f folder) fromCopy(had Record) (network, bool) {
	n, ok := f.find(had.Target)
	if !ok || had.Mode != Copy || !f.copied(n) {
		return n, false
	}
	list, err := Remove(n.data)
	n.list = list
	return n, err == nil
}

func (f folder) deleteCopies(but, why string) (out []Change) {
	for _, name := range f.copies() {
		if name != but {
			n, _ := f.find(name)
			out = append(out, Change{Path: filepath.Join(f.path, name), Old: n.data, Text: "is deleted: " + why})
		}
	}
	return out
}

// chainsEntry reports whether a list has an entry of wgcni that is the same value.
func chainsEntry(data []byte, entry string) bool {
	l, err := scan(data)
	return err == nil && slices.ContainsFunc(l.ours(data), func(i int) bool {
		return SameJSON(l.plugins[i].of(data), []byte(entry))
	})
}
