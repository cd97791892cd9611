package crash

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Tree is all there is below some folders: what a file holds, by its absolute path.
type Tree map[string]File

// File is a file, a folder or a symbolic link.
type File struct {
	Mode fs.FileMode
	Data string // of a symbolic link: where it leads
	Same string // optional: the path of the same file under another name
}

// Disk knows of each file what programs see and what has been synced. It follows the
// calls of a program, and tells what is there after a power cut. The rules are those
// of fsync(2): of a file only what was in it when it was last synced is safe, and its
// name only once the folder has been synced too. What was not may be there or not, in
// any mixture. Real file systems lose less.
type Disk struct {
	roots []string
	top   *entry
	// Far are folders of another machine, whose power stays. Boot is one that a boot
	// finds empty, as /run.
	Far, Boot []string
}

// entry is a file, folder or link.
type entry struct {
	mode         fs.FileMode
	link         string
	data, synced []byte
	writes       []Call // since it was synced

	names, syncedNames map[string]*entry
}

// ReadDisk takes what is below the folders for synced. Real is where the harness
// finds a path of the program's.
func ReadDisk(real func(string) string, roots []string) (*Disk, error) {
	d := &Disk{roots: roots, top: folder(0o755)}
	tree, err := ReadTree(real, roots)
	if err != nil {
		return nil, err
	}
	for _, root := range roots {
		d.make(root)
	}
	for _, p := range slices.Sorted(maps.Keys(tree)) {
		f := tree[p]
		e := &entry{mode: f.Mode}
		switch {
		case f.Mode.IsDir():
			e = folder(f.Mode.Perm())
		case f.Mode&fs.ModeSymlink != 0:
			e.link = f.Data
		case f.Same != "":
			e = d.find(f.Same)
		default:
			e.data, e.synced = []byte(f.Data), []byte(f.Data)
		}
		dir := d.make(path.Dir(p))
		dir.names[path.Base(p)], dir.syncedNames[path.Base(p)] = e, e
	}
	return d, nil
}

// umask is that of the programs: that of the harness, as most have it.
const umask = 0o022

func folder(perm fs.FileMode) *entry {
	return &entry{mode: fs.ModeDir | perm, names: map[string]*entry{}, syncedNames: map[string]*entry{}}
}

// make returns the folder of that path, which lies above a root if it is missing.
func (d *Disk) make(p string) *entry {
	if p == "/" {
		return d.top
	}
	up := d.make(path.Dir(p))
	if up.names[path.Base(p)] == nil {
		e := folder(0o755)
		up.names[path.Base(p)], up.syncedNames[path.Base(p)] = e, e
	}
	return up.names[path.Base(p)]
}

func (d *Disk) covers(p string) bool {
	return slices.ContainsFunc(d.roots, func(root string) bool { return p == root || strings.HasPrefix(p, root+"/") })
}

func (d *Disk) find(p string) *entry {
	e := d.top
	for name := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
		if e = e.names[name]; e == nil {
			return nil
		}
	}
	return e
}

// Apply follows a call that has returned.
func (d *Disk) Apply(c Call) error {
	if c.Result < 0 || !d.covers(c.Path) {
		return nil
	}
	dir, name := d.find(path.Dir(c.Path)), path.Base(c.Path)
	e := d.find(c.Path)
	if dir == nil || e == nil && c.Name != "openat" && c.Name != "mkdir" && c.Name != "symlink" {
		return fmt.Errorf("%v: there is no such file", c)
	}
	switch c.Name {
	case "openat":
		if e == nil {
			e = &entry{mode: c.Mode &^ umask}
			dir.names[name] = e
		} else if c.Flags&unix.O_TRUNC != 0 {
			e.write(Call{Name: "ftruncate"})
		}
	case "write", "pwrite":
		c.Data = c.Data[:c.Result]
		if c.Offset < 0 {
			c.Offset = int64(len(e.data))
		}
		e.write(c)
	case "ftruncate":
		e.write(c)
	case "fsync":
		e.synced, e.writes = bytes.Clone(e.data), nil
		e.syncedNames = maps.Clone(e.names)
	case "chmod":
		e.mode = e.mode&^fs.ModePerm | c.Mode
	case "chown":
	case "mkdir":
		dir.names[name] = folder(c.Mode &^ umask)
	case "symlink":
		dir.names[name] = &entry{mode: fs.ModeSymlink | 0o777, link: c.To}
	case "unlink":
		delete(dir.names, name)
	case "link", "rename":
		to := d.find(path.Dir(c.To))
		if to == nil {
			return fmt.Errorf("%v: there is no such folder", c)
		}
		there := to.names[path.Base(c.To)]
		to.names[path.Base(c.To)] = e
		switch {
		case c.Name == "link":
		case c.Flags&unix.RENAME_EXCHANGE != 0:
			dir.names[name] = there
		default:
			delete(dir.names, name)
		}
	default:
		return fmt.Errorf("%v: this package does not know what it does", c)
	}
	return nil
}

func (e *entry) write(c Call) {
	e.data = c.written(e.data)
	e.writes = append(e.writes, c)
}

// written is what a write makes of a file's content.
func (c Call) written(data []byte) []byte {
	end := int(c.Offset) + len(c.Data)
	if c.Name == "ftruncate" {
		return grown(data[:min(len(data), end)], end)
	}
	data = grown(data, end)
	copy(data[c.Offset:], c.Data)
	return data
}

