// Package config reads the wgcni stanza of a CNI network configuration, the
// only configuration there is: the plugin gets it on stdin, wgcnid reads it from
// the conflist on disk.
//
//	raw JSON --Parse--> Config (validated, with every default filled in)
package config

import (
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// The defaults that are not obvious.
const (
	DefaultInterface  = "wgcni0"
	DefaultListenPort = 51820
	// DefaultFwMark is one bit that no known owner of packet marks uses, see markOwners.
	DefaultFwMark = 0x4
	// DefaultTable is "wg" in ASCII; wg-quick counts upward from 51820.
	DefaultTable = 0x7767
	// DefaultRulePriority comes after the local table (0) and Cilium's (100),
	// before AWS VPC CNI (512), Tailscale (5210), KubeSpan (32500) and main (32766).
	DefaultRulePriority = 110
	// LeastKeyRotation leaves a rotation that waits for a node time to be seen.
	LeastKeyRotation = time.Hour
	DefaultRunDir    = "/run/wgcni"
	DefaultStateDir  = "/var/lib/wgcni"
)

// Config is a validated stanza.
type Config struct {
	CNIVersion string
	Name       string // of the network
	NodeName   string

	// Settings has all but MTU when MTU is 0: it is then found from the underlay.
	mesh.Settings

	PodCIDRs []netip.Prefix // empty: found, see FindPodCIDRs
	// PodCIDRsLater says that flannel is to tell them, and has not yet: its file is
	// in /run, so that after each boot that takes until flanneld has run.
	PodCIDRsLater bool
	// Subnets are announced beside PodCIDRs: what else is behind this machine. A
	// single address is the machine's own, and stands on its interface.
	Subnets []netip.Prefix

	Location string
	Role     mesh.Role
	Segments []string // sorted; none: the segment of all that name none

	Endpoint string // host:port; empty: found from the default route
	// CallsOnly says that no endpoint is to be published: the machine is behind NAT.
	CallsOnly bool
	// CalledInside says that only machines of the same location can call it.
	CalledInside bool
	Registry     Registry

	// SecretFile has the cluster secrets, see package identity; empty: there are none.
	SecretFile string
	// AcceptUnsealed takes records of others that no cluster secret has sealed.
	// It is true without a SecretFile.
	AcceptUnsealed bool

	// KeyRotation is how old the node's key becomes before it is replaced, at least
	// LeastKeyRotation; 0: until a rotation is ordered.
	KeyRotation time.Duration

	RunDir   string
	StateDir string

	// Bare says that the stanza stands in a file of its own and names no podCIDRs: the
	// machine has no CNI, and no pods.
	Bare bool
	// Source is the file that the stanza was read from, if it was.
	Source []byte
	// PassedOver is a conflist that comes before that file, but is no JSON: "" if there is
	// none. Runtimes pass over it as well.
	PassedOver string
}

// String names what the configuration is about; it holds no secret.
func (c Config) String() string {
	return fmt.Sprintf("network %s, node %s, interface %s, clusterCIDRs %v", c.Name, c.NodeName, c.Interface, c.ClusterCIDRs)
}

// Error is a fault in a stanza. It names the key, what is there, and what would be right.
type Error struct {
	Key   string
	Fault string
	Want  string
}

func (e *Error) Error() string {
	if e.Want == "" {
		return fmt.Sprintf("%s: %s", e.Key, e.Fault)
	}
	return fmt.Sprintf("%s: %s; %s", e.Key, e.Fault, e.Want)
}

// Parse validates a stanza and fills in the defaults. The error is an *Error
// for everything but broken JSON.
func Parse(stanza []byte) (Config, error) {
	raw, err := decode(stanza)
	if err != nil {
		return Config{}, err
	}
	c := Config{
		CNIVersion: raw.CNIVersion, Name: raw.Name,
		Settings: mesh.Settings{
			Interface:    or(raw.Interface, DefaultInterface),
			ListenPort:   orZero(raw.ListenPort, DefaultListenPort),
			RulePriority: orZero(raw.RulePriority, DefaultRulePriority),
			Table:        orZero(raw.Table, DefaultTable),
		},
		Endpoint: raw.Endpoint,
		RunDir:   or(raw.RunDir, DefaultRunDir),
		StateDir: or(raw.StateDir, DefaultStateDir),
	}
	for _, check := range []func(*Config, rawStanza) error{
		checkCIDRs, checkExternal, checkPlace, checkEncryption, checkNames, checkNumbers, checkRotation, checkMark, checkEndpoint, checkRegistry, checkSecret, checkPaths, checkNodes,
	} {
		if err := check(&c, raw); err != nil {
			return Config{}, err
		}
	}
	return c, nil
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}

// orZero tells a key that is missing from one that is 0: the latter is checked.
func orZero(n *int, fallback int) int {
	if n == nil {
		return fallback
	}
	return *n
}

func checkCIDRs(c *Config, raw rawStanza) (err error) {
	if len(raw.ClusterCIDRs) == 0 {
		return &Error{"clusterCIDRs", "missing", `set it to the pods' ranges of the whole cluster, for example ["10.244.0.0/16"]`}
	}
	if c.ClusterCIDRs, err = prefixes("clusterCIDRs", raw.ClusterCIDRs); err != nil {
		return err
	}
	for _, p := range c.ClusterCIDRs {
		if p.Bits() == 0 {
			return &Error{"clusterCIDRs", p.String() + " is every address there is", "name the pods' ranges only"}
		}
	}
	c.PodCIDRs, err = prefixes("podCIDRs", raw.PodCIDRs)
	return err
}

func prefixes(key string, in []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range in {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, &Error{key, strconv.Quote(s) + " is not a prefix", "write it like 10.244.0.0/16 or fd00:244::/48"}
		}
		if p != p.Masked() {
			return nil, &Error{key, s + " has bits set behind its mask", "write " + p.Masked().String()}
		}
		if p.Addr().Is4In6() {
			return nil, &Error{key, s + " is an IPv4 address in IPv6 form", "write it as IPv4"}
		}
		out = append(out, p)
	}
	return out, nil
}

