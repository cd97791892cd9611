package etcdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// patience is how long a server may take to start, to end or to answer; reached
// only by one that fails.
const patience = 30 * time.Second

// Server is one etcd server. After Stop or Kill it can be started again, at the
// same addresses. Its methods may not be called at the same time.
type Server struct {
	o    Options
	dir  string // all that it writes
	name string
	// tick in milliseconds; an election takes ten of them or more.
	tick int

	clientURL, peerURL, metricsURL string
	peers                          string // names and URLs of all members
	certFile, keyFile              string // with Options.CA

	process *process // nil when it does not run

	rootPassword string // once there is a root user
}

// process is a running etcd.
type process struct {
	*os.Process
	ended chan struct{} // closed when it has ended and has been waited for
}

func newServer(name string, clustered bool, o Options) (*Server, error) {
	if o.Host == "" {
		o.Host = "127.0.0.1"
	}
	if o.In == nil {
		o.In = func(f func() error) error { return f() }
	}
	dir, err := os.MkdirTemp("", "wgcni-etcd-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for etcd: %w", err)
	}
	s := &Server{o: o, dir: dir, name: name, tick: 10}
	if clustered { // whose members must not think each other dead on a busy machine
		s.tick = 100
	}
	scheme := "http"
	if o.CA != nil {
		scheme = "https"
		if s.certFile, s.keyFile, err = o.CA.Issue(name, o.Host); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	for _, url := range []*string{&s.clientURL, &s.peerURL, &s.metricsURL} {
		port, err := s.freePort()
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		*url = scheme + "://" + net.JoinHostPort(o.Host, port)
		scheme = "http"
	}
	return s, nil
}

// freePort returns a port below those that the kernel gives to clients
// (net.ipv4.ip_local_port_range), which could take it while the server is down.
func (s *Server) freePort() (string, error) {
	var errs error
	for range 100 {
		port := strconv.Itoa(20000 + rand.IntN(12000))
		err := s.o.In(func() error {
			l, err := net.Listen("tcp", net.JoinHostPort(s.o.Host, port))
			if err != nil {
				return err
			}
			return l.Close()
		})
		if err == nil {
			return port, nil
		}
		errs = err
	}
	return "", fmt.Errorf("find a free port: %w", errs)
}

// Endpoints are where clients find it.
func (s *Server) Endpoints() []string { return []string{s.clientURL} }

func (s *Server) dataDir() string { return filepath.Join(s.dir, "data") }
func (s *Server) logFile() string { return filepath.Join(s.dir, "log") }

func (s *Server) args() []string {
	args := []string{
		"--name", s.name, "--data-dir", s.dataDir(),
		"--listen-client-urls", s.clientURL, "--advertise-client-urls", s.clientURL,
		"--listen-peer-urls", s.peerURL, "--initial-advertise-peer-urls", s.peerURL,
		"--initial-cluster", s.peers, "--listen-metrics-urls", s.metricsURL,
		"--heartbeat-interval", strconv.Itoa(s.tick), "--election-timeout", strconv.Itoa(10 * s.tick),
		"--log-level", "warn", "--unsafe-no-fsync",
	}
	if s.o.CA != nil {
		args = append(args, "--cert-file", s.certFile, "--key-file", s.keyFile)
		if s.o.ClientCerts {
			args = append(args, "--client-cert-auth", "--trusted-ca-file", s.o.CA.File)
		}
	}
	if s.o.QuotaBytes != 0 {
		args = append(args, "--quota-backend-bytes", strconv.FormatInt(s.o.QuotaBytes, 10))
	}
	return append(args, s.o.Args...)
}

// start begins the process, without waiting for it.
func (s *Server) start() error {
	path, err := Binary("etcd")
	if err != nil {
		return err
	}
	log, err := os.OpenFile(s.logFile(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(path, s.args()...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &process{ended: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		defer close(p.ended)
		// The death signal comes when the thread ends that made the process
		// (prctl(2), PR_SET_PDEATHSIG), so it is kept.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := s.o.In(func() error {
			err := cmd.Start()
			p.Process = cmd.Process
			started <- err
			if err == nil {
				_ = cmd.Wait() // how it ended is in its log
			}
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	s.process = p
	return nil
}

// Await waits until the server is ready: of a cluster, until it has a leader.
func (s *Server) Await(ctx context.Context) error { return s.await(ctx, "readyz") }

// await waits until the server's health check of that name succeeds.
func (s *Server) await(ctx context.Context, check string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			return s.dial(ctx, address)
		},
	}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.metricsURL+"/"+check, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			err = errors.New(resp.Status)
		}
		select {
		case <-s.process.ended:
			return fmt.Errorf("etcd %s ended at once:\n%s", s.name, s.log())
		case <-ctx.Done():
			return fmt.Errorf("etcd %s is not well within %v (%s: %w):\n%s", s.name, patience, check, err, s.log())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// log returns the last of what the server has said.
func (s *Server) log() string {
	text, err := os.ReadFile(s.logFile())
	if err != nil {
		return err.Error()
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-10):], nil))
}

