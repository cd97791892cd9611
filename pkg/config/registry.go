package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode"
)

// DefaultEtcdPrefix is what the keys of a mesh begin with in etcd.
const DefaultEtcdPrefix = "/wgcni/"

// The types of a registry.
const (
	RegistryFile = "file"
	RegistryEtcd = "etcd"
)

// Registry says where nodes find each other.
type Registry struct {
	Type string // RegistryFile or RegistryEtcd
	Path string // of the shared file; empty for another type
	Etcd Etcd   // the zero value for another type
}

// Etcd says how to reach the etcd that holds the registry. It has no secret, only
// the files where they are.
type Etcd struct {
	// Endpoints are at least one URL "http://host:port" or "https://host:port",
	// all with the one scheme or all with the other.
	Endpoints []string
	// Prefix begins every key. It begins and ends with "/".
	Prefix string
	// CAFile has the authorities that may vouch for etcd, in PEM form; empty:
	// those of the system.
	CAFile string
	// CertFile and KeyFile are what this node shows to etcd, in PEM form; both or none.
	CertFile, KeyFile string
	// Username is how this node calls itself to etcd, with the password that
	// PasswordFile holds; both or none.
	Username, PasswordFile string
}

func checkRegistry(c *Config, raw rawStanza) (err error) {
	r := raw.Registry
	if r == nil {
		return &Error{"registry", "missing", `set it, for example to {"type": "file", "path": "/srv/shared/mesh.json"}`}
	}
	if r.Type == "" {
		return &Error{"registry.type", "missing", `use "file" or "etcd"`}
	}
	if r.Type != RegistryFile && r.Type != RegistryEtcd {
		return &Error{"registry.type", strconv.Quote(r.Type) + " is not known", `use "file" or "etcd"`}
	}
	if err := ownKeys(*r); err != nil {
		return err
	}
	c.Registry = Registry{Type: r.Type}
	if r.Type == RegistryEtcd {
		c.Registry.Etcd, err = checkEtcd(*r)
		return err
	}
	if r.Path == "" {
		return &Error{"registry.path", "missing", "name the shared file"}
	}
	c.Registry.Path, err = absolute("registry.path", r.Path)
	return err
}

// ownKeys refuses the keys of the other type: whoever wrote them believes that
// they do something.
func ownKeys(r rawRegistry) error {
	for _, k := range []struct {
		key, of string
		set     bool
	}{
		{"path", RegistryFile, r.Path != ""},
		{"endpoints", RegistryEtcd, len(r.Endpoints) > 0},
		{"prefix", RegistryEtcd, r.Prefix != ""},
		{"caFile", RegistryEtcd, r.CAFile != ""},
		{"certFile", RegistryEtcd, r.CertFile != ""},
		{"keyFile", RegistryEtcd, r.KeyFile != ""},
		{"username", RegistryEtcd, r.Username != ""},
		{"passwordFile", RegistryEtcd, r.PasswordFile != ""},
	} {
		if k.set && k.of != r.Type {
			return &Error{"registry." + k.key, "belongs to type " + k.of + ", and this registry is of type " + r.Type, "leave it out, or change registry.type"}
		}
	}
	return nil
}

func checkEtcd(r rawRegistry) (e Etcd, err error) {
	e.Username = r.Username
	for _, f := range []struct {
		key  string
		in   string
		out  *string
		read func(key, path string) (string, error)
	}{
		{"registry.caFile", r.CAFile, &e.CAFile, absolute},
		{"registry.certFile", r.CertFile, &e.CertFile, absolute},
		{"registry.keyFile", r.KeyFile, &e.KeyFile, secretFile},
		{"registry.passwordFile", r.PasswordFile, &e.PasswordFile, secretFile},
	} {
		if f.in == "" {
			continue
		}
		if *f.out, err = f.read(f.key, f.in); err != nil {
			return Etcd{}, err
		}
	}
	for _, p := range []struct{ a, inA, b, inB string }{
		{"certFile", e.CertFile, "keyFile", e.KeyFile},
		{"username", e.Username, "passwordFile", e.PasswordFile},
	} {
		switch {
		case p.inA != "" && p.inB == "":
			return Etcd{}, &Error{"registry." + p.b, "missing", "set it beside " + p.a + ", or leave out both"}
		case p.inA == "" && p.inB != "":
			return Etcd{}, &Error{"registry." + p.a, "missing", "set it beside " + p.b + ", or leave out both"}
		}
	}
	if e.Endpoints, err = etcdEndpoints(r.Endpoints, e.CAFile != "" || e.CertFile != ""); err != nil {
		return Etcd{}, err
	}
	if e.Prefix, err = etcdPrefix(or(r.Prefix, DefaultEtcdPrefix)); err != nil {
		return Etcd{}, err
	}
	return e, nil
}

