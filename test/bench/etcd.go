package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/wgcni/wgcni/test/cluster"
)

// dialEtcd connects to etcd from a node, by the same link as its wgcnid.
func dialEtcd(n *cluster.Node, e *cluster.Etcd) (*clientv3.Client, error) {
	dial := func(ctx context.Context, address string) (c net.Conn, err error) {
		err = n.Do(func() (err error) {
			c, err = new(net.Dialer).DialContext(ctx, "tcp", address)
			return err
		})
		return c, err
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: e.Endpoints(), Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(dial)},
	})
	if err != nil {
		return nil, fmt.Errorf("connect to etcd from %s: %w", n, err)
	}
	return c, nil
}

// etcdRevision is how many changes etcd has ever stored.
func etcdRevision(ctx context.Context, c *clientv3.Client) (int64, error) {
	answer, err := c.Get(ctx, "/", clientv3.WithCountOnly())
	if err != nil {
		return 0, fmt.Errorf("ask etcd for its revision: %w", err)
	}
	return answer.Header.Revision, nil
}

// findEtcd returns the process of an etcd of one member.
func findEtcd(c *cluster.Cluster) (pid int, err error) {
	found, err := c.Underlay.FindProcesses("etcd")
	for _, p := range found {
		if filepath.Base(p.Args[0]) == "etcd" { // and not nsenter
			return p.HostPID, nil
		}
	}
	return 0, errors.Join(err, errors.New("find etcd: no such process"))
}
