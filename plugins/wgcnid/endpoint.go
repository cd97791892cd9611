package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/endpoint"
)

// endpointFlags are the command's own.
type endpointFlags struct {
	forwards       []string
	file           string
	addresses      []string
	allow          []string
	dns            []string
	proxyProtocol  bool
	idle, udpIdle  time.Duration
	dial, drain    time.Duration
	maxConnections int
	maxSessions    int
	health         string
	logs           logFlags
	debug          bool
}

func endpointCommand(o *options) *cobra.Command {
	var f endpointFlags
	cmd := &cobra.Command{
		Use:   "endpoint",
		Short: "Let machines of the mesh reach services, by one address",
		Long: `Let machines of the mesh reach services of the cluster and of the cloud, by this
node's tunnel address: TCP connections and UDP datagrams that arrive there are
forwarded. A target's name is resolved anew for each connection, so that pods may
move, and ranges that both ends use do not matter.

A forward is PROTOCOL/PORT=HOST:PORT, followed by any of
  ,allow=WHO         who may call it: the name of a machine, as "wgcnid nodes" shows
                     it, with what is behind that machine; an address; a prefix.
                     More than once for more of them. It takes the place of --allow
  ,max=CONNECTIONS   a limit of its own
  ,proxy-protocol    tell the target the caller's address, by the PROXY protocol,
                     version 2, which the target must expect
or the same in a file: {"forwards": [{"listen": "tcp/5432", "target": "db:5432",
  "allow": ["laptop"], "maxConnections": 100, "proxyProtocol": false}]}

Who may call, unless a list says otherwise: every machine of the mesh. Callers must
come in by the tunnel, where WireGuard vouches for their address; others are reset.
Names stand for what the machines' records say; that is looked at again every few
seconds, and connections of a machine that may no longer call are reset.

Names are asked of the servers in /etc/resolv.conf, which on a node rarely are the
cluster's: name those by --dns. While none answers, the last answer is used, and the
log says so. At the limit of connections callers wait; they are not turned away. On
SIGTERM the listeners close, connections go on for --drain, and are then reset.

It listens as soon as the node knows its tunnel address, and goes on doing so when
the tunnel is made anew. "wgcnid run" must run beside it.`,
		Example: `  # A database of the cluster, for two machines; the cluster's DNS, for all
  wgcnid endpoint --dns 10.96.0.10 \
    --forward tcp/5432=db.prod.svc.cluster.local:5432,allow=laptop,allow=vm-1 \
    --forward udp/53=10.96.0.10:53 --forward tcp/53=10.96.0.10:53
  # A managed service that only the cloud's own machines reach
  wgcnid endpoint --forward tcp/6379=cache.internal.example:6379 --allow 10.251.0.0/24
  # At an address of its own, which "subnets" of this node has as 10.250.255.1/32
  wgcnid endpoint --address 10.250.255.1 --file /etc/wgcni/endpoint.json
  curl -s http://127.0.0.1:51821/healthz http://127.0.0.1:51821/metrics`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.debug {
				f.logs.level = "debug"
			}
			log, err := f.logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return runEndpoint(cmd.Context(), *o, f, log)
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&f.forwards, "forward", nil, "PROTOCOL/PORT=HOST:PORT[,...]; more than once for more of them")
	flags.StringVar(&f.file, "file", "", "JSON file with more forwards; read once")
	flags.StringSliceVar(&f.addresses, "address", nil, "where to listen (default: this node's tunnel addresses)")
	flags.StringSliceVar(&f.allow, "allow", nil, "who may call forwards that do not say it: names, addresses, prefixes (default: the mesh)")
	flags.StringSliceVar(&f.dns, "dns", nil, "name servers to ask in place of those of /etc/resolv.conf, such as the cluster's: ADDRESS or ADDRESS:PORT")
	flags.BoolVar(&f.proxyProtocol, "proxy-protocol", false, "tell the targets of all tcp forwards who calls")
	flags.DurationVar(&f.idle, "idle-timeout", endpoint.DefaultIdleTimeout, "reset connections on which nothing moved, either way, for this long; negative: never")
	flags.DurationVar(&f.udpIdle, "udp-idle-timeout", endpoint.DefaultUDPIdleTimeout, "forget UDP callers that were silent for this long")
	flags.DurationVar(&f.dial, "dial-timeout", endpoint.DefaultDialTimeout, "how long the target may take to answer")
	flags.DurationVar(&f.drain, "drain", endpoint.DefaultDrain, "how long connections may go on after SIGTERM")
	flags.IntVar(&f.maxConnections, "max-connections", endpoint.DefaultMaxConnections, "TCP connections at once, of all forwards")
	flags.IntVar(&f.maxSessions, "max-udp-sessions", endpoint.DefaultMaxSessions, "UDP callers at once; the longest silent one makes room")
	flags.StringVar(&f.health, "health", "127.0.0.1:51821", `where to serve /healthz and /metrics; "off": nowhere`)
	f.logs.register(flags)
	flags.BoolVar(&f.debug, "debug", false, "log every connection: --log-level debug")
	return cmd
}