func (s *Server) dial(ctx context.Context, address string) (conn net.Conn, err error) {
	return conn, s.o.In(func() error {
		// Of one IP address the dialer makes the socket on this thread.
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", strings.TrimPrefix(address, "//"))
		return err
	})
}

// PID returns the process id, or 0 if it does not run.
func (s *Server) PID() int {
	if s.process == nil {
		return 0
	}
	return s.process.Pid
}

// Stop ends the server as an operator does, by SIGTERM.
func (s *Server) Stop() error { return s.end(syscall.SIGTERM) }

// Kill ends the server as a power cut does, by SIGKILL.
func (s *Server) Kill() error { return s.end(syscall.SIGKILL) }

func (s *Server) end(signal syscall.Signal) error {
	if s.process == nil {
		return nil
	}
	if err := s.process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end etcd %s: %w", s.name, err)
	}
	select {
	case <-s.process.ended:
	case <-time.After(patience):
		return fmt.Errorf("etcd %s has not ended within %v of %v", s.name, patience, signal)
	}
	s.process = nil
	return nil
}

// Restart starts the server, after it was stopped if it runs, and waits until it
// lives. A single server then is ready; for a member of a cluster see Await.
func (s *Server) Restart(ctx context.Context) error {
	if err := s.Stop(); err != nil {
		return err
	}
	if err := s.start(); err != nil {
		return err
	}
	if strings.Contains(s.peers, ",") {
		return s.await(ctx, "livez")
	}
	return s.Await(ctx)
}

// Wipe replaces the server, which must not be one of several, by an empty one.
func (s *Server) Wipe(ctx context.Context) error {
	if err := s.Kill(); err != nil {
		return err
	}
	if err := os.RemoveAll(s.dataDir()); err != nil {
		return fmt.Errorf("wipe etcd: %w", err)
	}
	s.rootPassword = ""
	return s.Restart(ctx)
}

// Pause makes the server silent, though its connections stay, by SIGSTOP.
func (s *Server) Pause() error { return s.process.Signal(syscall.SIGSTOP) }

// Resume ends a Pause.
func (s *Server) Resume() error { return s.process.Signal(syscall.SIGCONT) }

// Close kills the server and removes its files.
func (s *Server) Close() error { return errors.Join(s.Kill(), os.RemoveAll(s.dir)) }

// Snapshot writes a backup into a file.
func (s *Server) Snapshot(ctx context.Context, path string) error {
	c, err := s.NewClient()
	if err != nil {
		return err
	}
	defer c.Close()
	from, err := c.Snapshot(ctx)
	if err != nil {
		return fmt.Errorf("back up etcd: %w", err)
	}
	defer from.Close()
	to, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("back up etcd: %w", err)
	}
	if _, err = io.Copy(to, from); err != nil {
		err = fmt.Errorf("back up etcd: %w", err)
	}
	return errors.Join(err, to.Close())
}

// Restore replaces the server, which must not be one of several, by one with the
// content of a backup.
func (s *Server) Restore(ctx context.Context, path string, args ...string) error {
	etcdutl, err := Binary("etcdutl")
	if err != nil {
		return err
	}
	if err := errors.Join(s.Kill(), os.RemoveAll(s.dataDir())); err != nil {
		return err
	}
	args = append([]string{
		"snapshot", "restore", path, "--data-dir", s.dataDir(), "--name", s.name,
		"--initial-cluster", s.peers, "--initial-advertise-peer-urls", s.peerURL,
	}, args...)
	if out, err := exec.CommandContext(ctx, etcdutl, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("restore etcd: %w:\n%s", err, out)
	}
	return s.Restart(ctx)
}

// EnableAuth makes a root user and refuses everybody who is no user.
func (s *Server) EnableAuth(ctx context.Context, rootPassword string) error {
	return s.administer(func(c *clientv3.Client) error {
		_, err1 := c.UserAdd(ctx, "root", rootPassword)
		_, err2 := c.UserGrantRole(ctx, "root", "root")
		_, err3 := c.AuthEnable(ctx)
		s.rootPassword = rootPassword
		return errors.Join(err1, err2, err3)
	})
}

// AddUser makes a user who may read, or also write, all keys with that prefix,
// and nothing else.
func (s *Server) AddUser(ctx context.Context, name, password, prefix string, write bool) error {
	may := clientv3.PermRead
	if write {
		may = clientv3.PermReadWrite
	}
	return s.administer(func(c *clientv3.Client) error {
		_, err1 := c.UserAdd(ctx, name, password)
		_, err2 := c.RoleAdd(ctx, name)
		_, err3 := c.RoleGrantPermission(ctx, name, prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(may))
		_, err4 := c.UserGrantRole(ctx, name, name)
		return errors.Join(err1, err2, err3, err4)
	})
}

// SetPassword changes a user's password, which ends that user's sessions.
func (s *Server) SetPassword(ctx context.Context, name, password string) error {
	return s.administer(func(c *clientv3.Client) error {
		_, err := c.UserChangePassword(ctx, name, password)
		return err
	})
}

func (s *Server) administer(do func(*clientv3.Client) error) error {
	c, err := s.NewClient()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := do(c); err != nil {
		return fmt.Errorf("administer etcd: %w", err)
	}
	return nil
}
