package doctor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/containerd"
	"github.com/wgcni/wgcni/pkg/install"
)

// containerdFile is where containerd reads its configuration; it is a variable of
// the tests.
var containerdFile = containerd.File

// GatherChains looks at the CNI folder, which needs no working configuration. With
// an empty binDir it is found.
func GatherChains(ctx context.Context, dir, binDir string, c config.Config) Chains {
	out := Chains{Dir: dir, Containerd: containerd.Read(containerdFile)}
	entries, err := os.ReadDir(dir)
	out.DirError = err
	for _, e := range entries { // sorted by name, as libcni's ConfFiles and its callers have them
		if ext := filepath.Ext(e.Name()); !e.IsDir() && slices.Contains([]string{".conf", ".conflist", ".json"}, ext) {
			out.Files = append(out.Files, readChainFile(dir, e.Name()))
		}
	}
	installed := ""
	if record, err := install.Load(cmp.Or(c.StateDir, config.DefaultStateDir)); err == nil {
		out.Install, installed = &record, filepath.Dir(record.Plugin.Path)
	}
	out.BinDir = cmp.Or(binDir, installed, out.Containerd.BinDir, containerd.DefaultBinDir)
	if ours := out.ours(); ours != nil {
		for _, plugin := range ours.Plugins {
			if info, err := os.Stat(filepath.Join(out.BinDir, plugin)); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
				out.Missing = append(out.Missing, plugin)
			}
		}
		if !slices.Contains(out.Missing, config.PluginType) {
			out.PluginVersion, out.PluginError = pluginVersion(ctx, filepath.Join(out.BinDir, config.PluginType))
		}
	}
	return out
}

// ours is the first file that chains wgcni, or nil.
func (c Chains) ours() *ChainFile {
	for i, f := range c.Files {
		if slices.Contains(f.Plugins, config.PluginType) {
			return &c.Files[i]
		}
	}
	return nil
}

func readChainFile(dir, name string) ChainFile {
	f := ChainFile{Name: name}
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		f.Error = err
		return f
	}
	var list struct {
		Name    string            `json:"name"`
		Type    string            `json:"type"`
		Plugins []json.RawMessage `json:"plugins"`
	}
	if f.Error = json.Unmarshal(data, &list); f.Error != nil {
		return f
	}
	f.Network = list.Name
	if list.Plugins == nil && list.Type != "" { // a .conf has a single plugin
		list.Plugins = []json.RawMessage{data}
	}
	for _, raw := range list.Plugins {
		var plugin struct {
			Type string `json:"type"`
		}
		_ = json.Unmarshal(raw, &plugin) // what is no object has no type
		f.Plugins = append(f.Plugins, plugin.Type)
		var compact bytes.Buffer
		_ = json.Compact(&compact, raw) // it is part of valid JSON
		f.raw = append(f.raw, compact.String())
	}
	if len(f.Plugins) == 0 {
		f.Error = errors.New("it has no plugins")
	}
	return f
}

// pluginVersion asks the binary as a person would: without CNI_COMMAND a plugin
// says what it is.
func pluginVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = []string{}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s does not run: %w: %s", path, err, strings.TrimSpace(string(out)))
	}
	const before = "CNI plugin wgcni "
	_, rest, ok := strings.Cut(string(out), before)
	version, _, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 {
		return "", fmt.Errorf("%s is another program: it says %q", path, firstLine(string(out)))
	}
	return version, nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
