package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/identity"
)

// sayAgain is how often a command that waits repeats what it waits for.
const sayAgain = 30 * time.Second

// Options say what is to be installed. Paths are absolute.
type Options struct {
	CNIDir string // required: the folder of network configurations
	BinDir string // required: the folder of CNI plugins
	Plugin string // required: the plugin's binary, to be placed in BinDir
	// Entry is the text of the entry, see [Entry]; required.
	Entry []byte
	// Conflist is the file to chain wgcni to; empty: the first in CNIDir.
	Conflist string
	InPlace  bool
	// Secret is a file of cluster secrets, to be copied to where the entry wants
	// it. Empty: it is there, or there is none.
	Secret string
	// Wait bounds the wait for a network configuration. 0: for ever.
	Wait time.Duration
	// Say is told what is waited for, once and every 30 s; optional.
	Say func(text string)
}

// Prepare looks at the node and says what Install would do. It changes nothing.
// The error Is ErrUnready while there is no network configuration to chain to.
func (o Options) Prepare() (Plan, error) {
	c, err := config.Parse(o.Entry)
	if err != nil {
		return Plan{}, fmt.Errorf("the entry: %w", err)
	}
	had, err := loadIfAny(c.StateDir)
	if err != nil {
		return Plan{}, err
	}
	p := Plan{Record: Record{Stage: Installed, Mode: Copy, CNIDir: o.CNIDir, Entry: string(o.Entry)}}
	r := &p.Record
	if o.InPlace {
		r.Mode = InPlace
	}
	if had != nil && had.CNIDir == o.CNIDir {
		r.Target, r.Folders, r.Made = had.Target, had.Folders, had.Made
	} else if had != nil {
		return p, fmt.Errorf("wgcni is installed with --cni-dir %s: run `wgcnid uninstall` first", had.CNIDir)
	}
	if o.Conflist != "" {
		r.Source, r.Pinned = filepath.Base(o.Conflist), true
		if dir := filepath.Dir(o.Conflist); dir != o.CNIDir {
			return p, fmt.Errorf("%s is not in %s, where the runtime looks: give --cni-dir too if it looks elsewhere", o.Conflist, o.CNIDir)
		}
	} else if had != nil && had.Pinned {
		r.Source, r.Pinned = had.Source, true
	}
	if err := o.check(c); err != nil {
		return p, err
	}
	f, err := readFolder(o.CNIDir, had)
	if err != nil {
		return p, err
	}
	chained, changes, err := chain(f, *r, had)
	if err != nil {
		return p, err
	}
	p.Record = chained
	if err := o.files(&p, c, had); err != nil {
		return p, err
	}
	p.Changes = append(p.Changes, changes...) // the binary is there before the entry names it
	if had != nil {
		p.Changes = append(p.Changes, deletePlaced(had.Plugin, r.Plugin.Path)...)
		if had.Secret != nil && c.SecretFile != had.Secret.Path {
			p.Changes = append(p.Changes, deletePlaced(*had.Secret, c.SecretFile)...)
		}
	}
	p.note(f, c, had)
	return p, nil
}

// check finds what cannot be installed whatever the network configuration is. It
// reads little: while that is waited for, it is called again and again.
func (o Options) check(c config.Config) error {
	if info, err := os.Stat(o.Plugin); err != nil {
		return fmt.Errorf("the plugin's binary: %w: name it with --plugin", err)
	} else if !info.Mode().IsRegular() || info.Size() == 0 {
		return fmt.Errorf("the plugin's binary: %s is no file with content: name it with --plugin", o.Plugin)
	}
	if o.Secret == "" {
		return nil
	}
	if c.SecretFile == "" {
		return errors.New("--secret: the entry names no \"clusterSecretFile\" to copy it to: add that")
	}
	_, err := identity.LoadSecrets(o.Secret)
	return err
}

// files decides about the binary and the secret.
func (o Options) files(p *Plan, c config.Config, had *Record) error {
	var hadPlugin, hadSecret *Placed
	if had != nil {
		hadPlugin, hadSecret = &had.Plugin, had.Secret
	}
	plugin, changes, err := placement(o.Plugin, filepath.Join(o.BinDir, config.PluginType), 0o755, hadPlugin)
	if err != nil {
		return fmt.Errorf("the plugin's binary: %w", err)
	}
	p.Record.Plugin, p.Changes, p.folders = plugin, changes, []string{o.BinDir}
	if o.Secret == "" {
		if hadSecret != nil && hadSecret.Path == c.SecretFile {
			p.Record.Secret = hadSecret
		}
		return nil
	}
	if same, err := sameFile(o.Secret, c.SecretFile); err != nil || same {
		return err
	}
	secret, changes, err := placement(o.Secret, c.SecretFile, 0o600, hadSecret)
	if err != nil {
		return fmt.Errorf("cluster secret: %w", err)
	}
	secret.SHA256 = ""
	p.Record.Secret = &secret
	p.Changes = append(p.Changes, changes...)
	p.folders = append(p.folders, filepath.Dir(c.SecretFile))
	return nil
}

// deletePlaced deletes what an earlier run has placed elsewhere, if it is still that.
func deletePlaced(p Placed, now string) []Change {
	if p.Path == now || p.Found {
		return nil
	}
	data, err := os.ReadFile(p.Path)
	if err != nil || p.SHA256 != "" && hashOf(data) != p.SHA256 {
		return nil
	}
	text := "is deleted: " + now + " has taken its place"
	if now == "" {
		text = "is deleted: the entry does not name it any more"
	}
	return []Change{{Path: p.Path, Old: data, Quiet: true, Text: text}}
}

