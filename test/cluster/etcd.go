package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Etcd is a real etcd, of one member or several, on the underlay: every node
// reaches it at the gateway's address.
type Etcd struct {
	Members []*EtcdMember

	cluster *Cluster
	flags   []string
	era     int // grows when its data are given up, so that members of before are strangers
}

// EtcdMember is one server process. While it is stopped Process is nil.
type EtcdMember struct {
	*Process

	etcd   *Etcd
	index  int
	client netip.AddrPort
	peer   netip.AddrPort
}

// StartEtcd starts an etcd and waits until it is healthy. The flags are etcd's,
// and given to every member. It ends with the cluster.
func (c *Cluster) StartEtcd(ctx context.Context, members int, flags ...string) (*Etcd, error) {
	e := &Etcd{cluster: c, flags: flags}
	for i := range members {
		e.Members = append(e.Members, &EtcdMember{
			etcd: e, index: i,
			client: netip.AddrPortFrom(Gateway4, uint16(2379+2*i)),
			peer:   netip.AddrPortFrom(Gateway4, uint16(2380+2*i)),
		})
	}
	return e, e.Start(ctx)
}

// Start starts all members that are stopped and waits until etcd is healthy.
func (e *Etcd) Start(ctx context.Context) error {
	for _, m := range e.Members {
		if err := m.Start(); err != nil {
			return err
		}
	}
	return e.AwaitHealthy(ctx)
}

// Kill ends all members with SIGKILL.
func (e *Etcd) Kill() error {
	var errs []error
	for _, m := range e.Members {
		errs = append(errs, m.Kill())
	}
	return errors.Join(errs...)
}

// Wipe gives up all that a killed etcd has stored.
func (e *Etcd) Wipe() error {
	e.era++
	return os.RemoveAll(e.folder())
}

// Backup writes what is stored to a file, as `etcdctl snapshot save` does.
func (e *Etcd) Backup(ctx context.Context, file string) error {
	_, err := e.ctl(ctx, e.Members[0].URL(), "snapshot", "save", file)
	return err
}

// Restore gives a killed etcd what a backup holds, as `etcdutl snapshot restore` does.
func (e *Etcd) Restore(ctx context.Context, file string) error {
	if err := e.Wipe(); err != nil {
		return err
	}
	for _, m := range e.Members {
		_, err := e.cluster.Underlay.Run(ctx, filepath.Join(e.cluster.BinDir, "etcdutl"), "snapshot", "restore", file,
			"--data-dir", m.folder(), "--name", m.name(), "--initial-cluster", e.initial(),
			"--initial-cluster-token", e.token(), "--initial-advertise-peer-urls", "http://"+m.peer.String())
		if err != nil {
			return err
		}
	}
	return nil
}

// Endpoints are the URLs of all members.
func (e *Etcd) Endpoints() (urls []string) {
	for _, m := range e.Members {
		urls = append(urls, m.URL())
	}
	return urls
}

// Registry is the "registry" of a stanza that uses this etcd.
func (e *Etcd) Registry() map[string]any {
	return map[string]any{"type": "etcd", "endpoints": e.Endpoints()}
}

// Ctl runs etcdctl against all members.
func (e *Etcd) Ctl(ctx context.Context, args ...string) (string, error) {
	return e.ctl(ctx, strings.Join(e.Endpoints(), ","), args...)
}

func (e *Etcd) ctl(ctx context.Context, endpoints string, args ...string) (string, error) {
	return e.cluster.Underlay.Run(ctx, filepath.Join(e.cluster.BinDir, "etcdctl"), append([]string{"--endpoints", endpoints, "--dial-timeout", "2s", "--command-timeout", "5s"}, args...)...)
}

// AwaitHealthy waits until every running member answers a linearizable read.
func (e *Etcd) AwaitHealthy(ctx context.Context) error {
	ctx, cancel := withDefaultTimeout(ctx, time.Minute)
	defer cancel()
	for _, m := range e.Members {
		if m.Process == nil {
			continue
		}
		err := Poll(ctx, "etcd member "+m.URL()+" to be healthy", func() error {
			select {
			case <-m.Done():
				return fmt.Errorf("etcd has ended:\n%s", m.Log)
			default:
			}
			_, err := e.ctl(ctx, m.URL(), "get", "health")
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (e *Etcd) folder() string { return filepath.Join(e.cluster.dir, "etcd") }

func (e *Etcd) token() string { return "wgcni-" + strconv.Itoa(e.era) }

func (e *Etcd) initial() string {
	var members []string
	for _, m := range e.Members {
		members = append(members, m.name()+"=http://"+m.peer.String())
	}
	return strings.Join(members, ",")
}

// URL is where clients reach the member.
func (m *EtcdMember) URL() string { return "http://" + m.client.String() }

func (m *EtcdMember) name() string { return "member-" + strconv.Itoa(m.index) }

func (m *EtcdMember) folder() string { return filepath.Join(m.etcd.folder(), m.name()) }

// Start starts the member if it is stopped.
func (m *EtcdMember) Start() (err error) {
	if m.Process != nil {
		return nil
	}
	e := m.etcd
	args := append([]string{
		"--name", m.name(), "--data-dir", m.folder(),
		"--listen-client-urls", m.URL(), "--advertise-client-urls", m.URL(),
		"--listen-peer-urls", "http://" + m.peer.String(), "--initial-advertise-peer-urls", "http://" + m.peer.String(),
		"--initial-cluster", e.initial(), "--initial-cluster-token", e.token(),
		"--log-level", "warn",
	}, e.flags...)
	m.Process, err = e.cluster.Underlay.Start(filepath.Join(e.cluster.BinDir, "etcd"), args...)
	return err
}

// Kill ends the member with SIGKILL. Its data stay.
func (m *EtcdMember) Kill() error {
	if m.Process == nil {
		return nil
	}
	err := m.Process.Kill()
	m.Process = nil
	return err
}

// Pause stops the member where it is, as a disk that hangs does. Resume lets it go on.
func (m *EtcdMember) Pause(ctx context.Context) error { return m.Signal(ctx, unix.SIGSTOP) }

// Resume lets a paused member go on.
func (m *EtcdMember) Resume(ctx context.Context) error { return m.Signal(ctx, unix.SIGCONT) }