func etcdPrefix(prefix string) (string, error) {
	wrong := func(fault string) (string, error) {
		return "", &Error{"registry.prefix", strconv.Quote(prefix) + " " + fault, "write it like " + DefaultEtcdPrefix}
	}
	rest, ok := strings.CutPrefix(strings.TrimSuffix(prefix, "/"), "/")
	if !ok {
		return wrong("does not name a folder from /")
	}
	for part := range strings.SplitSeq(rest, "/") {
		if part == "" || part == "." || part == ".." {
			return wrong("has an empty part, or one that is . or ..")
		}
		// Unseen in most texts, it would make a mesh of its own.
		if strings.ContainsFunc(part, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }) {
			return wrong("has white space in it")
		}
	}
	return "/" + rest + "/", nil
}

// etcdEndpoints gives every endpoint its scheme: https once anything speaks of
// TLS. The client takes its credentials for all of them from the first, so a
// mixture would work or not by their order.
func etcdEndpoints(in []string, secure bool) ([]string, error) {
	const key = "registry.endpoints"
	if len(in) == 0 {
		return nil, &Error{key, "missing", `set it, for example to ["https://etcd.example.org:2379"]`}
	}
	urls := make([]url.URL, 0, len(in))
	for i, s := range in {
		if strings.Contains(s, "@") { // neither this text nor url's error may be shown
			return nil, &Error{key, fmt.Sprintf("number %d has a user name or a password in it", i+1), "use username and passwordFile"}
		}
		u, fault := etcdEndpoint(s)
		if fault != "" {
			return nil, &Error{key, strconv.Quote(s) + " " + fault, "write it like https://etcd.example.org:2379, 192.0.2.1:2379 or [2001:db8::1]:2379"}
		}
		urls = append(urls, u)
		secure = secure || u.Scheme == "https"
	}
	out := make([]string, 0, len(in))
	for i, u := range urls {
		switch {
		case u.Scheme == "http" && secure:
			return nil, &Error{key, strconv.Quote(in[i]) + " would be in the clear, beside TLS files or https", "write https for it, or leave those out"}
		case u.Scheme == "" && secure:
			u.Scheme = "https"
		case u.Scheme == "":
			u.Scheme = "http"
		}
		out = append(out, u.String())
	}
	return out, nil
}

// etcdEndpoint reads one endpoint; its scheme is empty if the text has none.
func etcdEndpoint(s string) (u url.URL, fault string) {
	text := s
	if !strings.Contains(s, "://") {
		text = "//" + s
	}
	parsed, err := url.Parse(text)
	if err != nil || parsed.Host == "" || strings.Trim(parsed.Path, "/") != "" || parsed.RawQuery != "" || parsed.Fragment != "" {
		return u, "is neither a URL without a path nor host:port"
	}
	u = url.URL{Scheme: parsed.Scheme, Host: parsed.Host}
	host, port, err := net.SplitHostPort(u.Host)
	_, notAddress := netip.ParseAddr(host)
	switch {
	case u.Scheme != "" && u.Scheme != "http" && u.Scheme != "https":
		return u, "is neither http nor https"
	case err != nil || !validPort(port):
		return u, "does not end in a port from 1 to 65535"
	case notAddress != nil && !wellFormed(strings.TrimSuffix(host, "."), alnum, alnum+"_.-", alnum):
		return u, "has no address and no DNS name in it"
	}
	return u, ""
}
