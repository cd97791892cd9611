package main

import (
	"context"
	"fmt"
	"net"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/wgcni/wgcni/test/cluster"
)

// dialEtcd connects to etcd from inside a machine, by its own links.
func dialEtcd(at cluster.Endpointer, e *cluster.Etcd) (*clientv3.Client, error) {
	dial := func(ctx context.Context, address string) (c net.Conn, err error) {
		err = at.Do(func() (err error) {
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
		return nil, fmt.Errorf("connect to etcd from %s: %w", at, err)
	}
	return c, nil
}

// etcdRevision grows by one with every change that etcd stores.
func etcdRevision(ctx context.Context, c *clientv3.Client) (int64, error) {
	answer, err := c.Get(ctx, "/", clientv3.WithCountOnly())
	if err != nil {
		return 0, fmt.Errorf("ask etcd for its revision: %w", err)
	}
	return answer.Header.Revision, nil
}
