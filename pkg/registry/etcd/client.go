package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/wgcni/wgcni/pkg/identity"
)

// connection is a client that is there or on its way.
type connection struct {
	ready  chan struct{} // closed once one of the others is set
	client *clientv3.Client
	err    error
}

// connect returns the connection that all calls share, and makes it if there is
// none. Making one may take the timeout, for with a username the client asks for
// a token before it exists; who waits for it waits no longer than ctx.
func (s *Store) connect(ctx context.Context) (*connection, error) {
	s.mu.Lock()
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return nil, errClosed
	}
	c := s.conn
	if c == nil {
		c = &connection{ready: make(chan struct{})}
		s.conn = c
		s.dialing.Go(func() {
			defer close(c.ready)
			if c.client, c.err = s.dial(); c.err != nil {
				s.drop(c)
			}
		})
	}
	s.mu.Unlock()
	select {
	case <-c.ready:
		return c, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// drop makes the next call connect anew. What others have underway on c ends
// with codes.Canceled, and they try again.
func (s *Store) drop(c *connection) {
	s.mu.Lock()
	current := s.conn == c
	if current {
		s.conn = nil
	}
	s.mu.Unlock()
	if current && c.client != nil {
		_ = c.client.Close() // it is of no use anyhow
	}
}

func (s *Store) dropped(c *connection) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn != c
}

// dial makes a client of the configuration and the files as they are now.
func (s *Store) dial() (*clientv3.Client, error) {
	if err := s.cfg.check(); err != nil {
		return nil, err
	}
	secure, err := s.cfg.tls()
	if err != nil {
		return nil, err
	}
	password, err := s.cfg.password()
	if err != nil {
		return nil, err
	}
	slow := backoff.DefaultConfig
	slow.MaxDelay = 30 * time.Second // to a dead member while others live
	return clientv3.New(clientv3.Config{
		Endpoints:   s.cfg.Endpoints,
		TLS:         secure,
		Username:    s.cfg.Username,
		Password:    password,
		Context:     s.ctx,
		DialTimeout: s.timeout,
		// A peer that went silent is noticed while a stream is open. gRPC pings no
		// more often than this, and etcd throws out who does so below 5 s
		// (--grpc-keepalive-min-time) or without a stream.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		MaxCallRecvMsgSize:   s.limit,
		MaxCallSendMsgSize:   min(s.limit, 2<<20), // the client's default
		// Trying again is ask's, except once with a new token.
		MaxUnaryRetries: 2,
		Logger:          zap.NewNop(), // a library is silent
		DialOptions: append([]grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: slow, MinConnectTimeout: s.timeout}),
			grpc.WithChainUnaryInterceptor(failFast),
		}, s.options...),
	})
}

// failFast makes a request fail once no endpoint can be connected to, and say
// why. The client's default is to wait until ctx ends, which tells nothing.
func failFast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoker(ctx, method, req, reply, cc, append(opts, grpc.WaitForReady(false))...)
}

// check returns what is wrong with a configuration, before anything is sent.
func (c Config) check() error {
	if len(c.Endpoints) == 0 {
		return errors.New("endpoints: none; want etcd's, such as https://192.0.2.1:2379")
	}
	https := 0
	for _, e := range c.Endpoints {
		scheme, _, _ := strings.Cut(e, "://")
		if strings.Contains(e, "@") {
			return errors.New("endpoints: one has a user before an @; want username and passwordFile instead")
		}
		if scheme == "https" || scheme == "unixs" {
			https++
		}
		// The client would take a plain endpoint at its word, and send the
		// password unencrypted.
		if (scheme == "http" || scheme == "unix") && (c.CAFile != "" || c.CertFile != "") {
			return fmt.Errorf("endpoint %s is not encrypted, although there is a caFile or a certFile; want https", e)
		}
	}
	if https != 0 && https != len(c.Endpoints) { // the client goes by the first
		return errors.New("endpoints: some are encrypted and some are not; want https for all or for none")
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		return errors.New("certFile and keyFile: one without the other; want both or none")
	}
	if (c.Username == "") != (c.PasswordFile == "") {
		return errors.New("username and passwordFile: one without the other; want both or none")
	}
	return nil
}

func (c Config) encrypted() bool {
	return c.CAFile != "" || c.CertFile != "" || len(c.Endpoints) > 0 && strings.HasPrefix(c.Endpoints[0], "https:")
}

