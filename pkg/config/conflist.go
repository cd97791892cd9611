package config

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go4.org/netipx"
)

// DefaultDir is where CNI network configurations lie.
const DefaultDir = "/etc/cni/net.d"

// PluginType is our stanza's "type", and the name of the plugin's binary.
const PluginType = "wgcni"

// flannelSubnetFile is where flanneld writes the node's ranges.
const flannelSubnetFile = "/run/flannel/subnet.env"

// ErrNotChained says that no network configuration in a folder chains wgcni.
var ErrNotChained = errors.New("no network configuration chains wgcni")

// conflist is as much of a network configuration list as we need.
type conflist struct {
	CNIVersion string            `json:"cniVersion"`
	Name       string            `json:"name"`
	Plugins    []json.RawMessage `json:"plugins"`
}

// Load reads the stanza from a conflist, or from a file that is a bare stanza.
// With an empty path it takes the first conflist in dir that chains wgcni.
// Where the stanza names no podCIDRs they are found, see FindPodCIDRs.
func Load(path, dir string) (Config, error) {
	passed := ""
	if path == "" {
		var err error
		if path, passed, err = find(dir); err != nil {
			return Config{}, err
		}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, err
	}
	c, err := ParseFile(data)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	c.Source, c.PassedOver = data, passed
	return c, nil
}

// ParseFile is Load for the content of a conflist or of a bare stanza's file.
func ParseFile(data []byte) (Config, error) {
	var list conflist
	if err := json.Unmarshal(data, &list); err != nil {
		return Config{}, fmt.Errorf("not valid JSON: %w", err)
	}
	stanza := data
	if list.Plugins != nil {
		i := slices.IndexFunc(list.Plugins, isOurs)
		if i < 0 {
			return Config{}, fmt.Errorf("%w: add {\"type\": %q, …} to its plugins", ErrNotChained, PluginType)
		}
		stanza = list.Plugins[i]
	}
	c, err := Parse(stanza)
	if err != nil {
		return Config{}, err
	}
	c.Bare = list.Plugins == nil && len(c.PodCIDRs) == 0
	if list.Plugins != nil {
		c.Name, c.CNIVersion = list.Name, list.CNIVersion
	}
	if len(c.PodCIDRs) == 0 {
		c.PodCIDRs, err = podCIDRs(list.Plugins, flannelSubnetFile)
		if c.PodCIDRsLater = errors.Is(err, errNoSubnetFile); err != nil && !c.PodCIDRsLater {
			return Config{}, err
		}
	}
	return c, nil
}

func isOurs(stanza json.RawMessage) bool { return typeOf(stanza) == PluginType }

func typeOf(stanza json.RawMessage) string {
	var head struct {
		Type string `json:"type"`
	}
	_ = json.Unmarshal(stanza, &head) // what is no object has no type
	return head.Type
}

// find returns the first conflist, in the order of their names, that chains wgcni, and
// one before it, if any, that is no JSON.
func find(dir string) (path, passed string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", "", err
	}
	for _, e := range entries { // sorted by name
		if e.IsDir() || filepath.Ext(e.Name()) != ".conflist" {
			continue
		}
		path := filepath.Join(dir, e.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			return "", "", err
		}
		var list conflist
		if json.Unmarshal(data, &list) != nil {
			passed = path
		} else if slices.ContainsFunc(list.Plugins, isOurs) {
			return path, passed, nil
		}
	}
	return "", "", fmt.Errorf("%w in %s: `wgcnid install --entry FILE` adds it; on a machine with no CNI give the file with --config", ErrNotChained, dir)
}

// FindPodCIDRs looks up the ranges of this node for a network whose stanza does
// not name them, as the plugin sees it: it gets its own stanza only. Nothing
// found is no error; the pods are then announced one by one.
func FindPodCIDRs(network, dir string) ([]netip.Prefix, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		var list conflist
		if json.Unmarshal(data, &list) == nil && list.Name == network && slices.ContainsFunc(list.Plugins, isOurs) {
			found, err := podCIDRs(list.Plugins, flannelSubnetFile)
			if errors.Is(err, errNoSubnetFile) {
				return nil, nil
			}
			return found, err
		}
	}
	return nil, nil
}

// errNoSubnetFile says that flannel has not told the node's ranges yet.
var errNoSubnetFile = errors.New("flannel has not written its subnet file yet")

