// Package etcd keeps a registry in etcd.
package etcd

import (
	_ "go.etcd.io/etcd/api/v3/mvccpb"
	_ "go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	_ "go.etcd.io/etcd/client/pkg/v3/transport"
	_ "go.etcd.io/etcd/client/v3"
	_ "go.uber.org/zap"
	_ "google.golang.org/grpc"
)