// tls returns nil where no file is named. The client's certificate is read again
// at each handshake (transport.TLSInfo), the CA is not.
func (c Config) tls() (*tls.Config, error) {
	if c.CAFile == "" && c.CertFile == "" {
		return nil, nil
	}
	if c.KeyFile != "" {
		if _, err := identity.ReadSecretFile(c.KeyFile, maxSecretFile); err != nil {
			return nil, fmt.Errorf("keyFile: %w", err)
		}
	}
	secure, err := transport.TLSInfo{CertFile: c.CertFile, KeyFile: c.KeyFile, TrustedCAFile: c.CAFile}.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("caFile, certFile or keyFile: %w", err)
	}
	if c.CAFile != "" && secure.RootCAs.Equal(x509.NewCertPool()) {
		return nil, fmt.Errorf("caFile: %s holds no certificate; want some in PEM form", c.CAFile)
	}
	return secure, nil
}

// maxSecretFile bounds a key or a password, in bytes.
const maxSecretFile = 64 << 10

func (c Config) password() (string, error) {
	if c.PasswordFile == "" {
		return "", nil
	}
	text, err := identity.ReadSecretFile(c.PasswordFile, maxSecretFile)
	if err != nil {
		return "", fmt.Errorf("passwordFile: %w", err)
	}
	password := strings.TrimRight(string(text), "\r\n")
	if password == "" { // the client would go without a user
		return "", fmt.Errorf("passwordFile: %s is empty; want the password of user %s", c.PasswordFile, c.Username)
	}
	return password, nil
}

// request is one round trip to etcd, or some. It may be called again.
type request func(ctx context.Context, c *clientv3.Client) error

// ask sends a request, again and again while that may help, for as long as the
// timeout lasts. An etcd that restarts or elects a leader is no failure yet.
func (s *Store) ask(ctx context.Context, r request) error {
	patient, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	// Of several members one that is silent must not use up the time of all.
	each := s.timeout
	if len(s.cfg.Endpoints) > 1 {
		each /= 2
	}
	last := context.DeadlineExceeded
	for pause := 50 * time.Millisecond; patient.Err() == nil; pause = min(2*pause, time.Second) {
		err := s.askOnce(patient, each, r)
		if err == nil {
			return nil
		}
		if !errors.Is(err, context.DeadlineExceeded) { // which would tell less than what came before
			last = err
		}
		if !transient(err) {
			break
		}
		sleep(patient, jitter(pause, 0.5))
	}
	if ctx.Err() != nil {
		return s.interrupted(ctx.Err(), last)
	}
	return s.explain(last)
}

// askOnce sends a request once, except that it is sent again where the password
// may have been changed since the connection was made.
func (s *Store) askOnce(ctx context.Context, limit time.Duration, r request) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return s.attempt(ctx, r)
}

func (s *Store) attempt(ctx context.Context, r request) error {
	for again := true; ; {
		c, err := s.connect(ctx)
		if err != nil {
			return err
		}
		// A member without a leader says so at once instead of being silent.
		err = r(clientv3.WithRequireLeader(ctx), c.client)
		switch {
		case err == nil:
			return nil
		case unauthenticated(err):
			s.drop(c)
			if !again {
				return err
			}
			again = false
		case code(err) == codes.Canceled && ctx.Err() == nil && s.dropped(c): // by somebody else
		case c.client.ActiveConnection().GetState() == connectivity.TransientFailure:
			// No endpoint is left: nobody loses by a new connection, which reads the
			// files again and waits for nobody's back-off but ours.
			s.drop(c)
			return err
		default:
			return err
		}
	}
}

// unauthenticated reports whether a new password or token could help.
func unauthenticated(err error) bool {
	return errors.Is(err, rpctypes.ErrAuthFailed) || errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrUserEmpty)
}

// transient reports whether the same request may well succeed a moment later.
func transient(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, rpctypes.ErrAuthOldRevision) {
		return true
	}
	switch code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	default:
		return false
	}
}

// code is that of an error of etcd's or gRPC's, else codes.Unknown.
func code(err error) codes.Code {
	if e := (rpctypes.EtcdError{}); errors.As(err, &e) {
		return e.Code()
	}
	return status.Code(err)
}

// overlong reports whether a message was larger than gRPC may send or receive, at
// either end.
func overlong(err error) bool {
	return code(err) == codes.ResourceExhausted && !errors.As(err, new(rpctypes.EtcdError))
}

// jitter returns d give or take that share of it, so that the nodes of a mesh do
// not all come at once.
func jitter(d time.Duration, share float64) time.Duration {
	return time.Duration(float64(d) * (1 + share*(2*rand.Float64()-1)))
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