func checkEncryption(c *Config, raw rawStanza) error {
	if raw.Encryption == "" {
		return nil
	}
	if err := c.Encryption.UnmarshalText([]byte(raw.Encryption)); err != nil {
		return &Error{"encryption", err.Error(), ""}
	}
	return nil
}

const (
	lower  = "abcdefghijklmnopqrstuvwxyz"
	digits = "0123456789"
	alnum  = lower + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + digits
)

// wellFormed reports whether s begins with one of first, ends with one of last,
// and has nothing but these and what else all names. To compile regular
// expressions would be a noticeable part of what the plugin's start takes.
func wellFormed(s, first, all, last string) bool {
	return s != "" && strings.Contains(first, s[:1]) && strings.Trim(s, all) == "" && strings.Contains(last, s[len(s)-1:])
}

func checkNames(c *Config, raw rawStanza) error {
	c.NodeName = or(raw.NodeName, os.Getenv("NODE_NAME"))
	if c.NodeName == "" {
		host, err := os.Hostname()
		if err != nil {
			return &Error{"nodeName", "the host name cannot be read: " + err.Error(), "set nodeName"}
		}
		c.NodeName = strings.ToLower(host)
	}
	if len(c.NodeName) > 253 || !wellFormed(c.NodeName, lower+digits, lower+digits+"-.", lower+digits) {
		return &Error{"nodeName", strconv.Quote(c.NodeName) + " is not a DNS name (RFC 1123)", "use lower case letters, digits, - and ."}
	}
	if c.Interface == mesh.SpareInterface(c.Interface) {
		return &Error{"interface", strconv.Quote(c.Interface) + " is the name that its second interface would have", "use up to 14 characters, or another one at the end"}
	}
	if len(c.Interface) > 15 || !wellFormed(c.Interface, alnum, alnum+"_.-", alnum+"_.-") {
		return &Error{"interface", strconv.Quote(c.Interface) + " is not an interface name", "use up to 15 letters, digits, - _ and ."}
	}
	return nil
}

func checkNumbers(c *Config, raw rawStanza) error {
	within := func(key string, n, low, high int) error {
		if n < low || n > high {
			return &Error{key, fmt.Sprintf("%d is out of range", n), fmt.Sprintf("use %d to %d", low, high)}
		}
		return nil
	}
	for _, err := range []error{
		within("listenPort", c.ListenPort, 1, 65535),
		within("rulePriority", c.RulePriority, 1, 32765),
		within("table", c.Table, 1, 1<<31-1),
		within("keepalive", raw.Keepalive, 0, 65535),
	} {
		if err != nil {
			return err
		}
	}
	if c.Table >= 253 && c.Table <= 255 {
		return &Error{"table", strconv.Itoa(c.Table) + " is the kernel's own (local, main, default)", "use another"}
	}
	if raw.MTU != nil {
		if err := within("mtu", *raw.MTU, mesh.LeastMTU(c.Bounds().All()), 65535); err != nil {
			return err
		}
		c.MTU = *raw.MTU
	}
	c.Keepalive = time.Duration(raw.Keepalive) * time.Second
	return nil
}

func checkRotation(c *Config, raw rawStanza) error {
	// The last port there is has none after it.
	c.SparePort = c.ListenPort + 1
	if c.ListenPort == 65535 {
		c.SparePort = c.ListenPort - 1
	}
	if raw.RotationPort != nil {
		if c.SparePort = *raw.RotationPort; c.SparePort < 1 || c.SparePort > 65535 {
			return &Error{"rotationPort", fmt.Sprintf("%d is out of range", c.SparePort), "use 1 to 65535"}
		}
		if c.SparePort == c.ListenPort {
			return &Error{"rotationPort", fmt.Sprintf("%d is listenPort as well", c.SparePort), "use two: while a key is replaced, both are in use"}
		}
	}
	if raw.KeyRotation == nil {
		return nil
	}
	const want = `write a time of at least an hour, for example "720h" for 30 days, or leave it out`
	every, err := time.ParseDuration(*raw.KeyRotation)
	if err != nil {
		return &Error{"keyRotation", strconv.Quote(*raw.KeyRotation) + " is no time", want}
	}
	if every < LeastKeyRotation && every != 0 {
		return &Error{"keyRotation", every.String() + " is too short", want}
	}
	c.KeyRotation = every
	return nil
}

