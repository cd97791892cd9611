package doctor

import (
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/containerd"
	"github.com/wgcni/wgcni/pkg/identity"
	"github.com/wgcni/wgcni/pkg/install"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/probe"
	"github.com/wgcni/wgcni/pkg/reconcile"
	"github.com/wgcni/wgcni/pkg/registry"
	"github.com/wgcni/wgcni/pkg/store"
)

// Facts are all that the checks go by. Where something could not be looked at, an
// error says so in the place of what it would have been.
type Facts struct {
	Now     time.Time
	Version string // of wgcnid
	Quick   bool   // nothing was sent
	Config  config.Config
	Chain   Chains // of the CNI folder

	Helper  Helper
	Files   Files
	Tunnel  Tunnel
	Plan    Plan
	Mesh    Mesh
	Network Network
	Rules   Ruleset
	// RulesError says why the machine's filters could not be read.
	RulesError error
	Peers      []Peer // by name
}

// Chains are the network configurations of the CNI folder.
type Chains struct {
	Dir      string
	DirError error
	Files    []ChainFile // in the runtime's order
	BinDir   string
	// Missing are the plugins of the chain that the runtime will not find, by type.
	Missing []string
	// PluginVersion is the wgcni binary's; PluginError says why it has none.
	PluginVersion string
	PluginError   error
	Install       *install.Record   // nil: not by `wgcnid install`
	Containerd    containerd.Config // as far as it is readable
}

// ChainFile is one network configuration.
type ChainFile struct {
	Name    string // without the folder
	Error   error  // why it cannot be read
	Network string
	Plugins []string // types, in their order
	raw     []string // the plugins' JSON, compact
}

// Helper is `wgcnid run`.
type Helper struct {
	Running bool
	Report  *reconcile.Report // its last word; nil before its first
}

// Files are those that nobody else may read.
type Files struct {
	KeyPath     string
	KeyError    error // of reading this node's key
	KeyMode     uint32
	StateMode   uint32 // of the folder
	NextPath    string
	NextMode    uint32 // 0: there is none
	Keys        identity.Keys
	KeysError   error  // of reading them with the state of their rotation
	Ordered     bool   // a rotation that wgcnid has not begun
	SecretPath  string // "": there is none
	SecretError error
	SecretIDs   int // how many secrets are in the file
}

// Tunnel is what WireGuard runs on.
type Tunnel struct {
	KernelHasIt bool
	Kind        string // of the interface, as ip(8) has it; "": there is none
	PID         int    // of the process, where it is in userspace; 0: not found
	// Holders are other programs that listen on WireGuard's UDP port.
	Holders []Holder
	// SpareHolders are those on the second interface's, where that does not.
	SpareHolders []Holder
}

// Holder is a program that listens on a UDP port.
type Holder struct {
	PID  int // 0: not found
	Name string
}

// Plan is what the kernel should hold, and what it lacks.
type Plan struct {
	Error    error
	Observed mesh.State
	State    mesh.State
	Pending  []mesh.Op
	Pods     []store.Attachment
	Tables   error // why nftables cannot be used
	// Unverified says that the filter cannot tell where packets with a source of this
	// node's own come from.
	Unverified bool

	conflicts []mesh.Conflict
}

// Mesh is what is known of the others.
type Mesh struct {
	Key           wgtypes.Key // this node's public one; zero: none
	Known         store.Known
	Forgotten     bool
	Store         string // names the registry
	RegistryError error
	Fresh         registry.Snapshot // as the registry has it now
	Stale         []registry.Stale
	Took          time.Duration // to read it
	// WriteError says why this node could not write to the registry, as far as that
	// can be told without writing.
	WriteError error
	Conflicts  []mesh.Conflict
}

// Network is the machine's own.
type Network struct {
	Uplinks       []string // interfaces of the default routes
	Addresses     []netip.Addr
	UnderlayMTU   int
	Fragments     string // see reconcile.FragmentsNote
	Forwarding    string // see reconcile.ForwardingNote
	ForwardsV4    bool
	ForwardsV6    bool
	LinkForwards  bool // wgcni0 itself, IPv4
	ReversePath   map[string]int
	SrcValidMark  bool
	Rules         []PolicyRule // of others
	ForeignRoutes []string     // in our table
	Managers      []string     // NetworkManager, systemd-networkd: those that would touch wgcni0
	Error         error
}

// PolicyRule is a rule of `ip rule` that is not ours.
type PolicyRule struct {
	Text     string
	Family   string // ipv4 or ipv6
	Priority int
	Table    int
	Mark     uint32 // with Mask, what the packet's mark must be
	Mask     uint32
	// Takes is the cluster prefix that it takes away from us; invalid: none.
	Takes netip.Prefix
	// Via says by which route.
	Via string
}

// Peer is one peer, and what came back from it.
type Peer struct {
	Name      string
	Key       wgtypes.Key
	Record    registry.Record
	Wanted    mesh.Peer // as planned
	Present   bool
	Have      mesh.Peer  // in the kernel, after the packets were sent
	Before    mesh.Peer  // before
	Address   netip.Addr // in the tunnel; invalid: none
	Route     string     // the interface by which Address is reached; "" if not known
	RouteErr  error
	Echo      probe.Answer // of a small packet to Address
	Full      probe.Answer // of one as large as the tunnel's MTU
	Fits      int          // where Full failed: the largest that came back, 0 if none; in bytes
	Machine   probe.Answer // of a small packet to the endpoint's machine, outside of the tunnel
	Whole     probe.Answer // of one as large as the tunnel's largest, outside of the tunnel
	WholeSize int          // its size in bytes
	Refused   bool         // its machine says that nobody listens at the endpoint
}