func sameFile(a, b string) (bool, error) {
	x, err := os.Stat(a)
	if err != nil {
		return false, err
	}
	y, err := os.Stat(b)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(x, y), err
}

// note adds what the operator should know.
func (p *Plan) note(f folder, c config.Config, had *Record) {
	path := filepath.Join(f.path, p.Record.Source)
	n, _ := f.find(p.Record.Source)
	bin := filepath.Dir(p.Record.Plugin.Path)
	if primary := n.primary(); primary != "" {
		if _, err := os.Lstat(filepath.Join(bin, primary)); err != nil {
			p.Notes = append(p.Notes, fmt.Sprintf("%s has no %q, the primary plugin of %s: if the runtime looks for plugins elsewhere no pod can start, so name that folder with --bin-dir", bin, primary, path))
		}
	}
	if p.Record.Mode == ByHand {
		note := path + " chains wgcni already: it stays as it is, and to change or remove the entry is up to you"
		if !chainsEntry(n.list, p.Record.Entry) {
			note += "; it differs from the one given"
		}
		p.Notes = append(p.Notes, note)
	}
	if had != nil && p.Record.Mode == Copy && !slices.ContainsFunc(f.networks, func(n network) bool { return n.file == p.Record.Source }) {
		p.Notes = append(p.Notes, path+" is not there: its copy stays until it is back")
	}
	if c.SecretFile != "" && p.Record.Secret == nil {
		if _, err := os.Stat(c.SecretFile); err != nil {
			p.Notes = append(p.Notes, fmt.Sprintf("the cluster secret is not there yet (%v): wgcnid needs it", err))
		}
	}
}

// Install waits for a network configuration and installs. What is installed
// already is left alone, and the plan is then empty. A process that is killed
// leaves a node on which pods start; the next Install, or the keeper, completes it.
func Install(ctx context.Context, o Options) (Plan, error) {
	waiting := ctx
	if o.Wait > 0 {
		var cancel context.CancelFunc
		waiting, cancel = context.WithTimeout(ctx, o.Wait)
		defer cancel()
	}
	for {
		if err := o.await(waiting); err != nil {
			return Plan{}, err
		}
		// It may be half written again by now.
		if p, err := o.install(ctx); !errors.Is(err, ErrUnready) || waiting.Err() != nil {
			return p, err
		}
	}
}

// install is Install without the waiting.
func (o Options) install(ctx context.Context) (Plan, error) {
	c, err := config.Parse(o.Entry)
	if err != nil {
		return Plan{}, fmt.Errorf("the entry: %w", err)
	}
	if err := durable.MkdirAll(c.StateDir, 0o700); err != nil {
		return Plan{}, err
	}
	held, err := lock(ctx, c.StateDir)
	if err != nil {
		return Plan{}, err
	}
	defer held.Close()
	dirs := []string{o.CNIDir, o.BinDir, c.StateDir}
	if c.SecretFile != "" {
		dirs = append(dirs, filepath.Dir(c.SecretFile))
	}
	removeLeftovers(dirs...) // before anything is decided: it may put a file back
	var done []Change
	for {
		p, err := o.Prepare()
		if err != nil {
			return p, err
		}
		err = p.carryOut(c.StateDir)
		done = append(done, p.Changes...)
		if errors.Is(err, errRaced) && ctx.Err() == nil {
			time.Sleep(20 * time.Millisecond) // its author is at work
			continue
		}
		p.Changes = done
		return p, err
	}
}

// carryOut does what was planned, with the lock held. The record comes before the
// first change, so that whoever comes after a crash knows of them all.
func (p *Plan) carryOut(stateDir string) error {
	had, err := loadIfAny(stateDir)
	if err != nil {
		return err
	}
	if had != nil && len(p.Changes) == 0 && reflect.DeepEqual(*had, p.Record) {
		return nil
	}
	for _, dir := range p.folders {
		for ; ; dir = filepath.Dir(dir) {
			if _, err := os.Stat(dir); err == nil || slices.Contains(p.Record.Folders, dir) {
				break
			}
			p.Record.Folders = append(p.Record.Folders, dir)
		}
	}
	slices.Sort(p.Record.Folders)
	begun := p.Record
	if had != nil && had.Mode == InPlace && had.Mode != begun.Mode {
		// Until the entry is out of the source, it has to be known who put it there.
		plugin := begun.Plugin
		begun = *had
		begun.Plugin, begun.Folders = plugin, p.Record.Folders
	}
	begun.Stage = Installing
	if err := config.KeepStateDir(p.Record.CNIDir, stateDir); err != nil {
		return err
	}
	if err := begun.save(stateDir); err != nil {
		return err
	}
	for _, dir := range p.folders {
		mode := fs.FileMode(0o755)
		if p.Record.Secret != nil && dir == filepath.Dir(p.Record.Secret.Path) {
			mode = 0o700
		}
		if err := durable.MkdirAll(dir, mode); err != nil {
			return err
		}
	}
	for _, c := range p.Changes {
		if err := c.apply(); err != nil {
			return err
		}
	}
	return p.Record.save(stateDir)
}

// await waits until there is a network configuration to chain to.
func (o Options) await(ctx context.Context) error {
	var said time.Time
	for begun := time.Now(); ; {
		_, err := o.Prepare()
		if !errors.Is(err, ErrUnready) {
			return err
		}
		if o.Say != nil && time.Since(said) >= sayAgain && time.Since(begun) >= time.Second/2 { // most are being written
			o.Say(fmt.Sprintf("waiting: %v", err))
			said = time.Now()
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%w; waited %v", err, time.Since(begun).Round(time.Second/10))
		}
	}
}
