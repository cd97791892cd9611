// Package etcdtest runs real etcd servers, for tests and benchmarks. The
// programs are those of test/etcd/go.mod, which `make tools` builds into .bin.
package etcdtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// Options describe a server. The zero value is one that anybody on this machine
// may use, unencrypted.
type Options struct {
	Host        string   // optional: the address that it listens on; 127.0.0.1 by default
	CA          *CA      // optional: for https, with a certificate of this CA
	ClientCerts bool     // refuses clients that have no certificate of CA
	QuotaBytes  int64    // optional: the size of its database above which it is out of space
	Args        []string // optional: more flags

	// In is optional. All that the server and its clients do in the network goes
	// through it, on the thread that it calls its argument on: for servers in a
	// network namespace, such as cluster.Machine.Do. The server lives no longer
	// than that thread.
	In func(func() error) error
}

// Binary returns the path of a program that `make tools` builds.
func Binary(name string) (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the repository: %w", err)
	}
	for root := dir; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			path := filepath.Join(root, ".bin", name)
			if _, err := os.Stat(path); err != nil {
				return "", fmt.Errorf("%s is missing: run \"make tools\"", path)
			}
			return path, nil
		}
		if root == filepath.Dir(root) {
			return "", fmt.Errorf("find the repository: no go.mod in %s or above", dir)
		}
	}
}

// Cluster is some servers with one content.
type Cluster struct{ Members []*Server }

// Run starts a server and waits until it is ready.
func Run(ctx context.Context, o Options) (*Server, error) {
	c, err := RunCluster(ctx, 1, o)
	if err != nil {
		return nil, err
	}
	return c.Members[0], nil
}

// RunCluster starts a cluster of n servers and waits until all are ready.
func RunCluster(ctx context.Context, n int, o Options) (*Cluster, error) {
	for {
		c, err := runCluster(ctx, n, o)
		// Somebody else was quicker to take a port that was free when we chose it.
		if err == nil || !strings.Contains(err.Error(), "address already in use") {
			return c, err
		}
	}
}

func runCluster(ctx context.Context, n int, o Options) (*Cluster, error) {
	c := &Cluster{}
	var peers []string
	for i := range n {
		s, err := newServer(fmt.Sprintf("etcd-%d", i), n > 1, o)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.Members = append(c.Members, s)
		peers = append(peers, s.name+"="+s.peerURL)
	}
	for _, s := range c.Members {
		s.peers = strings.Join(peers, ",")
		if err := s.start(); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	for _, s := range c.Members {
		if err := s.Await(ctx); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	return c, nil
}

// Endpoints are the URLs of all members.
func (c *Cluster) Endpoints() []string {
	var all []string
	for _, s := range c.Members {
		all = append(all, s.Endpoints()...)
	}
	return all
}

// Close kills all members and removes their files.
func (c *Cluster) Close() error {
	var errs []error
	for _, s := range c.Members {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// Start is [Run] for a test, at whose end the server is gone.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("end etcd: %v", err)
		}
	})
	return s
}

// StartCluster is [RunCluster] for a test, at whose end the servers are gone.
func StartCluster(t testing.TB, n int, o Options) *Cluster {
	t.Helper()
	c, err := RunCluster(t.Context(), n, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("end etcd: %v", err)
		}
	})
	return c
}

// Client returns a client that may do everything, which is closed at the test's
// end.
func (s *Server) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	c, err := s.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// NewClient returns a client that may do everything.
func (s *Server) NewClient() (*clientv3.Client, error) {
	cfg := clientv3.Config{
		Endpoints: s.Endpoints(), Logger: zap.NewNop(), DialTimeout: patience,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(s.dial)},
	}
	if s.rootPassword != "" {
		cfg.Username, cfg.Password = "root", s.rootPassword
	}
	if s.o.CA != nil {
		secure, err := s.o.CA.client()
		if err != nil {
			return nil, err
		}
		cfg.TLS = secure
	}
	c, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", s.clientURL, err)
	}
	return c, nil
}