// endpointForwards are those of the flags and of the file.
func endpointForwards(f endpointFlags) ([]endpoint.Forward, error) {
	var out []endpoint.Forward
	for _, text := range f.forwards {
		forward, err := endpoint.ParseForward(text)
		if err != nil {
			return nil, err
		}
		out = append(out, forward)
	}
	if f.file != "" {
		text, err := os.ReadFile(f.file)
		if err != nil {
			return nil, fmt.Errorf("--file: %w", err)
		}
		more, err := endpoint.ParseForwards(text)
		if err != nil {
			return nil, fmt.Errorf("--file %s: %w", f.file, err)
		}
		out = append(out, more...)
	}
	allow, err := endpoint.ParseAllow(f.allow)
	if err != nil {
		return nil, fmt.Errorf("--%w", err)
	}
	for i := range out {
		if out[i].Allow.IsZero() {
			out[i].Allow = allow
		}
		if f.proxyProtocol && out[i].Protocol == endpoint.TCP {
			out[i].ProxyProtocol = true
		}
	}
	return out, endpoint.CheckForwards(out)
}

// endpointAddresses are those of --address.
func endpointAddresses(texts []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			return nil, fmt.Errorf("--address: %q is not an address", text)
		}
		if a = a.Unmap(); a.IsUnspecified() || a.IsMulticast() {
			return nil, fmt.Errorf("--address: %s would be more than one: name the one that callers use", a)
		}
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, nil
}

// endpointInterface is by which interface callers must come in: the tunnel, if
// these are addresses of the mesh. At any other address nobody vouches for the
// callers', so that the forwards have to say by address who may call.
func endpointInterface(c config.Config, addresses []netip.Addr, forwards []endpoint.Forward) (string, error) {
	b := c.Bounds()
	ofMesh := func(a netip.Addr) bool {
		return slices.ContainsFunc(b.All(), func(p netip.Prefix) bool { return p.Contains(a) })
	}
	if !slices.ContainsFunc(addresses, func(a netip.Addr) bool { return !ofMesh(a) }) {
		return c.Interface, nil
	}
	for _, a := range addresses {
		if ofMesh(a) {
			return "", fmt.Errorf("--address: %s is an address of the mesh, and another one is not: run an endpoint for each", a)
		}
	}
	for _, f := range forwards {
		if f.Allow.IsZero() || len(f.Allow.Names) > 0 {
			return "", fmt.Errorf("forward %s: at %s callers do not come by the tunnel: say by --allow which addresses or prefixes may call, not names", f, addresses[0])
		}
	}
	return "", nil
}

func runEndpoint(ctx context.Context, o options, f endpointFlags, log *slog.Logger) error {
	debug.SetGCPercent(50) // as for `wgcnid run`
	forwards, err := endpointForwards(f)
	if err != nil {
		return err
	}
	c, err := o.load()
	if err != nil {
		return err
	}
	follower := &follower{config: c, log: log}
	addresses, err := endpointAddresses(f.addresses)
	if err != nil {
		return err
	}
	if len(addresses) == 0 {
		if addresses, err = follower.awaitAddresses(ctx); err != nil {
			return err
		}
		follower.given = addresses
	}
	iface, err := endpointInterface(c, addresses, forwards)
	if err != nil {
		return err
	}
	lookup, err := lookupBy(f.dns)
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	settings := endpoint.Config{
		Addresses: addresses, Forwards: forwards, Interface: iface,
		Metrics: endpoint.NewMetrics(registry), Log: log, Lookup: lookup,
		IdleTimeout: f.idle, UDPIdleTimeout: f.udpIdle, DialTimeout: f.dial, Drain: f.drain,
		MaxConnections: f.maxConnections, MaxSessions: f.maxSessions,
	}
	if err := fitFiles(&settings, log); err != nil {
		return err
	}
	server, err := endpoint.New(settings)
	if err != nil {
		return err
	}
	follower.server, follower.addresses, follower.iface = server, addresses, iface
	return follower.run(ctx, f.health, registry)
}

// lookupBy asks these name servers in turns, or those of the system if there are none.
func lookupBy(texts []string) (endpoint.Lookup, error) {
	var servers []string
	for _, text := range texts {
		at, err := netip.ParseAddrPort(text)
		if a, aerr := netip.ParseAddr(text); aerr == nil {
			at, err = netip.AddrPortFrom(a, 53), nil
		}
		if err != nil || at.Port() == 0 {
			return nil, fmt.Errorf("--dns: %q is neither an address nor address:port", text)
		}
		servers = append(servers, at.String())
	}
	if len(servers) == 0 {
		return net.DefaultResolver.LookupNetIP, nil
	}
	var asked atomic.Uint32
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		// The resolver dials for every attempt anew: one that is silent is not asked twice in a row.
		server := servers[int(asked.Add(1)-1)%len(servers)]
		return new(net.Dialer).DialContext(ctx, network, server)
	}}
	return r.LookupNetIP, nil
}

// fitFiles makes the number of connections one that the process can hold. The
// runtime has raised the limit as far as it may (package os, Go 1.19).
func fitFiles(c *endpoint.Config, log *slog.Logger) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	wanted := c.MaxConnections
	if c.MaxConnections < 1 || c.MaxSessions < 1 {
		return errors.New("--max-connections and --max-udp-sessions: use 1 or more")
	}
	if c.Fit(limit.Max) {
		log.Warn("the limit of open files allows for fewer connections", "openFiles", limit.Max, "wanted", wanted, "connections", c.MaxConnections,
			"mend", "raise it: LimitNOFILE= of a systemd unit, `ulimit -Hn` of a shell")
	}
	return nil
}