// markOwners are the bits that other software on cluster nodes is known to use.
var markOwners = []struct {
	name string
	bits uint32
}{
	{"kube-proxy", 0xc000},
	{"the portmap plugin", 0x2000},
	{"Calico", 0xffff0000},
	{"Cilium", 0x1f00},
	{"KubeSpan", 0x60},
	{"the AWS VPC CNI", 0x80},
}

func checkMark(c *Config, raw rawStanza) error {
	c.FwMark = DefaultFwMark
	if raw.FwMark == nil {
		return nil
	}
	const want = "use one bit, for example 0x4"
	n, err := strconv.ParseUint(string(*raw.FwMark), 0, 32)
	if err != nil {
		return &Error{"fwmark", string(*raw.FwMark) + " is not a 32 bit number", want}
	}
	mark := uint32(n)
	if bits.OnesCount32(mark) != 1 {
		return &Error{"fwmark", fmt.Sprintf("%#x has %d bits set", mark, bits.OnesCount32(mark)), want}
	}
	for _, o := range markOwners {
		if mark&o.bits != 0 {
			return &Error{"fwmark", fmt.Sprintf("%#x belongs to %s (%#x)", mark, o.name, o.bits), want}
		}
	}
	c.FwMark = mark
	return nil
}

// What a machine behind NAT writes in the place of its endpoint: nobody can call
// it, or the machines of its location can, at the address of its default route.
const (
	noEndpoint     = "none"
	insideEndpoint = "location"
)

func checkEndpoint(c *Config, raw rawStanza) error {
	if raw.Endpoint == "" {
		return nil
	}
	if raw.Endpoint == noEndpoint {
		c.Endpoint, c.CallsOnly = "", true
		return nil
	}
	if raw.Endpoint == insideEndpoint {
		if c.Location == "" {
			return &Error{"endpoint", strconv.Quote(insideEndpoint) + " without a location", `set "location" too, or write "none"`}
		}
		c.Endpoint, c.CalledInside = "", true
		return nil
	}
	host, port, err := net.SplitHostPort(raw.Endpoint)
	if err != nil || host == "" {
		return &Error{"endpoint", strconv.Quote(raw.Endpoint) + " is not host:port", "write it like 192.0.2.1:51820, [2001:db8::1]:51820 or node.example.org:51820"}
	}
	if !validPort(port) {
		return &Error{"endpoint", "port " + strconv.Quote(port) + " is out of range", "use 1 to 65535"}
	}
	if a, err := netip.ParseAddr(host); err == nil && (a.IsUnspecified() || a.IsMulticast() || a.IsLoopback()) {
		return &Error{"endpoint", host + " is no address that others could reach", "name one that they can"}
	}
	return nil
}

func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n != 0
}

func checkPaths(c *Config, _ rawStanza) (err error) {
	if c.RunDir, err = absolute("runDir", c.RunDir); err != nil {
		return err
	}
	if c.StateDir, err = absolute("stateDir", c.StateDir); err != nil {
		return err
	}
	if c.RunDir == c.StateDir {
		return &Error{"runDir", c.RunDir + " is stateDir as well", "use two: one is emptied at boot, the other is not"}
	}
	return nil
}

// absolute cleans a path, which is the same for every process only from the root.
func absolute(key, path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", &Error{key, strconv.Quote(path) + " is a relative path", "write it from /"}
	}
	return filepath.Clean(path), nil
}

// secretFile is absolute for a file whose content is a secret: what stands in
// its place may be that content, and is not repeated.
func secretFile(key, path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", &Error{key, "not a path from /", "name the file there, and leave its content in it"}
	}
	return filepath.Clean(path), nil
}

func checkSecret(c *Config, raw rawStanza) (err error) {
	if raw.ClusterSecretFile == "" {
		if raw.Seal != "" {
			return &Error{"seal", strconv.Quote(raw.Seal) + " without a cluster secret", "set clusterSecretFile too, or leave seal out"}
		}
		c.AcceptUnsealed = true
		return nil
	}
	if c.SecretFile, err = secretFile("clusterSecretFile", raw.ClusterSecretFile); err != nil {
		return err
	}
	switch raw.Seal {
	case "", "required":
	case "preferred":
		c.AcceptUnsealed = true
	default:
		return &Error{"seal", strconv.Quote(raw.Seal) + ` is neither "required" nor "preferred"`, `use "preferred" only until every node has the secret`}
	}
	return nil
}
