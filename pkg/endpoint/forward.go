package endpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Protocol is "tcp" or "udp".
type Protocol string

// The protocols that are forwarded.
const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

// Forward is one port that is listened on, and where what arrives there goes.
type Forward struct {
	Protocol Protocol
	// Port is listened on at each of the server's addresses. In tests 0 takes any.
	Port uint16
	// Target is host:port. A name is resolved for each connection.
	Target string
	// Allow says who may call; the zero value is whatever the server allows.
	Allow Allow
	// MaxConnections of this forward, beside those of the server; 0: no limit of its own.
	MaxConnections int
	// ProxyProtocol tells the target the caller's address, by a header ahead of the
	// stream (PROXY protocol, version 2). The target must expect it. TCP only.
	ProxyProtocol bool
}

// String names the forward, such as "tcp/5432".
func (f Forward) String() string { return string(f.Protocol) + "/" + strconv.Itoa(int(f.Port)) }

// Allow is a list of callers. The zero value is no list: the whole mesh may call.
type Allow struct {
	Names    []string // of machines of the mesh, each with what is behind it
	Prefixes []netip.Prefix
}

// IsZero reports whether there is no list.
func (a Allow) IsZero() bool { return len(a.Names) == 0 && len(a.Prefixes) == 0 }

// ParseAllow reads names of machines, addresses and prefixes.
func ParseAllow(entries []string) (a Allow, err error) {
	for _, e := range entries {
		if addr, err := netip.ParseAddr(e); err == nil {
			addr = addr.Unmap()
			a.Prefixes = append(a.Prefixes, netip.PrefixFrom(addr, addr.BitLen()))
			continue
		}
		if strings.Contains(e, "/") {
			p, err := netip.ParsePrefix(e)
			if err != nil || p != p.Masked() {
				return Allow{}, fmt.Errorf("allow %q: not a prefix: write it like 10.251.0.0/24", e)
			}
			a.Prefixes = append(a.Prefixes, p)
			continue
		}
		if !validName(e) {
			return Allow{}, fmt.Errorf("allow %q: neither the name of a machine, as `wgcnid nodes` shows it, nor an address, nor a prefix", e)
		}
		a.Names = append(a.Names, e)
	}
	return a, nil
}

// validName is what the registry takes for a name (RFC 1123).
func validName(s string) bool {
	return s != "" && len(s) <= 253 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-.") == "" && strings.Trim(s[:1]+s[len(s)-1:], "-.") == s[:1]+s[len(s)-1:]
}

const forwardForm = "write it like tcp/5432=db.prod.svc.cluster.local:5432 or udp/53=10.96.0.10:53,allow=laptop"

// ParseForward reads the form of the command line,
//
//	PROTOCOL/PORT=HOST:PORT[,allow=NAME|ADDRESS|PREFIX]...[,max=CONNECTIONS][,proxy-protocol]
func ParseForward(s string) (Forward, error) {
	fail := func(why string) (Forward, error) {
		return Forward{}, fmt.Errorf("forward %q: %s: %s", s, why, forwardForm)
	}
	listen, rest, ok := strings.Cut(s, "=")
	if !ok {
		return fail("it names no target")
	}
	words := strings.Split(rest, ",")
	var max int
	var allow []string
	var proxy bool
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "allow":
			allow = append(allow, value)
		case "max":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 {
				return fail(fmt.Sprintf("%q is no number of connections", w))
			}
			max = n
		case "proxy-protocol":
			if value != "" {
				return fail("proxy-protocol takes no value")
			}
			proxy = true
		default:
			return fail(fmt.Sprintf("%q is none of allow=, max= and proxy-protocol", w))
		}
	}
	return makeForward(listen, words[0], allow, max, proxy)
}

// fileForward is the form of a file.
type fileForward struct {
	Listen         string   `json:"listen"`
	Target         string   `json:"target"`
	Allow          []string `json:"allow"`
	MaxConnections int      `json:"maxConnections"`
	ProxyProtocol  bool     `json:"proxyProtocol"`
}

// ParseForwards reads the form of a file:
//
//	{"forwards": [{"listen": "tcp/5432", "target": "db.prod.svc.cluster.local:5432",
//	  "allow": ["laptop"], "maxConnections": 100, "proxyProtocol": false}]}
func ParseForwards(text []byte) ([]Forward, error) {
	var file struct {
		Forwards []fileForward `json:"forwards"`
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&file); err != nil {
		return nil, fmt.Errorf("forwards: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("forwards: there is more behind the object: keep one")
	}
	var out []Forward
	for _, f := range file.Forwards {
		if f.MaxConnections < 0 {
			return nil, fmt.Errorf("forward %s: maxConnections %d is negative", f.Listen, f.MaxConnections)
		}
		made, err := makeForward(f.Listen, f.Target, f.Allow, f.MaxConnections, f.ProxyProtocol)
		if err != nil {
			return nil, err
		}
		out = append(out, made)
	}
	return out, nil
}

func makeForward(listen, target string, allow []string, max int, proxy bool) (Forward, error) {
	f := Forward{MaxConnections: max, ProxyProtocol: proxy, Target: target}
	fail := func(why string) (Forward, error) {
		return Forward{}, fmt.Errorf("forward %s=%s: %s: %s", listen, target, why, forwardForm)
	}
	protocol, port, _ := strings.Cut(listen, "/")
	if f.Protocol = Protocol(protocol); f.Protocol != TCP && f.Protocol != UDP {
		return fail(fmt.Sprintf("%q is neither tcp nor udp", protocol))
	}
	var ok bool
	if f.Port, ok = parsePort(port); !ok {
		return fail(fmt.Sprintf("port %q is out of range", port))
	}
	if host, port, err := splitTarget(target); err != nil || port == 0 || host == "" {
		return fail(fmt.Sprintf("target %q is not host:port", target))
	}
	if f.Protocol == UDP && proxy {
		return fail("the PROXY protocol is for tcp only")
	}
	if f.Protocol == UDP && max > 0 {
		return fail("a number of connections is for tcp only")
	}
	a, err := ParseAllow(allow)
	if err != nil {
		return Forward{}, fmt.Errorf("forward %s: %w", listen, err)
	}
	f.Allow = a
	return f, nil
}

func parsePort(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && n != 0
}

func splitTarget(target string) (host string, port uint16, err error) {
	host, p, err := net.SplitHostPort(target)
	if err != nil {
		return "", 0, err
	}
	port, ok := parsePort(p)
	if !ok || strings.ContainsAny(host, " /=,") {
		return "", 0, fmt.Errorf("%q is not host:port", target)
	}
	return host, port, nil
}

// CheckForwards looks for what cannot be served at once.
func CheckForwards(forwards []Forward) error {
	if len(forwards) == 0 {
		return errors.New("nothing to forward: name at least one, like --forward tcp/5432=db.prod.svc.cluster.local:5432")
	}
	for i, f := range forwards {
		if f.Port != 0 && slices.ContainsFunc(forwards[:i], func(g Forward) bool { return g.String() == f.String() }) {
			return fmt.Errorf("forward %s is named twice: a port has one target", f)
		}
	}
	return nil
}