// podCIDRs takes the host-local subnets of the primary plugin, else flannel's
// subnet file where flannel is the primary.
func podCIDRs(plugins []json.RawMessage, subnetFile string) ([]netip.Prefix, error) {
	if len(plugins) == 0 {
		return nil, nil
	}
	if typeOf(plugins[0]) == "flannel" {
		var flannel struct {
			SubnetFile string `json:"subnetFile"`
		}
		if json.Unmarshal(plugins[0], &flannel) == nil && flannel.SubnetFile != "" {
			subnetFile = flannel.SubnetFile
		}
		return flannelSubnets(subnetFile)
	}
	var primary struct {
		IPAM struct {
			Type   string             `json:"type"`
			Ranges [][]hostLocalRange `json:"ranges"`
			hostLocalRange
		} `json:"ipam"`
	}
	if json.Unmarshal(plugins[0], &primary) != nil || primary.IPAM.Type != "host-local" {
		return nil, nil
	}
	var ranges []hostLocalRange
	if primary.IPAM.Subnet != "" {
		ranges = append(ranges, primary.IPAM.hostLocalRange)
	}
	return hostLocalSubnets(slices.Concat(append([][]hostLocalRange{ranges}, primary.IPAM.Ranges...)...))
}

// hostLocalRange is a range of the host-local IPAM plugin.
type hostLocalRange struct {
	Subnet     string `json:"subnet"`
	RangeStart string `json:"rangeStart"`
	RangeEnd   string `json:"rangeEnd"`
}

// hostLocalSubnets returns the subnets that are this node's own: those of which
// the ranges take more than half. A node that takes less shares the subnet, as
// nodes do that hand out parts of their own network, and no two can take more.
func hostLocalSubnets(ranges []hostLocalRange) ([]netip.Prefix, error) {
	var subnets []netip.Prefix
	taken := map[netip.Prefix]*big.Int{}
	for _, r := range ranges {
		p, err := netip.ParsePrefix(r.Subnet)
		if err != nil {
			return nil, fmt.Errorf("host-local subnet %q of the primary plugin: %w", r.Subnet, err)
		}
		p = p.Masked()
		from, to := p.Addr(), netipx.PrefixLastIP(p)
		for _, limit := range []struct {
			at  *netip.Addr
			key string
		}{{&from, r.RangeStart}, {&to, r.RangeEnd}} {
			// What is no address in the subnet is for host-local to refuse.
			if a, err := netip.ParseAddr(limit.key); err == nil && p.Contains(a.Unmap()) {
				*limit.at = a.Unmap()
			}
		}
		if taken[p] == nil {
			subnets, taken[p] = append(subnets, p), new(big.Int)
		}
		size := new(big.Int).Sub(new(big.Int).SetBytes(to.AsSlice()), new(big.Int).SetBytes(from.AsSlice()))
		taken[p].Add(taken[p], size.Add(size, big.NewInt(1)))
	}
	return slices.DeleteFunc(subnets, func(p netip.Prefix) bool {
		half := new(big.Int).Lsh(big.NewInt(1), uint(p.Addr().BitLen()-p.Bits()))
		return taken[p].Cmp(half.Rsh(half, 1)) <= 0
	}), nil
}

// flannelSubnets reads FLANNEL_SUBNET and FLANNEL_IPV6_SUBNET. The error Is
// errNoSubnetFile where flanneld has not run since the node booted.
func flannelSubnets(path string) ([]netip.Prefix, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", errNoSubnetFile, path)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []netip.Prefix
	for lines := bufio.NewScanner(f); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), "=")
		if key != "FLANNEL_SUBNET" && key != "FLANNEL_IPV6_SUBNET" {
			continue
		}
		for s := range strings.SplitSeq(value, ",") {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", path, key, err)
			}
			out = append(out, p.Masked()) // flannel writes the bridge's own address
		}
	}
	return out, nil
}

// RunDirOf is the run folder of a stanza that may be wrong in all else: DEL
// must do its work whatever has become of the configuration.
func RunDirOf(stanza []byte) string {
	var raw struct {
		RunDir string `json:"runDir"`
	}
	if json.Unmarshal(stanza, &raw) != nil || !filepath.IsAbs(raw.RunDir) {
		return DefaultRunDir
	}
	return filepath.Clean(raw.RunDir)
}
