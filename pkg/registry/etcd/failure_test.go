package etcd

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestExplain(t *testing.T) {
	plain := Config{Endpoints: []string{"http://192.0.2.1:2379"}, Username: "me", PasswordFile: "/p"}
	secure := Config{Endpoints: []string{"https://192.0.2.1:2379"}, CertFile: "/cert", KeyFile: "/key"}
	refused := status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial tcp 192.0.2.1:2379: connect: connection refused"`)
	stranger := status.Error(codes.Unavailable, `connection error: desc = "transport: authentication handshake failed: tls: failed to verify certificate: x509: certificate signed by unknown authority"`)
	for _, c := range []struct {
		cfg    Config
		err    error
		is     error
		costly bool
		want   string
	}{
		{
			plain, rpctypes.ErrNoSpace, rpctypes.ErrNoSpace, false,
			"registry etcd:http://192.0.2.1:2379/wgcni/ is out of space: free some with `etcdctl compact REVISION` and `etcdctl defrag --cluster`, then end the alarm with `etcdctl alarm disarm`",
		},
		{
			secure, rpctypes.ErrPermissionDenied, rpctypes.ErrPermissionDenied, true,
			"registry etcd:https://192.0.2.1:2379/wgcni/: the user that /cert names may not do this: grant it with `etcdctl role grant-permission ROLE readwrite /wgcni/ --prefix`",
		},
		{
			plain, rpctypes.ErrAuthFailed, rpctypes.ErrAuthFailed, true,
			`registry etcd:http://192.0.2.1:2379/wgcni/ refuses user "me": the name is wrong, or the password in /p`,
		},
		{
			plain, rpctypes.ErrInvalidAuthToken, rpctypes.ErrInvalidAuthToken, true,
			"registry etcd:http://192.0.2.1:2379/wgcni/ asks for a user: set username and passwordFile, or a client certificate that names one",
		},
		{
			plain, rpctypes.ErrNoLeader, rpctypes.ErrNoLeader, false,
			"registry etcd:http://192.0.2.1:2379/wgcni/ has no leader: more than half of its members must run and reach each other",
		},
		{
			plain, context.DeadlineExceeded, ErrUnreachable, false,
			"registry etcd:http://192.0.2.1:2379/wgcni/ is unreachable: no answer within 5s; see that it runs and is not overloaded",
		},
		{
			plain, status.Error(codes.Unavailable, `connection error: desc = "error reading server preface: raw-read tcp 192.0.2.9:1->192.0.2.1:2379: use of closed network connection"`), ErrUnreachable, false,
			"registry etcd:http://192.0.2.1:2379/wgcni/ is unreachable: no answer within 5s; see that it runs and is not overloaded",
		},
		{
			plain, refused, ErrUnreachable, false,
			"registry etcd:http://192.0.2.1:2379/wgcni/ is unreachable: dial tcp 192.0.2.1:2379: connect: connection refused; see that it runs, that this node can reach it and whether it wants https",
		},
		{
			secure, refused, ErrUnreachable, false,
			"registry etcd:https://192.0.2.1:2379/wgcni/ is unreachable: dial tcp 192.0.2.1:2379: connect: connection refused; see that it runs and that this node can reach it, and see caFile, certFile and keyFile",
		},
		{
			secure, stranger, ErrUnreachable, false,
			"registry etcd:https://192.0.2.1:2379/wgcni/ is unreachable: authentication handshake failed: tls: failed to verify certificate: x509: certificate signed by unknown authority; see the endpoints' https, caFile, certFile and keyFile",
		},
		{
			plain, rpctypes.ErrCorrupt, rpctypes.ErrCorrupt, false,
			"registry etcd:http://192.0.2.1:2379/wgcni/: corrupt cluster",
		},
	} {
		s := New(c.cfg)
		err := s.explain(c.err)
		if diff := cmp.Diff(c.want, err.Error()); diff != "" {
			t.Error(diff)
		}
		if f := (*failure)(nil); !errors.Is(err, c.is) || !errors.As(err, &f) || f.costly != c.costly {
			t.Errorf("%v: want it to be %v, and costly %v", err, c.is, c.costly)
		}
		if s.explain(err).Error() != err.Error() {
			t.Errorf("explained twice: %v", s.explain(err))
		}
		must(t, s.Close())
	}
}

// What differs from one time to the next makes no new cause.
func TestFailureKey(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"dial tcp 192.0.2.1:2379: connection refused", "dial tcp 192.0.2.2:2379: connection refused", true},
		{"dial tcp [2001:db8::1]:2379: connection refused", "dial tcp 192.0.2.2:2379: connection refused", true},
		{"read tcp 192.0.2.1:40001->192.0.2.9:2379: connection reset by peer", "read tcp 192.0.2.1:40002->192.0.2.9:2379: connection reset by peer", true},
		{"certificate has expired: current time 2026-03-01T12:00:00Z", "certificate has expired: current time 2026-03-01T12:00:09Z", true},
		{"dial tcp 192.0.2.1:2379: connection refused", "dial tcp 192.0.2.1:2379: no route to host", false},
		{"dial tcp 192.0.2.1:2379: connection refused", "no answer within 5s", false},
	} {
		if same := fail(c.a).key == fail(c.b).key; same != c.same {
			t.Errorf("%q and %q: one cause %v, want %v", c.a, c.b, same, c.same)
		}
	}
}
