package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// EtcdOptions describe an etcd. The zero value is one member that anybody may
// use, unencrypted.
type EtcdOptions struct {
	Members int      // optional: how many; 1 by default
	Flags   []string // optional: more of etcd's own, for every member
	Node    *Node    // optional: where it runs; the underlay's machine by default
	// CAFile, CertFile and KeyFile are optional, all or none. With them clients
	// must come by TLS, and show a certificate of this CA as each member does.
	CAFile, CertFile, KeyFile string
}

// Etcd is a real etcd on the underlay: every node reaches it at the gateway's
// address, or at that of the node where it runs. With the node's machine it ends,
// and is to be killed and started again.
type Etcd struct {
	Members []*EtcdMember

	cluster *Cluster
	options EtcdOptions
	root    string // the password of its user root; empty without authentication
	era     int    // grows when its data are given up, so that members of before are strangers
}

// EtcdMember is one server process. While it is stopped Process is nil.
type EtcdMember struct {
	*Process

	etcd   *Etcd
	index  int
	client netip.AddrPort
	peer   netip.AddrPort
}

// StartEtcd starts an etcd and waits until it is healthy. It ends with the cluster.
func (c *Cluster) StartEtcd(ctx context.Context, o EtcdOptions) (*Etcd, error) {
	e := &Etcd{cluster: c, options: o}
	address := Gateway4
	if o.Node != nil {
		address = o.Node.IPv4
	}
	for i := range max(o.Members, 1) {
		e.Members = append(e.Members, &EtcdMember{
			etcd: e, index: i,
			client: netip.AddrPortFrom(address, uint16(2379+2*i)),
			peer:   netip.AddrPortFrom(address, uint16(2380+2*i)),
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

// Wipe gives up all that a killed etcd has stored, its users as well.
func (e *Etcd) Wipe() error {
	e.era++
	e.root = ""
	return os.RemoveAll(e.folder())
}

// Backup writes what is stored to a file, as `etcdctl snapshot save` does.
func (e *Etcd) Backup(ctx context.Context, file string) error {
	_, err := output(e.ctl(ctx, "", e.Endpoints()[:1], "snapshot", "save", file))
	return err
}

// Restore gives a killed etcd what a backup holds, as `etcdutl snapshot restore`
// does. The backup must be of a time when authentication was on, or off, as now.
func (e *Etcd) Restore(ctx context.Context, file string) error {
	root := e.root
	if err := e.Wipe(); err != nil {
		return err
	}
	e.root = root
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

// Registry is the "registry" of a stanza that uses this etcd, with more of its
// keys if there are any.
func (e *Etcd) Registry(more map[string]any) map[string]any {
	r := map[string]any{"type": "etcd", "endpoints": e.Endpoints()}
	maps.Copy(r, more)
	return r
}

// EnableAuth makes etcd ask everybody for a user. From then on [Etcd.Ctl] is root.
func (e *Etcd) EnableAuth(ctx context.Context) error {
	const password = "root's password"
	for _, args := range [][]string{{"user", "add", "root:" + password}, {"user", "grant-role", "root", "root"}, {"auth", "enable"}} {
		if _, err := e.Ctl(ctx, args...); err != nil {
			return err
		}
	}
	e.root = password
	return nil
}

// AddUser adds a user that may do nothing until [Etcd.Grant].
func (e *Etcd) AddUser(ctx context.Context, name, password string) error {
	for _, args := range [][]string{{"user", "add", name + ":" + password}, {"role", "add", name}, {"user", "grant-role", name, name}} {
		if _, err := e.Ctl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// Grant lets a user read or readwrite the keys with a prefix. It takes the
// place of what the user was allowed to do with the same prefix.
func (e *Etcd) Grant(ctx context.Context, user, permission, prefix string) error {
	_, err := e.Ctl(ctx, "role", "grant-permission", user, permission, prefix, "--prefix")
	return err
}

// Fill writes until etcd is out of space, which is soon with a small
// --quota-backend-bytes. Other writers are then refused as well.
func (e *Etcd) Fill(ctx context.Context) error {
	value := strings.Repeat("x", 1<<20)
	for i := 0; ; i++ {
		_, err := output(e.ctl(ctx, value, e.Endpoints(), "put", fillPrefix+strconv.Itoa(i)))
		if err != nil && strings.Contains(err.Error(), "database space exceeded") {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Free undoes Fill, by what etcd's manual tells to do:
// https://etcd.io/docs/v3.6/op-guide/maintenance/#space-quota
func (e *Etcd) Free(ctx context.Context) error {
	out, err := e.Ctl(ctx, "del", fillPrefix, "--prefix", "--write-out", "json")
	if err != nil {
		return err
	}
	var deleted struct{ Header struct{ Revision int64 } }
	if err := json.Unmarshal([]byte(out), &deleted); err != nil {
		return fmt.Errorf("etcdctl printed %s: %w", out, err)
	}
	for _, args := range [][]string{{"compact", strconv.FormatInt(deleted.Header.Revision, 10), "--physical"}, {"defrag"}, {"alarm", "disarm"}} {
		if _, err := e.Ctl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

const fillPrefix = "/fill/"

// Ctl runs etcdctl against all members, as somebody who may do everything, and
// returns what it printed.
func (e *Etcd) Ctl(ctx context.Context, args ...string) (string, error) {
	return output(e.ctl(ctx, "", e.Endpoints(), args...))
}

func (e *Etcd) ctl(ctx context.Context, stdin string, endpoints []string, args ...string) *exec.Cmd {
	flags := []string{"--endpoints", strings.Join(endpoints, ","), "--dial-timeout", "2s", "--command-timeout", "5s"}
	if o := e.options; o.CAFile != "" {
		flags = append(flags, "--cacert", o.CAFile, "--cert", o.CertFile, "--key", o.KeyFile)
	}
	if e.root != "" {
		flags = append(flags, "--user", "root", "--password", e.root)
	}
	cmd := e.cluster.Underlay.Command(ctx, filepath.Join(e.cluster.BinDir, "etcdctl"), append(flags, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	return cmd
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
			_, err := output(e.ctl(ctx, "", []string{m.URL()}, "get", "health"))
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (e *Etcd) machine() *Machine {
	if e.options.Node != nil {
		return e.options.Node.Machine
	}
	return e.cluster.Underlay
}

func (e *Etcd) binary() string { return filepath.Join(e.cluster.BinDir, "etcd") }

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
func (m *EtcdMember) URL() string {
	if m.etcd.options.CAFile != "" {
		return "https://" + m.client.String()
	}
	return "http://" + m.client.String()
}

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
	}, e.options.Flags...)
	if o := e.options; o.CAFile != "" {
		args = append(args, "--client-cert-auth", "--trusted-ca-file", o.CAFile, "--cert-file", o.CertFile, "--key-file", o.KeyFile)
	}
	// A shell is between nsenter and etcd, since nsenter stops itself when its child
	// is paused (util-linux, sys-utils/nsenter.c, continue_as_child). It then reaps
	// nobody, and the machine could not end.
	m.Process, err = e.machine().Start("sh", append([]string{"-c", `"$@" & wait`, "sh", e.binary()}, args...)...)
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

// Pause stops the member where it is, as a disk that hangs does.
func (m *EtcdMember) Pause() error { return m.signalServer(unix.SIGSTOP) }

// Resume lets a paused member go on.
func (m *EtcdMember) Resume() error { return m.signalServer(unix.SIGCONT) }

func (m *EtcdMember) signalServer(sig unix.Signal) error {
	found, err := m.etcd.machine().FindProcesses("--name " + m.name())
	if err != nil {
		return err
	}
	for _, p := range found {
		if p.Args[0] != m.etcd.binary() { // the shell
			continue
		}
		if err := unix.Kill(p.HostPID, sig); err != nil {
			return fmt.Errorf("send %v to etcd member %s: %w", sig, m.URL(), err)
		}
		return nil
	}
	return fmt.Errorf("send %v to etcd member %s: %w", sig, m.URL(), os.ErrProcessDone)
}
