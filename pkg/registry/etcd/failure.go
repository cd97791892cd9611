package etcd

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrUnreachable means that no endpoint answers. Other errors of etcd's are
// those of go.etcd.io/etcd/api/v3/v3rpc/rpctypes, such as rpctypes.ErrNoSpace.
var ErrUnreachable = errors.New("unreachable")

var (
	errClosed    = errors.New("the handle was closed")
	errOversized = errors.New("too many bytes")
)

// failure is why etcd could not be asked: what a person reads, and behind it
// what errors.Is finds.
type failure struct {
	text   string
	causes []error
	// key is the same for all failures of one cause. Their texts may differ in
	// an address, a port or a time.
	key string
	// costly means that to ask again is dear to etcd, which compares passwords
	// by bcrypt, or to both; and that it will hardly help.
	costly bool
}

func (f *failure) Error() string   { return f.text }
func (f *failure) Unwrap() []error { return f.causes }

// varying is what a message may say differently each time: addresses with a
// port, and numbers.
var varying = regexp.MustCompile(`\S+:[0-9]+(->\S+:[0-9]+)?|[0-9]+`)

func fail(text string, causes ...error) *failure {
	return &failure{text: text, causes: causes, key: varying.ReplaceAllString(text, "")}
}

func costly(text string, cause error) *failure {
	f := fail(text, cause)
	f.costly = true
	return f
}

// explain says what an error of the client's means and how to mend it.
func (s *Store) explain(err error) error {
	if f := (*failure)(nil); errors.As(err, &f) {
		return err
	}
	name := "registry " + s.String()
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		// https://etcd.io/docs/v3.6/op-guide/maintenance/#space-quota
		return fail(name+" is out of space: free some with `etcdctl compact REVISION` and `etcdctl defrag --cluster`, then end the alarm with `etcdctl alarm disarm`", err)
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return costly(fmt.Sprintf("%s: %s may not do this: grant it with `etcdctl role grant-permission ROLE readwrite %s --prefix`",
			name, s.cfg.who(), s.cfg.Prefix), err)
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return costly(fmt.Sprintf("%s refuses %s: the name is wrong, or the password in %s", name, s.cfg.who(), s.cfg.PasswordFile), err)
	case unauthenticated(err):
		return costly(name+" asks for a user: set username and passwordFile, or a client certificate that names one", err)
	case errors.Is(err, rpctypes.ErrNoLeader):
		return fail(name+" has no leader: more than half of its members must run and reach each other", err)
	case errors.Is(err, rpctypes.ErrRequestTooLarge):
		return fail(name+": the entry is larger than what etcd takes (--max-request-bytes, 1.5 MiB by default): raise that, or make the entry smaller", err)
	case errors.Is(err, errOversized):
		return costly(fmt.Sprintf("%s holds more than %d MiB, which is the most that is read: forget old nodes, or find out who writes below %s", name, s.limit>>20, s.folder), err)
	case errors.Is(err, context.DeadlineExceeded), code(err) == codes.DeadlineExceeded, silent(err):
		// Not the caller's deadline, which is for interrupted.
		return fail(fmt.Sprintf("%s is unreachable: no answer within %v; see that it runs and is not overloaded", name, s.timeout), ErrUnreachable)
	case code(err) == codes.Unavailable:
		what, mend := message(err), "see that it runs, that this node can reach it and whether it wants https"
		if strings.Contains(what, "tls: ") || strings.Contains(what, "x509: ") {
			mend = "see the endpoints' https, caFile, certFile and keyFile"
		} else if s.cfg.encrypted() { // who refuses our certificate may just hang up
			mend = "see that it runs and that this node can reach it, and see caFile, certFile and keyFile"
		}
		return fail(fmt.Sprintf("%s is unreachable: %s; %s", name, what, mend), ErrUnreachable, err)
	default:
		return fail(fmt.Sprintf("%s: %s", name, message(err)), err)
	}
}

// silent is true of a connection that was taken, and given up before etcd said its
// first word on it. gRPC's own patience may end a moment before ours.
func silent(err error) bool {
	what := message(err)
	return code(err) == codes.Unavailable && strings.Contains(what, "error reading server preface") &&
		(strings.Contains(what, "use of closed network connection") || strings.Contains(what, "i/o timeout"))
}

// interrupted is explain for a call whose ctx ended, and says what it was
// waiting for.
func (s *Store) interrupted(ended, last error) error {
	text, causes := fmt.Sprintf("registry %s: %v", s, ended), []error{ended}
	if !errors.Is(last, context.Canceled) && !errors.Is(last, context.DeadlineExceeded) && code(last) != codes.Canceled {
		text, causes = text+" while it failed with: "+message(last), append(causes, last)
	}
	return fail(text, causes...)
}

// who is the user as whom etcd takes this client.
func (c Config) who() string {
	switch {
	case c.Username != "":
		return "user " + strconv.Quote(c.Username)
	case c.CertFile != "":
		return "the user that " + c.CertFile + " names"
	default:
		return "a client without a user"
	}
}

// message strips gRPC's wrapping off an error's text, such as
//
//	connection error: desc = "transport: Error while dialing: dial tcp 192.0.2.1:2379: connect: connection refused"
func message(err error) string {
	text := err.Error()
	if st, ok := status.FromError(err); ok {
		text = st.Message()
	}
	if _, quoted, found := strings.Cut(text, "desc = "); found {
		if inner, err := strconv.Unquote(quoted); err == nil {
			text = inner
		}
	}
	for _, noise := range []string{"transport: ", "Error while dialing: ", "etcdserver: "} {
		text = strings.TrimPrefix(text, noise)
	}
	return text
}