// grown is a copy of data that has n bytes at least.
func grown(data []byte, n int) []byte {
	out := make([]byte, max(len(data), n))
	copy(out, data)
	return out
}

// Cut says what of the unsynced a power cut leaves.
type Cut struct {
	Names func() bool // whether a folder's latest names are there
	Write func() bool // whether a write is there
	// Everywhere says that the other machines' power fails too.
	Everywhere bool
}

func always(b bool) func() bool { return func() bool { return b } }

// Cuts are the outcomes that are looked at: nothing is left; the names, but nothing
// that was written, as of a file system that allocates late; and any mixture.
func Cuts(rng *rand.Rand) map[string]Cut {
	some := func() bool { return rng.IntN(2) == 0 }
	return map[string]Cut{
		"nothing unsynced":            {Names: always(false), Write: always(false)},
		"nothing unsynced everywhere": {Names: always(false), Write: always(false), Everywhere: true},
		"names only":                  {Names: always(true), Write: always(false), Everywhere: true},
		"names, some data":            {Names: always(true), Write: some},
		"a mixture":                   {Names: some, Write: some, Everywhere: true},
	}
}

// After is what is there after a power cut.
func (d *Disk) After(c Cut) Tree {
	tree := d.tree(c)
	for _, dir := range d.Boot {
		maps.DeleteFunc(tree, func(p string, _ File) bool { return strings.HasPrefix(p, dir+"/") })
	}
	return tree
}

// Now is what programs see.
func (d *Disk) Now() Tree { return d.tree(Cut{Names: always(true), Write: always(true)}) }

func (d *Disk) tree(c Cut) Tree {
	out, seen := Tree{}, map[*entry]string{}
	var walk func(p string, e *entry, far bool)
	walk = func(p string, e *entry, far bool) {
		far = far || !c.Everywhere && slices.Contains(d.Far, p)
		within := d.covers(p) && !slices.Contains(d.roots, p)
		switch {
		case e.mode.IsDir():
			if within {
				out[p] = File{Mode: e.mode}
			}
			names := e.syncedNames
			if far || c.Names() {
				names = e.names
			}
			for _, name := range slices.Sorted(maps.Keys(names)) {
				walk(path.Join(p, name), names[name], far)
			}
		case !within:
		case e.link != "":
			out[p] = File{Mode: e.mode, Data: e.link}
		case seen[e] != "":
			out[p] = File{Mode: e.mode, Data: out[seen[e]].Data, Same: seen[e]}
		case far:
			out[p] = File{Mode: e.mode, Data: string(e.data)}
		default:
			out[p] = File{Mode: e.mode, Data: string(e.left(c))}
		}
		if !e.mode.IsDir() && seen[e] == "" {
			seen[e] = p
		}
	}
	walk("/", d.top, false)
	return out
}

// left is what a power cut leaves of a file's content.
func (e *entry) left(c Cut) []byte {
	data := bytes.Clone(e.synced)
	for _, w := range e.writes {
		if c.Write() {
			data = w.written(data)
		}
	}
	return data
}

// ReadTree reads what is below the folders, each of which may be missing.
func ReadTree(real func(string) string, roots []string) (Tree, error) {
	out, seen := Tree{}, map[unix.Stat_t]string{}
	for _, root := range roots {
		base := real(root)
		err := filepath.WalkDir(base, func(at string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := e.Info()
			if err != nil || at == base {
				return err
			}
			f := File{Mode: info.Mode()}
			var data []byte
			switch {
			case info.Mode().IsRegular():
				data, err = os.ReadFile(at)
				f.Data = string(data)
				if st, ok := info.Sys().(*syscall.Stat_t); ok {
					id := unix.Stat_t{Dev: uint64(st.Dev), Ino: st.Ino}
					if f.Same = seen[id]; f.Same == "" {
						seen[id] = root + strings.TrimPrefix(at, base)
					}
				}
			case info.Mode()&fs.ModeSymlink != 0:
				f.Data, err = os.Readlink(at)
			}
			out[root+strings.TrimPrefix(at, base)] = f
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Write makes what is below the folders be exactly this. A folder itself stays.
func (t Tree) Write(real func(string) string, roots []string) error {
	for _, root := range roots {
		entries, err := os.ReadDir(real(root))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := os.RemoveAll(filepath.Join(real(root), e.Name())); err != nil {
				return err
			}
		}
	}
	for _, p := range slices.Sorted(maps.Keys(t)) {
		f, at := t[p], real(p)
		var err error
		switch {
		case f.Mode.IsDir():
			err = os.Mkdir(at, f.Mode.Perm())
		case f.Mode&fs.ModeSymlink != 0:
			err = os.Symlink(f.Data, at)
		case f.Same != "":
			err = os.Link(real(f.Same), at)
		case f.Mode.IsRegular():
			if err = os.WriteFile(at, []byte(f.Data), f.Mode.Perm()); err == nil {
				err = os.Chmod(at, f.Mode.Perm())
			}
		default:
			err = fmt.Errorf("%s is no file", p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Names are the paths, with the modes: what tells litter from a proper state.
func (t Tree) Names() []string {
	var out []string
	for _, p := range slices.Sorted(maps.Keys(t)) {
		out = append(out, p+" "+t[p].Mode.String())
	}
	return out
}
